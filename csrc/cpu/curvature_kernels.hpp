// The inner loops of the curvature products; curvature_kernels.cpp is compiled once for every SIMD
// level.
#pragma once

#include <cstdint>

#include "lcodec/curvature.hpp"
#include "lcodec/simd_level.hpp"

namespace lcodec {

constexpr std::int64_t kLaneBytes = 128;
template <class T>
constexpr std::int64_t kLanes = kLaneBytes / static_cast<std::int64_t>(sizeof(T));

// Rows side by side share the loads of v and of out.
constexpr std::int64_t kRowsAtOnce = 8;

// m arrays, each `stride` elements after the one before.
template <class T>
struct Arrays {
  T* data;
  std::int64_t m, stride;
};

// Of the rows' selected columns. A dot may be taken, and a sum added, in several calls one after
// another, for columns that follow each other: dots are parted at multiples of kLanes columns of a
// segment.
template <class S, class T>
struct CurvatureKernels {
  // lane_j[r] [kLanes] += products of row r with v_j, in the tree of lcodec/curvature.hpp.
  void (*dots)(const SelectedColumns<S>& rows, const Arrays<const T>& v, const Arrays<T>& lane);
  // dot[k] = the sum of lane[k] [kLanes].
  void (*fold)(const T* lane, std::int64_t count, T* dot);
  // out_j += factor_j[r] * row r, for the rows in order.
  void (*accumulate)(const SelectedColumns<S>& rows, const Arrays<const T>& factor,
                     const Arrays<T>& out);
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
