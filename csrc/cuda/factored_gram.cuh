// k_ij = (delta_i . delta_j)(a_i . a_j): the Gram matrix of the rows delta_i x a_i.
//
// Mapping    block (x, y), 16 x 16 threads, takes the 32 x 32 tile of rows 32 y and columns 32 x
//            of k, if it is not above the diagonal, and writes its mirror image too; a thread has 4
//            elements. Both factors pass through shared memory in steps of 32 columns.
// Fast       n^2 (r + d) multiplications and additions in all, half of them left out for symmetry;
//            4 multiplications and additions for 4 reads of shared memory, which bound it. Memory:
//            2 n^2 (r + d) / 32 elements read, from the cache where the factors fit, and n^2
//            written. n = 1000, d = 4608 in float: 2.3e9 of each, and as many reads of shared
//            memory, 7e7 of a warp.
// Must not   store the two products, or give k_ij and k_ji different bits: both are added in the
//            same order.
// Twin       lcodec_ext/curvature/reference.py; cpu/curvature.cpp, with its own tree
#pragma once

#include <cstdint>

#include "cuda/platform.cuh"
#include "cuda/storage.cuh"

namespace lcodec::cuda {

constexpr int kGramTile = 32;
constexpr int kGramThreads = 16;  // squared

// dot[a][b] = x_i . x_j for this thread's rows i = first_i + y + 16 a and j = first_j + x + 16 b,
// where threadIdx is (x, y). Rows past the last one are 0.
template <class T>
__device__ __forceinline__ void tile_dots(const T* data, std::int64_t stride, std::int64_t columns,
                                          std::int64_t n, std::int64_t first_i,
                                          std::int64_t first_j, T (&dot)[2][2]) {
  using Row = T[kGramTile + 1];  // one more: rows lie in different banks
  LCODEC_SHARED_ARRAY(Row, left, kGramTile);
  LCODEC_SHARED_ARRAY(Row, right, kGramTile);
  const int x = static_cast<int>(threadIdx.x);
  const int y = static_cast<int>(threadIdx.y);
  for (auto& row : dot) row[0] = row[1] = T{0};
  for (std::int64_t start = 0; start < columns; start += kGramTile) {
    for (int a = y; a < kGramTile; a += kGramThreads) {
      for (int b = x; b < kGramTile; b += kGramThreads) {
        const std::int64_t c = start + b;
        const std::int64_t i = first_i + a;
        const std::int64_t j = first_j + a;
        left[a][b] = c < columns && i < n ? load(data + i * stride + c) : T{0};
        right[a][b] = c < columns && j < n ? load(data + j * stride + c) : T{0};
      }
    }
    __syncthreads();
    T sum[2][2] = {};
    for (int c = 0; c < kGramTile; ++c) {
      LCODEC_UNROLL
      for (int a = 0; a < 2; ++a) {
        LCODEC_UNROLL
        for (int b = 0; b < 2; ++b) {
          sum[a][b] = sum[a][b] + left[y + kGramThreads * a][c] * right[x + kGramThreads * b][c];
        }
      }
    }
    for (int a = 0; a < 2; ++a) {
      for (int b = 0; b < 2; ++b) dot[a][b] = dot[a][b] + sum[a][b];
    }
    __syncthreads();  // left and right are written again
  }
}

template <class T>
__global__ void __launch_bounds__(kGramThreads* kGramThreads)
    factored_gram_kernel(const T* delta, std::int64_t delta_stride, std::int64_t r, const T* a,
                         std::int64_t a_stride, std::int64_t d, std::int64_t n, T* k) {
  if (blockIdx.x > blockIdx.y) return;
  const std::int64_t first_i = static_cast<std::int64_t>(blockIdx.y) * kGramTile;
  const std::int64_t first_j = static_cast<std::int64_t>(blockIdx.x) * kGramTile;
  T left[2][2];
  T right[2][2];
  tile_dots(delta, delta_stride, r, n, first_i, first_j, left);
  tile_dots(a, a_stride, d, n, first_i, first_j, right);
  for (int s = 0; s < 2; ++s) {
    for (int t = 0; t < 2; ++t) {
      const std::int64_t i = first_i + threadIdx.y + kGramThreads * s;
      const std::int64_t j = first_j + threadIdx.x + kGramThreads * t;
      if (i >= n || j > i) continue;
      k[i * n + j] = k[j * n + i] = left[s][t] * right[s][t];
    }
  }
}

}  // namespace lcodec::cuda
