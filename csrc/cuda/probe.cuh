// Proof that this build's machine code runs on a device and rounds there as on the host.
//
//   out[i] = a[i] * b[i] + c[i]        product and sum each rounded; denormal numbers honoured
//
// Mapping    one thread an element; a 1-d grid of 1-d blocks with at least n threads in all
// Arguments  a, b, c, out: n contiguous elements of T (float or double) on the device; n >= 0;
//            out overlaps none of the others
// Cost       4 n sizeof(T) bytes and 2 n operations; n is a few hundred, so only the launch counts
// Must not   be compiled to a fused multiply-add or flush denormals (nvcc -fmad=false, and no
//            --use_fast_math): device_info.cu chooses inputs where either gives another result
// Twin       the host loop in device_info.cu
#pragma once

#include <cstdint>

namespace lcodec::cuda {

template <typename T>
__global__ void multiply_add_probe(const T* a, const T* b, const T* c, T* out, std::int64_t n) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) {
    out[i] = a[i] * b[i] + c[i];
  }
}

}  // namespace lcodec::cuda
