// Vectors of the SIMD level that a file is compiled for, and the names of what it defines. For the
// files that are compiled once for every level (LCODEC_SIMD_LEVEL is baseline, avx2 or avx512).
//
// All in an unnamed namespace: the linker keeps one copy of what objects share, and that could be
// one for a level that the CPU does not have.
#pragma once

#include <cstdint>

// baseline_name, avx2_name or avx512_name.
#define LCODEC_OF_LEVEL(name) LCODEC_CONCAT(LCODEC_SIMD_LEVEL, _##name)
#define LCODEC_CONCAT(a, b) LCODEC_CONCAT_EXPANDED(a, b)
#define LCODEC_CONCAT_EXPANDED(a, b) a##b

// For the parts of an inner loop, whose values are to stay in registers.
#define LCODEC_INLINE inline __attribute__((always_inline))

namespace lcodec {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

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

}  // namespace
}  // namespace lcodec
