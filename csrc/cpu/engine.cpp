#include "lcodec/engine.hpp"

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "common/fixed_point.hpp"
#include "conditioned.hpp"
#include "scanner.hpp"
#include "sorted_groups.hpp"

namespace lcodec {
namespace {

using Index = std::int32_t;

// Groups of at least this many identical rows may be scored by sorting.
constexpr std::int64_t kBigGroup = 64;
// Sorting costs about as much for each row as scanning this many neighbours.
constexpr std::int64_t kSortCost = 128;
// Packed candidates in memory at a time.
constexpr std::int64_t kPackedBytes = std::int64_t{1} << 28;
// So few candidates are searched in a tree of their own: a tile costs as much for one as for all.
constexpr std::int64_t kFewCandidates = 4;
// Shares of the rows, those of the highest ranks first, after which candidates that can no longer
// win are left out. A row adds at most its rank, so that what a share u of the lowest ones may
// still bring is small, about u^3 of what all can.
constexpr std::array<double, 10> kBands = {0.25,   0.3125, 0.375, 0.4375, 0.5,
                                           0.5625, 0.625,  0.75,  0.875,  1.0};

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

// A sum in fixed point whose parts may be added in any order.
struct Total {
  std::int64_t whole = 0;
  std::int64_t fraction = 0;
  void add(const FixedPoint& part) {
    whole += part.whole;
    fraction += part.fraction;
  }
  // At most the exact sum, and less than two below it.
  std::int64_t floor() const { return whole + (fraction >> kFractionBits); }
};

}  // namespace

template <class T>
struct Engine<T>::State {
  Conditioned<T> given;
  Scanner<T> scanner;
  bool prepared = false;
  bool sorting = false;          // big groups are scored by sorting
  std::vector<Index> positions;  // of the other rows, by place in the tree
  // The subspace with the column that was looked at last: when that is selected, it is there.
  std::int64_t ahead_column = -1;
  std::vector<T> ahead_values;
  Subspace<T> ahead;

  State(const Columns<T>& columns, const std::int32_t* rank, TieRule rule)
      : given(columns, rank, rule), scanner(given), ahead(columns.n) {}

  const Spatial<T>& space() const { return given.space(); }

  bool by_sorting(Index point) const {
    return sorting && (given.k() == 0 || space().end(point) - space().begin(point) >= kBigGroup);
  }

  void look_ahead(std::int64_t column) {
    if (ahead_column == column) return;
    const DefaultFloats floats;
    ahead_column = -1;  // should memory run out
    ahead_values = given.values(column);
    ahead = given.with(column, ahead_values);
    ahead_column = column;
  }

  void select(std::int64_t column) {
    look_ahead(column);
    given.select(column, std::move(ahead_values), std::move(ahead));
    ahead_column = -1;
    prepared = false;
  }

  void prepare() {
    if (prepared) return;
    std::int64_t scanned = 0;
    for (Index point = 0; point < space().size(); ++point) {
      const std::int64_t size = space().end(point) - space().begin(point);
      if (size >= kBigGroup) scanned += size * size;
    }
    sorting = given.k() == 0 || scanned > kSortCost * given.columns.n;
    positions.clear();
    for (Index position = 0; position < given.columns.n; ++position)
      if (!by_sorting(space().point_of(space().row(position)))) positions.push_back(position);
    scanner.reset();
    prepared = true;
  }

  // Rows of big groups, added to totals [m].
  Status sort_rows(const std::int64_t* candidate, std::int64_t m, Total* totals,
                   const Execution& execution) {
    const Kernels<T> kernels = pick_kernels<T>(execution.level);
    std::vector<std::pair<Index, T>> big;  // point, squared distance to the nearest other one
    for (Index point = 0; point < space().size(); ++point)
      if (by_sorting(point)) big.emplace_back(point, space().nearest(kernels, point));
    return parallel_for(m, execution, [&] {
      return [&, groups = SortedGroups<T>(kernels, space(), given.rank.data(), given.rule)](
                 std::int64_t c) mutable {
        const std::int64_t column = candidate[c];
        const auto& by_value = given.sorted[at(column)];
        groups.sort(by_value.rows.get(), by_value.values.get(), given.columns.n,
                    given.columns.factor[column]);
        for (const auto& [point, gap] : big)
          groups.score(point, gap, [&](const FixedPoint& part) { totals[c].add(part); });
      };
    });
  }

  // report(row, sum, count) for every row in the conditioning set and a column, from a
  // report = make_report() of each thread.
  template <class MakeReport>
  Status search(std::int64_t column, const Execution& execution, const MakeReport& make_report) {
    const DefaultFloats floats;
    const Kernels<T> kernels = pick_kernels<T>(execution.level);
    const std::int32_t* rank = given.rank.data();
    const auto taken = [&](Index own, const Nearest& nearest, auto& report) {
      const std::int64_t k = given.rule.taken(own, nearest.count);
      if (k == TieRule::kAll) return false;
      const Index row = kth_row(nearest.ranges, nearest.rows, k, own);
      report(own, std::int64_t{std::min(rank[own], rank[row])}, std::int64_t{1});
      return true;
    };
    const auto n = given.columns.n;
    if (static_cast<std::int64_t>(given.k()) >= kTreeColumns) {
      std::vector<const T*> x;
      for (const auto& values : given.selected) x.push_back(values.data());
      const std::vector<T> own_values = given.values(column);
      x.push_back(own_values.data());
      std::vector<T> factors = given.selected_factor;
      factors.push_back(given.columns.factor[column]);
      return nearest_of_all(x, factors, n, kernels, execution, [&] {
        return [&, report = make_report()](Index own, const Nearest& nearest) mutable {
          if (taken(own, nearest, report)) return;
          std::int64_t sum = 0;
          for (std::int64_t t = 0; t < nearest.count; ++t)
            sum += std::min(rank[own], rank[nearest.rows[t]]);
          report(own, sum, nearest.count);
        };
      });
    }
    look_ahead(column);
    // Ranks ascend inside a point, so that its rank sum comes from prefix sums.
    const Index* rows = ahead.space.rows();
    std::vector<std::int64_t> prefix(at(n) + 1, 0);
    for (std::int64_t t = 0; t < n; ++t) prefix[at(t) + 1] = prefix[at(t)] + rank[rows[t]];
    return nearest_by_tree(ahead.space, kernels, execution, [&] {
      return [&, report = make_report()](Index own, const Nearest& nearest) mutable {
        if (taken(own, nearest, report)) return;
        std::int64_t sum = 0;
        for (const Range& range : nearest.ranges) {
          if (range.end - range.begin == 1) {
            sum += std::min(rank[own], rank[rows[range.begin]]);
            continue;
          }
          const Index* middle =
              std::partition_point(rows + range.begin, rows + range.end,
                                   [&](Index row) { return rank[row] < rank[own]; });
          sum += prefix[at(middle - rows)] - prefix[at(range.begin)] +
                 (rows + range.end - middle) * rank[own];
          const Index self = ahead.space.point_of(own);
          if (range.begin == ahead.space.begin(self)) sum -= rank[own];
        }
        report(own, sum, nearest.count);
      };
    });
  }

  Status total(std::int64_t column, Total& result, const Execution& execution) {
    result = Total{};
    std::mutex mutex;
    return search(column, execution, [&] {
      return [sum = Shared(&result, 1, mutex)](Index, std::int64_t s, std::int64_t count) mutable {
        sum.own[0].add(fixed_point(s, count));
      };
    });
  }

  // Totals that a thread adds up on its own, and to those of all when it ends.
  struct Shared {
    std::vector<Total> own;
    Total* all;
    std::mutex* mutex;
    Shared(Total* totals, std::size_t m, std::mutex& lock) : own(m), all(totals), mutex(&lock) {}
    Shared(Shared&& other) = default;
    ~Shared() {
      if (own.empty()) return;  // moved from
      const std::lock_guard<std::mutex> lock(*mutex);
      for (std::size_t c = 0; c < own.size(); ++c) all[c].add({own[c].whole, own[c].fraction});
    }
  };

  // The rows at `some` positions, added to totals [m] of the packed candidates.
  Status scan(const std::vector<Index>& some, const std::vector<std::uint8_t>& alive, Total* totals,
              const Execution& execution) {
    std::mutex mutex;
    return scanner.scan(some, alive, execution, [&] {
      return [sums = Shared(totals, alive.size(), mutex)](
                 std::int64_t c, std::int64_t used, Index, const std::int64_t* sum,
                 const std::int64_t* count, bool unique) mutable {
        Total* own = sums.own.data() + c;
        if (unique) {
          for (std::int64_t l = 0; l < used; ++l) own[l].whole += sum[l];
        } else {
          for (std::int64_t l = 0; l < used; ++l) own[l].add(fixed_point(sum[l], count[l]));
        }
      };
    });
  }

  // The scanned positions in bands of falling rank, each in ascending order.
  std::vector<std::vector<Index>> bands() const {
    const auto rank_at = [&](Index position) { return given.rank[at(space().row(position))]; };
    std::vector<std::size_t> start(at(given.columns.n) + 2, 0);  // counting sort, by falling rank
    for (const Index position : positions) ++start[at(given.columns.n - rank_at(position)) + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    std::vector<Index> by_rank(positions.size());
    for (const Index position : positions)
      by_rank[start[at(given.columns.n - rank_at(position))]++] = position;
    std::vector<std::vector<Index>> result;
    std::size_t begin = 0;
    for (const double share : kBands) {
      const auto end = static_cast<std::size_t>(share * static_cast<double>(by_rank.size()));
      result.emplace_back(by_rank.begin() + static_cast<std::ptrdiff_t>(begin),
                          by_rank.begin() + static_cast<std::ptrdiff_t>(end));
      std::sort(result.back().begin(), result.back().end());
      begin = end;
    }
    return result;
  }

  // Completes the totals of candidates, or leaves out (-1) those whose sum cannot exceed `bar`,
  // which rises to the largest complete one.
  Status race(const std::int64_t* candidate, std::int64_t m, std::int64_t& bar, Total* totals,
              const Execution& execution) {
    std::int64_t left = 0;  // ranks of the rows to come
    for (const Index position : positions) left += given.rank[at(space().row(position))];
    std::vector<std::int64_t> running(at(m));  // numbers of candidates that may still win
    std::iota(running.begin(), running.end(), 0);
    std::vector<std::int64_t> packed;
    std::vector<std::uint8_t> alive;
    std::vector<Total> sums;
    const bool searchable = static_cast<std::int64_t>(given.k()) < kTreeColumns;
    // More than the exact sum can be: a fixed-point sum is less than one below it.
    const auto most = [&](std::int64_t c) { return totals[c].floor() + 2 + left; };
    const auto complete = [&](std::int64_t c) {
      const Status status = total(candidate[c], totals[c], execution);
      bar = std::max(bar, totals[c].floor());
      return status;
    };
    for (const auto& band : bands()) {
      if (searchable && static_cast<std::int64_t>(running.size()) <= kFewCandidates) {
        for (const std::int64_t c : running) {
          if (most(c) <= bar) {
            totals[c] = {-1, 0};
          } else if (complete(c) != Status::ok) {
            return Status::cancelled;
          }
        }
        return Status::ok;
      }
      if (2 * running.size() <= packed.size() || packed.empty()) {
        packed = running;
        std::vector<std::int64_t> columns;
        for (const std::int64_t c : packed) columns.push_back(candidate[c]);
        if (scanner.pack(columns.data(), static_cast<std::int64_t>(columns.size()), execution) !=
            Status::ok)
          return Status::cancelled;
        alive.assign(packed.size(), 1);
      }
      sums.assign(packed.size(), Total{});
      if (scan(band, alive, sums.data(), execution) != Status::ok) return Status::cancelled;
      for (const Index position : band) left -= given.rank[at(space().row(position))];
      for (std::size_t a = 0; a < packed.size(); ++a)
        if (alive[a]) totals[packed[a]].add({sums[a].whole, sums[a].fraction});
      if (left == 0) {
        for (const std::int64_t c : running) bar = std::max(bar, totals[c].floor());
        return Status::ok;
      }
      if (searchable) {  // the leader is likely to win: the others must beat its whole sum
        const std::int64_t leader = *std::max_element(
            running.begin(), running.end(),
            [&](std::int64_t a, std::int64_t b) { return totals[a].floor() < totals[b].floor(); });
        if (most(leader) > bar) {
          if (complete(leader) != Status::ok) return Status::cancelled;
          std::erase(running, leader);
          alive[at(std::find(packed.begin(), packed.end(), leader) - packed.begin())] = 0;
        }
      }
      for (std::size_t a = 0; a < packed.size(); ++a)
        if (alive[a] && most(packed[a]) <= bar) {
          totals[packed[a]] = {-1, 0};
          alive[a] = 0;
        }
      std::erase_if(running, [&](std::int64_t c) { return totals[c].whole < 0; });
    }
    return Status::ok;
  }
};

template <class T>
Engine<T>::Engine(const Columns<T>& columns, const std::int32_t* rank, Ties ties,
                  std::uint64_t seed)
    : state_(std::make_unique<State>(columns, rank, TieRule{ties, seed})) {}

template <class T>
Engine<T>::~Engine() = default;

template <class T>
void Engine<T>::select(std::int64_t column) {
  const DefaultFloats floats;
  state_->select(column);
}

template <class T>
Status Engine<T>::score(const std::int64_t* candidate, std::int64_t m, std::int64_t floor,
                        std::int64_t* whole, std::int64_t* fraction, const Execution& execution) {
  State& s = *state_;
  s.prepare();
  std::vector<Total> totals(at(m));
  if (s.given.sort_columns(candidate, m, execution) != Status::ok) return Status::cancelled;
  if (s.sorting && s.sort_rows(candidate, m, totals.data(), execution) != Status::ok)
    return Status::cancelled;
  if (!s.positions.empty()) {
    const std::int64_t column_bytes = s.given.columns.n * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t batch = std::max<std::int64_t>(64, kPackedBytes / column_bytes / 64 * 64);
    for (std::int64_t first = 0; first < m; first += batch) {
      const std::int64_t size = std::min(batch, m - first);
      if (floor != kNoFloor) {
        if (s.race(candidate + first, size, floor, totals.data() + first, execution) != Status::ok)
          return Status::cancelled;
        continue;
      }
      const std::vector<std::uint8_t> alive(at(size), 1);
      if (s.scanner.pack(candidate + first, size, execution) != Status::ok ||
          s.scan(s.positions, alive, totals.data() + first, execution) != Status::ok)
        return Status::cancelled;
    }
  }
  for (std::int64_t c = 0; c < m; ++c) {
    whole[c] = totals[at(c)].whole;
    fraction[c] = totals[at(c)].fraction;
  }
  return Status::ok;
}

template <class T>
Status Engine<T>::row_sums(std::int64_t candidate, std::int64_t* sum, std::int64_t* count,
                           const Execution& execution) {
  State& s = *state_;
  return s.search(candidate, execution, [&] {
    return [&](Index row, std::int64_t row_sum, std::int64_t row_count) {
      sum[s.given.order[at(row)]] = row_sum;
      count[s.given.order[at(row)]] = row_count;
    };
  });
}

template <class T>
std::int64_t Engine<T>::comparisons() const {
  return state_->scanner.comparisons();
}

template class Engine<float>;
template class Engine<double>;

}  // namespace lcodec
