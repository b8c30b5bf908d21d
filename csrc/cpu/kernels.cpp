// The inner loops, written once on the compiler's vector types and compiled for every SIMD level
// (LCODEC_SIMD_LEVEL is baseline, avx2 or avx512). The arithmetic is the same at each: plain
// subtract, multiply, multiply, add, compare; contraction is off for the whole build.
//
// Why the scan is fast: candidates lie side by side in a packed tile, so that one neighbour j
// serves a whole vector of them with contiguous loads; only minimum, count and rank sum are kept,
// in registers; and it stops at the first chunk that lies farther than every lane's best.
// It must not use fma, reassociate, or include anything with inline functions of external linkage:
// the linker would keep one copy of those, possibly of a level that the CPU does not have.

#include "kernels.hpp"

#define LCODEC_CONCAT2(a, b) a##b
#define LCODEC_CONCAT(a, b) LCODEC_CONCAT2(a, b)

namespace lcodec {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
// Side by side, to hide the latency of compare and blend, and to start fewer scans: as many as the
// registers hold.
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Value __attribute__((vector_size(kVectorBytes)));
  typedef std::int32_t Int __attribute__((vector_size(kVectorBytes)));
  using Lane = std::int32_t;
};
template <>
struct Simd<double> {
  typedef double Value __attribute__((vector_size(kVectorBytes)));
  typedef std::int64_t Int __attribute__((vector_size(kVectorBytes)));
  using Lane = std::int64_t;
};

template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
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

// Whether any lane of a comparison's result is set. Compilers take generic code for this apart into
// a move for each word, which costs a scan a quarter of its time.
template <class Int>
inline bool any(const Int& mask) {
#if defined(__AVX512DQ__)
  typedef int Words __attribute__((vector_size(64)));
  return __builtin_ia32_cvtd2mask512(reinterpret_cast<const Words&>(mask)) != 0;
#elif defined(__AVX__)
  typedef long long Words __attribute__((vector_size(32)));
  const auto words = reinterpret_cast<const Words&>(mask);
  return __builtin_ia32_ptestz256(words, words) == 0;
#elif defined(__SSE2__)
  typedef char Bytes __attribute__((vector_size(16)));
  return __builtin_ia32_pmovmskb128(reinterpret_cast<const Bytes&>(mask)) != 0;
#else
  long long words[sizeof(Int) / sizeof(long long)];
  __builtin_memcpy(words, &mask, sizeof mask);
  long long all = 0;
  for (const long long word : words) all |= word;
  return all != 0;
#endif
}

template <class T, bool kCount>
ScanResult scan(const ScanArgs<T>& a) {
  using Value = typename Simd<T>::Value;
  using Int = typename Simd<T>::Int;
  using Lane = typename Simd<T>::Lane;
  Value x[kVectors], factor[kVectors], best[kVectors];
  for (int q = 0; q < kVectors; ++q) {
    x[q] = load<Value>(a.own + q * kWidth<T>);
    factor[q] = load<Value>(a.factor + q * kWidth<T>);
    best[q] = kInfinity<T> - Value{};
  }
  bool stopped = false;
  bool unique = true;
  std::int64_t compared = 0;
  [[maybe_unused]] Int tied{};
  for (std::int64_t begin = 0; begin < a.list.chunks && !stopped; begin += kSegment) {
    const std::int64_t end = begin + kSegment < a.list.chunks ? begin + kSegment : a.list.chunks;
    Value start[kVectors];
    Int count[kVectors], sum[kVectors];
    for (int q = 0; q < kVectors; ++q) {
      start[q] = best[q];
      count[q] = Int{};
      sum[q] = Int{};
    }
    std::int64_t c = begin;
    for (; c < end; ++c) {
      Int reach = best[0] >= a.list.bound[c];
      for (int q = 1; q < kVectors; ++q) reach |= best[q] >= a.list.bound[c];
      if (!any(reach)) {
        stopped = true;
        break;
      }
      const std::int32_t* index = a.list.index + c * kChunk;
      const std::int32_t* ranks = a.list.rank + c * kChunk;
      const T* distance = a.list.distance + c * kChunk;
#pragma GCC unroll 8
      for (int u = 0; u < kChunk; ++u) {
        const T* row = a.tile + static_cast<std::int64_t>(index[u]) * kLanes<T>;
        const auto rank = static_cast<Lane>(ranks[u]);
        for (int q = 0; q < kVectors; ++q) {
          const Value scaled = (x[q] - load<Value>(row + q * kWidth<T>)) * factor[q];
          const Value v = distance[u] + scaled * scaled;
          const Int less = v < best[q];
          if constexpr (kCount) {
            const Int kept = v <= best[q];
            count[q] = (count[q] & ~less) - kept;
            sum[q] = (sum[q] & ~less) + (rank & kept);
          } else {
            tied |= v == best[q];  // also where a nearer one follows: rare, and counted then
            sum[q] = less ? rank + Int{} : sum[q];
          }
          best[q] = less ? v : best[q];
        }
      }
    }
    compared += c - begin;
    Lane sums[kLanes<T>];
    __builtin_memcpy(sums, sum, sizeof sum);
    if constexpr (!kCount) {
      if (begin == 0) {
        for (int l = 0; l < kLanes<T>; ++l) a.sum[l] = sums[l];
      } else {
        T now[kLanes<T>], before[kLanes<T>];
        __builtin_memcpy(now, best, sizeof best);
        __builtin_memcpy(before, start, sizeof start);
        for (int l = 0; l < kLanes<T>; ++l)
          if (now[l] < before[l]) a.sum[l] = sums[l];
      }
      continue;
    }
    Lane counts[kLanes<T>];
    __builtin_memcpy(counts, count, sizeof count);
    if (begin == 0) {
      Int several = count[0] != 1;
      for (int q = 1; q < kVectors; ++q) several |= count[q] != 1;
      unique = !any(several);
      for (int l = 0; l < kLanes<T>; ++l) {
        a.sum[l] = sums[l];
        a.count[l] = counts[l];
      }
      continue;
    }
    unique = false;  // not worth a look for a list this long
    T now[kLanes<T>], before[kLanes<T>];
    __builtin_memcpy(now, best, sizeof best);
    __builtin_memcpy(before, start, sizeof start);
    for (int l = 0; l < kLanes<T>; ++l) {
      const bool lower = now[l] < before[l];
      a.sum[l] = (lower ? 0 : a.sum[l]) + sums[l];
      a.count[l] = (lower ? 0 : a.count[l]) + counts[l];
    }
  }
  if constexpr (!kCount) unique = !any(tied);
  Int open = best[0] >= a.list.reach;
  for (int q = 1; q < kVectors; ++q) open |= best[q] >= a.list.reach;
  __builtin_memcpy(a.best, best, sizeof best);
  return {stopped || !any(open), unique, compared};
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

template <class T>
std::int64_t saturate(std::int64_t rounds) {
  using Value = typename Simd<T>::Value;
  constexpr int chains = 8;
  Value chain[chains];
  for (int c = 0; c < chains; ++c) chain[c] = static_cast<T>(c) - Value{};
  const Value factor = T{1} - Value{};
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 8
    for (int c = 0; c < chains; ++c) {
      chain[c] = chain[c] * factor + factor;
      __asm__ volatile("" : "+x"(chain[c]));
    }
  }
  return rounds * chains * 2;
}

template <class T>
constexpr Kernels<T> kernels() {
  return {kWidth<T>,    kLanes<T>,    kScanInstructions, scan<T, false>, scan<T, true>,
          adjacent<T>,  distances<T>, within<T>,         accumulate<T>,  range<T>,
          lane_sums<T>, minimum<T>,   saturate<T>};
}

}  // namespace

LevelKernels LCODEC_CONCAT(LCODEC_SIMD_LEVEL, _kernels)() {
  return {kernels<float>(), kernels<double>()};
}

}  // namespace lcodec
