// _interpreted: the CUDA sources, whose kernels nvcc compiled, run by the PTX interpreter.
#include <cuda_runtime_api.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings/bindings.hpp"
#include "emulate/bind_selftests.hpp"
#include "lcodec/cuda_info.hpp"
#include "ptx/machine.hpp"
#include "ptx/runtime.hpp"

namespace py = pybind11;

namespace lcodec::ptx {
namespace {

using Address = std::uintptr_t;
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

void configure(const std::string& order, std::uint64_t seed, std::size_t memory) {
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
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

Address allocate(std::size_t bytes) {
  void* address = nullptr;
  check(cudaMalloc(&address, bytes));
  return reinterpret_cast<Address>(address);
}

void copy_to_device(Address to, const Bytes& data) {
  check(cudaMemcpy(reinterpret_cast<void*>(to), data.data(), static_cast<std::size_t>(data.size()),
                   cudaMemcpyHostToDevice));
}

Bytes copy_to_host(Address from, py::ssize_t bytes) {
  Bytes data(bytes);
  check(cudaMemcpy(data.mutable_data(), reinterpret_cast<const void*>(from),
                   static_cast<std::size_t>(bytes), cudaMemcpyDeviceToHost));
  return data;
}

py::list coverage_rows() {
  py::list rows;
  for (const Coverage& c : coverage()) {
    rows.append(py::make_tuple(c.kernel, c.launches, c.executed, c.instructions, c.never));
  }
  return rows;
}

}  // namespace
}  // namespace lcodec::ptx

PYBIND11_MODULE(_interpreted, m) {
  using namespace lcodec::ptx;
  m.doc() = "The CUDA sources of lcodec_ext, whose compiled kernels a PTX interpreter runs.";
  py::register_exception<Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("configure", &configure, py::arg("order"), py::arg("seed") = 0,
        py::arg("memory") = Config().memory,
        "Order of warps and blocks, its seed when shuffled, and the bytes of device memory.");
  m.def("allocated_bytes", [] { return heap().allocated(); }, "Device memory in use.");
  m.def("allocate", &allocate, py::arg("bytes"), "The address of device memory.");
  m.def(
      "free", [](Address address) { check(cudaFree(reinterpret_cast<void*>(address))); },
      py::arg("address"));
  m.def(
      "adopt",
      [](Address address, std::size_t bytes) {
        heap().adopt(reinterpret_cast<unsigned char*>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"), "Take memory of the host for device memory.");
  m.def("write", &copy_to_device, py::arg("to"), py::arg("data"), "Copy bytes to device memory.");
  m.def("read", &copy_to_host, py::arg("from"), py::arg("bytes"), "Copy bytes from device memory.");
  m.def("kernel_names", &kernel_names, "Mangled names of all kernels.");
  m.def("kernel_source", &kernel_source, py::arg("name"), "The PTX of a kernel, which is parsed.");
  m.def("replace_source", &replace_source, py::arg("name"), py::arg("source"),
        "Takes other PTX for a kernel.");
  m.def("coverage", &coverage_rows,
        "Of every kernel that was launched: name, launches, instructions that were executed, all "
        "instructions, and the places of the source of which none was.");
  m.def("reset", &reset, "Forget a failure, which stays as on a device, and memory of the host.");
  m.def("probe", [] { return lcodec::probe_cuda().reason; }, "What cuda_status() says.");

  lcodec::bindings::register_selftests(m);

  const auto cuda = m.def_submodule("cuda");  // as _core.cuda
  lcodec::bindings::register_cuda(cuda);
  lcodec::bindings::register_cuda_permutation(cuda);
  lcodec::bindings::register_cuda_curvature(cuda);
}
