// Elements as they are stored, and as they are computed with.
#pragma once

#include <cstdint>

#include "common/bfloat16.hpp"
#include "cuda/platform.cuh"

namespace lcodec::cuda {

// From memory that the kernel does not write.
__device__ __forceinline__ float load(const float* p) { return __ldg(p); }
__device__ __forceinline__ double load(const double* p) { return __ldg(p); }
__device__ __forceinline__ float load(const Bfloat16* p) {
  return __uint_as_float(static_cast<unsigned>(__ldg(&p->bits)) << 16);
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(Bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

__device__ __forceinline__ void store(float* p, float value) { *p = value; }
__device__ __forceinline__ void store(double* p, double value) { *p = value; }
// To nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ void store(Bfloat16* p, float value) {
  const unsigned word = __float_as_uint(value);
  const unsigned rounded =
      value != value ? word >> 16 | 0x40 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  p->bits = static_cast<std::uint16_t>(rounded);
}

}  // namespace lcodec::cuda
