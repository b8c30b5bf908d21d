// A table on the device as the engine's kernels see it, and its columns in sorted order.
//
// Rows are renumbered. Where ties are averaged, they are numbered by rank: the ranks of rows of
// equal value then ascend, and their sums come from prefix sums. Where a tied row is picked by its
// number, they keep the given numbers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/platform.cuh"
#include "lcodec/engine.hpp"  // Ties

namespace lcodec::cuda {

constexpr unsigned kFullWarp = 0xffffffff;
constexpr int kHeld = 32;  // selected columns that are kept side by side, by row

template <class T>
struct Table {
  using Key = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;

  std::int64_t n, p;
  const T* x;                       // [n][p] by given row
  const T* factor;                  // [p]
  const std::int32_t* order;        // [n] given row of a row
  const std::int32_t* rank;         // [n] by row
  const std::int32_t* sorted_rows;  // [p][n] by (value, row)
  const T* sorted_values;           // [p][n]
  int k;                            // selected columns
  const std::int32_t* selected;     // [k]
  const T* held;                    // [min(k, kHeld)][n] by row
  const T* held_factor;             // [min(k, kHeld)]
  Ties ties;
  std::uint64_t seed;

  __device__ T value(std::int64_t column, int row) const { return x[order[row] * p + column]; }

  // Squared distance of two rows in the selected columns.
  __device__ __forceinline__ T distance(int i, int j) const {
    T result = 0;
    const T* column = held;
    LCODEC_NO_UNROLL
    for (int d = 0; d < k && d < kHeld; ++d) {
      const T scaled = (column[i] - column[j]) * held_factor[d];
      result = result + scaled * scaled;
      column += n;
    }
    LCODEC_NO_UNROLL
    for (int d = kHeld; d < k; ++d) {
      const std::int64_t other = selected[d];
      const T scaled = (value(other, i) - value(other, j)) * factor[other];
      result = result + scaled * scaled;
    }
    return result;
  }
};

// A value as an unsigned key in the same order, -0 as 0; and back.
__device__ __forceinline__ std::uint32_t sort_key(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ std::uint64_t sort_key(double value) {
  constexpr std::uint64_t sign = std::uint64_t{1} << 63;
  const auto bits = static_cast<std::uint64_t>(__double_as_longlong(value + 0.0));
  return (bits & sign) != 0 ? ~bits : bits | sign;
}
__device__ __forceinline__ float sort_value(std::uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & ~0x80000000u : ~key);
}
__device__ __forceinline__ double sort_value(std::uint64_t key) {
  constexpr std::uint64_t sign = std::uint64_t{1} << 63;
  return __longlong_as_double(static_cast<long long>((key & sign) != 0 ? key & ~sign : ~key));
}

// First place of [begin, end) where a predicate holds, which then holds at all later places.
template <class Holds>
__device__ __forceinline__ std::int64_t first_place(std::int64_t begin, std::int64_t end,
                                                    const Holds& holds) {
  while (begin < end) {
    const std::int64_t middle = begin + (end - begin) / 2;
    if (holds(middle)) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

constexpr int kThreads = 256;  // of kernels that take an element a thread

__device__ __forceinline__ std::int64_t global_thread() {
  return static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

// keys[row] = the rank, numbers[row] = row: what is sorted to number rows by rank.
__global__ void __launch_bounds__(kThreads)
    rank_keys_kernel(const std::int32_t* rank, std::int64_t n, std::uint32_t* keys,
                     std::int32_t* numbers) {
  const std::int64_t row = global_thread();
  if (row >= n) return;
  if (keys) keys[row] = static_cast<std::uint32_t>(rank[row]);
  numbers[row] = static_cast<std::int32_t>(row);
}

__global__ void __launch_bounds__(kThreads)
    gather_kernel(const std::int32_t* from, const std::int32_t* index, std::int64_t n,
                  std::int32_t* to) {
  const std::int64_t e = global_thread();
  if (e < n) to[e] = from[index[e]];
}

// Keys of columns [first, first + gridDim.y) by row, transposed through shared memory: a block
// takes 32 rows of 32 columns. rows[column][row] = row.
constexpr int kTransposed = 32;

template <class T>
__global__ void __launch_bounds__(kTransposed * 8)
    column_keys_kernel(const T* x, const std::int32_t* order, std::int64_t n, std::int64_t p,
                       std::int64_t first, std::int64_t columns, typename Table<T>::Key* keys,
                       std::int32_t* rows) {
  using Line = T[kTransposed + 1];
  LCODEC_SHARED_ARRAY(Line, tile, kTransposed);
  const std::int64_t tiles = (columns + kTransposed - 1) / kTransposed;
  const std::int64_t left = blockIdx.x % tiles * kTransposed;
  const std::int64_t top = blockIdx.x / tiles * kTransposed;
  const int a = static_cast<int>(threadIdx.x);
  for (int b = static_cast<int>(threadIdx.y); b < kTransposed; b += 8) {
    if (top + b < n && left + a < columns) tile[b][a] = x[order[top + b] * p + first + left + a];
  }
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.y); b < kTransposed; b += 8) {
    if (top + a < n && left + b < columns) {
      const std::int64_t e = (left + b) * n + top + a;
      keys[e] = sort_key(tile[a][b]);
      rows[e] = static_cast<std::int32_t>(top + a);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    key_values_kernel(const typename Table<T>::Key* keys, std::int64_t size, T* values) {
  const std::int64_t e = global_thread();
  if (e < size) values[e] = sort_value(keys[e]);
}

// run[column]: its longest run of equal values. A block takes a column.
template <class T>
__global__ void __launch_bounds__(kThreads)
    longest_run_kernel(const T* sorted_values, std::int64_t n, std::int32_t* run) {
  LCODEC_SHARED_ARRAY(int, longest, 1);
  const T* values = sorted_values + static_cast<std::int64_t>(blockIdx.x) * n;
  if (threadIdx.x == 0) longest[0] = 1;
  __syncthreads();
  int mine = 1;
  for (std::int64_t t = threadIdx.x; t < n; t += kThreads) {
    if (t + 1 == n || values[t] != values[t + 1]) {  // a run ends here
      if (t == 0 || values[t - 1] != values[t]) continue;
      const std::int64_t begin =
          first_place(0, t, [&](std::int64_t s) { return values[s] == values[t]; });
      mine = max(mine, static_cast<int>(t - begin + 1));
    }
  }
  if (mine > 1) atomicMax(&longest[0], mine);
  __syncthreads();
  if (threadIdx.x == 0) run[blockIdx.x] = longest[0];
}

// Adds column number k to the selected ones. limit: no squared distance in them is larger.
template <class T>
__global__ void __launch_bounds__(kThreads)
    select_kernel(Table<T> table, std::int32_t column, std::int32_t* selected, T* held,
                  T* held_factor, T* limit) {
  const std::int64_t row = global_thread();
  if (row < table.n && table.k < kHeld) {
    held[table.k * table.n + row] = table.value(column, static_cast<int>(row));
  }
  if (row == 0) {
    const T* values = table.sorted_values + column * table.n;
    const T scaled = (values[table.n - 1] - values[0]) * table.factor[column];
    *limit = (table.k == 0 ? T{0} : *limit) + scaled * scaled;
    selected[table.k] = column;
    if (table.k < kHeld) held_factor[table.k] = table.factor[column];
  }
}

// Marks the sums of selected columns: -1.
__global__ void __launch_bounds__(kThreads)
    leave_out_kernel(const std::int32_t* selected, int k, std::int64_t* whole,
                     std::int64_t* fraction) {
  const std::int64_t d = global_thread();
  if (d < k) whole[selected[d]] = fraction[selected[d]] = -1;
}

}  // namespace lcodec::cuda
