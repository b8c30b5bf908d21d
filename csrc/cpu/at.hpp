// Indices as containers of the standard library take them.
#pragma once

#include <cstddef>

namespace lcodec {

template <class I>
constexpr std::size_t at(I index) {
  return static_cast<std::size_t>(index);
}

}  // namespace lcodec
