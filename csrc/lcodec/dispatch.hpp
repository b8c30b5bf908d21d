// Which SIMD levels this binary holds and which of them this CPU can run.
#pragma once

#include <string>
#include <vector>

#include "lcodec/simd_level.hpp"

namespace lcodec {

// Names in rising order: "baseline", "avx2", "avx512".
std::vector<std::string> compiled_simd_levels();
std::vector<std::string> supported_simd_levels();

// The level of that name, or the highest supported one for "auto".
// Throws std::invalid_argument for an unknown name or a level that cannot run here.
SimdLevel resolve_simd_level(const std::string& name);

}  // namespace lcodec
