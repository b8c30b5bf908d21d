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
constexpr int kVectors = 2;  // side by side, to hide the latency of compare and blend

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

// Whether any lane of a comparison's result is set.
template <class Int>
inline bool any(const Int& mask) {
  long long words[sizeof(Int) / sizeof(long long)];
  __builtin_memcpy(words, &mask, sizeof mask);
  long long all = 0;
  for (const long long word : words) all |= word;
  return all != 0;
}

template <class T>
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
  for (std::int64_t begin = 0; begin < a.list.chunks && !stopped; begin += kSegment) {
    const std::int64_t end = begin + kSegment < a.list.chunks ? begin + kSegment : a.list.chunks;
    Value start[kVectors];
    Int count[kVectors], sum[kVectors];
    for (int q = 0; q < kVectors; ++q) {
      start[q] = best[q];
      count[q] = Int{};
      sum[q] = Int{};
    }
    for (std::int64_t c = begin; c < end; ++c) {
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
          const Int kept = v <= best[q];
          best[q] = less ? v : best[q];
          count[q] = (count[q] & ~less) - kept;
          sum[q] = (sum[q] & ~less) + (rank & kept);
        }
      }
    }
    Lane counts[kLanes<T>], sums[kLanes<T>];
    __builtin_memcpy(counts, count, sizeof count);
    __builtin_memcpy(sums, sum, sizeof sum);
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
  Int open = best[0] >= a.list.reach;
  for (int q = 1; q < kVectors; ++q) open |= best[q] >= a.list.reach;
  __builtin_memcpy(a.best, best, sizeof best);
  return {stopped || !any(open), unique};
}

template <class T>
std::int64_t adjacent(const AdjacentArgs<T>& a) {
  const std::int64_t edge = a.size < 4 ? a.size : 2;
  for (std::int64_t t = 0; t < edge; ++t) {
    a.flag[t] = 1;
    a.flag[a.size - 1 - t] = 1;
  }
  std::int64_t total = 0;
  for (std::int64_t t = 2; t < a.size - 2; ++t) {
    const T x = a.value[t];
    const T near_left = (x - a.value[t - 1]) * a.factor;
    const T near_right = (a.value[t + 1] - x) * a.factor;
    const T far_left = (x - a.value[t - 2]) * a.factor;
    const T far_right = (a.value[t + 2] - x) * a.factor;
    const T left = near_left * near_left;
    const T right = near_right * near_right;
    const bool take_left = left < right;
    const T best = take_left ? left : right;
    const T second_left = far_left * far_left;
    const T second_right = far_right * far_right;
    const bool tied =
        (left == right) | (second_left <= best) | (second_right <= best) | !(best < a.limit);
    const std::int32_t neighbor = take_left ? a.rank[t - 1] : a.rank[t + 1];
    const std::int32_t m = neighbor < a.rank[t] ? neighbor : a.rank[t];
    a.flag[t] = tied;
    total += tied ? 0 : m;
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
constexpr Kernels<T> kernels() {
  return {kLanes<T>, scan<T>, adjacent<T>, distances<T>, within<T>, accumulate<T>, minimum<T>};
}

}  // namespace

LevelKernels LCODEC_CONCAT(LCODEC_SIMD_LEVEL, _kernels)() {
  return {kernels<float>(), kernels<double>()};
}

}  // namespace lcodec
