// The inner loops of the curvature products; curvature_kernels.cpp is compiled once for every SIMD
// level.
#pragma once

#include <cstdint>

#include "lcodec/curvature.hpp"
#include "lcodec/simd_level.hpp"

namespace lcodec {

template <class S, class T>
struct CurvatureKernels {
  // dot[r] = (selected columns of row r) . v for `rows` rows, in the tree of lcodec/curvature.hpp.
  void (*dots)(const SelectedColumns<S>& rows, const T* v, T* dot);
  // out_k += factor[r] * (row r)_k for the rows in order. The elements `ahead` behind those read
  // are fetched into the cache meanwhile; 0 for none.
  void (*accumulate)(const SelectedColumns<S>& rows, const T* factor, std::int64_t ahead, T* out);
};

struct LevelCurvatureKernels {
  CurvatureKernels<float, float> f32;
  CurvatureKernels<double, double> f64;
  CurvatureKernels<Bfloat16, float> bf16;
};

LevelCurvatureKernels baseline_curvature_kernels();
LevelCurvatureKernels avx2_curvature_kernels();
LevelCurvatureKernels avx512_curvature_kernels();

// What dispatch.cpp picks for a level.
LevelCurvatureKernels curvature_kernels_for(SimdLevel level);

}  // namespace lcodec
