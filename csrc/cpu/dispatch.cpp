#include "lcodec/dispatch.hpp"

#include <stdexcept>

#include "cpu/curvature_kernels.hpp"
#include "cpu/instruments.hpp"
#include "cpu/kernels.hpp"
#include "cpu/lane_sort.hpp"
#include "cpu/screen_kernels.hpp"

namespace lcodec {
namespace {

// A SIMD level of this binary, in rising order: place and SimdLevel are the same number.
struct Level {
  const char* name;
  bool (*runs_here)();
  LevelKernels (*kernels)();
  LevelCurvatureKernels (*curvature_kernels)();
  LevelScreenKernels (*screen_kernels)();
  LaneSort (*lane_sort)();
};

constexpr Level kLevels[] = {
    {"baseline", [] { return true; }, baseline_kernels, baseline_curvature_kernels,
     baseline_screen_kernels, baseline_lane_sort},
#ifdef LCODEC_HAVE_X86_SIMD
    {"avx2",
     [] {
       __builtin_cpu_init();
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     },
     avx2_kernels, avx2_curvature_kernels, avx2_screen_kernels, avx2_lane_sort},
    {"avx512",
     [] {
       __builtin_cpu_init();
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     avx512_kernels, avx512_curvature_kernels, avx512_screen_kernels, avx512_lane_sort},
#endif
};

const Level& entry(SimdLevel level) { return kLevels[static_cast<int>(level)]; }

}  // namespace

std::vector<std::string> compiled_simd_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) names.emplace_back(level.name);
  return names;
}

std::vector<std::string> supported_simd_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels)
    if (level.runs_here()) names.emplace_back(level.name);
  return names;
}

SimdLevel resolve_simd_level(const std::string& name) {
  const auto supported = supported_simd_levels();
  const std::string& wanted = name == "auto" ? supported.back() : name;
  std::string listed;
  for (const auto& level : supported) listed += ", " + level;
  for (const Level& level : kLevels) {
    if (wanted != level.name) continue;
    if (level.runs_here()) return static_cast<SimdLevel>(&level - kLevels);
    throw std::invalid_argument("SIMD level '" + name + "' cannot run here; expected auto" +
                                listed);
  }
  throw std::invalid_argument("unknown SIMD level '" + name + "'; expected auto" + listed);
}

LevelKernels kernels_for(SimdLevel level) { return entry(level).kernels(); }

LevelCurvatureKernels curvature_kernels_for(SimdLevel level) {
  return entry(level).curvature_kernels();
}

LevelScreenKernels screen_kernels_for(SimdLevel level) { return entry(level).screen_kernels(); }

LaneSort lane_sort_for(SimdLevel level) { return entry(level).lane_sort(); }

#ifdef LCODEC_INSTRUMENTS
std::int64_t saturate(const std::string& level, std::int64_t rounds) {
  using Saturate = std::int64_t(std::int64_t);
  constexpr Saturate* kOfLevel[] = {
      baseline_saturate,
#ifdef LCODEC_HAVE_X86_SIMD
      avx2_saturate,
      avx512_saturate,
#endif
  };
  return kOfLevel[static_cast<int>(resolve_simd_level(level))](rounds);
}
#endif

}  // namespace lcodec
