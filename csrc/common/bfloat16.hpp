// bfloat16 as it is stored: the upper half of a float.
#pragma once

#include <cstdint>

#include "common/random.hpp"  // LCODEC_HOST_DEVICE

namespace lcodec {

struct Bfloat16 {
  std::uint16_t bits;
};

LCODEC_HOST_DEVICE static inline float widen(Bfloat16 value) {
  const std::uint32_t word = static_cast<std::uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &word, sizeof result);
  return result;
}

}  // namespace lcodec
