// Written once on the compiler's vector types and compiled for every SIMD level, as kernels.cpp is.
// Nothing here is part of a result, so this file alone may fuse multiply-adds (CMakeLists.txt): the
// bound on its errors holds with them and without (cpu/screen.hpp).
//
// Why the products are fast: kRows rows of the left panel times a whole right panel stay in
// registers over kProductBlock columns, in which a step loads kVectors vectors, broadcasts kRows
// numbers and multiplies and adds kRows * kVectors vectors. The right panel stays in the first
// level of the cache meanwhile, the tile and the left panels in the second.

#include "cpu/screen_kernels.hpp"

#include "cpu/simd.hpp"

namespace lcodec {
namespace {

using Value = Simd<float>::Value;
using Int = Simd<float>::Int;

// As many accumulators as the registers hold.
#if defined(__AVX512F__)
constexpr int kVectors = 3;
constexpr int kRows = 8;
#elif defined(__AVX__)
constexpr int kVectors = 3;
constexpr int kRows = 4;
#else
constexpr int kVectors = 2;
constexpr int kRows = 4;
#endif
constexpr int kLanes = kWidth<float>;
constexpr int kPanel = kVectors * kLanes;
static_assert(kTile % kPanel == 0 && kPanel % kRows == 0);

constexpr float kInfinity = __builtin_inff();

LCODEC_INLINE Value load(const float* p) {
  Value v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

LCODEC_INLINE void store(float* p, const Value& v) { __builtin_memcpy(p, &v, sizeof v); }

template <class T>
LCODEC_INLINE void pack_rows(const T* const* x, std::int64_t d, std::int64_t first,
                             std::int64_t count, const double* center, const double* factor,
                             double scale, float* panel, double* squares) {
  for (std::int64_t f = 0; f < d; ++f)
    for (std::int64_t l = 0; l < count; ++l) {
      const double value = static_cast<double>(x[f][first + l]);
      const auto packed = static_cast<float>((value - center[f]) * factor[f] * scale);
      panel[f * kPanel + l] = packed;
      squares[l] += static_cast<double>(packed) * static_cast<double>(packed);
    }
}

template <class T>
void pack(const T* const* x, std::int64_t d, std::int64_t first, std::int64_t count,
          const double* center, const double* factor, double scale, float* panel, double* squares) {
  double sums[kPanel] = {};
  if (count == kPanel) {
    pack_rows(x, d, first, kPanel, center, factor, scale, panel, sums);
  } else {
    __builtin_memset(panel, 0, static_cast<std::size_t>(d * kPanel) * sizeof *panel);
    pack_rows(x, d, first, count, center, factor, scale, panel, sums);
  }
  __builtin_memcpy(squares, sums, sizeof sums);
}

// kRows rows of the left panel, which start at `left`, times a right panel.
template <bool kFirst>
LCODEC_INLINE void multiply(const float* left, const float* right, std::int64_t d, float* out) {
  Value sum[kRows][kVectors] = {};
  for (std::int64_t f = 0; f < d; ++f) {
    Value other[kVectors];
    for (int q = 0; q < kVectors; ++q) other[q] = load(right + f * kPanel + q * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Value own = left[f * kPanel + r] - Value{};
      for (int q = 0; q < kVectors; ++q) sum[r][q] += own * other[q];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int q = 0; q < kVectors; ++q) {
      float* place = out + r * kTile + q * kLanes;
      store(place, kFirst ? sum[r][q] : load(place) + sum[r][q]);
    }
}

template <bool kFirst>
void multiply_block(const float* left, std::int64_t left_panels, const float* right,
                    std::int64_t right_panels, std::int64_t stride, std::int64_t d,
                    float* product) {
  for (std::int64_t b = 0; b < right_panels; ++b)
    for (std::int64_t a = 0; a < (left == right ? b + 1 : left_panels); ++a)
      for (int r = 0; r < kPanel; r += kRows)
        multiply<kFirst>(left + a * stride + r, right + b * stride, d,
                         product + (a * kPanel + r) * kTile + b * kPanel);
}

void products(const float* left, std::int64_t left_panels, const float* right,
              std::int64_t right_panels, std::int64_t d, float* product) {
  for (std::int64_t f = 0; f < d; f += kProductBlock) {
    const std::int64_t size = d - f < kProductBlock ? d - f : kProductBlock;
    const auto block = f == 0 ? multiply_block<true> : multiply_block<false>;
    block(left + f * kPanel, left_panels, right + f * kPanel, right_panels, d * kPanel, size,
          product);
  }
  if (left != right) return;
  for (std::int64_t a = kPanel; a < left_panels * kPanel; ++a)
    for (std::int64_t b = 0; b < a / kPanel * kPanel; ++b)
      product[a * kTile + b] = product[b * kTile + a];
}

LCODEC_INLINE Value lower(const Value& a, const Value& b) { return a < b ? a : b; }

void least(const float* product, std::int64_t rows, std::int64_t columns, const float* left,
           const float* right, float* of_left, float* of_right) {
  for (std::int64_t b = 0; b < columns; b += kLanes) store(of_right + b, kInfinity - Value{});
  for (std::int64_t a = 0; a < rows; ++a) {
    Value own = kInfinity - Value{};
    for (std::int64_t b = 0; b < columns; b += kLanes) {
      const Value p = load(product + a * kTile + b);
      own = lower(load(right + b) - p, own);
      store(of_right + b, lower(left[a] - p, load(of_right + b)));
    }
    of_left[a] = own[0];
    for (int l = 1; l < kLanes; ++l) of_left[a] = own[l] < of_left[a] ? own[l] : of_left[a];
  }
}

std::int64_t hits(const float* product, std::int64_t rows, std::int64_t columns, const float* left,
                  const float* right, const float* left_limit, const float* right_limit,
                  std::int32_t* place) {
  std::int64_t count = 0;
  for (std::int64_t a = 0; a < rows; ++a)
    for (std::int64_t panel = 0; panel < columns; panel += kPanel) {
      Int hit[kVectors];
      Int any{};
      for (int q = 0; q < kVectors; ++q) {
        const std::int64_t b = panel + q * kLanes;
        const Value p = load(product + a * kTile + b);
        hit[q] = (load(right + b) - p <= left_limit[a]) | (left[a] - p <= load(right_limit + b));
        any |= hit[q];
      }
      std::int64_t words[sizeof any / sizeof(std::int64_t)];
      __builtin_memcpy(words, &any, sizeof any);
      std::int64_t found = 0;
      for (const std::int64_t word : words) found |= word;
      if (found == 0) continue;
      for (int q = 0; q < kVectors; ++q)
        for (int l = 0; l < kLanes; ++l)
          if (hit[q][l] != 0)
            place[count++] = static_cast<std::int32_t>(a * kTile + panel + q * kLanes + l);
    }
  return count;
}

}  // namespace

LevelScreenKernels LCODEC_OF_LEVEL(screen_kernels)() {
  return {{kPanel, pack<float>, products, least, hits},
          {kPanel, pack<double>, products, least, hits}};
}

}  // namespace lcodec
