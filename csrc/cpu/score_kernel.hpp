// Kernels of one row against all others; score_kernel.cpp is compiled once for every SIMD level.
#pragma once

#include <cstdint>

#include "lcodec/engine.hpp"

namespace lcodec {

// Scans one row for the tile's candidates side by side in SIMD lanes.
//   best_l = min over j != i of v_j,  v_j = distance[j] + ((tile[i][l] - tile[j][l]) * factor[l])^2
//   count_l = #{j : v_j = best_l},  sum_l = sum over those j of min(rank_i, rank_j)
// (Ties::first: the lowest such j alone; Ties::random: the pick of `word` among them.)
template <class T>
struct ScanArgs {
  std::int64_t n;
  std::int64_t i;
  const T* distance;         // [n] from row i to every row in the conditioning set
  const T* tile;             // [n][lanes] candidate columns, padded with zeros
  const T* factor;           // [lanes]
  const std::int32_t* rank;  // [n]
  Ties ties;
  std::uint64_t word;
  std::int64_t* sum;    // [lanes] out
  std::int64_t* count;  // [lanes] out
};

template <class T>
struct Kernels {
  int lanes;  // candidates in a tile
  void (*scan)(const ScanArgs<T>&);
  // distance[j] += ((x[i] - x[j]) * factor)^2 for all j
  void (*accumulate)(const T* x, std::int64_t n, std::int64_t i, T factor, T* distance);
  // min over j != i of distance[j]
  T (*minimum)(const T* distance, std::int64_t n, std::int64_t i);
};

struct LevelKernels {
  Kernels<float> f32;
  Kernels<double> f64;
};

LevelKernels baseline_kernels();
LevelKernels avx2_kernels();
LevelKernels avx512_kernels();

// What dispatch.cpp picks for a level.
LevelKernels kernels_for(SimdLevel level);

}  // namespace lcodec
