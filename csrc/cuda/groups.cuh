// Rows that share their values in the selected columns, and scoring by sorting for those that share
// them with many others.
//
// In such a group the rows nearest to a row are next to it in the candidate's order, and the rank
// sum of a run of equal values comes from prefix sums. Other groups matter only where they are no
// farther than the best inside. With nothing selected all rows are one group: the first step.
#pragma once

#include <cstdint>

#include "common/fixed_point.hpp"
#include "cuda/table.cuh"
#include "cuda/walk.cuh"

namespace lcodec::cuda {

// Groups of at least this many rows are scored by sorting.
constexpr int kBigGroup = 64;

template <class T>
struct Groups {
  bool any_big;               // whether there may be big ones; if not, nothing else is kept
  const std::int32_t* of;     // [n] group of a row
  const std::int32_t* begin;  // [groups + 1] of its rows, by group
  const T* gap;               // [groups] squared distance to the nearest other one, of big ones

  __device__ bool is_big(int row) const {
    return any_big && begin[of[row] + 1] - begin[of[row]] >= kBigGroup;
  }
};

// One group of all rows.
__global__ void __launch_bounds__(kThreads)
    one_group_kernel(std::int64_t n, std::int32_t* of, std::int32_t* begin) {
  const std::int64_t row = global_thread();
  if (row < n) of[row] = 0;
  if (row == 0) {
    begin[0] = 0;
    begin[1] = static_cast<std::int32_t>(n);
  }
}

// Keys and values of the sort of a column's rows by (group, value): the group of the row at a place
// of the column's order, and that place.
__global__ void __launch_bounds__(kThreads)
    group_keys_kernel(const std::int32_t* sorted_rows, const std::int32_t* of, std::int64_t n,
                      std::int64_t size, std::uint32_t* keys, std::int32_t* places) {
  const std::int64_t e = global_thread();
  if (e >= size) return;
  keys[e] = static_cast<std::uint32_t>(of[sorted_rows[e]]);
  places[e] = static_cast<std::int32_t>(e % n);
}

// Rows and values of columns by (group, value), from the places.
template <class T>
__global__ void __launch_bounds__(kThreads)
    group_rows_kernel(const std::int32_t* sorted_rows, const T* sorted_values,
                      const std::int32_t* places, std::int64_t n, std::int64_t size,
                      std::int32_t* rows, T* values) {
  const std::int64_t e = global_thread();
  if (e >= size) return;
  const std::int64_t at = e / n * n + places[e];
  rows[e] = sorted_rows[at];
  values[e] = sorted_values[at];
}

// starts[t] = 1 where a group of (group, value) begins.
template <class T>
__global__ void __launch_bounds__(kThreads)
    group_starts_kernel(const std::uint32_t* keys, const std::int32_t* places, const T* values,
                        std::int64_t n, std::int32_t* starts) {
  const std::int64_t t = global_thread();
  if (t >= n) return;
  starts[t] = t == 0 || keys[t] != keys[t - 1] || values[places[t]] != values[places[t - 1]];
}

// Groups from the running count of their starts.
__global__ void __launch_bounds__(kThreads)
    group_numbers_kernel(const std::int32_t* sorted_rows, const std::int32_t* places,
                         const std::int32_t* starts, const std::int64_t* number, std::int64_t n,
                         std::int32_t* of, std::int32_t* begin) {
  const std::int64_t t = global_thread();
  if (t >= n) return;
  const auto group = static_cast<std::int32_t>(number[t] - 1);
  of[sorted_rows[places[t]]] = group;
  if (starts[t] != 0) begin[group] = static_cast<std::int32_t>(t);
  if (t == n - 1) begin[group + 1] = static_cast<std::int32_t>(n);
}

// Distances between big groups and the nearest other group, and whether there are big groups at
// all. A warp takes a row and works only if a big group begins with that row. O(n k) a big group.
template <class T>
__global__ void __launch_bounds__(32 * kWalkWarps)
    group_gaps_kernel(Table<T> table, const std::int32_t* of, const std::int32_t* begin,
                      const std::int32_t* sorted_rows, const std::int32_t* places, T* gap,
                      std::int32_t* any_big) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * kWalkWarps + threadIdx.x / 32;
  if (t >= table.n) return;
  const int row = sorted_rows[places[t]];
  const int group = of[row];
  if (begin[group] != t || begin[group + 1] - t < kBigGroup) return;
  T least = kFar<T>;
  for (int j = static_cast<int>(threadIdx.x % 32); j < table.n; j += 32) {
    if (of[j] == group) continue;
    const T distance = table.distance(row, j);
    least = distance < least ? distance : least;
  }
  least = least_of_warp(least);
  if (threadIdx.x % 32 == 0) {
    gap[group] = least;
    *any_big = 1;
  }
}

// Columns with all rows by (group, value).
template <class T>
struct Ordered {
  std::int64_t first;  // column
  std::int64_t columns;
  const std::int32_t* rows;    // [columns][n]
  const T* values;             // [columns][n]
  const std::int32_t* ranks;   // [columns][n] of the rows
  const std::int64_t* prefix;  // [columns n] ranks added up to and with an element, through columns
};

// One row's neighbours inside its group, which are around its place t in [begin, end): sum and
// count, and in `best` how far they are.
template <class T>
__device__ __forceinline__ Sums nearest_inside(const Table<T>& table, const Ordered<T>& ordered,
                                               std::int64_t start, std::int64_t begin,
                                               std::int64_t end, std::int64_t t, T factor,
                                               T& best) {
  const T* values = ordered.values + start;
  const std::int32_t* ranks = ordered.ranks + start;
  const std::int32_t* rows = ordered.rows + start;
  const T x = values[t];
  const auto distance = [&](std::int64_t s) {
    const T scaled = (x - values[s]) * factor;
    return scaled * scaled;
  };
  const T left = t > begin ? distance(t - 1) : kFar<T>;
  const T right = t + 1 < end ? distance(t + 1) : kFar<T>;
  best = left < right ? left : right;
  const T nearest = best;
  const int own = ranks[t];
  const bool take_left = left < right;
  const std::int64_t beside = take_left ? t - 1 : t + 1;
  const std::int64_t behind = take_left ? t - 2 : t + 2;
  if (left != right && (behind < begin || behind >= end || distance(behind) > nearest)) {
    return {min(own, ranks[beside]), 1};
  }
  // Distances do not fall away from t: all within the best are equal to it.
  const std::int64_t low =
      first_place(begin, t, [&](std::int64_t s) { return distance(s) <= nearest; });
  const std::int64_t high =
      first_place(t + 1, end, [&](std::int64_t s) { return distance(s) > nearest; });
  const int count = static_cast<int>(high - low - 1);
  // Runs of equal value: run(begin, end), with rows in increasing order
  const auto runs = [&](const auto& run) {
    for (std::int64_t a = low; a < high;) {
      const T value = values[a];
      const std::int64_t b =
          first_place(a, high, [&](std::int64_t s) { return values[s] > value; });
      run(a, b);
      a = b;
    }
  };
  if (table.ties == Ties::average) {
    const auto added = [&](std::int64_t s) {  // ranks up to s, without it
      return start + s == 0 ? 0 : ordered.prefix[start + s - 1];
    };
    std::int64_t sum = -own;
    runs([&](std::int64_t a, std::int64_t b) {
      const std::int64_t middle =
          first_place(a, b, [&](std::int64_t s) { return ranks[s] >= own; });
      sum += added(middle) - added(a) + (b - middle) * own;
    });
    return {sum, count};
  }
  const int row = rows[t];
  const int taken = row_at(count == 1 ? 0 : place_taken(table, row, count), table.n, [&](int last) {
    std::int64_t up_to = row <= last ? -1 : 0;
    runs([&](std::int64_t a, std::int64_t b) {
      up_to += first_place(a, b, [&](std::int64_t s) { return rows[s] > last; }) - a;
    });
    return up_to;
  });
  return {min(own, table.rank[taken]), 1};
}

// Rows of big groups, or all rows where nothing is selected, added to whole and fraction.
//
// Mapping    a thread takes a place of a column; what must be looked for in other groups is done
//            by its warp, one after the other
// Fast       a row without ties reads 5 values and 3 ranks, mostly the same as its neighbours, and
//            takes about 60 instructions; n = 1000, p = 40 000: 4e7 rows, 0.3 GB, 0.1 ms at 3.3
//            TB/s, against 0.08 ms of instructions at 30e12/s
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    ordered_kernel(Table<T> table, Groups<T> groups, Ordered<T> ordered, unsigned long long* whole,
                   unsigned long long* fraction) {
  const std::int64_t blocks = (table.n + kThreads - 1) / kThreads;  // of a column
  const std::int64_t c = blockIdx.x / blocks;
  const std::int64_t t = blockIdx.x % blocks * kThreads + threadIdx.x;
  const std::int64_t start = c * table.n;
  const std::int64_t column = ordered.first + c;
  Sums sums{0, 1};
  bool elsewhere = false;
  T best = 0;
  int row = 0;
  if (t < table.n) {
    row = ordered.rows[start + t];
    std::int64_t begin = 0;
    std::int64_t end = table.n;
    T gap = kFar<T>;
    if (table.k > 0) {
      const int group = groups.of[row];
      begin = groups.begin[group];
      end = groups.begin[group + 1];
      gap = end - begin >= kBigGroup ? groups.gap[group] : 0;
    }
    if (table.k == 0 || end - begin >= kBigGroup) {
      sums = nearest_inside(table, ordered, start, begin, end, t, table.factor[column], best);
      elsewhere = gap <= best;
    }
  }
  unsigned open = __ballot_sync(kFullWarp, elsewhere);
  for (; open != 0; open &= open - 1) {
    const int lane = __ffs(static_cast<int>(open)) - 1;
    const Sums found = nearest_along(table, __shfl_sync(kFullWarp, row, lane), column,
                                     __shfl_sync(kFullWarp, best, lane));
    if (static_cast<int>(threadIdx.x) % 32 == lane) sums = found;
  }
  const FixedPoint mean = fixed_point(sums.sum, sums.count);
  const std::int64_t wholes = sum_of_warp(mean.whole);
  const std::int64_t fractions = sum_of_warp(mean.fraction);
  if (threadIdx.x % 32 == 0) {
    add_to(whole + column, wholes);
    add_to(fraction + column, fractions);
  }
}

}  // namespace lcodec::cuda
