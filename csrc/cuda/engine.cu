#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "cuda/device_sort.hpp"
#include "cuda/groups.cuh"
#include "cuda/leaders.cuh"
#include "cuda/lists.cuh"
#include "cuda/outcome.hpp"
#include "cuda/scan.cuh"
#include "cuda/table.cuh"
#include "cuda/walk.cuh"
#include "lcodec/cuda_engine.hpp"

// Returns the outcome of what failed; `name` is a literal.
#define LCODEC_TRY(name, ...) \
  if (const cudaError_t error_ = (__VA_ARGS__); error_ != cudaSuccess) return outcome(error_, name)
#define LCODEC_TRY_RUN(...) \
  if (const Outcome outcome_ = run(__VA_ARGS__); !outcome_.ok()) return outcome_
// CUB need not ask for more memory where there is more to do: check, and never write past the
// scratch.
#define LCODEC_TRY_FIT(bytes) \
  if ((bytes) > scratch_bytes) return outcome(cudaErrorMemoryAllocation, "scratch")

namespace lcodec::cuda {

constexpr std::int64_t kMostRows = std::int64_t{1} << 20;  // of the fixed-point sums

// Arrays one after another in a piece of memory, or how large it must be.
class Layout {
 public:
  explicit Layout(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <class T>
  T* take(std::int64_t count) {
    constexpr std::size_t kAlignment = 256;
    unsigned char* const here = memory_ ? memory_ + size_ : nullptr;
    size_ +=
        (static_cast<std::size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(here);
  }
  std::size_t size() const { return size_; }

 private:
  unsigned char* memory_;
  std::size_t size_ = 0;
};

template <class T>
using Key = typename Table<T>::Key;

// What the engine keeps between calls.
template <class T>
struct Kept {
  std::int32_t *order, *rank, *sorted_rows, *run, *selected, *group_of, *group_begin;
  T *sorted_values, *held, *held_factor, *gap, *limit;
  std::int32_t* any_big;

  Kept(Layout& layout, std::int64_t n, std::int64_t p)
      : order(layout.take<std::int32_t>(n)),
        rank(layout.take<std::int32_t>(n)),
        sorted_rows(layout.take<std::int32_t>(n * p)),
        run(layout.take<std::int32_t>(p)),
        selected(layout.take<std::int32_t>(p)),
        group_of(layout.take<std::int32_t>(n)),
        group_begin(layout.take<std::int32_t>(n + 1)),
        sorted_values(layout.take<T>(n * p)),
        held(layout.take<T>(n * std::min<std::int64_t>(p, kHeld))),
        held_factor(layout.take<T>(kHeld)),
        gap(layout.take<T>(n)),
        limit(layout.take<T>(1)),
        any_big(layout.take<std::int32_t>(1)) {}
};

// Scratch for sorting columns by value.
template <class T>
struct SortScratch {
  Key<T>*keys, *sorted;
  std::int32_t* rows;
  std::size_t bytes = 0;
  void* temporary;

  SortScratch(Layout layout, std::int64_t n, std::int64_t columns)
      : keys(layout.take<Key<T>>(n * columns)),
        sorted(layout.take<Key<T>>(n * columns)),
        rows(layout.take<std::int32_t>(n * columns)) {
    static_cast<void>(sort_pairs<Key<T>>(nullptr, bytes, nullptr, nullptr, nullptr, nullptr, n,
                                         columns, 0, kBits, nullptr));
    temporary = layout.take<unsigned char>(static_cast<std::int64_t>(bytes));
    size = layout.size();
  }
  static constexpr int kBits = 8 * static_cast<int>(sizeof(Key<T>));
  std::size_t size = 0;
};

// Scratch for columns by (group, value), and for the first step, which sorts nothing.
template <class T>
struct GroupScratch {
  std::uint32_t *keys = nullptr, *sorted = nullptr;
  std::int32_t *places = nullptr, *sorted_places = nullptr, *rows = nullptr;
  T* values = nullptr;
  std::int32_t* ranks;
  std::int64_t* prefix;
  std::size_t sort_bytes = 0, sum_bytes = 0;
  void* temporary;
  std::size_t size = 0;

  GroupScratch(Layout layout, std::int64_t n, std::int64_t columns, bool sorts) {
    const std::int64_t elements = n * columns;
    ranks = layout.take<std::int32_t>(elements);
    prefix = layout.take<std::int64_t>(elements);
    if (sorts) {
      keys = layout.take<std::uint32_t>(elements);
      sorted = layout.take<std::uint32_t>(elements);
      places = layout.take<std::int32_t>(elements);
      sorted_places = layout.take<std::int32_t>(elements);
      rows = layout.take<std::int32_t>(elements);
      values = layout.take<T>(elements);
      static_cast<void>(sort_pairs<std::uint32_t>(nullptr, sort_bytes, nullptr, nullptr, nullptr,
                                                  nullptr, n, columns, 0, bits(n), nullptr));
    }
    static_cast<void>(
        inclusive_sum<std::int32_t>(nullptr, sum_bytes, nullptr, nullptr, elements, nullptr));
    temporary =
        layout.take<unsigned char>(static_cast<std::int64_t>(std::max(sort_bytes, sum_bytes)));
    size = layout.size();
  }
  static int bits(std::int64_t n) {
    return static_cast<int>(std::bit_width(static_cast<std::uint64_t>(n)));
  }
};

template <class T>
Lists<T> lay_out_lists(Layout layout, std::int64_t rows, std::int64_t stride, std::size_t& size) {
  Lists<T> lists{};
  lists.rows = rows;
  lists.stride = stride;
  lists.entries = layout.take<Entry<T>>(rows * stride);
  lists.size = layout.take<std::int32_t>(rows);
  lists.reach = layout.take<T>(rows);
  size = layout.size();
  return lists;
}

// Entries of a list, in whole chunks, where there is room: all rows of a small table; else what
// most scans need, about n^(1 / (k + 1)) in k columns of continuous data, several times over.
static std::int64_t list_length(std::int64_t n, int k) {
  constexpr std::int64_t kAlways = 1024;
  const double share = std::pow(static_cast<double>(n), 1.0 / (k + 1));
  const auto wanted = std::max(kAlways, 128 + static_cast<std::int64_t>(10 * share));
  // ranks of a list are added up in 32 bits
  const std::int64_t most = (std::int64_t{1} << 32) / n / kChunk * kChunk - kChunk;
  return std::min((std::min(n - 1, wanted) + kChunk - 1) / kChunk * kChunk, most);
}

// More elements than a grid's blocks have threads for are never needed at once.
constexpr std::int64_t kMostElements = std::int64_t{INT32_MAX} * 128;

// Scratch in which so many lists fit at a time, and so many columns.
template <class T>
std::size_t scratch_for(std::int64_t n, std::int64_t rows, std::int64_t columns) {
  std::size_t lists = 0;
  static_cast<void>(lay_out_lists<T>(Layout(nullptr), rows, list_length(n, 1), lists));
  return std::max({SortScratch<T>(Layout(nullptr), n, columns).size,
                   GroupScratch<T>(Layout(nullptr), n, columns, true).size, lists});
}

// Of the scratch that is offered, what a table can use.
template <class T>
std::size_t usable_scratch(std::int64_t n, std::int64_t p, std::size_t scratch) {
  return std::min(scratch, scratch_for<T>(n, n, std::min(p, kMostElements / n)));
}

// The most pieces, up to `most`, whose scratch fits; size_of(pieces) rises with them.
template <class SizeOf>
std::int64_t most_that_fit(std::int64_t most, std::size_t scratch, const SizeOf& size_of) {
  std::int64_t low = 1;
  for (std::int64_t high = most + 1; high - low > 1;) {
    const std::int64_t middle = low + (high - low) / 2;
    (size_of(middle) <= scratch ? low : high) = middle;
  }
  return low;
}

static dim3 blocks_for(std::int64_t elements) {
  return dim3(static_cast<unsigned>((elements + kThreads - 1) / kThreads));
}

template <class T>
struct Engine<T>::State {
  Table<T> table;
  const std::int32_t* given_rank;
  Kept<T> kept;
  void* scratch;
  std::size_t scratch_bytes;
  bool any_big = true;             // groups may be big
  std::vector<std::int32_t> runs;  // [p] longest run of every column, once read
  int processors = 1;
  std::size_t shared_bytes = 0;  // that a block can have

  State(const T* x, std::int64_t n, std::int64_t p, const T* factor, const std::int32_t* rank,
        Ties ties, std::uint64_t seed, Layout layout, std::size_t bytes)
      : given_rank(rank),
        kept(layout, n, p),
        scratch(layout.take<unsigned char>(0)),
        scratch_bytes(usable_scratch<T>(n, p, bytes)) {
    table = {n,
             p,
             x,
             factor,
             kept.order,
             kept.rank,
             kept.sorted_rows,
             kept.sorted_values,
             0,
             kept.selected,
             kept.held,
             kept.held_factor,
             ties,
             seed};
  }

  Layout free() const { return Layout(scratch); }
  cudaStream_t on(Stream stream) const { return static_cast<cudaStream_t>(stream); }

  Outcome number_rows(Stream stream) {
    const std::int64_t n = table.n;
    const dim3 blocks = blocks_for(n);
    if (table.ties != Ties::average) {
      LCODEC_TRY_RUN("rank_keys", rank_keys_kernel, blocks, dim3(kThreads), stream, given_rank, n,
                     nullptr, kept.order);
    } else {
      const GroupScratch<T> s(free(), n, 1, true);
      LCODEC_TRY_FIT(s.size);
      LCODEC_TRY_RUN("rank_keys", rank_keys_kernel, blocks, dim3(kThreads), stream, given_rank, n,
                     s.keys, s.places);
      std::size_t bytes = s.sort_bytes;
      LCODEC_TRY("sort of ranks", sort_pairs(s.temporary, bytes, s.keys, s.sorted, s.places,
                                             kept.order, n, 1, 0, s.bits(n), on(stream)));
    }
    LCODEC_TRY_RUN("gather", gather_kernel, blocks, dim3(kThreads), stream, given_rank, kept.order,
                   n, kept.rank);
    return {};
  }

  Outcome sort_columns(Stream stream) {
    const std::int64_t n = table.n;
    const std::int64_t p = table.p;
    const std::int64_t most = std::min(p, kMostElements / n);
    const std::int64_t batch = most_that_fit(most, scratch_bytes, [&](std::int64_t columns) {
      return SortScratch<T>(Layout(nullptr), n, columns).size;
    });
    for (std::int64_t first = 0; first < p; first += batch) {
      const std::int64_t columns = std::min(batch, p - first);
      const SortScratch<T> s(free(), n, columns);
      LCODEC_TRY_FIT(s.size);
      const std::int64_t tiles =
          (columns + kTransposed - 1) / kTransposed * ((n + kTransposed - 1) / kTransposed);
      LCODEC_TRY_RUN("column_keys", column_keys_kernel<T>, dim3(static_cast<unsigned>(tiles)),
                     dim3(kTransposed, 8), stream, table.x, kept.order, n, p, first, columns,
                     s.keys, s.rows);
      std::size_t bytes = s.bytes;
      LCODEC_TRY("sort of columns",
                 sort_pairs(s.temporary, bytes, s.keys, s.sorted, s.rows,
                            kept.sorted_rows + first * n, n, columns, 0, s.kBits, on(stream)));
      LCODEC_TRY_RUN("key_values", key_values_kernel<T>, blocks_for(n * columns), dim3(kThreads),
                     stream, s.sorted, n * columns, kept.sorted_values + first * n);
    }
    LCODEC_TRY_RUN("longest_run", longest_run_kernel<T>, dim3(static_cast<unsigned>(p)),
                   dim3(kThreads), stream, kept.sorted_values, n, kept.run);
    return {};
  }

  // Splits groups by a column that was just selected.
  Outcome refine_groups(std::int64_t column, Stream stream) {
    const std::int64_t n = table.n;
    const dim3 blocks = blocks_for(n);
    const std::int32_t* rows = kept.sorted_rows + column * n;
    const GroupScratch<T> s(free(), n, 1, true);
    LCODEC_TRY_FIT(s.size);
    LCODEC_TRY_RUN("group_keys", group_keys_kernel, blocks, dim3(kThreads), stream, rows,
                   kept.group_of, n, n, s.keys, s.places);
    std::size_t bytes = s.sort_bytes;
    LCODEC_TRY("sort of groups", sort_pairs(s.temporary, bytes, s.keys, s.sorted, s.places,
                                            s.sorted_places, n, 1, 0, s.bits(n), on(stream)));
    LCODEC_TRY_RUN("group_starts", group_starts_kernel<T>, blocks, dim3(kThreads), stream, s.sorted,
                   s.sorted_places, kept.sorted_values + column * n, n, s.ranks);
    bytes = s.sum_bytes;
    LCODEC_TRY("count of groups",
               inclusive_sum(s.temporary, bytes, s.ranks, s.prefix, n, on(stream)));
    LCODEC_TRY_RUN("group_numbers", group_numbers_kernel, blocks, dim3(kThreads), stream, rows,
                   s.sorted_places, s.ranks, s.prefix, n, kept.group_of, kept.group_begin);
    LCODEC_TRY("select", cudaMemsetAsync(kept.any_big, 0, sizeof *kept.any_big, on(stream)));
    LCODEC_TRY_RUN("group_gaps", group_gaps_kernel<T>,
                   dim3(static_cast<unsigned>((n + kWalkWarps - 1) / kWalkWarps)),
                   dim3(32 * kWalkWarps), stream, table, kept.group_of, kept.group_begin, rows,
                   s.sorted_places, kept.gap, kept.any_big);
    std::int32_t found = 0;
    LCODEC_TRY("select", cudaMemcpyAsync(&found, kept.any_big, sizeof found, cudaMemcpyDeviceToHost,
                                         on(stream)));
    LCODEC_TRY("select", cudaStreamSynchronize(on(stream)));
    any_big = found != 0;
    return {};
  }

  Groups<T> groups() const { return {any_big, kept.group_of, kept.group_begin, kept.gap}; }

  // Rows of big groups, or all rows where nothing is selected.
  Outcome score_ordered(unsigned long long* whole, unsigned long long* fraction, Stream stream) {
    const std::int64_t n = table.n;
    const bool sorts = table.k > 0;
    const std::int64_t most = std::min(table.p, kMostElements / n);
    const std::int64_t batch = most_that_fit(most, scratch_bytes, [&](std::int64_t columns) {
      return GroupScratch<T>(Layout(nullptr), n, columns, sorts).size;
    });
    for (std::int64_t first = 0; first < table.p; first += batch) {
      const std::int64_t columns = std::min(batch, table.p - first);
      const std::int64_t size = n * columns;
      const dim3 blocks = blocks_for(size);
      const std::int32_t* rows = kept.sorted_rows + first * n;
      const T* values = kept.sorted_values + first * n;
      const GroupScratch<T> s(free(), n, columns, sorts);
      LCODEC_TRY_FIT(s.size);
      if (sorts) {
        LCODEC_TRY_RUN("group_keys", group_keys_kernel, blocks, dim3(kThreads), stream, rows,
                       kept.group_of, n, size, s.keys, s.places);
        std::size_t bytes = s.sort_bytes;
        LCODEC_TRY("sort by groups",
                   sort_pairs(s.temporary, bytes, s.keys, s.sorted, s.places, s.sorted_places, n,
                              columns, 0, s.bits(n), on(stream)));
        LCODEC_TRY_RUN("group_rows", group_rows_kernel<T>, blocks, dim3(kThreads), stream, rows,
                       values, s.sorted_places, n, size, s.rows, s.values);
        rows = s.rows;
        values = s.values;
      }
      LCODEC_TRY_RUN("gather", gather_kernel, blocks, dim3(kThreads), stream, kept.rank, rows, size,
                     s.ranks);
      std::size_t bytes = s.sum_bytes;
      LCODEC_TRY("sums of ranks",
                 inclusive_sum(s.temporary, bytes, s.ranks, s.prefix, size, on(stream)));
      const std::int64_t of_column = (n + kThreads - 1) / kThreads;
      LCODEC_TRY_RUN("ordered", ordered_kernel<T>, dim3(static_cast<unsigned>(of_column * columns)),
                     dim3(kThreads), stream, table, groups(),
                     Ordered<T>{first, columns, rows, values, s.ranks, s.prefix}, whole, fraction);
    }
    return {};
  }

  // All other rows.
  Outcome score_scanned(unsigned long long* whole, unsigned long long* fraction, Stream stream) {
    const std::int64_t n = table.n;
    const std::int64_t stride = list_length(n, table.k);
    std::size_t size = 0;
    const std::int64_t at_once = most_that_fit(n, scratch_bytes, [&](std::int64_t rows) {
      static_cast<void>(lay_out_lists<T>(Layout(nullptr), rows, stride, size));
      return size;
    });
    // long enough: the bucket that comes to it is kept if it fits
    const auto wanted = static_cast<int>(stride >= n - 1 ? n : stride - stride / 4);
    const std::size_t tile = static_cast<std::size_t>(n) * kTileStride * sizeof(T);
    const bool fits = tile <= shared_bytes;
    const std::int64_t tiles = (table.p + 31) / 32;
    for (std::int64_t first = 0; first < n; first += at_once) {
      Lists<T> lists = lay_out_lists<T>(free(), std::min(at_once, n - first), stride, size);
      lists.first = first;
      LCODEC_TRY_RUN("lists", lists_kernel<T>, dim3(static_cast<unsigned>(lists.rows)),
                     dim3(kThreads), stream, table, groups(), lists, wanted, kept.limit);
      // Enough blocks for the device, twice over, but each warp with a row.
      constexpr std::int64_t kMostSplits = 65535;
      const std::int64_t splits =
          std::clamp<std::int64_t>(std::min((2 * processors + tiles - 1) / tiles,
                                            (lists.rows + kScanWarps - 1) / kScanWarps),
                                   1, kMostSplits);
      const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
      LCODEC_TRY("scan", launch("scan", fits ? scan_kernel<T, true> : scan_kernel<T, false>, grid,
                                dim3(kScanThreads), fits ? tile : 0, on(stream), table, groups(),
                                lists, whole, fraction));
    }
    return {};
  }
};

template <class T>
std::size_t Engine<T>::workspace_bytes(std::int64_t n, std::int64_t p, std::size_t scratch) {
  Layout layout(nullptr);
  static_cast<void>(Kept<T>(layout, n, p));
  return layout.size() + usable_scratch<T>(n, p, scratch);
}

template <class T>
std::size_t Engine<T>::least_scratch(std::int64_t n) {
  return scratch_for<T>(n, 1, 1);
}

template <class T>
Engine<T>::Engine(const T* x, std::int64_t n, std::int64_t p, const T* factor,
                  const std::int32_t* rank, Ties ties, std::uint64_t seed, void* workspace,
                  std::size_t scratch)
    : state_(
          std::make_unique<State>(x, n, p, factor, rank, ties, seed, Layout(workspace), scratch)) {}

template <class T>
Engine<T>::~Engine() = default;

template <class T>
Outcome Engine<T>::start(Stream stream) {
  State& s = *state_;
  const std::int64_t n = s.table.n;
  const std::int64_t p = s.table.p;
  if (n < 2 || n > kMostRows || p < 1 || p > INT32_MAX || s.scratch_bytes < least_scratch(n)) {
    return outcome(cudaErrorInvalidValue, "start");
  }
  int device = 0;
  int value = 0;
  LCODEC_TRY("start", cudaGetDevice(&device));
  LCODEC_TRY("start", cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device));
  s.processors = value;
  LCODEC_TRY("start",
             cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  s.shared_bytes = static_cast<std::size_t>(value);
  if (const Outcome o = s.number_rows(stream); !o.ok()) return o;
  LCODEC_TRY_RUN("one_group", one_group_kernel, blocks_for(n), dim3(kThreads), stream, n,
                 s.kept.group_of, s.kept.group_begin);
  return s.sort_columns(stream);
}

template <class T>
Outcome Engine<T>::select(std::int64_t column, Stream stream) {
  State& s = *state_;
  if (column < 0 || column >= s.table.p || s.table.k >= s.table.p) {
    return outcome(cudaErrorInvalidValue, "select");
  }
  if (s.runs.empty()) {
    std::vector<std::int32_t> runs(static_cast<std::size_t>(s.table.p));
    LCODEC_TRY("select", cudaMemcpyAsync(runs.data(), s.kept.run, runs.size() * sizeof runs.front(),
                                         cudaMemcpyDeviceToHost, s.on(stream)));
    LCODEC_TRY("select", cudaStreamSynchronize(s.on(stream)));
    s.runs = std::move(runs);
  }
  // Rows that share all selected values share this column's.
  s.any_big = s.any_big && s.runs[static_cast<std::size_t>(column)] >= kBigGroup;
  LCODEC_TRY_RUN("select", select_kernel<T>, blocks_for(s.table.n), dim3(kThreads), stream, s.table,
                 static_cast<std::int32_t>(column), s.kept.selected, s.kept.held,
                 s.kept.held_factor, s.kept.limit);
  ++s.table.k;
  return s.any_big ? s.refine_groups(column, stream) : Outcome{};
}

template <class T>
Outcome Engine<T>::score(std::int64_t* whole, std::int64_t* fraction, Stream stream) {
  State& s = *state_;
  const std::size_t bytes = static_cast<std::size_t>(s.table.p) * sizeof *whole;
  LCODEC_TRY("score", cudaMemsetAsync(whole, 0, bytes, s.on(stream)));
  LCODEC_TRY("score", cudaMemsetAsync(fraction, 0, bytes, s.on(stream)));
  auto* wholes = reinterpret_cast<unsigned long long*>(whole);
  auto* fractions = reinterpret_cast<unsigned long long*>(fraction);
  if (s.table.k == 0) return s.score_ordered(wholes, fractions, stream);
  if (s.any_big) {
    if (const Outcome o = s.score_ordered(wholes, fractions, stream); !o.ok()) return o;
  }
  if (const Outcome o = s.score_scanned(wholes, fractions, stream); !o.ok()) return o;
  LCODEC_TRY_RUN("leave_out", leave_out_kernel, blocks_for(s.table.k), dim3(kThreads), stream,
                 s.kept.selected, s.table.k, whole, fraction);
  return {};
}

template <class T>
Outcome Engine<T>::leaders(const std::int64_t* whole, const std::int64_t* fraction,
                           const std::uint8_t* candidate, std::int64_t* out, Stream stream) {
  return run("leaders", leaders_kernel, dim3(1), dim3(kLeaderThreads), stream, whole, fraction,
             candidate, state_->table.p, out);
}

template <class T>
Outcome Engine<T>::row_sums(std::int64_t candidate, std::int64_t* sum, std::int64_t* count,
                            Stream stream) {
  const Table<T>& table = state_->table;
  if (candidate < 0 || candidate >= table.p) return outcome(cudaErrorInvalidValue, "row_sums");
  return run("row_sums", row_sums_kernel<T>,
             dim3(static_cast<unsigned>((table.n + kWalkWarps - 1) / kWalkWarps)),
             dim3(32 * kWalkWarps), stream, table, candidate, sum, count);
}

template class Engine<float>;
template class Engine<double>;

}  // namespace lcodec::cuda
