// The two halves of a curvature product on a tile of rows, on the compiler's vector types, compiled
// for every SIMD level (LCODEC_SIMD_LEVEL). A dot has as many lanes at every level, held in more
// registers where these are narrow; rows side by side share the loads of v, or of out.
//
// Must not use fma, reassociate, or define anything with external linkage but its table: see
// kernels.cpp.

#include "cpu/curvature_kernels.hpp"

#include <cstddef>

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
constexpr int kLaneBytes = 128;
constexpr int kVectors = kLaneBytes / kVectorBytes;  // of a dot
constexpr int kDotRows = kVectorBytes / 16;          // 8 registers of sums at every level
constexpr int kSumRows = 4;

template <class T>
struct Vector;
template <>
struct Vector<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Vector<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kLanes = kLaneBytes / static_cast<int>(sizeof(T));

template <class T>
inline void load(const T* p, typename Vector<T>::Type& v) {
  __builtin_memcpy(&v, p, sizeof v);
}
inline void load(const Bfloat16* p, Vector<float>::Type& v) {
  typedef std::uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef std::uint32_t Word __attribute__((vector_size(kVectorBytes)));
  Half half;
  __builtin_memcpy(&half, p, sizeof half);
  const Word word = __builtin_convertvector(half, Word) << 16;
  __builtin_memcpy(&v, &word, sizeof v);
}

// The first `count` elements, and 0 behind them: a sum that began at 0 does not change by 0.
template <class S, class V>
inline void load_some(const S* p, std::int64_t count, V& v) {
  S buffer[sizeof(V) / sizeof(v[0])] = {};
  __builtin_memcpy(buffer, p, static_cast<std::size_t>(count) * sizeof(S));
  load(buffer, v);
}

template <class T>
inline T widen(const T* p) {
  return *p;
}
inline float widen(const Bfloat16* p) {
  const std::uint32_t word = static_cast<std::uint32_t>(p->bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

template <class S, class T, int kRows>
void dots_of(const SelectedColumns<S>& g, const S* row, const T* v, T* dot) {
  using V = typename Vector<T>::Type;
  constexpr int W = kWidth<T>;
  constexpr int L = kLanes<T>;
  V sum[std::size_t{kRows}][kVectors] = {};
  for (std::int64_t s = 0; s < g.count; ++s) {
    const S* base = row + g.segments[s].start;
    const std::int64_t length = g.segments[s].length;
    std::int64_t j = 0;
    for (; j + L <= length; j += L) {
#pragma GCC unroll 8
      for (int k = 0; k < kVectors; ++k) {
        V x;
        load(v + j + k * W, x);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          V value;
          load(base + r * g.stride + j + k * W, value);
          sum[r][k] = sum[r][k] + value * x;
        }
      }
    }
    if (j < length) {
#pragma GCC unroll 8
      for (int k = 0; k < kVectors; ++k) {
        const std::int64_t left = length - j - k * W;
        if (left <= 0) continue;  // not break: k must stay a constant
        const std::int64_t size = left < W ? left : W;
        V x;
        load_some(v + j + k * W, size, x);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          V value;
          load_some(base + r * g.stride + j + k * W, size, value);
          sum[r][k] = sum[r][k] + value * x;
        }
      }
    }
    v += length;
  }
  for (int r = 0; r < kRows; ++r) {
    T lane[std::size_t{L}];
    __builtin_memcpy(lane, sum[r], sizeof lane);
    for (int width = L / 2; width > 0; width /= 2)
      for (int l = 0; l < width; ++l) lane[l] = lane[l] + lane[l + width];
    dot[r] = lane[0];
  }
}

template <class S, class T>
void dots(const SelectedColumns<S>& g, const T* v, T* dot) {
  std::int64_t r = 0;
  for (; r + kDotRows <= g.rows; r += kDotRows)
    dots_of<S, T, kDotRows>(g, g.data + r * g.stride, v, dot + r);
  for (; r < g.rows; ++r) dots_of<S, T, 1>(g, g.data + r * g.stride, v, dot + r);
}

template <class S, class T, int kRows>
void accumulate_of(const SelectedColumns<S>& g, const S* row, const T* factor, std::int64_t ahead,
                   T* out) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(S));
  using V = typename Vector<T>::Type;
  constexpr int W = kWidth<T>;
  V factors[std::size_t{kRows}];
  for (int r = 0; r < kRows; ++r) factors[r] = factor[r] - V{};
  for (std::int64_t s = 0; s < g.count; ++s) {
    const S* base = row + g.segments[s].start;
    const std::int64_t length = g.segments[s].length;
    std::int64_t j = 0;
    for (; j + W <= length; j += W) {
      if (ahead != 0 && j % kLine == 0) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) __builtin_prefetch(base + r * g.stride + j + ahead, 0, 2);
      }
      V sum;
      load(out + j, sum);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        V value;
        load(base + r * g.stride + j, value);
        sum = sum + factors[r] * value;
      }
      __builtin_memcpy(out + j, &sum, sizeof sum);
    }
    for (; j < length; ++j)
      for (int r = 0; r < kRows; ++r) out[j] = out[j] + factor[r] * widen(base + r * g.stride + j);
    out += length;
  }
}

template <class S, class T>
void accumulate(const SelectedColumns<S>& g, const T* factor, std::int64_t ahead, T* out) {
  std::int64_t r = 0;
  for (; r + kSumRows <= g.rows; r += kSumRows)
    accumulate_of<S, T, kSumRows>(g, g.data + r * g.stride, factor + r, ahead, out);
  for (; r < g.rows; ++r) accumulate_of<S, T, 1>(g, g.data + r * g.stride, factor + r, ahead, out);
}

}  // namespace

LevelCurvatureKernels LCODEC_CONCAT(LCODEC_SIMD_LEVEL, _curvature_kernels)() {
  return {{dots<float, float>, accumulate<float, float>},
          {dots<double, double>, accumulate<double, double>},
          {dots<Bfloat16, float>, accumulate<Bfloat16, float>}};
}

}  // namespace lcodec
