// The inner loops of a screen by matrix products (cpu/screen.hpp); screen_kernels.cpp is compiled
// once for every SIMD level.
#pragma once

#include <cstdint>

#include "lcodec/simd_level.hpp"

namespace lcodec {

// Rows are packed in panels, [d][width] each, the last one filled up with zeros.
template <class T>
struct ScreenKernels {
  std::int64_t width;
  // A panel of the rows [first, first + count) of columns x[f]: ((x - center[f]) * factor[f]) *
  // scale, in double, rounded to float once. squares[r] is the squared norm of a packed row.
  void (*pack)(const T* const* x, std::int64_t d, std::int64_t first, std::int64_t count,
               const double* center, const double* factor, double scale, float* panel,
               double* squares);
  // product[a * kTile + b] = left row a times right row b. A sum is one of sums of kProductBlock
  // products. Where left and right are the same panels, half of them are computed.
  void (*products)(const float* left, std::int64_t left_panels, const float* right,
                   std::int64_t right_panels, std::int64_t d, float* product);
  // of_left[a] = min over b of (right[b] - product[a][b]), of_right[b] = min over a of (left[a] -
  // product[a][b]).
  void (*least)(const float* product, std::int64_t rows, std::int64_t columns, const float* left,
                const float* right, float* of_left, float* of_right);
  // Places a * kTile + b where right[b] - product[a][b] <= left_limit[a] or left[a] -
  // product[a][b] <= right_limit[b], in order; returns how many.
  std::int64_t (*hits)(const float* product, std::int64_t rows, std::int64_t columns,
                       const float* left, const float* right, const float* left_limit,
                       const float* right_limit, std::int32_t* place);
};

constexpr std::int64_t kTile = 192;          // rows of a tile, a multiple of every level's width
constexpr std::int64_t kProductBlock = 256;  // columns whose products stay in registers

struct LevelScreenKernels {
  ScreenKernels<float> f32;
  ScreenKernels<double> f64;
};

LevelScreenKernels baseline_screen_kernels();
LevelScreenKernels avx2_screen_kernels();
LevelScreenKernels avx512_screen_kernels();

// What dispatch.cpp picks for a level.
LevelScreenKernels screen_kernels_for(SimdLevel level);

template <class T>
ScreenKernels<T> pick_screen_kernels(SimdLevel level) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return screen_kernels_for(level).f32;
  } else {
    return screen_kernels_for(level).f64;
  }
}

}  // namespace lcodec
