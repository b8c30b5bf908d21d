#include "lcodec/dispatch.hpp"

#include <stdexcept>

#include "cpu/curvature_kernels.hpp"
#include "cpu/kernels.hpp"

namespace lcodec {
namespace {

bool cpu_has(SimdLevel level) {
#ifdef LCODEC_HAVE_X86_SIMD
  __builtin_cpu_init();
  switch (level) {
    case SimdLevel::baseline:
      return true;
    case SimdLevel::avx2:
      return __builtin_cpu_supports("avx2");
    case SimdLevel::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return level == SimdLevel::baseline;
#endif
}

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

}  // namespace

std::vector<std::string> compiled_simd_levels() {
#ifdef LCODEC_HAVE_X86_SIMD
  return {kNames[0], kNames[1], kNames[2]};
#else
  return {kNames[0]};
#endif
}

std::vector<std::string> supported_simd_levels() {
  std::vector<std::string> names;
  for (const auto level : {SimdLevel::baseline, SimdLevel::avx2, SimdLevel::avx512})
    if (cpu_has(level)) names.emplace_back(kNames[static_cast<int>(level)]);
  return names;
}

SimdLevel resolve_simd_level(const std::string& name) {
  const auto supported = supported_simd_levels();
  const std::string& wanted = name == "auto" ? supported.back() : name;
  std::string listed;
  for (const auto& level : supported) listed += ", " + level;
  for (int k = 0; k < 3; ++k) {
    if (wanted != kNames[k]) continue;
    if (cpu_has(static_cast<SimdLevel>(k))) return static_cast<SimdLevel>(k);
    throw std::invalid_argument("SIMD level '" + name + "' cannot run here; expected auto" +
                                listed);
  }
  throw std::invalid_argument("unknown SIMD level '" + name + "'; expected auto" + listed);
}

LevelKernels kernels_for([[maybe_unused]] SimdLevel level) {
#ifdef LCODEC_HAVE_X86_SIMD
  if (level == SimdLevel::avx512) return avx512_kernels();
  if (level == SimdLevel::avx2) return avx2_kernels();
#endif
  return baseline_kernels();
}

LevelCurvatureKernels curvature_kernels_for([[maybe_unused]] SimdLevel level) {
#ifdef LCODEC_HAVE_X86_SIMD
  if (level == SimdLevel::avx512) return avx512_curvature_kernels();
  if (level == SimdLevel::avx2) return avx2_curvature_kernels();
#endif
  return baseline_curvature_kernels();
}

}  // namespace lcodec
