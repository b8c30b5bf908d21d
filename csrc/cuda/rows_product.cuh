// out_j = (1/n) sum_i c_ij x_i + damping v_j, with c_ij from the dots u_ij = x_i . v_j of row i's
// selected columns: c_ij = w_i u_ij, or the softmax head's w_i p_ij (u_ij - sum_j' p_ij' u_ij').
// One pass over the selected bytes of x.
//
// Mapping    A launch adds up chunk t - 1 and takes the dots of chunk t, side by side: both chunks
//            stay in the second-level cache (kChunkBytes is their size), so memory streams one
//            while the other is read from the cache. The first blocks add up: 256 positions of a
//            group of 32 rows, a thread for each position, factors in shared memory. The others
//            take dots: a tile of 4096 positions of 8 rows, thread l at positions l, l + 256, ....
//            blockIdx.y counts groups of kVectors vectors.
// Arguments  column [size], the selected columns; dots [2][rows of a chunk][m][tiles], of odd and
//            even chunks; partial [groups][m][size]. The tree is in lcodec/cuda_curvature.hpp.
// Fast       Bound by memory: n size elements of x, once. The cache gives x again, v and column for
//            every 8 rows, and partial, twice, for every 32: 2.3 times the bytes of x in all, in
//            float. An element and vector takes 2 multiplications and 2 additions; an element 2
//            loads, of whole sectors where segments are long, and their addresses; 16 elements of 8
//            rows 40 shuffles and as many additions: about 12 for an element and one vector.
//            n = 1000, size = 46 000 in float: 184 MB, 0.06 ms at 3.3 TB/s, against 0.02 ms of
//            5.5e8 / 32 instructions of a warp, and 19 launches, of 12 MB each.
// Must not   gather x into a copy, add with atomics, or let a sum depend on the grid. Rows that do
//            not exist are not added; NaN in columns that are not selected is not read.
// Twin       lcodec_ext/curvature/reference.py CudaTree; cpu/curvature.cpp, with its own tree
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/platform.cuh"
#include "cuda/storage.cuh"

namespace lcodec::cuda {

constexpr int kProductThreads = 256;
constexpr int kDotRows = 8;
constexpr int kTilePositions = 4096;
constexpr int kGroupRows = 32;
constexpr int kLoadsAhead = 8;   // rows whose loads come before their additions
constexpr int kFinishLanes = 8;  // of the last sum

template <class S, class T>
struct RowsProduct {
  const S* x;
  std::int64_t n, stride, size, m;
  const std::int32_t* column;
  const T* v;
  const T* p;       // [n][m] of a softmax head, or null
  const T* weight;  // [n], or null
  T* dots;
  T* partial;
  std::int64_t tiles;
  std::int64_t groups;  // of kGroupRows rows in a chunk

  __device__ std::int64_t chunk_rows() const { return groups * kGroupRows; }
  // A row's dots with vector 0, tile 0.
  __device__ T* row_dots(std::int64_t chunk, std::int64_t row) const {
    return dots + ((chunk & 1) * chunk_rows() + row) * m * tiles;
  }
};

// Dots of kDotRows rows of a chunk, from `first` on, with a tile of v.
template <class S, class T, int kVectors>
__device__ __forceinline__ void take_dots(const RowsProduct<S, T>& a, std::int64_t chunk,
                                          std::int64_t first, std::int64_t tile) {
  constexpr int kWarps = kProductThreads / 32;
  constexpr int kValues = kDotRows * kVectors;
  static_assert(kValues <= kProductThreads);
  using Values = T[std::size_t{kValues}];
  LCODEC_SHARED_ARRAY(Values, of_warp, kWarps);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t vector = static_cast<std::int64_t>(blockIdx.y) * kVectors;
  const std::int64_t row = chunk * a.chunk_rows() + first;

  T sum[kDotRows][std::size_t{kVectors}] = {};
  for (int j = 0; j < kTilePositions / kProductThreads; ++j) {
    const std::int64_t k = tile * kTilePositions + j * kProductThreads + thread;
    if (k >= a.size) break;
    const S* x = a.x + a.column[k];
    T factor[std::size_t{kVectors}];
    LCODEC_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      factor[c] = vector + c < a.m ? a.v[(vector + c) * a.size + k] : T{0};
    }
    T value[kDotRows];
    LCODEC_UNROLL
    for (int r = 0; r < kDotRows; ++r) {
      // Rows past the last one repeat it; their dots are not kept.
      value[r] = load(x + (row + r < a.n ? row + r : a.n - 1) * a.stride);
    }
    LCODEC_UNROLL
    for (int r = 0; r < kDotRows; ++r) {
      LCODEC_UNROLL
      for (int c = 0; c < kVectors; ++c) sum[r][c] = sum[r][c] + value[r] * factor[c];
    }
  }
  LCODEC_UNROLL
  for (int r = 0; r < kDotRows; ++r) {
    LCODEC_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      T value = sum[r][c];
      LCODEC_UNROLL
      for (int step = 16; step > 0; step /= 2) {
        value = value + __shfl_xor_sync(0xffffffffu, value, step);
      }
      if (thread % 32 == 0) of_warp[thread / 32][r * kVectors + c] = value;
    }
  }
  __syncthreads();
  if (thread < kValues) {
    T part[kWarps];
    LCODEC_UNROLL
    for (int w = 0; w < kWarps; ++w) part[w] = of_warp[w][thread];
    LCODEC_UNROLL
    for (int width = kWarps / 2; width > 0; width /= 2) {
      LCODEC_UNROLL
      for (int w = 0; w < kWarps / 2; ++w) {
        if (w < width) part[w] = part[w] + part[w + width];
      }
    }
    const int r = thread / kVectors;
    const std::int64_t c = vector + thread % kVectors;
    if (row + r < a.n && c < a.m) a.row_dots(chunk, first + r)[c * a.tiles + tile] = part[0];
  }
}

// Adds a group of rows of a chunk to its partial sums, at 256 positions.
template <class S, class T, int kVectors>
__device__ __forceinline__ void add_group(const RowsProduct<S, T>& a, std::int64_t chunk,
                                          std::int64_t group, std::int64_t piece) {
  using Factors = T[std::size_t{kVectors}];
  LCODEC_SHARED_ARRAY(Factors, factor, kGroupRows);
  LCODEC_SHARED_ARRAY(T, mean, kGroupRows);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t vector = static_cast<std::int64_t>(blockIdx.y) * kVectors;
  const std::int64_t first = chunk * a.chunk_rows() + group * kGroupRows;
  const std::int64_t left = a.n - first;
  const int rows = left < kGroupRows ? static_cast<int>(left) : kGroupRows;

  const auto dot = [&](int r, std::int64_t c) {
    const T* of_tile = a.row_dots(chunk, group * kGroupRows + r) + c * a.tiles;
    T sum = of_tile[0];
    for (std::int64_t t = 1; t < a.tiles; ++t) sum = sum + of_tile[t];
    return sum;
  };
  if (a.p && thread < rows) {
    T sum = 0;
    for (std::int64_t c = 0; c < a.m; ++c) {
      sum = sum + a.p[(first + thread) * a.m + c] * dot(thread, c);
    }
    mean[thread] = sum;
  }
  __syncthreads();
  if (thread < kGroupRows * kVectors) {
    const int r = thread / kVectors;
    const std::int64_t c = vector + thread % kVectors;
    T value = 0;
    if (r < rows && c < a.m) {
      value = dot(r, c);
      if (a.p) value = a.p[(first + r) * a.m + c] * (value - mean[r]);
      if (a.weight) value = a.weight[first + r] * value;
    }
    factor[r][thread % kVectors] = value;
  }
  __syncthreads();

  const std::int64_t k = piece * kProductThreads + thread;
  if (k >= a.size) return;
  const S* x = a.x + first * a.stride + a.column[k];
  T sum[std::size_t{kVectors}] = {};
  for (int r = 0; r < rows; r += kLoadsAhead) {
    T value[kLoadsAhead];
    LCODEC_UNROLL
    for (int t = 0; t < kLoadsAhead; ++t) {
      value[t] = r + t < rows ? load(x + (r + t) * a.stride) : T{0};
    }
    LCODEC_UNROLL
    for (int t = 0; t < kLoadsAhead; ++t) {
      if (r + t >= rows) break;
      LCODEC_UNROLL
      for (int c = 0; c < kVectors; ++c) sum[c] = sum[c] + factor[r + t][c] * value[t];
    }
  }
  LCODEC_UNROLL
  for (int c = 0; c < kVectors; ++c) {
    if (vector + c >= a.m) break;
    T& total = a.partial[(group * a.m + vector + c) * a.size + k];
    total = chunk == 0 ? sum[c] : total + sum[c];
  }
}

// Adds up chunk - 1 in the first `adding` blocks and takes the dots of `chunk` in the others.
template <class S, class T, int kVectors>
__global__ void __launch_bounds__(kProductThreads)
    rows_product_kernel(RowsProduct<S, T> a, std::int64_t chunk, std::int64_t adding) {
  const std::int64_t block = blockIdx.x;
  if (block < adding) {
    const std::int64_t pieces = (a.size + kProductThreads - 1) / kProductThreads;
    add_group<S, T, kVectors>(a, chunk - 1, block / pieces, block % pieces);
  } else {
    const std::int64_t own = block - adding;
    take_dots<S, T, kVectors>(a, chunk, own / a.tiles * kDotRows, own % a.tiles);
  }
}

// A thread for each element of out [m][size].
template <class S, class T>
__global__ void __launch_bounds__(kProductThreads, 1)
    finish_kernel(RowsProduct<S, T> a, T damping, T* out) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * kProductThreads + threadIdx.x;
  const std::int64_t count = a.m * a.size;
  if (t >= count) return;
  const T damped = damping * a.v[t];
  if (a.n == 0) {
    out[t] = damped;
    return;
  }
  T lane[kFinishLanes] = {};
  for (std::int64_t z = 0; z < a.groups; z += kFinishLanes) {
    LCODEC_UNROLL
    for (int l = 0; l < kFinishLanes; ++l) {
      if (z + l < a.groups) lane[l] = lane[l] + a.partial[(z + l) * count + t];
    }
  }
  LCODEC_UNROLL
  for (int width = kFinishLanes / 2; width > 0; width /= 2) {
    LCODEC_UNROLL
    for (int l = 0; l < kFinishLanes / 2; ++l) {
      if (l < width) lane[l] = lane[l] + lane[l + width];
    }
  }
  out[t] = lane[0] / static_cast<T>(a.n) + damped;
}

}  // namespace lcodec::cuda
