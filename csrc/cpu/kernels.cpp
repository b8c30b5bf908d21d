// The inner loops, written once on the compiler's vector types and compiled for every SIMD level
// (LCODEC_SIMD_LEVEL is baseline, avx2 or avx512). The arithmetic is the same at each: plain
// subtract, multiply, multiply, add, compare; contraction is off for the whole build.
//
// Why the scan is fast: candidates lie side by side in a packed tile, so that one neighbour j
// serves a whole vector of them with contiguous loads; only minimum, count and rank sum are kept,
// in registers; and it stops at the first chunk that lies farther than every lane's best. Of 64
// candidates the slowest one takes twice the neighbours of the next and four times those of the
// sixth: where vectors are wide, the last few go on by themselves, several neighbours side by side.
// It must not use fma, reassociate, or include anything with inline functions of external linkage:
// the linker would keep one copy of those, possibly of a level that the CPU does not have.

#include "cpu/kernels.hpp"

#include <type_traits>

#include "common/fixed_point.hpp"
#include "cpu/instruments.hpp"
#include "cpu/simd.hpp"

// Elements of a vector in another order; GCC has Clang's builtin from version 12 on.
#if __has_builtin(__builtin_shufflevector)
#define LCODEC_SHUFFLE(Int, vector, ...) __builtin_shufflevector(vector, vector, __VA_ARGS__)
#else
#define LCODEC_SHUFFLE(Int, vector, ...) __builtin_shuffle(vector, Int{__VA_ARGS__})
#endif

namespace lcodec {
namespace {

// Side by side, to hide the latency of compare and blend, and to start fewer scans: as many as the
// registers hold.
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

template <class T>
constexpr int kLanes = kVectors * kWidth<T>;

// Instructions of a scan for a neighbour and a vector of candidates: subtract, multiply twice, add,
// compare for less and for equal, and two blends. AVX-512 gathers ties in mask registers; others
// need an `or`, and before SSE4.1 a blend is three.
#if defined(__AVX512F__)
constexpr int kScanInstructions = 8;
#elif defined(__AVX__)
constexpr int kScanInstructions = 9;
#else
constexpr int kScanInstructions = 13;
#endif
// For a chunk of neighbours and one lane by itself: eight as above, and eleven to gather values.
constexpr int kLaneInstructions = 19;

// Chunks that a scan compared, for benchmarks: all lanes together, lanes by themselves, and where
// the last lane stopped.
struct Compared {
  std::int64_t together = 0;
  std::int64_t alone = 0;
  std::int64_t last = 0;

  template <class T>
  ScanCount count() const {
    if constexpr (!kInstruments) return {};
    constexpr std::int64_t kWhole = kChunk * kVectors * kScanInstructions;
    return {(together * kLanes<T> + alone) * kChunk, together * kWhole + alone * kLaneInstructions,
            last * kWhole};
  }
};

// Rank sums of this many neighbours fit a 32-bit lane: 255 * 8 * 10^6 < 2^31.
constexpr std::int64_t kSegment = 255;  // chunks

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

template <class V, class T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Lanes that go on by themselves: with AVX-512 a chunk costs one lane about a twelfth of what it
// costs 64 of float. In narrow vectors no lane does.
template <class T>
constexpr int kLastLanes = kLanes<T> / 12;

template <class T>
inline bool few(std::uint64_t lanes) {
  if constexpr (kLastLanes<T> > 0) return __builtin_popcountll(lanes) <= kLastLanes<T>;
  return lanes == 0;
}

// A bit for every lane of a comparison's result, an integer vector of 64 bytes at most. Built-in
// functions, since compilers turn generic code into a move for each lane.
template <class Int>
inline std::uint64_t bits(const Int& mask) {
  constexpr int kBytes = static_cast<int>(sizeof(Int));
  [[maybe_unused]] constexpr bool kWide = sizeof(mask[0]) == 8;
  [[maybe_unused]] const auto as = [&](auto words) {
    static_assert(sizeof words == sizeof mask);
    __builtin_memcpy(&words, &mask, sizeof mask);
    return words;
  };
  if constexpr (kBytes > kVectorBytes) {
    typedef std::remove_cvref_t<decltype(mask[0])> Half __attribute__((vector_size(kBytes / 2)));
    Half half[2];
    __builtin_memcpy(half, &mask, sizeof mask);
    return bits(half[0]) | bits(half[1]) << (kBytes / 2 / static_cast<int>(sizeof(mask[0])));
  }
#if defined(__AVX512DQ__)
  if constexpr (kBytes == 64) {
    typedef int Ints __attribute__((vector_size(64)));
    typedef long long Longs __attribute__((vector_size(64)));
    if constexpr (kWide)
      return __builtin_ia32_cvtq2mask512(as(Longs{}));
    else
      return __builtin_ia32_cvtd2mask512(as(Ints{}));
  }
#endif
#if defined(__AVX__)
  if constexpr (kBytes == 32) {
    typedef float Floats __attribute__((vector_size(32)));
    typedef double Doubles __attribute__((vector_size(32)));
    if constexpr (kWide)
      return static_cast<unsigned>(__builtin_ia32_movmskpd256(as(Doubles{})));
    else
      return static_cast<unsigned>(__builtin_ia32_movmskps256(as(Floats{})));
  }
#endif
#if defined(__SSE2__)
  if constexpr (kBytes == 16) {
    typedef float Floats __attribute__((vector_size(16)));
    typedef double Doubles __attribute__((vector_size(16)));
    if constexpr (kWide)
      return static_cast<unsigned>(__builtin_ia32_movmskpd(as(Doubles{})));
    else
      return static_cast<unsigned>(__builtin_ia32_movmskps(as(Floats{})));
  }
#endif
  std::uint64_t result = 0;
  for (int l = 0; l < kBytes / static_cast<int>(sizeof(mask[0])); ++l)
    result |= static_cast<std::uint64_t>(mask[l] & 1) << l;
  return result;
}

template <class Int>
inline void note(const Int& mask, Int& seen) {
#if defined(__AVX512F__)
  seen = mask ? ~Int{} : seen;
#else
  seen |= mask;
#endif
}

template <class Int>
inline bool any(const Int& mask) {
  return bits(mask) != 0;
}

// One lane of a scan that goes on by itself.
template <class T>
struct LastLane {
  T best;
  std::int32_t count, sum;
  bool tied;  // rows may be tied; where they are not counted
};

// Chunks [begin, end) of a list for one lane, until they lie farther than its best: neighbours of a
// chunk side by side. Returns the chunk that it stopped at.
template <class T, bool kCount>
inline std::int64_t scan_lane(const ScanArgs<T>& a, int lane, std::int64_t begin, std::int64_t end,
                              LastLane<T>& state) {
  static_assert(kChunk == 8);
  using Lane = typename Simd<T>::Lane;
  typedef T Value __attribute__((vector_size(kChunk * sizeof(T))));
  typedef Lane Int __attribute__((vector_size(kChunk * sizeof(T))));
  typedef std::int32_t Rank __attribute__((vector_size(kChunk * sizeof(std::int32_t))));
  const T* column = a.tile + lane;
  const auto at = [&](std::int32_t row) {
    return column[static_cast<std::int64_t>(row) * kLanes<T>];
  };
  const T x = a.own[lane];
  const T factor = a.factor[lane];
  Value best = state.best - Value{};
  Int count{}, sum{}, tied{};
  std::int64_t c = begin;
  for (; c < end; ++c) {
    // every element is at most what the lane had before, and its best the least of them
    const Int closed = best < a.list.bound[c];
    if (any(closed)) break;
    const std::int32_t* j = a.list.index + c * kChunk;
    const Value other = {at(j[0]), at(j[1]), at(j[2]), at(j[3]),
                         at(j[4]), at(j[5]), at(j[6]), at(j[7])};
    Rank ranks;
    Value distance;
    __builtin_memcpy(&ranks, a.list.rank + c * kChunk, sizeof ranks);
    __builtin_memcpy(&distance, a.list.distance + c * kChunk, sizeof distance);
    const Int rank = __builtin_convertvector(ranks, Int);
    const Value scaled = (x - other) * factor;
    const Value v = distance + scaled * scaled;
    const Int less = v < best;
    if constexpr (kCount) {
      const Int kept = v <= best;
      count = (count & ~less) - kept;
      sum = (sum & ~less) + (rank & kept);
    } else {
      note<Int>(v == best, tied);
      sum = less ? rank : sum;
    }
    best = less ? v : best;
  }
  Value low = best;
  const auto fold = [&](const Value& other) { low = other < low ? other : low; };
  fold(LCODEC_SHUFFLE(Int, low, 4, 5, 6, 7, 0, 1, 2, 3));
  fold(LCODEC_SHUFFLE(Int, low, 2, 3, 0, 1, 6, 7, 4, 5));
  fold(LCODEC_SHUFFLE(Int, low, 1, 0, 3, 2, 5, 4, 7, 6));
  const T least = low[0];
  const bool lower = least < state.best;
  if constexpr (kCount) {
    if (lower) state.count = state.sum = 0;
    for (int u = 0; u < kChunk; ++u)
      if (best[u] == least) {
        state.count += static_cast<std::int32_t>(count[u]);
        state.sum += static_cast<std::int32_t>(sum[u]);
      }
  } else {
    const auto where = bits<Int>(best == low);
    Lane sums[kChunk];
    __builtin_memcpy(sums, &sum, sizeof sum);
    if (lower) state.sum = static_cast<std::int32_t>(sums[__builtin_ctzll(where)]);
    state.tied = any(tied) || (lower && (where & (where - 1)) != 0);
  }
  state.best = least;
  return c;
}

// A scan of all lanes side by side.
template <class T>
struct Lanes {
  using Value = typename Simd<T>::Value;
  using Int = typename Simd<T>::Int;
  Value x[kVectors], factor[kVectors], best[kVectors];
  Int count[kVectors], sum[kVectors];  // of a segment
  Int tied{};                          // rows may be tied; where they are not counted

  LCODEC_INLINE explicit Lanes(const ScanArgs<T>& a) {
    for (int q = 0; q < kVectors; ++q) {
      x[q] = load<Value>(a.own + q * kWidth<T>);
      factor[q] = load<Value>(a.factor + q * kWidth<T>);
      best[q] = kInfinity<T> - Value{};
    }
  }

  LCODEC_INLINE void begin_segment() {
    for (int q = 0; q < kVectors; ++q) count[q] = sum[q] = Int{};
  }

  // A bit for every lane whose best is not below a bound.
  LCODEC_INLINE std::uint64_t open(T bound) const {
    std::uint64_t lanes = 0;
    for (int q = 0; q < kVectors; ++q) lanes |= bits<Int>(best[q] >= bound) << (q * kWidth<T>);
    return lanes;
  }

  // The neighbours of chunk c.
  template <bool kCount>
  LCODEC_INLINE void compare(const ScanArgs<T>& a, std::int64_t c) {
    const std::int32_t* index = a.list.index + c * kChunk;
    const std::int32_t* ranks = a.list.rank + c * kChunk;
    const T* distance = a.list.distance + c * kChunk;
#pragma GCC unroll 8
    for (int u = 0; u < kChunk; ++u) {
      const T* row = a.tile + static_cast<std::int64_t>(index[u]) * kLanes<T>;
      const auto rank = static_cast<typename Simd<T>::Lane>(ranks[u]);
      for (int q = 0; q < kVectors; ++q) {
        const Value scaled = (x[q] - load<Value>(row + q * kWidth<T>)) * factor[q];
        const Value v = distance[u] + scaled * scaled;
        const Int less = v < best[q];
        if constexpr (kCount) {
          const Int kept = v <= best[q];
          count[q] = (count[q] & ~less) - kept;
          sum[q] = (sum[q] & ~less) + (rank & kept);
        } else {
          // Also where a nearer one follows: that is rare, and the scan that counts finds it out.
          note<Int>(v == best[q], tied);
          sum[q] = less ? rank + Int{} : sum[q];
        }
        best[q] = less ? v : best[q];
      }
    }
  }
};

// The sums and counts of a segment of the list, lane by lane.
template <class T>
struct Segment {
  using Lane = typename Simd<T>::Lane;
  Lane sum[kLanes<T>], count[kLanes<T>];
};

// The lanes that are open at chunk `begin` go on by themselves, up to `end`.
template <class T, bool kCount>
LCODEC_INLINE void finish_alone(const ScanArgs<T>& a, std::uint64_t open, std::int64_t begin,
                                std::int64_t end, Lanes<T>& lanes, Segment<T>& segment, bool& tied,
                                Compared& compared) {
  T bests[kLanes<T>];
  __builtin_memcpy(bests, lanes.best, sizeof bests);
  for (; open != 0; open &= open - 1) {
    const int l = __builtin_ctzll(open);
    LastLane<T> lane{bests[l], 0, static_cast<std::int32_t>(segment.sum[l]), false};
    if constexpr (kCount) lane.count = static_cast<std::int32_t>(segment.count[l]);
    const std::int64_t stop = scan_lane<T, kCount>(a, l, begin, end, lane);
    compared.alone += stop - begin;
    compared.last = stop > compared.last ? stop : compared.last;
    bests[l] = lane.best;
    segment.sum[l] = lane.sum;
    if constexpr (kCount)
      segment.count[l] = lane.count;
    else
      tied |= lane.tied;
  }
  __builtin_memcpy(lanes.best, bests, sizeof bests);
}

// Adds a segment to those before it; where it has a nearer row, those are forgotten. `start` is the
// best before it. With counts, returns whether they are all known to be 1.
template <class T, bool kCount>
LCODEC_INLINE bool add_segment(const ScanArgs<T>& a, bool first, const Segment<T>& segment,
                               const typename Simd<T>::Value (&start)[kVectors],
                               const typename Simd<T>::Value (&best)[kVectors]) {
  if (first) {
    bool several = false;
    if constexpr (kCount)
      for (int l = 0; l < kLanes<T>; ++l) several |= segment.count[l] != 1;
    for (int l = 0; l < kLanes<T>; ++l) {
      a.sum[l] = segment.sum[l];
      if constexpr (kCount) a.count[l] = segment.count[l];
    }
    return !several;
  }
  T now[kLanes<T>], before[kLanes<T>];
  __builtin_memcpy(now, best, sizeof now);
  __builtin_memcpy(before, start, sizeof before);
  for (int l = 0; l < kLanes<T>; ++l) {
    const bool lower = now[l] < before[l];
    if constexpr (kCount) {
      a.sum[l] = (lower ? 0 : a.sum[l]) + segment.sum[l];
      a.count[l] = (lower ? 0 : a.count[l]) + segment.count[l];
    } else {
      if (lower) a.sum[l] = segment.sum[l];
    }
  }
  return false;  // not worth a look for a list this long
}

template <class T, bool kCount>
ScanResult scan(const ScanArgs<T>& a) {
  using Value = typename Simd<T>::Value;
  Lanes<T> lanes(a);
  bool stopped = false;
  bool unique = true;
  bool tied_alone = false;
  Compared compared;
  for (std::int64_t begin = 0; begin < a.list.chunks && !stopped; begin += kSegment) {
    const std::int64_t end = begin + kSegment < a.list.chunks ? begin + kSegment : a.list.chunks;
    Value start[kVectors];
    for (int q = 0; q < kVectors; ++q) start[q] = lanes.best[q];
    lanes.begin_segment();
    std::uint64_t open = 0;
    std::int64_t c = begin;
    for (; c < end; ++c) {
      open = lanes.open(a.list.bound[c]);
      if (few<T>(open)) break;
      lanes.template compare<kCount>(a, c);
    }
    compared.together += c - begin;
    if (c > begin) compared.last = c;
    stopped = c < end && open == 0;
    Segment<T> segment;
    __builtin_memcpy(segment.sum, lanes.sum, sizeof lanes.sum);
    if constexpr (kCount) __builtin_memcpy(segment.count, lanes.count, sizeof lanes.count);
    if constexpr (kLastLanes<T> > 0) {
      if (c < end && open != 0)
        finish_alone<T, kCount>(a, open, c, end, lanes, segment, tied_alone, compared);
    }
    unique = add_segment<T, kCount>(a, begin == 0, segment, start, lanes.best);
  }
  if constexpr (!kCount) unique = !any(lanes.tied) && !tied_alone;
  __builtin_memcpy(a.best, lanes.best, sizeof lanes.best);
  return {stopped || lanes.open(a.list.reach) == 0, unique, compared.template count<T>()};
}

template <class T>
std::int64_t adjacent(const AdjacentArgs<T>& a) {
  using Value = typename Simd<T>::Value;
  using Int = typename Simd<T>::Int;
  using Lane = typename Simd<T>::Lane;
  typedef std::int32_t Rank __attribute__((vector_size(kWidth<T> * sizeof(std::int32_t))));
  typedef std::uint8_t Flag __attribute__((vector_size(kWidth<T>)));
  const auto rank = [&](std::int64_t t) {
    return __builtin_convertvector(load<Rank>(a.rank + t), Int);
  };
  Int lane;
  for (int l = 0; l < kWidth<T>; ++l) lane[l] = l;
  std::int64_t total = 0;
  constexpr std::int64_t kSteps = 1024;  // additions to a 32-bit lane: 1024 * 10^6 < 2^31
  for (std::int64_t block = a.begin; block < a.end; block += kSteps * kWidth<T>) {
    const std::int64_t end =
        a.end - block < kSteps * kWidth<T> ? a.end : block + kSteps * kWidth<T>;
    Int sum{};
    for (std::int64_t t = block; t < end; t += kWidth<T>) {
      const Value x = load<Value>(a.value + t);
      const Value near_left = (x - load<Value>(a.value + t - 1)) * a.factor;
      const Value near_right = (load<Value>(a.value + t + 1) - x) * a.factor;
      const Value far_left = (x - load<Value>(a.value + t - 2)) * a.factor;
      const Value far_right = (load<Value>(a.value + t + 2) - x) * a.factor;
      const Value left = near_left * near_left;
      const Value right = near_right * near_right;
      const Int take_left = left < right;
      const Value best = take_left ? left : right;
      // ~(>) rather than <=: infinities at the ends of the column make NaN with factor 0
      const Int tied = (left == right) | ~(far_left * far_left > best) |
                       ~(far_right * far_right > best) | ~(best < a.limit) |
                       ~(lane < static_cast<Lane>(end - t));
      const Int own = rank(t);
      const Int other = take_left ? rank(t - 1) : rank(t + 1);
      sum += (other < own ? other : own) & ~tied;
      const Flag flag = __builtin_convertvector(tied & 1, Flag);
      __builtin_memcpy(a.flag + t, &flag, sizeof flag);
    }
    for (int l = 0; l < kWidth<T>; ++l) total += sum[l];
  }
  return total;
}

template <class T>
void distances(const T* points, std::int64_t stride, std::int64_t size, std::int64_t dims,
               const T* query, const T* factor, T* out) {
  for (std::int64_t a = 0; a < size; ++a) out[a] = 0;
  for (std::int64_t d = 0; d < dims; ++d) {
    const T* column = points + d * stride;
    const T own = query[d];
    const T c = factor[d];
    for (std::int64_t a = 0; a < size; ++a) {
      const T scaled = (own - column[a]) * c;
      out[a] = out[a] + scaled * scaled;
    }
  }
}

template <class T>
std::int64_t within(const T* distance, std::int64_t size, T radius, std::int32_t* out) {
  std::int64_t count = 0;
  for (std::int64_t a = 0; a < size; ++a) {  // no branch: which ones are near is unpredictable
    out[count] = static_cast<std::int32_t>(a);
    count += distance[a] <= radius;
  }
  return count;
}

template <class T>
void accumulate(const T* x, std::int64_t n, const std::int64_t* rows, T factor, T* distance) {
  T own[kRows];
  for (int r = 0; r < kRows; ++r) own[r] = x[rows[r]];
  for (std::int64_t j = 0; j < n; ++j)
    for (int r = 0; r < kRows; ++r) {
      const T scaled = (own[r] - x[j]) * factor;
      distance[r * n + j] = distance[r * n + j] + scaled * scaled;
    }
}

template <class T>
T range_minimum(const T* d, std::int64_t begin, std::int64_t end) {
  using Value = typename Simd<T>::Value;
  Value lanes = kInfinity<T> - Value{};
  std::int64_t j = begin;
  for (; j + kWidth<T> <= end; j += kWidth<T>) {
    const Value v = load<Value>(d + j);
    lanes = v < lanes ? v : lanes;
  }
  T least = kInfinity<T>;
  for (int l = 0; l < kWidth<T>; ++l) least = lanes[l] < least ? lanes[l] : least;
  for (; j < end; ++j) least = d[j] < least ? d[j] : least;
  return least;
}

template <class T>
T minimum(const T* distance, std::int64_t n, std::int64_t i) {
  const T before = range_minimum(distance, 0, i);
  const T after = range_minimum(distance, i + 1, n);
  return before < after ? before : after;
}

template <class T>
void range(const T* x, std::int64_t n, T* low, T* high) {
  using Value = typename Simd<T>::Value;
  Value lows = x[0] - Value{};
  Value highs = lows;
  std::int64_t j = 0;
  for (; j + kWidth<T> <= n; j += kWidth<T>) {
    const Value v = load<Value>(x + j);
    lows = v < lows ? v : lows;
    highs = v > highs ? v : highs;
  }
  T least = x[0];
  T most = x[0];
  for (int l = 0; l < kWidth<T>; ++l) {
    least = lows[l] < least ? lows[l] : least;
    most = highs[l] > most ? highs[l] : most;
  }
  for (; j < n; ++j) {
    least = x[j] < least ? x[j] : least;
    most = x[j] > most ? x[j] : most;
  }
  *low = least;
  *high = most;
}

template <class T>
void lane_sums(const T* x, std::int64_t n, const double* center, double* lane) {
  for (std::int64_t start = 0; start < n; start += kSumLanes) {
    const std::int64_t size = n - start < kSumLanes ? n - start : kSumLanes;
    if (center) {
      for (std::int64_t l = 0; l < size; ++l) {
        const double deviation = static_cast<double>(x[start + l]) - *center;
        lane[l] = lane[l] + deviation * deviation;
      }
    } else {
      for (std::int64_t l = 0; l < size; ++l) lane[l] = lane[l] + static_cast<double>(x[start + l]);
    }
  }
}

// Estimates in double, each corrected by its remainder. Compilers have instructions for these
// conversions from AVX-512 on.
void quotients(const std::int64_t* sum, std::int64_t size, std::int64_t count, std::int64_t* whole,
               std::int64_t* fraction) {
  using Value = typename Simd<double>::Value;
  using Int = typename Simd<double>::Int;
  const double inverse = 1 / static_cast<double>(count);
  const auto by_count = [&](const Int& value, const Value& estimate, Int& quotient, Int& rest) {
    quotient = __builtin_convertvector(estimate, Int);
    rest = value - quotient * count;
    const Int above = rest >= count;  // -1 where true
    const Int below = rest < 0;
    quotient += below - above;
    rest += count & below;
    rest -= count & above;
  };
  constexpr double scale = static_cast<double>(std::int64_t{1} << kFractionBits);
  Int wholes{}, fractions{};
  const auto add = [&](const Int& value) {
    Int quotient, rest, part, rest_of_part;
    by_count(value, __builtin_convertvector(value, Value) * inverse, quotient, rest);
    by_count(rest << kFractionBits, __builtin_convertvector(rest, Value) * scale * inverse, part,
             rest_of_part);
    wholes += quotient;
    fractions += part;
  };
  std::int64_t t = 0;
  for (; t + kWidth<double> <= size; t += kWidth<double>) {
    Int value;
    __builtin_memcpy(&value, sum + t, sizeof value);
    add(value);
  }
  if (t < size) {
    Int value{};  // 0 adds nothing
    __builtin_memcpy(&value, sum + t, static_cast<std::size_t>(size - t) * sizeof *sum);
    add(value);
  }
  for (int l = 0; l < kWidth<double>; ++l) {
    *whole += wholes[l];
    *fraction += fractions[l];
  }
}

template <class T>
constexpr Kernels<T> kernels() {
  return {kLanes<T>,     scan<T, false>, scan<T, true>, adjacent<T>, distances<T>, within<T>,
          accumulate<T>, range<T>,       lane_sums<T>,  minimum<T>,  quotients};
}

}  // namespace

LevelKernels LCODEC_OF_LEVEL(kernels)() { return {kernels<float>(), kernels<double>()}; }

}  // namespace lcodec
