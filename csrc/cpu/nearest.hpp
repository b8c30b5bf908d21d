// The rows nearest to every row, with all ties: the k-d tree in few columns, all rows in many.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "common/random.hpp"
#include "cpu/at.hpp"
#include "cpu/parallel.hpp"
#include "cpu/radix_sort.hpp"
#include "cpu/screen.hpp"
#include "cpu/spatial.hpp"

namespace lcodec {

// More columns than this are searched by comparing all rows: boxes prune little there.
constexpr std::int64_t kTreeColumns = 12;

// Whether rows are searched in a tree; building one takes longer than comparing a few rows.
inline bool tree_pays(std::int64_t n, std::int64_t columns) {
  return n >= kFewRows && columns <= kTreeColumns;
}

// Rows with equal values in all columns so far have equal group numbers.
template <class T>
struct Groups {
  std::vector<std::int32_t> of_row;
  std::int32_t count = 1;

  explicit Groups(std::int64_t n) : of_row(static_cast<std::size_t>(n), 0) {}

  // Splits groups by a further column [n]. O(n).
  void refine(const T* column) {
    const std::size_t n = of_row.size();
    std::vector<SortWord<T>> words(n);
    std::vector<SortWord<T>> spare;
    for (std::size_t row = 0; row < n; ++row)
      words[row] = {sort_key(column[row]), static_cast<std::int32_t>(row)};
    radix_sort<T>(words, spare);
    const auto group = [&](const SortWord<T>& word) {
      return of_row[static_cast<std::size_t>(word.row)];
    };
    std::vector<std::size_t> start(static_cast<std::size_t>(count) + 1, 0);
    for (const std::int32_t g : of_row) ++start[static_cast<std::size_t>(g) + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    spare.resize(n);
    for (const auto& word : words) spare[start[static_cast<std::size_t>(group(word))]++] = word;
    std::vector<std::int32_t> finer(n);
    std::int32_t number = -1;
    for (std::size_t t = 0; t < n; ++t) {
      number +=
          t == 0 || spare[t].key != spare[t - 1].key || group(spare[t]) != group(spare[t - 1]);
      finer[static_cast<std::size_t>(spare[t].row)] = number;
    }
    of_row = std::move(finer);
    count = number + 1;
  }
};

// Places [begin, end) of an array of rows, in which they are in increasing order.
struct Range {
  std::int64_t begin, end;
};

// The k-th row of all ranges, in increasing order and without `own`: bisection over row numbers.
inline std::int32_t kth_row(const std::vector<Range>& ranges, const std::int32_t* rows,
                            std::int64_t k, std::int32_t own) {
  std::int32_t low = std::numeric_limits<std::int32_t>::max();
  std::int32_t high = 0;
  for (const Range& range : ranges) {
    low = std::min(low, rows[range.begin]);
    high = std::max(high, rows[range.end - 1]);
  }
  while (low < high) {
    const std::int32_t middle = low + (high - low) / 2;
    std::int64_t below = 0;
    for (const Range& range : ranges) {
      const std::int32_t* first = rows + range.begin;
      const std::int32_t* bound = std::upper_bound(first, rows + range.end, middle);
      below += bound - first;
      if (own <= middle && std::binary_search(first, bound, own)) --below;
    }
    if (below > k) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Which of a row's tied neighbours are used.
struct TieRule {
  static constexpr std::int64_t kAll = -1;

  Ties ties;
  std::uint64_t seed;

  bool averages() const { return ties == Ties::average; }
  // The one to take of `count`, in increasing order, or kAll.
  std::int64_t taken(std::int64_t row, std::int64_t count) const {
    if (averages()) return kAll;
    return ties == Ties::first ? 0 : pick(tie_hash(seed, row), count);
  }
};

// The rows nearest to one: those in `ranges` of `rows`, except the row itself if it is among them.
struct Nearest {
  const std::int32_t* rows;
  const std::vector<Range>& ranges;
  std::int64_t count;  // without the row itself
};

// Sums of min(rank_i, rank_j) over the rows j of a point, where rows are numbered by rank: ranks
// then ascend inside a point, and a sum comes from prefix sums.
template <class T>
class RankSums {
 public:
  RankSums(const Spatial<T>& space, const std::int32_t* rank)
      : space_(space), rank_(rank), prefix_(at(space.rows_in_all()) + 1, 0) {
    for (std::int64_t t = 0; t < space.rows_in_all(); ++t)
      prefix_[at(t) + 1] = prefix_[at(t)] + rank[space.row(t)];
  }

  // Of the places `range`, which are those of a point, for row i = own without itself.
  std::int64_t operator()(const Range& range, std::int32_t own) const {
    const std::int32_t* rows = space_.rows();
    if (range.end - range.begin == 1)
      return rows[range.begin] == own ? 0 : std::min(rank_[own], rank_[rows[range.begin]]);
    const std::int32_t* middle =
        std::partition_point(rows + range.begin, rows + range.end,
                             [&](std::int32_t row) { return rank_[row] < rank_[own]; });
    const std::int64_t sum = prefix_[at(middle - rows)] - prefix_[at(range.begin)] +
                             (rows + range.end - middle) * rank_[own];
    const bool itself = range.begin == space_.begin(space_.point_of(own));
    return itself ? sum - rank_[own] : sum;
  }

 private:
  const Spatial<T>& space_;
  const std::int32_t* rank_;
  std::vector<std::int64_t> prefix_;
};

// Calls report(row, nearest) for every row, with a report = make_report() of each thread.
// About O(log n) a row, also with outliers; O(n) at worst.
template <class T, class MakeReport>
Status nearest_by_tree(const Spatial<T>& space, const Kernels<T>& kernels,
                       const Execution& execution, const MakeReport& make_report) {
  constexpr std::int64_t block = 256;
  const std::int64_t n = space.rows_in_all();
  // Where no other point is at distance 0, rows with twins need no search. Where points are few, it
  // pays to find out.
  bool apart = space.size() <= n / 16;
  if (apart) {
    const DefaultFloats floats;
    for (std::int32_t point = 0; point < space.size() && apart; ++point)
      apart = space.nearest(kernels, point) > 0;
  }
  return parallel_for((n + block - 1) / block, execution, [&] {
    return [&, report = make_report(), tied = std::vector<Range>()](std::int64_t piece) mutable {
      for (std::int64_t a = piece * block; a < std::min(n, (piece + 1) * block); ++a) {
        const std::int32_t own = space.row(a);
        const std::int32_t self = space.point_of(own);
        const std::int64_t twins = space.end(self) - space.begin(self) - 1;
        T best = twins > 0 ? T{0} : std::numeric_limits<T>::infinity();
        std::int64_t count = twins;
        tied.clear();
        if (twins > 0) tied.push_back({space.begin(self), space.end(self)});
        if (!apart || twins == 0)
          space.within(
              kernels, self, [&] { return best; },
              [&](std::int32_t point, T distance) {
                if (distance < best) {
                  best = distance;
                  tied.clear();
                  count = 0;
                }
                tied.push_back({space.begin(point), space.end(point)});
                count += space.end(point) - space.begin(point);
              });
        report(own, Nearest{space.rows(), tied, count});
      }
    };
  });
}

// Distances of one row from some others, the rows of which are null where they are from all, the
// row itself included.
template <class T>
struct Distances {
  const T* distance;
  const std::int32_t* rows;
  std::int64_t size;

  std::int32_t row(std::int64_t a) const { return rows ? rows[a] : static_cast<std::int32_t>(a); }
};

// The columns x[f] [n] of all rows, and what compares them.
template <class T>
struct Rows {
  const std::vector<const T*>& x;
  const std::vector<T>& factor;
  std::int64_t n;
  const Kernels<T>& kernels;
};

// Calls report for the rows `wanted`, with their distances from all. O(n) each and a column.
template <class T, class MakeReport>
Status compare_with_all(const Rows<T>& all, const std::vector<std::int32_t>& wanted,
                        const Execution& execution, const MakeReport& make_report) {
  const auto size = static_cast<std::int64_t>(wanted.size());
  return parallel_for((size + kRows - 1) / kRows, execution, [&] {
    return [&, report = make_report(),
            distance = std::vector<T>(at(kRows * all.n))](std::int64_t piece) mutable {
      const std::int64_t n = all.n;
      std::int64_t rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = wanted[at(std::min(piece * kRows + r, size - 1))];
      std::fill(distance.begin(), distance.end(), T{0});
      for (std::size_t f = 0; f < all.x.size(); ++f)
        all.kernels.accumulate(all.x[f], n, rows, all.factor[f], distance.data());
      for (int r = 0; r < kRows && piece * kRows + r < size; ++r)
        report(static_cast<std::int32_t>(rows[r]),
               Distances<T>{distance.data() + r * n, nullptr, n});
    };
  });
}

// Calls report for the rows of which the screen left few others. O(1) each and a column.
template <class T, class MakeReport>
Status compare_with_few(const Rows<T>& all, const Screen<T>& screen, const Execution& execution,
                        const MakeReport& make_report) {
  constexpr std::int64_t block = 64;
  return parallel_for((all.n + block - 1) / block, execution, [&] {
    return [&, report = make_report(), few = std::vector<std::int32_t>(), query = std::vector<T>(),
            points = std::vector<T>()](std::int64_t piece) mutable {
      for (std::int64_t own = piece * block; own < std::min(all.n, (piece + 1) * block); ++own) {
        if (screen.all(own)) continue;
        screen.candidates(own, few);
        T distance[Screen<T>::kMost] = {};
        const auto size = static_cast<std::int64_t>(few.size());
        if (size > 1) {  // one row needs no distance
          query.clear();
          points.clear();
          for (const T* column : all.x) {
            query.push_back(column[own]);
            for (const std::int32_t row : few) points.push_back(column[row]);
          }
          all.kernels.distances(points.data(), size, size, static_cast<std::int64_t>(query.size()),
                                query.data(), all.factor.data(), distance);
        }
        report(static_cast<std::int32_t>(own), Distances<T>{distance, few.data(), size});
      }
    };
  });
}

// Calls report(row, distances) for every row in any number of columns x[f] [n], with a report =
// make_report() of each thread: among the distances are those of the k nearest rows and of all rows
// tied with them. O(n^2) a column.
template <class T, class MakeReport>
Status compare_rows(const std::vector<const T*>& x, const std::vector<T>& factor, std::int64_t n,
                    std::int64_t k, const Kernels<T>& kernels, const Execution& execution,
                    const MakeReport& make_report) {
  const Rows<T> all{x, factor, n, kernels};
  std::vector<std::int32_t> wanted;
  if (Screen<T>::pays(n, static_cast<std::int64_t>(x.size()), k)) {
    Screen<T> screen(x, factor, n, k, execution);
    if (screen.run() != Status::ok ||
        compare_with_few(all, screen, execution, make_report) != Status::ok)
      return Status::cancelled;
    for (std::int32_t row = 0; row < n; ++row)
      if (screen.all(row)) wanted.push_back(row);
  } else {
    wanted.resize(at(n));
    std::iota(wanted.begin(), wanted.end(), 0);
  }
  return compare_with_all(all, wanted, execution, make_report);
}

// The same as nearest_by_tree in any number of columns.
template <class T, class MakeReport>
Status nearest_of_all(const std::vector<const T*>& x, const std::vector<T>& factor, std::int64_t n,
                      const Kernels<T>& kernels, const Execution& execution,
                      const MakeReport& make_report) {
  return compare_rows(x, factor, n, 1, kernels, execution, [&] {
    return [&, report = make_report(), tied = std::vector<std::int32_t>(),
            ranges = std::vector<Range>(1)](std::int32_t own, Distances<T> others) mutable {
      const T least = kernels.minimum(others.distance, others.size, others.rows ? -1 : own);
      tied.clear();
      for (std::int64_t a = 0; a < others.size; ++a)
        if (others.distance[a] == least && others.row(a) != own) tied.push_back(others.row(a));
      ranges[0] = {0, static_cast<std::int64_t>(tied.size())};
      report(own, Nearest{tied.data(), ranges, ranges[0].end});
    };
  });
}

}  // namespace lcodec
