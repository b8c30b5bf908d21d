// lcodec_ext._emulated: the CUDA sources, run by the CPU, for tests. Not part of an installation.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bindings/bindings.hpp"
#include "emulate/bind_selftests.hpp"
#include "emulate/cuda.hpp"

namespace py = pybind11;

namespace lcodec::emulate {
namespace {

void configure(const std::string& order, std::uint64_t seed, std::size_t memory,
               bool refuse_attributes) {
  if (order == "forward") {
    config().order = Order::forward;
  } else if (order == "reversed") {
    config().order = Order::reversed;
  } else if (order == "shuffled") {
    config().order = Order::shuffled;
  } else {
    throw std::invalid_argument("order must be forward, reversed or shuffled");
  }
  config().seed = seed;
  config().memory = memory;
  config().refuse_attributes = refuse_attributes;
}

}  // namespace
}  // namespace lcodec::emulate

PYBIND11_MODULE(_emulated, m) {
  using namespace lcodec::emulate;
  m.doc() = "The CUDA sources of lcodec_ext, run by the CPU, for tests.";
  m.def("configure", &configure, py::arg("order"), py::arg("seed") = 0,
        py::arg("memory") = Config().memory, py::arg("refuse_attributes") = false,
        "Order of threads and blocks, its seed when shuffled, the bytes of device memory, and "
        "whether cudaFuncSetAttribute fails.");
  m.def("allocated_bytes", &allocated_bytes, "Device memory in use.");

  lcodec::bindings::register_selftests(m);

  const auto cuda = m.def_submodule("cuda");  // as _core.cuda
  lcodec::bindings::register_cuda(cuda);
  lcodec::bindings::register_cuda_permutation(cuda);
  lcodec::bindings::register_cuda_curvature(cuda);
}
