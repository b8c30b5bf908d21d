// What kernels and launchers include for CUDA, so that one source serves two compilers: nvcc for a
// GPU, and a C++ compiler with LCODEC_EMULATE for the CPU (tests/emulate), where the tests run it.
//
//   template <int kThreads>
//   __global__ void __launch_bounds__(kThreads) kernel(const float* x, std::int64_t n) {
//     LCODEC_SHARED_ARRAY(float, partial, kThreads);
//     LCODEC_DYNAMIC_SHARED(float4, tile);
//     ...
//   }
//   return launch("kernel", kernel<256>, dim3(blocks), dim3(256), bytes, stream, x, n);
//
// Launch with launch(), not <<<>>>, and declare shared memory with the two macros, not __shared__:
// under emulation both are checked and filled with rubbish before every block.
#pragma once

#include <cstddef>
#include <type_traits>

#include "cuda/runtime.hpp"

#if defined(__CUDACC__)

// T name[count], static, for the block. For rows, let T be an array type: using Row = float[33].
#define LCODEC_SHARED_ARRAY(T, name, count) __shared__ T name[count]

// T* name: the launch's dynamic shared memory, aligned to 16 bytes. Every name is the same memory.
#define LCODEC_DYNAMIC_SHARED(T, name)                                      \
  extern __shared__ __align__(16) unsigned char lcodec_dynamic_shared[];    \
  static_assert(alignof(T) <= 16, "dynamic shared memory is less aligned"); \
  T* const name = reinterpret_cast<T*>(lcodec_dynamic_shared)

// Before a loop that must stay one, to save registers.
#define LCODEC_NO_UNROLL _Pragma("unroll 1")
// Before a loop that must be unrolled, so that arrays stay in registers.
#define LCODEC_UNROLL _Pragma("unroll")

#elif defined(LCODEC_EMULATE)

#define LCODEC_NO_UNROLL
#define LCODEC_UNROLL

#else
#error "CUDA sources need nvcc, or LCODEC_EMULATE and a C++ compiler"
#endif

namespace lcodec::cuda {

// Launches without waiting. Arguments convert to the kernel's parameter types. `name` is for the
// emulator's messages.
template <class... P>
cudaError_t launch([[maybe_unused]] const char* name, void (*kernel)(P...), dim3 grid, dim3 block,
                   std::size_t shared_bytes, [[maybe_unused]] cudaStream_t stream,
                   std::type_identity_t<P>... arguments) {
  static_cast<void>(cudaGetLastError());  // what an earlier call left is no failure of this launch
  constexpr std::size_t kGrantedUnasked = 48 * 1024;
  if (shared_bytes > kGrantedUnasked) {
    const cudaError_t refused = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (refused != cudaSuccess) {
      static_cast<void>(cudaGetLastError());  // it is told here
      return refused;
    }
  }
#if defined(__CUDACC__)
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
#else
  emulate::launch(name, kernel, grid, block, shared_bytes, arguments...);
#endif
  return cudaGetLastError();
}

}  // namespace lcodec::cuda
