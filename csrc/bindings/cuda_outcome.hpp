// Failed launches as Python exceptions.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bindings/gil.hpp"
#include "lcodec/cuda_engine.hpp"

namespace lcodec::bindings {

// Raises RuntimeError("CUDA kernel NAME failed: TEXT"). With or without the GIL.
inline void raise_if_failed(const cuda::Outcome& outcome) {
  if (outcome.ok()) return;
  throw std::runtime_error(std::string("CUDA kernel ") + (outcome.kernel ? outcome.kernel : "?") +
                           " failed: " + cuda::error_text(outcome.code));
}

// Raises what fails in call(), which runs without the GIL.
template <class Call>
void launched(const Call& call) {
  const WithoutGil released;
  raise_if_failed(call());
}

}  // namespace lcodec::bindings
