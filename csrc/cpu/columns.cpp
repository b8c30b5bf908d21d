// Laying out a table by column, and what is known of a column.
#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/column_sort.hpp"
#include "cpu/kernels.hpp"
#include "cpu/parallel.hpp"
#include "lcodec/engine.hpp"

namespace lcodec {

template <class T>
Status lay_out(const T* x, std::int64_t n, std::int64_t p, T* columns, T* low, T* high,
               const Execution& execution) {
  const Kernels<T> kernels = pick_kernels<T>(execution.level);
  // Columns in a piece: whole cache lines of every row, and something to do for every thread.
  const std::int64_t wide = std::clamp<std::int64_t>(p / execution.threads + 1, 16, 64);
  constexpr std::int64_t tall = 64;  // rows of a block that fits the first-level cache
  return parallel_for((p + wide - 1) / wide, execution, [&] {
    return [&](std::int64_t piece) {
      const std::int64_t first = piece * wide;
      const std::int64_t last = std::min(p, first + wide);
      for (std::int64_t top = 0; top < n; top += tall)
        for (std::int64_t f = first; f < last; ++f)
          for (std::int64_t i = top; i < std::min(n, top + tall); ++i)
            columns[f * n + i] = x[i * p + f];
      for (std::int64_t f = first; f < last; ++f)
        kernels.range(columns + f * n, n, low + f, high + f);
    };
  });
}

template <class T>
Status standard_deviations(const T* columns, std::int64_t n, std::int64_t p, double* deviation,
                           const Execution& execution) {
  const Kernels<T> kernels = pick_kernels<T>(execution.level);
  const auto sum = [&](const T* x, const double* center) {
    std::array<double, kSumLanes> lane{};
    kernels.lane_sums(x, n, center, lane.data());
    for (std::size_t width = kSumLanes / 2; width > 0; width /= 2)
      for (std::size_t l = 0; l < width; ++l) lane[l] += lane[l + width];
    return lane[0];
  };
  return parallel_for(p, execution, [&] {
    return [&](std::int64_t f) {
      const T* x = columns + f * n;
      const double mean = sum(x, nullptr) / static_cast<double>(n);
      deviation[f] = std::sqrt(sum(x, &mean) / static_cast<double>(n - 1));
    };
  });
}

template <class T>
Status sort_columns(const T* columns, std::int64_t n, std::int64_t p, std::int32_t* rows,
                    const Execution& execution) {
  std::vector<std::int32_t> as_given(at(n));
  std::iota(as_given.begin(), as_given.end(), 0);
  return sort_side_by_side<T>(p, as_given, as_given, execution, [&](std::int64_t f) {
    return Unsorted<T>{columns + f * n, rows + f * n};
  });
}

#define LCODEC_INSTANTIATE(T)                                                                     \
  template Status lay_out<T>(const T*, std::int64_t, std::int64_t, T*, T*, T*, const Execution&); \
  template Status standard_deviations<T>(const T*, std::int64_t, std::int64_t, double*,           \
                                         const Execution&);                                       \
  template Status sort_columns<T>(const T*, std::int64_t, std::int64_t, std::int32_t*,            \
                                  const Execution&);
LCODEC_INSTANTIATE(float)
LCODEC_INSTANTIATE(double)

}  // namespace lcodec
