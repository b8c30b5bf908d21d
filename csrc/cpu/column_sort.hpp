// Sorting the rows of many columns by (value, row).
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/at.hpp"
#include "cpu/kernels.hpp"
#include "cpu/lane_sort.hpp"
#include "cpu/pages.hpp"
#include "cpu/parallel.hpp"
#include "cpu/radix_sort.hpp"
#include "lcodec/engine.hpp"

namespace lcodec {

// Sorts up to width() columns of n rows at a time. Rows are renumbered: row r is the given row
// order[r], and number[order[r]] = r. Each thread has one.
template <class T>
class ColumnSorter {
 public:
  using Index = std::int32_t;

  ColumnSorter(SimdLevel level, const std::vector<Index>& order, const std::vector<Index>& number)
      : kernels_(pick_kernels<T>(level)),
        lanes_(lane_sort_for(level)),
        order_(order),
        number_(number),
        n_(static_cast<std::int64_t>(order.size())) {
    if (width() == 1) return;
    size_ = std::max(kLeastLaneRows, static_cast<std::int64_t>(std::bit_ceil(at(n_))));
    sorted_ = Pages<std::int32_t>(at(size_ * lanes_.lanes));
    std::fill_n(sorted_.data(), size_ * lanes_.lanes, kLargest);
  }

  static constexpr std::int64_t kMostLaneRows = 8192;

  // Longer columns leave too few bits for their values, and vectors of them outgrow the cache.
  static std::int64_t width(SimdLevel level, std::int64_t n) {
    return n <= kMostLaneRows ? lane_sort_for(level).lanes : 1;
  }

  // rows[c] [n]: the rows of column x[c] [n] in increasing order of (value, row).
  void sort(const std::vector<const T*>& x, const std::vector<Index*>& rows) {
    std::vector<std::uint8_t> by_lane(x.size(), 0);
    if (width() > 1) {
      for (std::size_t c = 0; c < x.size(); ++c) by_lane[c] = fill(x[c], sorted_.data() + c);
      lanes_.sort(sorted_.data(), size_, n_);
    }
    for (std::size_t c = 0; c < x.size(); ++c)
      if (!by_lane[c] || !take(sorted_.data() + c, x[c], rows[c])) sort_one(x[c], rows[c]);
  }

 private:
  static constexpr std::int32_t kLargest = std::numeric_limits<std::int32_t>::max();

  std::int64_t width() const { return n_ <= kMostLaneRows ? lanes_.lanes : 1; }
  int number_bits() const { return static_cast<int>(std::bit_width(at(n_ - 1))); }

  // False for a column whose values have no common scale.
  bool fill(const T* x, std::int32_t* words) const {
    T low, high;
    kernels_.range(x, n_, &low, &high);
    std::array<T, 5> some = {x[0], x[n_ / 4], x[n_ / 2], x[n_ - 1 - n_ / 4], x[n_ - 1]};
    std::nth_element(some.begin(), some.begin() + 2, some.end());
    const T center = some[2];
    const T scale = 1 / std::max(high - center, center - low);
    if (!(scale > 0 && std::isfinite(scale))) return false;
    lanes_.fill({x, center, scale, number_.data(), n_, number_bits(), words});
    return true;
  }

  // The rows of a lane's words, those of nearly equal values put right. False where these are many.
  bool take(const std::int32_t* words, const T* x, Index* rows) const {
    const std::int32_t mask = (std::int32_t{1} << number_bits()) - 1;
    const auto value = [&](Index row) { return x[order_[at(row)]]; };
    std::int64_t moves = 0;
    T last = -std::numeric_limits<T>::infinity();
    for (std::int64_t a = 0; a < n_; ++a) {
      const Index row = words[a * lanes_.lanes] & mask;
      const T here = value(row);
      std::int64_t b = a;
      if (here < last) {
        for (; b > 0 && value(rows[b - 1]) > here; --b) rows[b] = rows[b - 1];
        moves += a - b;
        if (moves > n_) return false;
      } else {
        last = here;
      }
      rows[b] = row;
    }
    return true;
  }

  void sort_one(const T* x, Index* rows) {
    words_.resize(at(n_));
    for (std::int64_t row = 0; row < n_; ++row)
      words_[at(row)] = {sort_key(x[order_[at(row)]]), static_cast<Index>(row)};
    radix_sort<T>(words_, spare_);
    for (std::size_t a = 0; a < words_.size(); ++a) rows[a] = words_[a].row;
  }

  Kernels<T> kernels_;
  LaneSort lanes_;
  const std::vector<Index>& order_;
  const std::vector<Index>& number_;
  std::int64_t n_;
  std::int64_t size_ = 0;
  Pages<std::int32_t> sorted_;  // [size][lanes]
  std::vector<SortWord<T>> words_, spare_;
};

// A column x [n] to sort and where its rows go; no x where nothing is to be done.
template <class T>
struct Unsorted {
  const T* x = nullptr;
  std::int32_t* rows = nullptr;
};

// Sorts the columns column_of(0) .. column_of(m - 1), each of them an Unsorted<T>, on all threads.
template <class T, class ColumnOf>
Status sort_side_by_side(std::int64_t m, const std::vector<std::int32_t>& order,
                         const std::vector<std::int32_t>& number, const Execution& execution,
                         const ColumnOf& column_of) {
  const auto n = static_cast<std::int64_t>(order.size());
  const std::int64_t width = ColumnSorter<T>::width(execution.level, n);
  return parallel_for((m + width - 1) / width, execution, [&] {
    return
        [&, sorter = ColumnSorter<T>(execution.level, order, number), x = std::vector<const T*>(),
         rows = std::vector<std::int32_t*>()](std::int64_t piece) mutable {
          x.clear();
          rows.clear();
          for (std::int64_t a = piece * width; a < std::min(m, (piece + 1) * width); ++a) {
            const Unsorted<T> column = column_of(a);
            if (!column.x) continue;
            x.push_back(column.x);
            rows.push_back(column.rows);
          }
          if (!x.empty()) sorter.sort(x, rows);
        };
  });
}

}  // namespace lcodec
