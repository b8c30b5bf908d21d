// bfloat16 as it is stored: the upper half of a float.
#pragma once

#include <cstdint>

namespace lcodec {

struct Bfloat16 {
  std::uint16_t bits;
};

}  // namespace lcodec
