#include "lcodec/engine.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "common/fixed_point.hpp"
#include "common/random.hpp"
#include "lists.hpp"
#include "parallel.hpp"
#include "sorted_groups.hpp"

namespace lcodec {
namespace {

using Index = std::int32_t;

// Groups of at least this many identical rows may be scored by sorting.
constexpr std::int64_t kBigGroup = 64;
// Sorting costs about as much for each row as scanning this many neighbours.
constexpr std::int64_t kSortCost = 128;
// Rows looked at along a candidate's order before a longer list is tried instead.
constexpr std::int64_t kAlong = 256;
// Rows beside each other in the tree whose lists are made together.
constexpr std::int64_t kListBlock = 32;
// Neighbours listed at a time on a thread: 12 or 16 bytes each, for the second-level cache.
constexpr std::int64_t kListEntries = std::int64_t{1} << 16;
// Neighbours in more columns than this are found by comparing all rows: boxes prune little there.
constexpr std::int64_t kTreeColumns = 12;
// Packed candidates in memory at a time.
constexpr std::int64_t kPackedBytes = std::int64_t{1} << 28;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

std::int64_t pieces_of(std::int64_t total, std::int64_t size) { return (total + size - 1) / size; }

template <class T>
Kernels<T> pick_kernels(SimdLevel level);
template <>
Kernels<float> pick_kernels(SimdLevel level) {
  return kernels_for(level).f32;
}
template <>
Kernels<double> pick_kernels(SimdLevel level) {
  return kernels_for(level).f64;
}

// Rows with equal values in all columns so far have equal group numbers.
template <class T>
struct Groups {
  std::vector<Index> of_row;
  Index count = 1;

  explicit Groups(std::int64_t n) : of_row(at(n), 0) {}

  // Splits groups by a further column. O(n).
  void refine(const std::vector<T>& column) {
    std::vector<SortWord<T>> words(column.size());
    std::vector<SortWord<T>> spare;
    for (std::size_t row = 0; row < column.size(); ++row)
      words[row] = {sort_key(column[row]), static_cast<Index>(row)};
    radix_sort<T>(words, spare);
    std::vector<Index> start(at(count) + 1, 0);
    for (const Index group : of_row) ++start[at(group) + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    for (const auto& word : words) spare[at(start[at(of_row[at(word.row)])]++)] = word;
    std::vector<Index> finer(of_row.size());
    Index number = -1;
    for (std::size_t t = 0; t < spare.size(); ++t) {
      const bool same = t > 0 && spare[t].key == spare[t - 1].key &&
                        of_row[at(spare[t].row)] == of_row[at(spare[t - 1].row)];
      number += !same;
      finer[at(spare[t].row)] = number;
    }
    of_row = std::move(finer);
    count = number + 1;
  }
};

// Totals of candidates in fixed point.
struct Totals {
  std::vector<std::int64_t> whole, fraction;
  explicit Totals(std::size_t m) : whole(m, 0), fraction(m, 0) {}
  void add(std::size_t candidate, std::int64_t sum, std::int64_t count) {
    const FixedPoint mean = fixed_point(sum, count);
    whole[candidate] += mean.whole;
    fraction[candidate] += mean.fraction;
  }
};

}  // namespace

template <class T>
struct Engine<T>::State {
  // A column in increasing order of (value, row).
  struct Sorted {
    std::unique_ptr<Index[]> rows;
    std::unique_ptr<T[]> values;
  };

  Columns<T> columns;
  Ties ties;
  std::uint64_t seed;
  // Rows are numbered anew: by rank where ties are averaged (rank sums of a run come from prefix
  // sums then), as they were where a tied row is picked by its number.
  std::vector<Index> order;              // [n] given row of a row
  std::vector<std::int32_t> rank;        // [n]
  std::vector<std::vector<T>> selected;  // values of the conditioning columns
  std::vector<T> selected_factor;
  Groups<T> groups;
  Spatial<T> space;
  bool space_ready = false;
  bool sorting = false;         // big groups are scored by sorting
  std::vector<Index> source;    // [n] given row of a position
  std::vector<Sorted> sorted;   // [p] made by sort_columns
  std::unique_ptr<T[]> packed;  // [tile][n][lanes] candidates
  std::size_t packed_size = 0;

  State(const Columns<T>& c, const std::int32_t* given_rank, Ties t, std::uint64_t s)
      : columns(c), ties(t), seed(s), order(at(c.n)), rank(at(c.n)), groups(c.n) {
    std::iota(order.begin(), order.end(), 0);
    if (ties == Ties::average)
      std::stable_sort(order.begin(), order.end(),
                       [&](Index a, Index b) { return given_rank[a] < given_rank[b]; });
    for (std::size_t row = 0; row < order.size(); ++row) rank[row] = given_rank[order[row]];
  }

  T value(std::int64_t column, std::int64_t row) const {
    return columns.x[column * columns.n + order[at(row)]];
  }

  bool by_sorting(Index point) const {
    return sorting && (selected.empty() || space.end(point) - space.begin(point) >= kBigGroup);
  }

  void prepare() {
    if (space_ready) return;
    const DefaultFloats floats;
    std::vector<const T*> values;
    for (const auto& column : selected) values.push_back(column.data());
    space.build(values, selected_factor, groups.of_row, groups.count);
    std::int64_t scanned = 0;
    for (Index point = 0; point < space.size(); ++point) {
      const std::int64_t size = space.end(point) - space.begin(point);
      if (size >= kBigGroup) scanned += size * size;
    }
    sorting = selected.empty() || scanned > kSortCost * columns.n;
    source.resize(at(columns.n));
    for (std::int64_t position = 0; position < columns.n; ++position)
      source[at(position)] = order[at(space.row(position))];
    space_ready = true;
  }

  // Sorts those of the candidates that have not been sorted yet.
  Status sort_columns(const std::int64_t* candidate, std::int64_t m, const Execution& execution) {
    sorted.resize(at(columns.p));
    std::vector<std::int64_t> missing;
    for (std::int64_t c = 0; c < m; ++c)
      if (!sorted[at(candidate[c])].rows) missing.push_back(candidate[c]);
    std::sort(missing.begin(), missing.end());
    missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
    return parallel_for(static_cast<std::int64_t>(missing.size()), execution, [&] {
      return [&, words = std::vector<SortWord<T>>(at(columns.n)),
              spare = std::vector<SortWord<T>>()](std::int64_t piece) mutable {
        const std::int64_t column = missing[at(piece)];
        for (std::int64_t row = 0; row < columns.n; ++row)
          words[at(row)] = {sort_key(value(column, row)), static_cast<Index>(row)};
        radix_sort<T>(words, spare);
        auto rows = std::make_unique_for_overwrite<Index[]>(words.size());
        auto values = std::make_unique_for_overwrite<T[]>(words.size());
        for (std::size_t a = 0; a < words.size(); ++a) {
          rows[a] = words[a].row;
          values[a] = value(column, words[a].row);
        }
        sorted[at(column)] = {std::move(rows), std::move(values)};
      };
    });
  }

  // Rows of big groups: report(candidate number, row, sum, count), or many of them at once to
  // add(candidate number, total).
  template <class Add, class Row>
  Status sort_rows(const std::int64_t* candidate, std::int64_t m, bool each_row,
                   const Execution& execution, const Add& add, const Row& report) {
    const Kernels<T> kernels = pick_kernels<T>(execution.level);
    std::vector<std::pair<Index, T>> big;  // point, squared distance to the nearest other one
    for (Index point = 0; point < space.size(); ++point)
      if (by_sorting(point)) big.emplace_back(point, space.nearest(kernels, point));
    return parallel_for(m, execution, [&] {
      return [&, groups_of = SortedGroups<T>(kernels, space, rank.data(), ties, seed)](
                 std::int64_t c) mutable {
        const std::int64_t column = candidate[c];
        const Sorted& by_value = sorted[at(column)];
        groups_of.sort(by_value.rows.get(), by_value.values.get(), columns.n,
                       columns.factor[column]);
        for (const auto& [point, gap] : big) {
          const auto row = [&](Index r, std::int64_t sum, std::int64_t count) {
            report(c, r, sum, count);
          };
          if (each_row) {
            groups_of.rows(point, gap, row);
          } else {
            groups_of.score(point, gap, [&](const FixedPoint& total) { add(c, total); }, row);
          }
        }
      };
    });
  }

  // What a thread needs to scan rows.
  struct Scratch {
    std::vector<RowList<T>> lists;
    std::vector<T> best;
    std::vector<std::int64_t> sum, count;
    std::int64_t wanted;              // neighbours in a list
    std::int64_t rows = 0, tied = 0;  // scans so far, and those that met ties
    std::vector<Index> nearest;       // of one row and candidate
  };

  // Lanes that the end of the list left open: a row that lies far out in the candidate has its
  // neighbours along the candidate's own order. Says no where that would be long.
  bool finish(const std::int64_t* candidate, std::int64_t used, std::int64_t position, T reach,
              Scratch& s, ScanResult& result) const {
    const Index own = space.row(position);
    if (result.unique) std::fill(s.count.begin(), s.count.end(), 1);
    for (std::int64_t l = 0; l < used; ++l) {
      if (s.best[at(l)] < reach) continue;
      if (!nearest_along(candidate[l], own, s.best[at(l)], s.nearest)) return false;
      std::int64_t sum = 0;
      for (const Index row : s.nearest) sum += std::min(rank[at(row)], rank[at(own)]);
      s.sum[at(l)] = sum;
      s.count[at(l)] = static_cast<std::int64_t>(s.nearest.size());
      if (s.nearest.size() > 1 && ties != Ties::average) s.sum[at(l)] = take(s.nearest, own);
      if (ties != Ties::average) s.count[at(l)] = 1;
      result.unique &= s.count[at(l)] == 1;
    }
    return true;
  }

  // Of tied rows, the rank sum of the one that the tie rule takes.
  std::int64_t take(std::vector<Index>& tied, Index own) const {
    const auto count = static_cast<std::int64_t>(tied.size());
    const std::int64_t k = ties == Ties::first ? 0 : pick(tie_hash(seed, own), count);
    std::nth_element(tied.begin(), tied.begin() + k, tied.end());
    return std::min(rank[at(tied[at(k)])], rank[at(own)]);
  }

  // All rows nearest to one in the conditioning set and a column, one of which is within `best`:
  // along the column's order, until the column alone is farther. False beyond kAlong rows.
  bool nearest_along(std::int64_t column, Index own, T best, std::vector<Index>& nearest) const {
    const Index* rows = sorted[at(column)].rows.get();
    const T* values = sorted[at(column)].values.get();
    const T x = value(column, own);
    const T c = columns.factor[column];
    const std::int64_t here = std::lower_bound(values, values + columns.n, x) - values;
    nearest.clear();
    std::int64_t left = kAlong;
    for (const std::int64_t step : {-1, 1}) {
      for (std::int64_t t = step < 0 ? here - 1 : here; 0 <= t && t < columns.n; t += step) {
        const T scaled = (x - values[t]) * c;
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

  // The other rows: a block of rows against all candidates at a time. Each thread calls
  // make_report() for its report(candidate number, row, sum, count).
  template <class MakeReport>
  Status scan_rows(const std::int64_t* candidate, std::int64_t m, const Execution& execution,
                   const MakeReport& make_report) {
    const Kernels<T> kernels = pick_kernels<T>(execution.level);
    const std::int64_t n = columns.n;
    const std::int64_t lanes = kernels.lanes;
    const std::int64_t tiles = pieces_of(m, lanes);
    if (packed_size < at(tiles * n * lanes)) {  // kept: a fresh one costs a page fault for 4 KiB
      packed_size = at(tiles * n * lanes);
      packed = std::make_unique_for_overwrite<T[]>(packed_size);
    }
    std::vector<T> factor(at(tiles * lanes), T{0});
    Status status = parallel_for(tiles, execution, [&] {
      return [&](std::int64_t tile) {
        T* out = packed.get() + tile * n * lanes;
        std::vector<const T*> x(at(lanes), columns.x + candidate[tile * lanes] * n);
        for (std::int64_t l = 0; l < std::min(lanes, m - tile * lanes); ++l) {
          const std::int64_t column = candidate[tile * lanes + l];
          factor[at(tile * lanes + l)] = columns.factor[column];
          x[at(l)] = columns.x + column * n;
        }
        for (std::int64_t position = 0; position < n; ++position)
          for (std::int64_t l = 0; l < lanes; ++l) *out++ = x[at(l)][source[at(position)]];
      };
    });
    if (status != Status::ok) return status;
    std::vector<std::int32_t> ranks(at(n));
    for (std::int64_t position = 0; position < n; ++position)
      ranks[at(position)] = rank[at(space.row(position))];
    // A scan takes about 2 n^(1/2) neighbours in one column and 3 n^(1/(k+1)) in k; where lists are
    // short, a generous one is cheaper than a second search. Only where to start: threads learn.
    const auto k = static_cast<double>(selected.size());
    const auto wanted = 16 + static_cast<std::int64_t>(
                                 (k > 1 ? 5 : 3) * std::pow(static_cast<double>(n), 1 / (k + 1)));
    const auto scanned = [&](std::int64_t i) { return !by_sorting(space.point_of(space.row(i))); };
    // A block's lists stay in the cache for all tiles, and so do the rows of a tile that they name.
    const std::int64_t block =
        std::clamp(kListEntries / wanted, kListBlock,
                   std::max(kListBlock, n / (2 * static_cast<std::int64_t>(execution.threads))));
    return parallel_for(pieces_of(n, block), execution, [&] {
      Scratch scratch{std::vector<RowList<T>>(at(block)),
                      std::vector<T>(at(lanes)),
                      std::vector<std::int64_t>(at(lanes)),
                      std::vector<std::int64_t>(at(lanes)),
                      wanted,
                      0,
                      0,
                      {}};
      return [&, s = std::move(scratch), report = make_report(),
              maker = ListMaker<T>(kernels, space, ranks.data())](std::int64_t piece) mutable {
        const std::int64_t begin = piece * block;
        const std::int64_t end = std::min(n, begin + block);
        for (std::int64_t i = begin; i < end; i += kListBlock)
          maker.build(s.lists.data() + (i - begin), i, std::min(end, i + kListBlock), s.wanted,
                      scanned);
        std::int64_t extended = 0;
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
          const std::int64_t used = std::min(lanes, m - tile * lanes);
          const T* values = packed.get() + tile * n * lanes;
          const T* factors = factor.data() + tile * lanes;
          for (std::int64_t i = begin; i < end; ++i) {
            if (!scanned(i)) continue;
            RowList<T>& list = s.lists[at(i - begin)];
            const auto scan = [&](auto* kernel) {
              for (;;) {
                ScanResult result = kernel({list.view(), values, values + i * lanes, factors,
                                            s.best.data(), s.sum.data(), s.count.data()});
                const bool everything = list.view().reach == std::numeric_limits<T>::infinity();
                if (result.complete || everything ||
                    (result.unique || kernel == kernels.scan_ties
                         ? finish(candidate + tile * lanes, used, i, list.view().reach, s, result)
                         : true))
                  return result.unique;
                maker.extend(list, i);
                ++extended;
              }
            };
            // Scans that only notice ties are faster by a third; where these are common, they are
            // counted at once.
            bool unique = s.tied * 8 <= s.rows && scan(kernels.scan);
            if (!unique) unique = scan(kernels.scan_ties);
            ++s.rows;
            s.tied += !unique;
            if (!unique && ties != Ties::average)
              for (std::int64_t l = 0; l < used; ++l)
                take_one(list.view(), values, factors, i, lanes, l, s.best[at(l)], s.sum[at(l)],
                         s.count[at(l)]);
            report(tile * lanes, used, space.row(i), s.sum.data(), s.count.data(), unique);
          }
        }
        if (32 * extended > end - begin) {
          s.wanted += s.wanted / 2;
        } else if (256 * extended < end - begin) {
          s.wanted = std::max<std::int64_t>(16, s.wanted - s.wanted / 8);
        }
      };
    });
  }

  // Of one lane's tied neighbours, the one that the tie rule takes.
  void take_one(const NeighborList<T>& list, const T* tile, const T* factor, std::int64_t i,
                std::int64_t lanes, std::int64_t l, T best, std::int64_t& sum,
                std::int64_t& count) const {
    if (count == 1) return;
    std::vector<Index> tied;
    for (std::int64_t c = 0; c < list.chunks && list.bound[c] <= best; ++c)
      for (std::int64_t a = c * kChunk; a < (c + 1) * kChunk; ++a) {
        const std::int64_t j = list.index[a];
        const T scaled = (tile[i * lanes + l] - tile[j * lanes + l]) * factor[l];
        if (list.distance[a] + scaled * scaled == best) tied.push_back(space.row(j));
      }
    sum = take(tied, space.row(i));
    count = 1;
  }
};

template <class T>
Engine<T>::Engine(const Columns<T>& columns, const std::int32_t* rank, Ties ties,
                  std::uint64_t seed)
    : state_(std::make_unique<State>(columns, rank, ties, seed)) {}

template <class T>
Engine<T>::~Engine() = default;

template <class T>
void Engine<T>::select(std::int64_t column) {
  const DefaultFloats floats;
  State& s = *state_;
  std::vector<T> values(at(s.columns.n));
  for (std::int64_t row = 0; row < s.columns.n; ++row) values[at(row)] = s.value(column, row);
  s.groups.refine(values);
  s.selected.push_back(std::move(values));
  s.selected_factor.push_back(s.columns.factor[column]);
  s.space_ready = false;
}

template <class T>
Status Engine<T>::score(const std::int64_t* candidate, std::int64_t m, std::int64_t* whole,
                        std::int64_t* fraction, const Execution& execution) {
  State& s = *state_;
  s.prepare();
  if (s.sort_columns(candidate, m, execution) != Status::ok) return Status::cancelled;
  std::fill_n(whole, m, 0);
  std::fill_n(fraction, m, 0);
  if (s.sorting) {  // a candidate is the work of one thread
    const auto add = [&](std::int64_t c, const FixedPoint& total) {
      whole[c] += total.whole;
      fraction[c] += total.fraction;
    };
    const auto row = [&](std::int64_t c, Index, std::int64_t sum, std::int64_t count) {
      add(c, fixed_point(sum, count));
    };
    if (s.sort_rows(candidate, m, false, execution, add, row) != Status::ok)
      return Status::cancelled;
    if (s.selected.empty()) return Status::ok;
  }
  const std::int64_t column_bytes = s.columns.n * static_cast<std::int64_t>(sizeof(T));
  const std::int64_t batch = std::max<std::int64_t>(64, kPackedBytes / column_bytes / 64 * 64);
  std::mutex mutex;
  for (std::int64_t first = 0; first < m; first += batch) {
    const std::int64_t size = std::min(batch, m - first);
    struct Report {  // adds up on its thread, and to the result when the thread ends
      Totals totals;
      std::int64_t* whole;
      std::int64_t* fraction;
      std::mutex* mutex;
      Report(std::int64_t size, std::int64_t* w, std::int64_t* f, std::mutex* lock)
          : totals(at(size)), whole(w), fraction(f), mutex(lock) {}
      Report(Report&& other) noexcept
          : totals(std::move(other.totals)),
            whole(other.whole),
            fraction(other.fraction),
            mutex(std::exchange(other.mutex, nullptr)) {}
      ~Report() {
        if (!mutex) return;
        const std::lock_guard<std::mutex> lock(*mutex);
        for (std::size_t c = 0; c < totals.whole.size(); ++c) {
          whole[c] += totals.whole[c];
          fraction[c] += totals.fraction[c];
        }
      }
      void operator()(std::int64_t c, std::int64_t used, Index, const std::int64_t* sum,
                      const std::int64_t* count, bool unique) {
        if (unique) {
          for (std::int64_t l = 0; l < used; ++l) totals.whole[at(c + l)] += sum[l];
        } else {
          for (std::int64_t l = 0; l < used; ++l) totals.add(at(c + l), sum[l], count[l]);
        }
      }
    };
    const auto make_report = [&] { return Report(size, whole + first, fraction + first, &mutex); };
    if (s.scan_rows(candidate + first, size, execution, make_report) != Status::ok)
      return Status::cancelled;
  }
  return Status::ok;
}

template <class T>
Status Engine<T>::row_sums(std::int64_t candidate, std::int64_t* sum, std::int64_t* count,
                           const Execution& execution) {
  State& s = *state_;
  s.prepare();
  if (s.sort_columns(&candidate, 1, execution) != Status::ok) return Status::cancelled;
  const auto row = [&](std::int64_t, Index r, std::int64_t row_sum, std::int64_t row_count) {
    sum[s.order[at(r)]] = row_sum;
    count[s.order[at(r)]] = row_count;
  };
  if (s.sorting) {
    const auto none = [](std::int64_t, const FixedPoint&) {};
    if (s.sort_rows(&candidate, 1, true, execution, none, row) != Status::ok)
      return Status::cancelled;
    if (s.selected.empty()) return Status::ok;
  }
  return s.scan_rows(&candidate, 1, execution, [&] {
    return [&](std::int64_t c, std::int64_t, Index r, const std::int64_t* sums,
               const std::int64_t* counts,
               bool unique) { row(c, r, sums[0], unique ? 1 : counts[0]); };
  });
}

template <class T>
Status neighbors(const Columns<T>& columns, Ties ties, std::uint64_t seed,
                 const std::int64_t* offset, std::int64_t* count, std::int64_t* indices,
                 const Execution& execution) {
  const DefaultFloats floats;
  const Kernels<T> kernels = pick_kernels<T>(execution.level);
  const std::int64_t n = columns.n;
  // Of `tied` neighbours the one to take, or -1 for all of them.
  const auto taken = [&](std::int64_t i, std::int64_t tied) -> std::int64_t {
    if (ties == Ties::average) return -1;
    return ties == Ties::first ? 0 : pick(tie_hash(seed, i), tied);
  };
  if (columns.p <= kTreeColumns) {
    Groups<T> groups(n);
    std::vector<const T*> values;
    for (std::int64_t f = 0; f < columns.p; ++f) {
      const T* x = columns.x + f * n;
      groups.refine(std::vector<T>(x, x + n));
      values.push_back(x);
    }
    Spatial<T> space;
    space.build(values, std::vector<T>(columns.factor, columns.factor + columns.p), groups.of_row,
                groups.count);
    constexpr std::int64_t rows = 256;
    return parallel_for(pieces_of(n, rows), execution, [&] {
      return [&, tied = std::vector<Range>(),
              listed = std::vector<Index>()](std::int64_t piece) mutable {
        for (std::int64_t a = piece * rows; a < std::min(n, (piece + 1) * rows); ++a) {
          const Index own = space.row(a);
          const Index self = space.point_of(own);
          const bool twins = space.end(self) - space.begin(self) > 1;
          T best = twins ? T{0} : std::numeric_limits<T>::infinity();
          tied.clear();
          if (twins) tied.push_back({space.begin(self), space.end(self)});
          space.within(
              kernels, self, [&] { return best; },
              [&](Index point, T distance) {
                if (distance < best) {
                  best = distance;
                  tied.clear();
                }
                tied.push_back({space.begin(point), space.end(point)});
              });
          std::int64_t size = -std::int64_t{twins};
          for (const Range& range : tied) size += range.end - range.begin;
          const std::int64_t k = taken(own, size);
          if (!indices) {
            count[own] = k < 0 ? size : 1;
          } else if (k >= 0) {
            indices[offset[own]] = kth_row(tied, space.rows(), k, own);
          } else {
            listed.clear();
            for (const Range& range : tied)
              for (std::int64_t t = range.begin; t < range.end; ++t)
                if (space.row(t) != own) listed.push_back(space.row(t));
            std::sort(listed.begin(), listed.end());
            std::copy(listed.begin(), listed.end(), indices + offset[own]);
          }
        }
      };
    });
  }
  return parallel_for(pieces_of(n, kRows), execution, [&] {
    return [&, distance = std::vector<T>(at(kRows * n))](std::int64_t piece) mutable {
      std::int64_t rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = std::min(piece * kRows + r, n - 1);
      std::fill(distance.begin(), distance.end(), T{0});
      for (std::int64_t f = 0; f < columns.p; ++f)
        kernels.accumulate(columns.x + f * n, n, rows, columns.factor[f], distance.data());
      for (int r = 0; r < kRows && piece * kRows + r < n; ++r) {
        const std::int64_t i = rows[r];
        const T* d = distance.data() + r * n;
        const T nearest = kernels.minimum(d, n, i);
        std::int64_t tied = 0;
        for (std::int64_t j = 0; j < n; ++j) tied += j != i && d[j] == nearest;
        const std::int64_t k = taken(i, tied);
        if (!indices) {
          count[i] = k < 0 ? tied : 1;
          continue;
        }
        std::int64_t* out = indices + offset[i];
        std::int64_t seen = 0;
        for (std::int64_t j = 0; j < n; ++j) {
          if (j == i || d[j] != nearest) continue;
          if (k < 0 || seen == k) *out++ = j;
          ++seen;
        }
      }
    };
  });
}

template <class T>
Status lay_out(const T* x, std::int64_t n, std::int64_t p, T* columns, T* low, T* high,
               const Execution& execution) {
  const Kernels<T> kernels = pick_kernels<T>(execution.level);
  constexpr std::int64_t wide = 64;  // columns in a piece: whole cache lines of every row
  constexpr std::int64_t tall = 64;  // rows of a block that fits the first-level cache
  return parallel_for(pieces_of(p, wide), execution, [&] {
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

#define LCODEC_INSTANTIATE(T)                                                                     \
  template class Engine<T>;                                                                       \
  template Status lay_out<T>(const T*, std::int64_t, std::int64_t, T*, T*, T*, const Execution&); \
  template Status standard_deviations<T>(const T*, std::int64_t, std::int64_t, double*,           \
                                         const Execution&);                                       \
  template Status neighbors<T>(const Columns<T>&, Ties, std::uint64_t, const std::int64_t*,       \
                               std::int64_t*, std::int64_t*, const Execution&);
LCODEC_INSTANTIATE(float)
LCODEC_INSTANTIATE(double)

}  // namespace lcodec
