// Stands in for device_info.cu in a build without CUDA.
#include "lcodec/cuda_info.hpp"

namespace lcodec {

const CudaProbe& probe_cuda() {
  static const CudaProbe probe{
      false, "CUDA is not used because this copy of lcodec_ext was built without it."};
  return probe;
}

}  // namespace lcodec
