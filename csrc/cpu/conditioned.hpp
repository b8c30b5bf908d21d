// The rows of a table given a conditioning set, as scoring sees them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/at.hpp"
#include "cpu/coded_groups.hpp"
#include "cpu/column_sort.hpp"
#include "cpu/nearest.hpp"
#include "cpu/pages.hpp"
#include "cpu/parallel.hpp"
#include "cpu/spatial.hpp"
#include "lcodec/engine.hpp"

namespace lcodec {

// Rows grouped by their values in some columns, and the tree over the groups.
template <class T>
struct Subspace {
  Groups<T> groups;
  Spatial<T> space;

  // All rows in one group.
  explicit Subspace(std::int64_t n) : groups(n) { space.build({}, {}, groups.of_row, 1); }

  // The subspace with one more column: `columns` [k + 1] are all of them, the new one last.
  Subspace refined(const std::vector<const T*>& columns, const std::vector<T>& factors) const {
    Subspace finer(groups);
    finer.groups.refine(columns.back());
    finer.space.build(columns, factors, finer.groups.of_row, finer.groups.count);
    return finer;
  }

 private:
  explicit Subspace(const Groups<T>& g) : groups(g) {}
};

template <class T>
struct Conditioned {
  using Index = std::int32_t;

  // A column in increasing order of (value, row).
  struct Sorted {
    Index* rows = nullptr;
    const T* values = nullptr;  // where a column outgrows the cache
    Coded<T> coded;
  };

  Columns<T> columns;
  TieRule rule;
  // Rows are renumbered. Where ties are averaged, they are numbered by rank: the rank sum of a run
  // then comes from prefix sums. Where a tied row is picked by its number, they keep the given
  // ones.
  std::vector<Index> order;              // [n] given row of a row
  std::vector<Index> number;             // [n] row of a given row
  std::vector<std::int32_t> rank;        // [n]
  std::vector<std::vector<T>> selected;  // values of the conditioning columns
  std::vector<T> selected_factor;
  Subspace<T> subspace;                 // up to date after place()
  std::vector<Sorted> sorted;           // [p] made by code_columns and sort_columns
  std::vector<std::uint8_t> looked_at;  // [p] by code_columns
  std::vector<Pages<Index>> row_slabs;  // memory of `sorted`
  std::vector<Pages<T>> value_slabs;

  Conditioned(const Columns<T>& c, const std::int32_t* given_rank, TieRule tie_rule)
      : columns(c),
        rule(tie_rule),
        order(at(c.n)),
        number(at(c.n)),
        rank(at(c.n)),
        subspace(c.n),
        sorted(at(c.p)),
        looked_at(at(c.p), 0) {
    if (rule.averages()) {  // ranks are 1 .. n
      std::vector<Index> start(at(c.n) + 2, 0);
      for (std::int64_t row = 0; row < c.n; ++row) ++start[at(given_rank[row]) + 1];
      std::partial_sum(start.begin(), start.end(), start.begin());
      for (std::int64_t row = 0; row < c.n; ++row)
        order[at(start[at(given_rank[row])]++)] = static_cast<Index>(row);
    } else {
      std::iota(order.begin(), order.end(), 0);
    }
    for (std::size_t row = 0; row < order.size(); ++row) {
      rank[row] = given_rank[order[row]];
      number[at(order[row])] = static_cast<Index>(row);
    }
  }

  const Spatial<T>& space() const { return subspace.space; }
  std::size_t k() const { return selected.size(); }

  T value(std::int64_t column, std::int64_t row) const {
    return columns.x[column * columns.n + order[at(row)]];
  }
  std::vector<T> values(std::int64_t column) const {
    std::vector<T> x(at(columns.n));
    for (std::int64_t row = 0; row < columns.n; ++row) x[at(row)] = value(column, row);
    return x;
  }

  // The subspace with one more column, whose values by row are x.
  Subspace<T> with(std::int64_t column, const std::vector<T>& x) {
    group();
    std::vector<const T*> all = pointers();
    all.push_back(x.data());
    std::vector<T> factors = selected_factor;
    factors.push_back(columns.factor[column]);
    return subspace.refined(all, factors);
  }

  // Adds a column. What the subspace lacks then is made when it is needed: many columns may be
  // selected before one is looked at.
  void select(std::int64_t column) {
    std::vector<T> x = values(column);
    selected_factor.reserve(k() + 1);
    selected.push_back(std::move(x));
    selected_factor.push_back(columns.factor[column]);
    placed_ = false;
  }

  // The same, with what `with` made of it.
  void select(std::int64_t column, std::vector<T> x, Subspace<T> refined) {
    selected_factor.reserve(k() + 1);
    selected.push_back(std::move(x));
    selected_factor.push_back(columns.factor[column]);
    subspace = std::move(refined);
    grouped_ = k();
    placed_ = true;
  }

  // Makes the space of all selected columns.
  void place() {
    group();
    if (placed_) return;
    subspace.space.build(pointers(), selected_factor, subspace.groups.of_row,
                         subspace.groups.count);
    placed_ = true;
  }

  // The wanted ones of some columns, each once.
  template <class Wanted>
  static std::vector<std::int64_t> distinct(std::vector<std::int64_t> some, const Wanted& wanted) {
    std::erase_if(some, [&](std::int64_t column) { return !wanted(column); });
    std::sort(some.begin(), some.end());
    some.erase(std::unique(some.begin(), some.end()), some.end());
    return some;
  }

  // Finds the columns of few distinct values among the candidates, where ranks are averaged.
  Status code_columns(const std::int64_t* candidate, std::int64_t m, const Execution& execution) {
    if (!rule.averages()) return Status::ok;
    const auto missing = distinct({candidate, candidate + m},
                                  [&](std::int64_t column) { return looked_at[at(column)] == 0; });
    return parallel_for(static_cast<std::int64_t>(missing.size()), execution, [&] {
      return [&](std::int64_t piece) {
        const std::int64_t column = missing[at(piece)];
        sorted[at(column)].coded = Coded<T>::of(at(columns.n), [&](std::size_t row) {
          return value(column, static_cast<std::int64_t>(row));
        });
        looked_at[at(column)] = 1;
      };
    });
  }

  // Sorts those of the candidates that have not been sorted yet.
  Status sort_columns(const std::vector<std::int64_t>& candidates, const Execution& execution) {
    const auto missing =
        distinct(candidates, [&](std::int64_t column) { return !sorted[at(column)].rows; });
    if (missing.empty()) return Status::ok;
    Index* slab = row_slabs.emplace_back(missing.size() * at(columns.n)).data();
    const auto m = static_cast<std::int64_t>(missing.size());
    const auto look = [&](std::int64_t a) {
      const std::int64_t column = missing[at(a)];
      const Coded<T>& coded = sorted[at(column)].coded;
      Index* rows = slab + a * columns.n;
      if (coded.code.empty() && !columns.sorted_rows)
        return Unsorted<T>{columns.x + column * columns.n, rows};
      if (coded.code.empty())
        renumber(column, rows);
      else
        coded.sort(rows);
      return Unsorted<T>{};
    };
    const Status status = sort_side_by_side<T>(m, order, number, execution, look);
    if (status != Status::ok) return status;
    for (std::int64_t a = 0; a < m; ++a) sorted[at(missing[at(a)])].rows = slab + a * columns.n;
    if (columns.n <= ColumnSorter<T>::kMostLaneRows) return status;
    T* values = value_slabs.emplace_back(missing.size() * at(columns.n)).data();
    return parallel_for(m, execution, [&] {
      return [&](std::int64_t a) {
        Sorted& result = sorted[at(missing[at(a)])];
        T* own = values + a * columns.n;
        for (std::int64_t t = 0; t < columns.n; ++t) own[t] = value(missing[at(a)], result.rows[t]);
        result.values = own;
      };
    });
  }

  // The order that is known of the given rows, in the rows here. Those of equal value change
  // places.
  void renumber(std::int64_t column, Index* rows) const {
    const Index* given = columns.sorted_rows + column * columns.n;
    const T* x = columns.x + column * columns.n;
    for (std::int64_t a = 0; a < columns.n; ++a) rows[a] = number[at(given[a])];
    for (std::int64_t a = 0, b = 0; a < columns.n; a = b) {
      while (b < columns.n && x[given[b]] == x[given[a]]) ++b;
      if (b - a > 1) std::sort(rows + a, rows + b);
    }
  }

  // All rows nearest to one in the conditioning set and a sorted column; the nearest is known to be
  // within `best`. Goes along the column's order until the column alone is farther. False beyond
  // kAlong rows.
  bool nearest_along(std::int64_t column, Index own, T best, std::vector<Index>& nearest) const {
    const Index* rows = sorted[at(column)].rows;
    const T* values = sorted[at(column)].values;
    const auto value_at = [&](std::int64_t t) {
      return values ? values[t] : value(column, rows[t]);
    };
    const T x = value(column, own);
    const T c = columns.factor[column];
    std::int64_t here = 0;
    for (std::int64_t end = columns.n; here < end;) {
      const std::int64_t middle = here + (end - here) / 2;
      if (value_at(middle) < x) {
        here = middle + 1;
      } else {
        end = middle;
      }
    }
    nearest.clear();
    std::int64_t left = kAlong;
    for (const std::int64_t step : {-1, 1}) {
      for (std::int64_t t = here - (step < 0); 0 <= t && t < columns.n; t += step) {
        const T scaled = (x - value_at(t)) * c;
        if (scaled * scaled > best) break;
        if (--left < 0) return false;
        const Index row = rows[t];
        T distance = 0;
        for (std::size_t d = 0; d < selected.size(); ++d) {
          const T part = (selected[d][at(own)] - selected[d][at(row)]) * selected_factor[d];
          distance = distance + part * part;
        }
        distance = distance + scaled * scaled;
        if (row == own || distance > best) continue;
        if (distance < best) {
          best = distance;
          nearest.clear();
        }
        nearest.push_back(row);
      }
    }
    return true;
  }

  // Of tied rows, the rank sum of the one that the tie rule takes.
  std::int64_t take(std::vector<Index>& tied, Index own) const {
    const auto k =
        static_cast<std::ptrdiff_t>(rule.taken(own, static_cast<std::int64_t>(tied.size())));
    std::nth_element(tied.begin(), tied.begin() + k, tied.end());
    return std::min(rank[at(tied[at(k)])], rank[at(own)]);
  }

 private:
  // Groups rows by all selected columns.
  void group() {
    for (; grouped_ < k(); ++grouped_) subspace.groups.refine(selected[grouped_].data());
  }

  std::vector<const T*> pointers() const {
    std::vector<const T*> all;
    for (const auto& values_of : selected) all.push_back(values_of.data());
    return all;
  }

  std::size_t grouped_ = 0;  // selected columns that rows are grouped by
  bool placed_ = true;       // whether the space is that of all selected columns

  // Rows looked at along a candidate's order before a longer list is tried instead.
  static constexpr std::int64_t kAlong = 256;
};

}  // namespace lcodec
