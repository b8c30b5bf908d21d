// The rows nearest to one in the selected columns and a candidate, along the candidate's order.
//
//   D(i, j) = sum over selected columns d, in order, of ((x_id - x_jd) c_d)^2   every operation
//   v(i, j) = D(i, j) + ((x_if - x_jf) c_f)^2                                  rounded
//   sum = sum of min(R_i, R_j) over the j != i with the smallest v, count = how many they are;
//   where a tie rule takes one of them: of that one, and 1
//
// Mapping    a warp takes one row and candidate, a lane one neighbour at a time, from both sides of
//            the row outwards; a side ends where the candidate alone is farther than the best
// Cost       with r the distance found, all rows within r in the candidate: 3 k + 4 loads and
//            7 k + 20 instructions for 32 of them, and 30 that the lanes share
#pragma once

#include <cstdint>
#include <limits>

#include "common/random.hpp"
#include "cuda/table.cuh"

namespace lcodec::cuda {

template <class T>
constexpr T kFar = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNone = std::numeric_limits<T>::quiet_NaN();  // neither less nor equal

struct Sums {
  std::int64_t sum;
  int count;
};

template <class T>
__device__ __forceinline__ T least_of_warp(T value) {
  for (int step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kFullWarp, value, step);
    value = other < value ? other : value;
  }
  return value;
}

template <class I>
__device__ __forceinline__ I sum_of_warp(I value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

// Adds to a total in memory. A sum of 0 costs nothing.
__device__ __forceinline__ void add_to(unsigned long long* total, std::int64_t sum) {
  if (sum != 0) atomicAdd(total, static_cast<unsigned long long>(sum));
}

// The nearest neighbours that the lanes of a warp have seen. Sum holds the ranks of all of them.
template <class T, class Sum>
struct Nearest {
  T best;
  int count = 0;
  Sum sum = 0;

  // A distance of NaN is never taken.
  __device__ __forceinline__ void offer(T distance, Sum rank) {
    if (distance < best) {
      best = distance;
      count = 0;
      sum = 0;
    }
    if (distance == best) {
      ++count;
      sum += rank;
    }
  }
  // The best of all lanes; what is farther is forgotten.
  __device__ __forceinline__ void agree() {
    const T least = least_of_warp(best);
    if (least < best) {
      best = least;
      count = 0;
      sum = 0;
    }
  }
  // Of all lanes, which agree.
  __device__ __forceinline__ Sums total() const {
    return {static_cast<std::int64_t>(sum_of_warp(sum)), sum_of_warp(count)};
  }
};

// Place of the neighbour to take among `count`, in increasing order; ties are not averaged.
template <class T>
__device__ __forceinline__ std::int64_t place_taken(const Table<T>& table, int row, int count) {
  return table.ties == Ties::first ? 0 : pick(tie_hash(table.seed, row), count);
}

// The row at a place among tied ones, in increasing order. up_to(row): how many there are up to
// row, the same in all lanes.
template <class UpTo>
__device__ __forceinline__ int row_at(std::int64_t place, std::int64_t n, const UpTo& up_to) {
  return static_cast<int>(first_place(
      0, n - 1, [&](std::int64_t row) { return up_to(static_cast<int>(row)) > place; }));
}

// look(row j, part), part being the candidate's part of v, for the rows whose part is at most
// limit(), which may fall when all lanes have looked; all lanes call, with -1 for no row.
template <class T, class Limit, class Look>
__device__ __forceinline__ void along(const Table<T>& table, int row, std::int64_t column,
                                      const Limit& limit, const Look& look) {
  const T* values = table.sorted_values + column * table.n;
  const std::int32_t* rows = table.sorted_rows + column * table.n;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const T x = table.value(column, row);
  const T factor = table.factor[column];
  const std::int64_t here = first_place(0, table.n, [&](std::int64_t t) { return values[t] >= x; });
  unsigned going = 3;  // a bit for each side
  for (std::int64_t step = 0; going != 0; step += 32) {
    for (int side = 0; side < 2; ++side) {
      if ((going >> side & 1u) == 0) continue;
      const std::int64_t t = side == 0 ? here - 1 - step - lane : here + step + lane;
      int other = -1;
      T part = 0;
      if (0 <= t && t < table.n) {
        const T scaled = (x - values[t]) * factor;
        part = scaled * scaled;
        if (part <= limit()) other = rows[t];
      }
      if (__any_sync(kFullWarp, other >= 0)) {
        look(other, part);
      } else {
        going &= ~(1u << side);
      }
    }
  }
}

// For a warp: sum and count of one row, whose nearest neighbour is within `limit`.
template <class T>
__device__ __forceinline__ Sums nearest_along(const Table<T>& table, int row, std::int64_t column,
                                              T limit) {
  const int own = table.rank[row];
  Nearest<T, std::int64_t> nearest{limit};
  along(
      table, row, column, [&] { return nearest.best; },
      [&](int other, T part) {
        if (other >= 0 && other != row) {
          nearest.offer(table.distance(row, other) + part, min(own, table.rank[other]));
        }
        nearest.agree();
      });
  const Sums sums = nearest.total();
  if (table.ties == Ties::average || sums.count == 1) return sums;
  const std::int64_t place = place_taken(table, row, sums.count);
  const int taken = row_at(place, table.n, [&](int last) {
    int count = 0;
    along(
        table, row, column, [&] { return nearest.best; },
        [&](int other, T part) {
          count += other >= 0 && other != row && other <= last &&
                   table.distance(row, other) + part == nearest.best;
        });
    return sum_of_warp(count);
  });
  return {min(own, table.rank[taken]), 1};
}

constexpr int kWalkWarps = 8;

// S_i and c_i of every row, by given row. A warp takes a row.
template <class T>
__global__ void __launch_bounds__(32 * kWalkWarps, 2)
    row_sums_kernel(Table<T> table, std::int64_t column, std::int64_t* sum, std::int64_t* count) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWalkWarps + threadIdx.x / 32;
  if (row >= table.n) return;
  const Sums sums = nearest_along(table, static_cast<int>(row), column, kFar<T>);
  if (threadIdx.x % 32 == 0) {
    sum[table.order[row]] = sums.sum;
    count[table.order[row]] = sums.count;
  }
}

}  // namespace lcodec::cuda
