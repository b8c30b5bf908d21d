// The two halves of a curvature product on a tile of rows, on the compiler's vector types, compiled
// for every SIMD level (LCODEC_SIMD_LEVEL). A dot has as many lanes at every level, held in more
// registers where these are narrow; rows side by side share the loads of v, or of out.
//
// Must not use fma, reassociate, or define anything with external linkage but its table: see
// kernels.cpp.

#include "cpu/curvature_kernels.hpp"

#include <cstddef>

#include "cpu/simd.hpp"

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define LCODEC_MASKS
#include <immintrin.h>
#endif

namespace lcodec {
namespace {

constexpr int kVectors = kLaneBytes / kVectorBytes;  // of a dot
constexpr int kDotRows = kVectorBytes / 16;          // 8 registers of sums for a vector v_j
constexpr int kDotArrays = kVectorBytes / 64 + 1;    // 2 where there are 32 registers
constexpr int kSumArrays = 2;
static_assert(kRowsAtOnce % kDotRows == 0);

template <class T>
inline void load(const T* p, typename Simd<T>::Value& v) {
  __builtin_memcpy(&v, p, sizeof v);
}
inline void load(const Bfloat16* p, Simd<float>::Value& v) {
  typedef std::uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef std::uint32_t Word __attribute__((vector_size(kVectorBytes)));
  Half half;
  __builtin_memcpy(&half, p, sizeof half);
  const Word word = __builtin_convertvector(half, Word) << 16;
  __builtin_memcpy(&v, &word, sizeof v);
}

// The first `count` elements, one or more, followed by zeros: adding 0 leaves a sum that began at 0
// as it is.
template <class S, class V>
inline void load_some(const S* p, std::int64_t count, V& v) {
  S buffer[sizeof(V) / sizeof(v[0])] = {};
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(S);
#ifdef LCODEC_MASKS
  if constexpr (sizeof buffer == 64) {
    const __m512i all = _mm512_maskz_loadu_epi8(~std::uint64_t{0} >> (64 - bytes), p);
    __builtin_memcpy(buffer, &all, sizeof all);
  } else {
    const __m256i all = _mm256_maskz_loadu_epi8(~std::uint32_t{0} >> (32 - bytes), p);
    __builtin_memcpy(buffer, &all, sizeof all);
  }
#else
  __builtin_memcpy(buffer, p, bytes);
#endif
  load(buffer, v);
}

#ifdef LCODEC_MASKS
template <class T, class V>
inline void store_some(const V& v, std::int64_t count, T* p) {
  __m512i all;
  __builtin_memcpy(&all, &v, sizeof all);
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  _mm512_mask_storeu_epi8(p, ~std::uint64_t{0} >> (64 - bytes), all);
}
#else
template <class T>
inline T widen(const T* p) {
  return *p;
}
inline float widen(const Bfloat16* p) { return lcodec::widen(*p); }
#endif

template <class S, class T, int kRows, int kArrays>
void dots_of(const SelectedColumns<S>& g, const S* row, const T* v, std::int64_t v_stride, T* lane,
             std::int64_t lane_stride) {
  using V = typename Simd<T>::Value;
  constexpr int W = kWidth<T>;
  constexpr std::int64_t L = kLanes<T>;
  V sum[std::size_t{kArrays}][std::size_t{kRows}][kVectors];
  for (int c = 0; c < kArrays; ++c) __builtin_memcpy(sum[c], lane + c * lane_stride, sizeof sum[c]);
  for (std::int64_t s = 0; s < g.count; ++s) {
    const S* base = row + g.segments[s].start;
    const std::int64_t length = g.segments[s].length;
    // Lanes k W, ... of this step: elements j + k W, ... of the segment.
    const auto add = [&](std::int64_t j, int k, const auto& take) {
      V x[std::size_t{kArrays}];
#pragma GCC unroll 2
      for (int c = 0; c < kArrays; ++c) take(v + c * v_stride + j + k * W, x[c]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        V value;
        take(base + r * g.stride + j + k * W, value);
#pragma GCC unroll 2
        for (int c = 0; c < kArrays; ++c) sum[c][r][k] = sum[c][r][k] + value * x[c];
      }
    };
    std::int64_t j = 0;
    for (; j + L <= length; j += L) {
#pragma GCC unroll 8
      for (int k = 0; k < kVectors; ++k) add(j, k, [](const auto* p, V& to) { load(p, to); });
    }
    if (j < length) {
#pragma GCC unroll 8
      for (int k = 0; k < kVectors; ++k) {
        const std::int64_t left = length - j - k * W;
        if (left <= 0) continue;  // not break: k must stay a constant
        const std::int64_t size = left < W ? left : W;
        add(j, k, [size](const auto* p, V& to) { load_some(p, size, to); });
      }
    }
    v += length;
  }
  for (int c = 0; c < kArrays; ++c) __builtin_memcpy(lane + c * lane_stride, sum[c], sizeof sum[c]);
}

template <class S, class T>
void dots(const SelectedColumns<S>& g, const Arrays<const T>& v, const Arrays<T>& lane) {
  std::int64_t r = 0;
  const auto take = [&]<int kRows>() {
    for (; r + kRows <= g.rows; r += kRows) {
      const S* row = g.data + r * g.stride;
      T* own = lane.data + r * kLanes<T>;
      std::int64_t j = 0;
      for (; j + kDotArrays <= v.m; j += kDotArrays)
        dots_of<S, T, kRows, kDotArrays>(g, row, v.data + j * v.stride, v.stride,
                                         own + j * lane.stride, lane.stride);
      for (; j < v.m; ++j)
        dots_of<S, T, kRows, 1>(g, row, v.data + j * v.stride, 0, own + j * lane.stride, 0);
    }
  };
  take.template operator()<kDotRows>();
  take.template operator()<1>();
}

// The sum of kCount lanes, in halves.
template <class T, int kCount>
inline T halves(const T* lane) {
  if constexpr (kCount == 1) {
    return lane[0];
  } else {
    typedef T Half __attribute__((vector_size(std::size_t{kCount} / 2 * sizeof(T))));
    Half low, high;
    __builtin_memcpy(&low, lane, sizeof low);
    __builtin_memcpy(&high, lane + kCount / 2, sizeof high);
    low = low + high;
    T sum[std::size_t{kCount} / 2];
    __builtin_memcpy(sum, &low, sizeof sum);
    return halves<T, kCount / 2>(sum);
  }
}

template <class T>
void fold(const T* lane, std::int64_t count, T* dot) {
  constexpr std::int64_t L = kLanes<T>;
  for (std::int64_t k = 0; k < count; ++k) dot[k] = halves<T, L>(lane + k * L);
}

template <class S, class T, int kRows, int kArrays>
void accumulate_of(const SelectedColumns<S>& g, const S* row, const T* factor,
                   std::int64_t factor_stride, T* out, std::int64_t out_stride) {
  using V = typename Simd<T>::Value;
  constexpr int W = kWidth<T>;
  V factors[std::size_t{kArrays}][std::size_t{kRows}];
  for (int c = 0; c < kArrays; ++c)
    for (int r = 0; r < kRows; ++r) factors[c][r] = factor[c * factor_stride + r] - V{};
  for (std::int64_t s = 0; s < g.count; ++s) {
    const S* base = row + g.segments[s].start;
    const std::int64_t length = g.segments[s].length;
    const auto add = [&](std::int64_t j, const auto& take, const auto& put) {
      V sum[std::size_t{kArrays}];
#pragma GCC unroll 2
      for (int c = 0; c < kArrays; ++c) take(out + c * out_stride + j, sum[c]);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        V value;
        take(base + r * g.stride + j, value);
#pragma GCC unroll 2
        for (int c = 0; c < kArrays; ++c) sum[c] = sum[c] + factors[c][r] * value;
      }
#pragma GCC unroll 2
      for (int c = 0; c < kArrays; ++c) put(sum[c], out + c * out_stride + j);
    };
    std::int64_t j = 0;
    for (; j + W <= length; j += W)
      add(
          j, [](const auto* p, V& to) { load(p, to); },
          [](const V& sum, T* p) { __builtin_memcpy(p, &sum, sizeof sum); });
#ifdef LCODEC_MASKS
    if (const std::int64_t left = length - j; left > 0)
      add(
          j, [left](const auto* p, V& to) { load_some(p, left, to); },
          [left](const V& sum, T* p) { store_some(sum, left, p); });
#else
    for (; j < length; ++j) {
      for (int c = 0; c < kArrays; ++c) {
        T& sum = out[c * out_stride + j];
        for (int r = 0; r < kRows; ++r)
          sum = sum + factor[c * factor_stride + r] * widen(base + r * g.stride + j);
      }
    }
#endif
    out += length;
  }
}

template <class S, class T>
void accumulate(const SelectedColumns<S>& g, const Arrays<const T>& factor, const Arrays<T>& out) {
  std::int64_t r = 0;
  const auto take = [&]<int kRows, int kArrays>() {
    for (; r + kRows <= g.rows; r += kRows) {
      const S* row = g.data + r * g.stride;
      const T* own = factor.data + r;
      std::int64_t j = 0;
      for (; j + kArrays <= out.m; j += kArrays)
        accumulate_of<S, T, kRows, kArrays>(g, row, own + j * factor.stride, factor.stride,
                                            out.data + j * out.stride, out.stride);
      for (; j < out.m; ++j)
        accumulate_of<S, T, kRows, 1>(g, row, own + j * factor.stride, 0, out.data + j * out.stride,
                                      0);
    }
  };
  take.template operator()<kRowsAtOnce, kDotArrays>();
  take.template operator()<4, kSumArrays>();
  take.template operator()<1, 1>();
}

}  // namespace

LevelCurvatureKernels LCODEC_OF_LEVEL(curvature_kernels)() {
  return {{dots<float, float>, fold<float>, accumulate<float, float>},
          {dots<double, double>, fold<double>, accumulate<double, double>},
          {dots<Bfloat16, float>, fold<float>, accumulate<Bfloat16, float>}};
}

}  // namespace lcodec
