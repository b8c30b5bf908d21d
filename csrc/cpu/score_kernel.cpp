// The inner loops, written once on the compiler's vector types and compiled for every SIMD level
// (LCODEC_SIMD_LEVEL is baseline, avx2 or avx512). The arithmetic is the same at each: plain
// subtract, multiply, multiply, add, compare; contraction is off for the whole build.
//
// Why it is fast: candidates lie side by side in a packed tile, so that one neighbour j serves a
// whole vector of them with contiguous loads, and only minimum, count and rank sum are kept, in
// registers; about eleven vector instructions for each neighbour and vector of candidates.
// It must not use fma, reassociate, or include anything with inline functions of external linkage:
// the linker would keep one copy of those, possibly of a level that the CPU does not have.

#include "score_kernel.hpp"

#include "common/random.hpp"

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

// Rank sums of this many neighbours fit a 32-bit lane: 2047 * 10^6 < 2^31.
constexpr std::int64_t kBlock = 2047;

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

template <class V, class T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Minimum, count and sum over rows [begin, end), which excludes i.
template <class T, bool kFirst>
struct Lanes {
  using Value = typename Simd<T>::Value;
  using Int = typename Simd<T>::Int;
  using Lane = typename Simd<T>::Lane;
  Value best[kVectors];
  Int count[kVectors];
  Int sum[kVectors];

  inline void scan(const ScanArgs<T>& a, std::int64_t begin, std::int64_t end) {
    const std::int32_t own = a.rank[a.i];
    Value x[kVectors], factor[kVectors], b[kVectors];
    Int c[kVectors], s[kVectors];
    for (int q = 0; q < kVectors; ++q) {
      x[q] = load<Value>(a.tile + a.i * kLanes<T> + q * kWidth<T>);
      factor[q] = load<Value>(a.factor + q * kWidth<T>);
      b[q] = best[q];
      c[q] = count[q];
      s[q] = sum[q];
    }
    for (std::int64_t j = begin; j < end; ++j) {
      const T* row = a.tile + j * kLanes<T>;
      const T d = a.distance[j];
      const auto rank = static_cast<Lane>(a.rank[j] < own ? a.rank[j] : own);
      for (int q = 0; q < kVectors; ++q) {
        const Value scaled = (x[q] - load<Value>(row + q * kWidth<T>)) * factor[q];
        const Value v = d + scaled * scaled;
        const Int less = v < b[q];
        b[q] = less ? v : b[q];
        if constexpr (kFirst) {
          s[q] = (s[q] & ~less) | (rank & less);
        } else {
          const Int kept = v <= b[q];  // b is the new minimum: less, or tied with the old one
          c[q] = (c[q] & ~less) - kept;
          s[q] = (s[q] & ~less) + (rank & kept);
        }
      }
    }
    for (int q = 0; q < kVectors; ++q) {
      best[q] = b[q];
      count[q] = c[q];
      sum[q] = s[q];
    }
  }
};

template <class T, bool kFirst>
void scan_row(const ScanArgs<T>& a) {
  using State = Lanes<T, kFirst>;
  T best[kLanes<T>];
  for (int l = 0; l < kLanes<T>; ++l) {
    best[l] = kInfinity<T>;
    a.sum[l] = 0;
    a.count[l] = 0;
  }
  for (std::int64_t begin = 0; begin < a.n; begin += kBlock) {
    const std::int64_t end = begin + kBlock < a.n ? begin + kBlock : a.n;
    State state;
    for (int q = 0; q < kVectors; ++q) {
      state.best[q] = load<typename State::Value>(best + q * kWidth<T>);
      state.count[q] = typename State::Int{};
      state.sum[q] = typename State::Int{};
    }
    if (a.i < begin || a.i >= end) {
      state.scan(a, begin, end);
    } else {
      state.scan(a, begin, a.i);
      state.scan(a, a.i + 1, end);
    }
    for (int q = 0; q < kVectors; ++q)
      for (int l = 0; l < kWidth<T>; ++l) {
        const int lane = q * kWidth<T> + l;
        if (state.best[q][l] < best[lane]) {
          best[lane] = state.best[q][l];
          a.sum[lane] = state.sum[q][l];
          a.count[lane] = kFirst ? 1 : state.count[q][l];
        } else if (!kFirst) {
          a.sum[lane] += state.sum[q][l];
          a.count[lane] += state.count[q][l];
        }
      }
  }
  if (a.ties != Ties::random) return;
  for (int l = 0; l < kLanes<T>; ++l) {  // one lane at a time: tied rows are the rare ones
    if (a.count[l] == 1) continue;
    std::int64_t left = pick(a.word, a.count[l]);
    a.count[l] = 1;
    const T x = a.tile[a.i * kLanes<T> + l];
    for (std::int64_t j = 0; j < a.n; ++j) {
      const T scaled = (x - a.tile[j * kLanes<T> + l]) * a.factor[l];
      const T v = a.distance[j] + scaled * scaled;
      if (j == a.i || v != best[l] || left-- != 0) continue;
      a.sum[l] = a.rank[j] < a.rank[a.i] ? a.rank[j] : a.rank[a.i];
      break;
    }
  }
}

template <class T>
void scan(const ScanArgs<T>& a) {
  if (a.ties == Ties::first) {
    scan_row<T, true>(a);
  } else {
    scan_row<T, false>(a);
  }
}

template <class T>
void accumulate(const T* x, std::int64_t n, std::int64_t i, T factor, T* distance) {
  const T own = x[i];
  for (std::int64_t j = 0; j < n; ++j) {
    const T scaled = (own - x[j]) * factor;
    distance[j] = distance[j] + scaled * scaled;
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
  return {kLanes<T>, scan<T>, accumulate<T>, minimum<T>};
}

}  // namespace

LevelKernels LCODEC_CONCAT(LCODEC_SIMD_LEVEL, _kernels)() {
  return {kernels<float>(), kernels<double>()};
}

}  // namespace lcodec
