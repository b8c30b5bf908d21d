// What was built, and what this machine makes of it. The LCODEC_* strings come from CMakeLists.txt.
#include <pybind11/stl.h>

#include <string>
#include <thread>

#include "bindings/bindings.hpp"
#include "bindings/gil.hpp"
#include "lcodec/cuda_info.hpp"
#include "lcodec/dispatch.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = LCODEC_VERSION;
  info["compiler"] = LCODEC_COMPILER;
  info["build_type"] = LCODEC_BUILD_TYPE;
  info["flags"] = LCODEC_FLAGS;
  info["sanitize"] = LCODEC_SANITIZE;
  info["simd_compiled"] = compiled_simd_levels();
  info["simd_supported"] = supported_simd_levels();
  info["hardware_threads"] = std::thread::hardware_concurrency();
  info["cuda_version"] = LCODEC_CUDA_VERSION;
  info["cuda_architectures"] = LCODEC_CUDA_ARCHITECTURES;
  return info;
}

py::tuple cuda_probe() {
  const CudaProbe* probe = nullptr;
  {
    const WithoutGil released;  // the first call may wait for the driver
    probe = &probe_cuda();
  }
  return py::make_tuple(probe->usable, probe->reason);
}

}  // namespace

void register_build_info(py::module_ m) {
  m.def("build_info", &build_info, "What was compiled, as strings; see lcodec_ext.build_info.");
  m.def("cuda_probe", &cuda_probe, "(usable, reason); see lcodec_ext.cuda_status.");
}

}  // namespace lcodec::bindings
