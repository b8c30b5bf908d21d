#include "lcodec/engine.hpp"

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "common/fixed_point.hpp"
#include "cpu/at.hpp"
#include "cpu/conditioned.hpp"
#include "cpu/scanner.hpp"
#include "cpu/sorted_groups.hpp"

namespace lcodec {
namespace {

using Index = std::int32_t;

// Groups of at least this many identical rows may be scored by sorting.
constexpr std::int64_t kBigGroup = 64;
// Sorting costs about as much for each row as scanning this many neighbours.
constexpr std::int64_t kSortCost = 128;
// Packed candidates in memory at a time.
constexpr std::int64_t kPackedBytes = std::int64_t{1} << 28;
// So few candidates are each searched in a tree: a tile costs as much for one as for all.
constexpr std::int64_t kFewCandidates = 4;
// Of the doubt (State::by_doubt) in all rows: how much is scanned before candidates are compared,
// and how much at the least from one look to the next. A look at the candidates reads all of them
// from memory.
constexpr double kFirstLook = 0.32;
constexpr double kNextLook = 0.05;
constexpr double kOfTheWay = 0.85;  // see Race::next_look
// Searching for a candidate costs as much as scanning all rows for so many.
constexpr double kSearchCost = 64;
// Rows before and after a row that tell what its neighbours are like.
constexpr std::int64_t kBeside = 8;

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

// By how many ranks a row is expected to fall short of its own.
struct Doubt {
  double size;
  Index position;
};

}  // namespace

template <class T>
struct Engine<T>::State {
  Conditioned<T> given;
  Scanner<T> scanner;
  bool prepared = false;
  bool sorting = false;          // big groups are scored by sorting
  int apart = -1;                // whether no two groups are at distance 0; -1: not known
  std::vector<Index> positions;  // of the other rows, by place in the tree
  // The subspace with the column that was looked at last, kept in case that column is selected.
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
    ahead_column = -1;  // in case memory runs out
    ahead_values = given.values(column);
    ahead = given.with(column, ahead_values);
    ahead_column = column;
  }

  void select(std::int64_t column) {
    const bool seen = ahead_column == column;
    ahead_column = -1;  // in case memory runs out
    if (seen)
      given.select(column, std::move(ahead_values), std::move(ahead));
    else
      given.select(column);
    prepared = false;
  }

  void prepare() {
    if (prepared) return;
    const DefaultFloats floats;
    given.place();
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
    apart = -1;
    prepared = true;
  }

  // Scores the columns of few distinct values that suit it; the numbers of the others are left.
  Status score_coded(const std::int64_t* candidate, std::vector<std::int64_t>& numbers,
                     Total* totals, const Execution& execution) {
    const Kernels<T> kernels = pick_kernels<T>(execution.level);
    std::vector<std::int64_t> suited;
    for (const std::int64_t c : numbers) {
      const Coded<T>& coded = given.sorted[at(candidate[c])].coded;
      if (!coded.code.empty() && CodedGroups<T>::suits(space(), coded.level.size()))
        suited.push_back(c);
    }
    if (suited.empty()) return Status::ok;
    if (apart < 0) {
      const DefaultFloats floats;
      apart = 1;
      for (Index point = 0; point < space().size() && apart; ++point)
        apart = space().nearest(kernels, point) > 0;
    }
    if (!apart) return Status::ok;
    std::vector<std::uint8_t> done(at(static_cast<std::int64_t>(numbers.back() + 1)), 0);
    const Status status = parallel_for(static_cast<std::int64_t>(suited.size()), execution, [&] {
      return
          [&, groups = CodedGroups<T>(kernels, space(), given.rank)](std::int64_t piece) mutable {
            const std::int64_t c = suited[at(piece)];
            FixedPoint total{0, 0};
            if (!groups.score(given.sorted[at(candidate[c])].coded,
                              given.columns.factor[candidate[c]], total))
              return;
            totals[c].add(total);
            done[at(c)] = 1;
          };
    });
    std::erase_if(numbers, [&](std::int64_t c) { return done[at(c)] != 0; });
    return status;
  }

  // Scores the candidates of these numbers by sorting and scanning.
  Status score_others(const std::int64_t* candidate, const std::vector<std::int64_t>& numbers,
                      std::int64_t floor, Total* totals, const Execution& execution) {
    std::vector<std::int64_t> columns;
    for (const std::int64_t c : numbers) columns.push_back(candidate[c]);
    if (given.sort_columns(columns, execution) != Status::ok) return Status::cancelled;
    if (sorting && sort_rows(candidate, numbers, totals, execution) != Status::ok)
      return Status::cancelled;
    if (positions.empty()) return Status::ok;
    const std::int64_t column_bytes = given.columns.n * static_cast<std::int64_t>(sizeof(T));
    const auto batch = at(std::max<std::int64_t>(64, kPackedBytes / column_bytes / 64 * 64));
    for (std::size_t first = 0; first < numbers.size(); first += batch) {
      const std::size_t last = std::min(numbers.size(), first + batch);
      const std::vector<std::int64_t> some(numbers.begin() + static_cast<std::ptrdiff_t>(first),
                                           numbers.begin() + static_cast<std::ptrdiff_t>(last));
      const Status status = floor == kNoFloor ? scan_all(candidate, some, totals, execution)
                                              : race(candidate, some, floor, totals, execution);
      if (status != Status::ok) return status;
    }
    return Status::ok;
  }

  // Rows of big groups, added to totals.
  Status sort_rows(const std::int64_t* candidate, const std::vector<std::int64_t>& numbers,
                   Total* totals, const Execution& execution) {
    const Kernels<T> kernels = pick_kernels<T>(execution.level);
    std::vector<std::pair<Index, T>> big;  // point, squared distance to the nearest other one
    for (Index point = 0; point < space().size(); ++point)
      if (by_sorting(point)) big.emplace_back(point, space().nearest(kernels, point));
    return parallel_for(static_cast<std::int64_t>(numbers.size()), execution, [&] {
      return [&, groups = SortedGroups<T>(kernels, space(), given.rank.data(), given.rule)](
                 std::int64_t piece) mutable {
        const std::int64_t c = numbers[at(piece)];
        const std::int64_t column = candidate[c];
        groups.sort(given.sorted[at(column)].rows, given.columns.n, given.columns.factor[column],
                    [&](Index row) { return given.value(column, row); });
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
    if (!tree_pays(n, static_cast<std::int64_t>(given.k()) + 1)) {
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
    const RankSums<T> rank_sums(ahead.space, rank);
    return nearest_by_tree(ahead.space, kernels, execution, [&] {
      return [&, report = make_report()](Index own, const Nearest& nearest) mutable {
        if (taken(own, nearest, report)) return;
        std::int64_t sum = 0;
        for (const Range& range : nearest.ranges) sum += rank_sums(range, own);
        report(own, sum, nearest.count);
      };
    });
  }

  Status total(std::int64_t column, Total& result, const Execution& execution) {
    result = Total{};
    std::mutex mutex;
    return search(column, execution, [&] {
      return
          [sums = Shared(&result, 1, mutex)](Index, std::int64_t sum, std::int64_t count) mutable {
            sums.add(0, fixed_point(sum, count));
          };
    });
  }

  // Totals that a thread adds up on its own, and to those of all when it ends.
  struct Shared {
    std::vector<std::int64_t> whole, fraction;
    Total* all;
    std::mutex* mutex;
    Shared(Total* totals, std::size_t m, std::mutex& lock)
        : whole(m), fraction(m), all(totals), mutex(&lock) {}
    Shared(Shared&& other) = default;
    ~Shared() {
      if (whole.empty()) return;  // moved from
      const std::lock_guard<std::mutex> lock(*mutex);
      for (std::size_t c = 0; c < whole.size(); ++c) all[c].add({whole[c], fraction[c]});
    }
    void add(std::size_t c, const FixedPoint& part) {
      whole[c] += part.whole;
      fraction[c] += part.fraction;
    }
  };

  Status pack(const std::int64_t* candidate, const std::vector<std::int64_t>& numbers,
              const Execution& execution) {
    std::vector<std::int64_t> packed;
    for (const std::int64_t c : numbers) packed.push_back(candidate[c]);
    return scanner.pack(packed.data(), static_cast<std::int64_t>(packed.size()), execution);
  }

  // The rows at `some` positions, added to totals of the packed candidates of these numbers.
  Status scan(const std::vector<Index>& some, const std::vector<std::int64_t>& numbers,
              const std::vector<std::uint8_t>& alive, Total* totals, const Execution& execution) {
    std::mutex mutex;
    std::vector<Total> sums_of(numbers.size());
    const Status status = scanner.scan(some, alive, execution, [&] {
      return [sums = Shared(sums_of.data(), sums_of.size(), mutex)](
                 std::int64_t c, std::int64_t used, Index, const std::int64_t* sum,
                 const std::int64_t* count, bool unique) mutable {
        if (unique) {
          std::int64_t* whole = sums.whole.data() + c;
          for (std::int64_t l = 0; l < used; ++l) whole[l] += sum[l];
        } else {
          for (std::int64_t l = 0; l < used; ++l)
            sums.add(at(c + l), fixed_point(sum[l], count[l]));
        }
      };
    });
    for (std::size_t a = 0; a < numbers.size(); ++a)
      if (alive[a]) totals[numbers[a]].add({sums_of[a].whole, sums_of[a].fraction});
    return status;
  }

  Status scan_all(const std::int64_t* candidate, const std::vector<std::int64_t>& numbers,
                  Total* totals, const Execution& execution) {
    if (pack(candidate, numbers, execution) != Status::ok) return Status::cancelled;
    const std::vector<std::uint8_t> alive(numbers.size(), 1);
    return scan(positions, numbers, alive, totals, execution);
  }

  // See Race.
  Status race(const std::int64_t* candidate, const std::vector<std::int64_t>& numbers,
              std::int64_t& bar, Total* totals, const Execution& execution);

  // The scanned positions by falling doubt. A row adds at most its rank; it is expected to add what
  // it would add with the rows next to it in the tree, which are about as near as its neighbours
  // will be. Their difference is the doubt, and where little of it is left, few candidates can
  // still win.
  std::vector<Doubt> by_doubt() const {
    const std::int64_t n = given.columns.n;
    std::vector<std::int32_t> rank(at(n));  // by position
    for (Index position = 0; position < n; ++position)
      rank[at(position)] = given.rank[at(space().row(position))];
    std::vector<Doubt> order;
    for (const Index position : positions) {
      const std::int64_t begin = std::max<std::int64_t>(position - kBeside, 0);
      const std::int64_t end = std::min(position + kBeside + 1, n);
      std::int64_t doubt = 0;
      for (std::int64_t other = begin; other < end; ++other)
        doubt += std::max(rank[at(position)] - rank[at(other)], 0);
      order.push_back({static_cast<double>(doubt) / (2 * kBeside), position});
    }
    std::sort(order.begin(), order.end(), [](const Doubt& a, const Doubt& b) {
      return a.size != b.size ? a.size > b.size : a.position < b.position;
    });
    return order;
  }
};

// Candidates against each other: the totals of those that may have the largest sum are completed,
// and the others are left out (-1) as soon as their sum cannot exceed the bar, which rises to the
// largest complete one.
template <class T>
class Engine<T>::Race {
 public:
  Race(State& state, const std::int64_t* candidate, const std::vector<std::int64_t>& numbers,
       std::int64_t& bar, Total* totals, const Execution& execution)
      : state_(state),
        candidate_(candidate),
        running_(numbers),
        bar_(bar),
        totals_(totals),
        execution_(execution),
        searchable_(static_cast<std::int64_t>(state.given.k()) < kTreeColumns) {
    for (const Index position : state_.positions) left_ += rank_at(position);
  }

  Status run() {
    const Status status = few() ? search_few() : scan_bands();
    if (status == Status::ok)
      for (const auto& [c, whole] : complete_)
        totals_[c] = whole.floor() + 2 > bar_ ? whole : Total{-1, 0};
    return status;
  }

 private:
  std::int32_t rank_at(Index position) const {
    return state_.given.rank[at(state_.space().row(position))];
  }

  bool is_complete(std::int64_t c) const {
    return std::any_of(complete_.begin(), complete_.end(),
                       [&](const auto& done) { return done.first == c; });
  }

  // So few candidates are left that each is searched for by itself.
  bool few() const {
    return searchable_ && static_cast<std::int64_t>(running_.size()) <= kFewCandidates;
  }

  // Whether the rows to come can lift a candidate above the bar. Their ranks are the most that they
  // add, and a fixed-point sum is less than two below the exact one with its fraction cut off.
  bool may_win(std::int64_t c) const { return totals_[c].floor() + 2 + left_ > bar_; }

  // Leaves a candidate out if it can no longer win.
  bool drop(std::int64_t c) {
    if (is_complete(c) || may_win(c)) return false;
    totals_[c] = {-1, 0};
    return true;
  }

  Status search_whole(std::int64_t c) {
    complete_.emplace_back(c, Total{});
    Total& whole = complete_.back().second;
    const Status status = state_.total(candidate_[c], whole, execution_);
    bar_ = std::max(bar_, whole.floor());
    return status;
  }

  Status search_few() {
    for (const std::int64_t c : running_)
      if (!is_complete(c) && !drop(c) && search_whole(c) != Status::ok) return Status::cancelled;
    return Status::ok;
  }

  Status scan_bands() {
    const std::vector<Doubt> order = state_.by_doubt();
    for (const Doubt& doubt : order) all_doubt_ += doubt.size;
    at_first_ = mean_of_most();
    double until = kFirstLook * all_doubt_;  // of the doubt, to be scanned before the next look
    for (auto next = order.begin(); next != order.end() && !running_.empty();) {
      if (few()) return search_few();
      if (pack_running() != Status::ok) return Status::cancelled;
      std::vector<Index> band;
      for (; next != order.end() && scanned_doubt_ <= until; ++next) {
        band.push_back(next->position);
        scanned_doubt_ += next->size;
        left_ -= rank_at(next->position);
      }
      std::sort(band.begin(), band.end());
      if (state_.scan(band, packed_, alive_, totals_, execution_) != Status::ok)
        return Status::cancelled;
      if (next == order.end()) {
        for (const std::int64_t c : running_) bar_ = std::max(bar_, totals_[c].floor());
        return Status::ok;
      }
      if (search_leader() != Status::ok) return Status::cancelled;
      for (std::size_t a = 0; a < packed_.size(); ++a)
        if (alive_[a] && drop(packed_[a])) alive_[a] = 0;
      std::erase_if(running_, [&](std::int64_t c) { return totals_[c].whole < 0; });
      if (!running_.empty()) until = next_look();
    }
    return Status::ok;
  }

  // The most that a candidate's sum can still be, and its mean over those that run.
  double most(std::int64_t c) const { return static_cast<double>(totals_[c].floor() + left_); }
  double mean_of_most() const {
    double sum = 0;
    for (const std::int64_t c : running_) sum += most(c);
    return sum / static_cast<double>(running_.size());
  }

  // What a candidate's sum comes to if it goes on to fall short of the most as it has so far.
  double expected(std::int64_t c) const {
    return at_first_ - (at_first_ - most(c)) * all_doubt_ / scanned_doubt_;
  }

  // How much more doubt is expected to be scanned before the average candidate is at a bar.
  double until_at(double bar) const {
    const double lost = std::max(at_first_ - mean_of_most(), 1.0);
    const double at_bar = scanned_doubt_ * (at_first_ - bar) / lost;
    return std::max(std::min(at_bar, all_doubt_) - scanned_doubt_, 0.0);
  }

  // Most of the way there: rows in less doubt take more from a sum than is expected.
  double next_look() const {
    const double way = kOfTheWay * until_at(static_cast<double>(bar_));
    return scanned_doubt_ + std::max(way, kNextLook * all_doubt_);
  }

  // Packs the running candidates, once half of those packed have dropped out.
  Status pack_running() {
    if (!packed_.empty() && 2 * running_.size() > packed_.size()) return Status::ok;
    packed_ = running_;
    alive_.assign(packed_.size(), 1);
    return state_.pack(candidate_, packed_, execution_);
  }

  // The leader is likely to win: the others must beat its whole sum. That is searched for where it
  // is likely to leave out the last one, or to save more scans than it costs.
  Status search_leader() {
    const auto [last, leader] = std::minmax_element(
        running_.begin(), running_.end(),
        [&](std::int64_t a, std::int64_t b) { return totals_[a].floor() < totals_[b].floor(); });
    const auto lead = static_cast<double>(totals_[*leader].floor() - totals_[*last].floor());
    if (!searchable_ || is_complete(*leader) || !may_win(*leader)) return Status::ok;
    const bool decides = lead >= all_doubt_ - scanned_doubt_;
    const double saved = until_at(static_cast<double>(bar_)) - until_at(expected(*leader));
    const bool pays = saved * static_cast<double>(running_.size()) >= kSearchCost * all_doubt_;
    return decides || pays ? search_whole(*leader) : Status::ok;
  }

  State& state_;
  const std::int64_t* candidate_;
  std::vector<std::int64_t> running_;  // those that may still win
  std::int64_t& bar_;
  Total* totals_;
  const Execution& execution_;
  const bool searchable_;
  std::int64_t left_ = 0;                     // ranks of the rows to come
  double all_doubt_ = 0, scanned_doubt_ = 0;  // in all rows, and in those scanned
  double at_first_ = 0;                       // the most that a sum could be, on average
  std::vector<std::int64_t> packed_;
  std::vector<std::uint8_t> alive_;                       // of those packed
  std::vector<std::pair<std::int64_t, Total>> complete_;  // whole totals, of running ones
};

template <class T>
Status Engine<T>::State::race(const std::int64_t* candidate,
                              const std::vector<std::int64_t>& numbers, std::int64_t& bar,
                              Total* totals, const Execution& execution) {
  return Race(*this, candidate, numbers, bar, totals, execution).run();
}

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
  if (s.given.code_columns(candidate, m, execution) != Status::ok) return Status::cancelled;
  std::vector<Total> totals(at(m));
  std::vector<std::int64_t> numbers(at(m));
  std::iota(numbers.begin(), numbers.end(), 0);
  if (s.score_coded(candidate, numbers, totals.data(), execution) != Status::ok)
    return Status::cancelled;
  if (floor != kNoFloor)
    for (const Total& total : totals) floor = std::max(floor, total.floor());
  if (s.score_others(candidate, numbers, floor, totals.data(), execution) != Status::ok)
    return Status::cancelled;
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
ScanWork Engine<T>::scanned() const {
  return state_->scanner.work();
}

template class Engine<float>;
template class Engine<double>;

}  // namespace lcodec
