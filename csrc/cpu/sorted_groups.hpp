// Scoring by sorting: for rows that share their values in the conditioning set with many others.
//
// Inside such a group a row's nearest neighbours are next to it in the candidate's order, and the
// rank sum of a run of equal values comes from prefix sums. Rows of other groups matter only
// where their group lies no farther than the best inside; they are found by the tree and by
// bisection. O(n) for a candidate after the sort, and O(log n) for each row in doubt.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/fixed_point.hpp"
#include "cpu/at.hpp"
#include "cpu/nearest.hpp"
#include "cpu/spatial.hpp"

namespace lcodec {

template <class T>
class SortedGroups {
 public:
  using Index = std::int32_t;

  SortedGroups(const Kernels<T>& kernels, const Spatial<T>& space, const std::int32_t* rank,
               TieRule rule)
      : kernels_(kernels), space_(space), rank_(rank), rule_(rule) {}

  // Sorts all rows by (point, value_of_row(row) of the candidate, row). They are given by (value,
  // row).
  template <class Value>
  void sort(const Index* rows, std::int64_t n, T factor, const Value& value_of_row) {
    factor_ = factor;
    row_.resize(at(n));
    value_store_.resize(at(n) + kBefore + kBeyond);
    rank_store_.resize(at(n) + kBefore + kBeyond);
    flag_.resize(at(n) + kBeyond);
    // infinities: the ends of the column have no neighbours
    T* value_of = value_store_.data() + kBefore;
    std::int32_t* rank_of = rank_store_.data() + kBefore;
    std::fill(value_store_.begin(), value_store_.begin() + kBefore,
              -std::numeric_limits<T>::infinity());
    std::fill(value_store_.end() - kBeyond, value_store_.end(), std::numeric_limits<T>::infinity());
    cursor_.assign(space_.offsets().begin(), space_.offsets().end() - 1);
    const bool one = space_.size() == 1;
    for (std::int64_t a = 0; a < n; ++a) {
      const Index row = rows[a];
      const std::size_t t = at(one ? static_cast<Index>(a) : cursor_[at(space_.point_of(row))]++);
      row_[t] = row;
      value_of[t] = value_of_row(row);
      rank_of[t] = rank_[row];
    }
    runs_ready_ = false;
  }

  // Adds up the rows of a group: add(total), most of them many at once. `gap`: squared distance to
  // the nearest other group.
  template <class Add>
  void score(Index point, T gap, const Add& add) {
    const std::int64_t begin = space_.begin(point);
    const std::int64_t end = space_.end(point);
    // Next to the first and the last two rows of a group are rows of other groups.
    const std::int64_t edge = space_.size() == 1 ? 0 : std::min<std::int64_t>(2, end - begin);
    if (end - begin > 2 * edge)
      add(FixedPoint{kernels_.adjacent(
                         {begin + edge, end - edge, value(), rank(), factor_, gap, flag_.data()}),
                     0});
    for (std::int64_t t = 0; t < edge; ++t) flag_[at(begin + t)] = flag_[at(end - 1 - t)] = 1;
    for (std::int64_t t = begin; t < end;) {
      if (!flag_[at(t)]) {
        ++t;
      } else if (!runs_ready_ && rule_.averages() && t + 2 < end && value()[t] == value()[t + 2]) {
        make_runs();
      } else if (runs_ready_ && rule_.averages() && t == run_begin_[at(t)] &&
                 run_end_[at(t)] - t > 2 && alone(point, t, gap)) {
        add(run_total(t, run_end_[at(t)]));
        t = run_end_[at(t)];
      } else {
        add(closer(point, t++, gap));
      }
    }
  }

 private:
  static constexpr std::size_t kBefore = 2;
  const T* value() const { return value_store_.data() + kBefore; }
  const std::int32_t* rank() const { return rank_store_.data() + kBefore; }

  // Runs of equal value inside a point, and prefix sums of ranks: needed for rows in doubt only.
  void make_runs() {
    const std::size_t n = row_.size();
    run_begin_.resize(n);
    run_end_.resize(n);
    prefix_.resize(n + 1);
    prefix_[0] = 0;
    for (std::size_t t = 0; t < n; ++t) prefix_[t + 1] = prefix_[t] + rank()[t];
    for (Index point = 0; point < space_.size(); ++point) {
      std::int64_t begin = space_.begin(point);
      for (std::int64_t t = begin; t < space_.end(point); ++t) {
        if (value()[t] != value()[begin]) begin = t;
        run_begin_[at(t)] = static_cast<Index>(begin);
      }
      std::int64_t end = space_.end(point);
      for (std::int64_t t = end - 1; t >= space_.begin(point); --t) {
        if (value()[t] != value()[end - 1]) end = t + 1;
        run_end_[at(t)] = static_cast<Index>(end);
      }
    }
    runs_ready_ = true;
  }

  // Whether the rows of the run that begins at t are nearest to each other and to no other row.
  bool alone(Index point, std::int64_t t, T gap) const {
    const T x = value()[t];
    const std::int64_t end = run_end_[at(t)];
    return gap > 0 && (t == space_.begin(point) || distance(T{0}, x, t - 1) > 0) &&
           (end == space_.end(point) || distance(T{0}, x, end) > 0);
  }

  // Sum over the rows of a run of the mean of min(R_i, R_j) over the others; ranks ascend.
  FixedPoint run_total(std::int64_t begin, std::int64_t end) const {
    const FixedPointQuotient mean_of(end - begin - 1);
    FixedPoint total{0, 0};
    std::int64_t below = 0;
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t own = rank()[t];
      const FixedPoint mean = mean_of(below + (end - 1 - t) * own);
      total.whole += mean.whole;
      total.fraction += mean.fraction;
      below += own;
    }
    return total;
  }

  T distance(T base, T x, std::int64_t t) const {
    const T scaled = (x - value()[t]) * factor_;
    return base + scaled * scaled;
  }

  // Runs to the left (below `from`) or right (from `from` on) that are as near as the best so far.
  void extend(T base, T x, std::int64_t begin, std::int64_t end, std::int64_t from, bool left) {
    for (std::int64_t t = left ? from - 1 : from; t >= begin && t < end;
         t = left ? run_begin_[at(t)] - 1 : run_end_[at(t)]) {
      const T v = distance(base, x, t);
      if (v > best_) return;
      if (v < best_) {
        best_ = v;
        tied_.clear();
      }
      tied_.push_back({run_begin_[at(t)], run_end_[at(t)]});
    }
  }

  // One row, looked at closely.
  FixedPoint closer(Index point, std::int64_t t, T gap) {
    if (!runs_ready_) make_runs();
    const T x = value()[t];
    best_ = std::numeric_limits<T>::infinity();
    tied_.clear();
    if (run_end_[at(t)] - run_begin_[at(t)] > 1) {
      best_ = distance(T{0}, x, t);
      tied_.push_back({run_begin_[at(t)], run_end_[at(t)]});
    }
    extend(T{0}, x, space_.begin(point), space_.end(point), run_begin_[at(t)], true);
    extend(T{0}, x, space_.begin(point), space_.end(point), run_end_[at(t)], false);
    if (gap <= best_)
      space_.within(
          kernels_, point, [&] { return best_; },
          [&](Index other, T base) {
            const T* values = value();
            const std::int64_t begin = space_.begin(other);
            const std::int64_t end = space_.end(other);
            const std::int64_t from = std::lower_bound(values + begin, values + end, x) - values;
            extend(base, x, begin, end, from, true);
            extend(base, x, begin, end, from, false);
          });
    std::int64_t count = 0;
    for (const Range& range : tied_) count += range.end - range.begin;
    const bool self = run_end_[at(t)] - run_begin_[at(t)] > 1 && holds(t);
    count -= self;
    const Index own = row_[at(t)];
    if (const std::int64_t k = rule_.taken(own, count); k != TieRule::kAll)
      return {std::min(rank_[own], rank_[kth_row(tied_, row_.data(), k, own)]), 0};
    std::int64_t sum = 0;
    for (const Range& range : tied_) {  // ranks ascend inside a run
      if (range.begin <= t && t < range.end) {
        sum += prefix_[at(t)] - prefix_[at(range.begin)] + (range.end - t) * rank_[own];
        continue;
      }
      const std::int32_t* ranks = rank();
      const std::int32_t* middle =
          std::lower_bound(ranks + range.begin, ranks + range.end, rank_[own]);
      const std::int64_t above = ranks + range.end - middle;
      sum += prefix_[at(middle - ranks)] - prefix_[at(range.begin)] + above * rank_[own];
    }
    if (self) sum -= rank_[own];
    return fixed_point(sum, count);
  }

  bool holds(std::int64_t t) const {
    for (const Range& range : tied_)
      if (range.begin <= t && t < range.end) return true;
    return false;
  }

  const Kernels<T>& kernels_;
  const Spatial<T>& space_;
  const std::int32_t* rank_;
  TieRule rule_;
  T factor_{0};
  std::vector<Index> row_, run_begin_, run_end_, cursor_;
  std::vector<T> value_store_;            // kBefore, [n] in sorted order, kBeyond
  std::vector<std::int32_t> rank_store_;  // the same
  std::vector<std::int64_t> prefix_;
  std::vector<std::uint8_t> flag_;
  bool runs_ready_ = false;
  T best_{0};
  std::vector<Range> tied_;
};

}  // namespace lcodec
