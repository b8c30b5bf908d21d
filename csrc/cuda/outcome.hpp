// Outcomes of launches.
#pragma once

#include <cstddef>
#include <type_traits>

#include "cuda/platform.cuh"
#include "lcodec/cuda_engine.hpp"

namespace lcodec::cuda {

// `kernel` outlives the outcome: a literal.
inline Outcome outcome(cudaError_t error, const char* kernel) {
  return {static_cast<int>(error), error == cudaSuccess ? nullptr : kernel};
}

// launch() (platform.cuh) without dynamic shared memory, on a stream as the entry points have it.
template <class... P>
Outcome run(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, Stream stream,
            std::type_identity_t<P>... arguments) {
  return outcome(
      launch(name, kernel, grid, block, 0, static_cast<cudaStream_t>(stream), arguments...), name);
}

}  // namespace lcodec::cuda
