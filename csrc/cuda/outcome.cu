#include "cuda/outcome.hpp"

namespace lcodec::cuda {

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace lcodec::cuda
