// Bindings of the CUDA engine, in _core where CUDA is built and in _emulated. Arrays are addresses
// of device memory as integers, 0 for none, whose sizes the caller answers for: they cannot be
// checked here.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/bindings.hpp"
#include "bindings/cuda_outcome.hpp"
#include "lcodec/cuda_engine.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Ties tie_rule(int ties) {
  if (ties < 0 || ties > 2) throw std::invalid_argument("unknown tie rule");
  return static_cast<Ties>(ties);
}

// call(T{}) for the type that dtype names, without the GIL; raises what fails.
template <class Call>
void with_type(const std::string& dtype, const Call& call) {
  const py::gil_scoped_release release;
  if (dtype == "float32") {
    raise_if_failed(call(float{}));
  } else if (dtype == "float64") {
    raise_if_failed(call(double{}));
  } else {
    throw std::invalid_argument("dtype must be float32 or float64");
  }
}

void column_statistics(const std::string& dtype, Address x, std::int64_t n, std::int64_t p,
                       Address low, Address high, Address deviation, Address stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    return cuda::column_statistics(at<const T>(x), n, p, at<T>(low), at<T>(high),
                                   at<double>(deviation), at<void>(stream));
  });
}

void neighbors(const std::string& dtype, Address columns, std::int64_t n, std::int64_t p, int ties,
               std::uint64_t seed, Address offset, Address count, Address indices, Address stream) {
  const Ties rule = tie_rule(ties);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    return cuda::neighbors(at<const T>(columns), n, p, rule, seed, at<const std::int64_t>(offset),
                           at<std::int64_t>(count), at<std::int64_t>(indices), at<void>(stream));
  });
}

}  // namespace

void register_cuda(py::module_& m) {
  m.def("cuda_column_statistics", &column_statistics, py::arg("dtype"), py::arg("x"), py::arg("n"),
        py::arg("p"), py::arg("low"), py::arg("high"), py::arg("deviation"), py::arg("stream"));
  m.def("cuda_neighbors", &neighbors, py::arg("dtype"), py::arg("columns"), py::arg("n"),
        py::arg("p"), py::arg("ties"), py::arg("seed"), py::arg("offset"), py::arg("count"),
        py::arg("indices"), py::arg("stream"));
}

}  // namespace lcodec::bindings
