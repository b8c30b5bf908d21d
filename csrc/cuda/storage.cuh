// Stored elements as they are computed with.
#pragma once

#include <cstdint>

#include "common/bfloat16.hpp"
#include "cuda/platform.cuh"

namespace lcodec::cuda {

// From memory that the kernel does not write.
__device__ __forceinline__ float load(const float* p) { return __ldg(p); }
__device__ __forceinline__ double load(const double* p) { return __ldg(p); }
__device__ __forceinline__ float load(const Bfloat16* p) {
  return widen(Bfloat16{__ldg(&p->bits)});
}

}  // namespace lcodec::cuda
