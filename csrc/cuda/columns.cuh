// Range and standard deviation of every column of a table by row.
//
//   low = min x_i         mean = sum x_i / n
//   high = max x_i        deviation = sqrt(sum (x_i - mean)^2 / (n - 1))
//
// in double, every operation rounded. A sum is added in one written order: lane l of 64 takes rows
// l, l + 64, ..., then lanes 32..63 are added to 0..31, 16..31 to 0..15, and so on.
//
// Mapping    a block takes kColumns columns: thread (c, y) of kColumns x kRowThreads holds the
//            64 / kRowThreads lanes y, y + kRowThreads, ... of column c, which are rows y,
//            y + kRowThreads, y + 2 kRowThreads, ... in turn. Lanes of a thread are added in
//            registers, those of different threads in shared memory: the same halves.
// Arguments  x [n][p] by row, T float or double; low, high [p] of T; deviation [p] of double; all
//            contiguous. n >= 2, p >= 1. The outputs do not overlap.
// Fast       A warp reads whole sectors of a row, kAhead * 64 rows are on their way at a time, and
//            n p values are read twice and nothing else: 2 n p sizeof(T) bytes. An element of float
//            takes 17 instructions in both passes together (sm_90): 2 loads, 4 for their addresses,
//            4 for the range, 2 conversions and 4 operations in double; of double 2 more for the
//            range and no conversion. n = 1000, p = 40 000 in float: 320 MB, 0.10 ms at 3.3 TB/s,
//            against 0.02 ms of 7e8 instructions at 30e12/s. One column alone is bound by latency:
//            n / 64 additions a lane, one after another.
// Must not   fuse, reassociate, or split a lane over threads: another order is another result. Rows
//            that do not exist are not added, not even as 0.
// Twin       lcodec_ext/dependence/backends/reference.py; on the CPU cpu/columns.cpp
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/platform.cuh"

namespace lcodec::cuda {

constexpr int kSumLanes = 64;

template <int kColumns, int kRowThreads, int kAhead>
struct ColumnTile {
  static constexpr int columns = kColumns;
  static constexpr int row_threads = kRowThreads;
  static constexpr int threads = kColumns * kRowThreads;
  static constexpr int lanes = kSumLanes / kRowThreads;    // of a thread
  static constexpr int at_once = lanes * kAhead;           // rows of a thread
  static constexpr int rows_at_once = kSumLanes * kAhead;  // of a block
  static_assert(kSumLanes % kRowThreads == 0 && (kRowThreads & (kRowThreads - 1)) == 0);
};

// add(lane, value) for the rows of a thread in order; x is its first one. All loads of a round come
// before its additions.
template <class Tile, bool kWhole, class T, class Add>
__device__ __forceinline__ void add_round(const T* x, std::int64_t stride, std::int64_t rows,
                                          const Add& add) {
  T value[Tile::at_once];
  for (int a = 0; a < Tile::at_once; ++a) {
    value[a] = kWhole || a * Tile::row_threads < rows ? x[a * stride] : T{0};
  }
  for (int a = 0; a < Tile::at_once; ++a) {
    if (kWhole || a * Tile::row_threads < rows) add(a % Tile::lanes, value[a]);
  }
}

template <class Tile, class T, class Add>
__device__ __forceinline__ void add_rows(const T* x, std::int64_t n, std::int64_t p,
                                         const Add& add) {
  const int y = static_cast<int>(threadIdx.y);
  const std::int64_t stride = p * Tile::row_threads;
  const T* row = x + y * p;
  std::int64_t left = n;
  for (; left >= Tile::rows_at_once; left -= Tile::rows_at_once) {
    add_round<Tile, true>(row, stride, left - y, add);
    row += stride * Tile::at_once;
  }
  add_round<Tile, false>(row, stride, left - y, add);
}

// The sum over the lanes of all threads of a column, for each of them.
template <class Tile>
__device__ __forceinline__ double add_lanes(double (&lane)[Tile::lanes],
                                            double (*partial)[Tile::columns]) {
  for (int width = Tile::lanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] = lane[l] + lane[l + width];
  }
  const int c = static_cast<int>(threadIdx.x);
  const int y = static_cast<int>(threadIdx.y);
  partial[y][c] = lane[0];
  __syncthreads();
  for (int width = Tile::row_threads / 2; width > 0; width /= 2) {
    if (y < width) partial[y][c] = partial[y][c] + partial[y + width][c];
    __syncthreads();
  }
  const double sum = partial[0][c];
  __syncthreads();  // partial is written again
  return sum;
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads)
    column_statistics_kernel(const T* x, std::int64_t n, std::int64_t p, T* low, T* high,
                             double* deviation) {
  using Sums = double[Tile::columns];
  using Values = T[Tile::columns];
  LCODEC_SHARED_ARRAY(Sums, partial, Tile::row_threads);
  LCODEC_SHARED_ARRAY(Values, lows, Tile::row_threads);
  LCODEC_SHARED_ARRAY(Values, highs, Tile::row_threads);
  const int c = static_cast<int>(threadIdx.x);
  const int y = static_cast<int>(threadIdx.y);
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * Tile::columns + c;
  // Threads past the last column repeat it, since the barriers need them.
  const T* own = x + (column < p ? column : p - 1);

  double lane[Tile::lanes];
  T least = *own;
  T most = least;
  for (int l = 0; l < Tile::lanes; ++l) lane[l] = 0;
  add_rows<Tile>(own, n, p, [&](int l, T value) {
    lane[l] = lane[l] + static_cast<double>(value);
    least = value < least ? value : least;
    most = value > most ? value : most;
  });
  lows[y][c] = least;
  highs[y][c] = most;
  const double mean = add_lanes<Tile>(lane, partial) / static_cast<double>(n);

  for (int l = 0; l < Tile::lanes; ++l) lane[l] = 0;
  add_rows<Tile>(own, n, p, [&](int l, T value) {
    const double difference = static_cast<double>(value) - mean;
    lane[l] = lane[l] + difference * difference;
  });
  const double sum = add_lanes<Tile>(lane, partial);

  if (y == 0 && column < p) {
    for (int other = 1; other < Tile::row_threads; ++other) {
      least = lows[other][c] < least ? lows[other][c] : least;
      most = highs[other][c] > most ? highs[other][c] : most;
    }
    low[column] = least;
    high[column] = most;
    deviation[column] = std::sqrt(sum / static_cast<double>(n - 1));
  }
}

}  // namespace lcodec::cuda
