// Bindings of the CUDA engine, in _core where CUDA is built and in _emulated. Arrays are addresses
// of device memory as integers, 0 for none, whose sizes the caller answers for: they cannot be
// checked here.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/address.hpp"
#include "bindings/bindings.hpp"
#include "bindings/cuda_outcome.hpp"
#include "lcodec/cuda_engine.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

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

template <class T>
class BoundEngine {
 public:
  BoundEngine(Address x, std::int64_t n, std::int64_t p, Address factor, Address rank, int ties,
              std::uint64_t seed, Address workspace, std::size_t scratch)
      : engine_(at<const T>(x), n, p, at<const T>(factor), at<const std::int32_t>(rank),
                tie_rule(ties), seed, at<void>(workspace), scratch) {}

  void start(Address stream) { raise_if_failed(engine_.start(at<void>(stream))); }
  void select(std::int64_t column, Address stream) {
    raise_if_failed(engine_.select(column, at<void>(stream)));
  }
  void score(Address whole, Address fraction, Address stream) {
    raise_if_failed(
        engine_.score(at<std::int64_t>(whole), at<std::int64_t>(fraction), at<void>(stream)));
  }
  void leaders(Address whole, Address fraction, Address candidate, Address out, Address stream) {
    raise_if_failed(engine_.leaders(at<const std::int64_t>(whole), at<const std::int64_t>(fraction),
                                    at<const std::uint8_t>(candidate), at<std::int64_t>(out),
                                    at<void>(stream)));
  }
  void row_sums(std::int64_t candidate, Address sum, Address count, Address stream) {
    raise_if_failed(engine_.row_sums(candidate, at<std::int64_t>(sum), at<std::int64_t>(count),
                                     at<void>(stream)));
  }

  static void bind(py::module_& m, const char* name) {
    using Guard = py::call_guard<py::gil_scoped_release>;
    py::class_<BoundEngine>(m, name)
        .def(py::init<Address, std::int64_t, std::int64_t, Address, Address, int, std::uint64_t,
                      Address, std::size_t>(),
             py::arg("x"), py::arg("n"), py::arg("p"), py::arg("factor"), py::arg("rank"),
             py::arg("ties"), py::arg("seed"), py::arg("workspace"), py::arg("scratch"))
        .def_static("workspace_bytes", &cuda::Engine<T>::workspace_bytes, py::arg("n"),
                    py::arg("p"), py::arg("scratch"))
        .def_static("least_scratch", &cuda::Engine<T>::least_scratch, py::arg("n"))
        .def("start", &BoundEngine::start, py::arg("stream"), Guard())
        .def("select", &BoundEngine::select, py::arg("column"), py::arg("stream"), Guard())
        .def("score", &BoundEngine::score, py::arg("whole"), py::arg("fraction"), py::arg("stream"),
             Guard())
        .def("leaders", &BoundEngine::leaders, py::arg("whole"), py::arg("fraction"),
             py::arg("candidate"), py::arg("out"), py::arg("stream"), Guard())
        .def("row_sums", &BoundEngine::row_sums, py::arg("column"), py::arg("sum"),
             py::arg("count"), py::arg("stream"), Guard());
  }

 private:
  cuda::Engine<T> engine_;
};

}  // namespace

void register_cuda(py::module_& m) {
  BoundEngine<float>::bind(m, "CudaEngineFloat");
  BoundEngine<double>::bind(m, "CudaEngineDouble");
  m.def("cuda_column_statistics", &column_statistics, py::arg("dtype"), py::arg("x"), py::arg("n"),
        py::arg("p"), py::arg("low"), py::arg("high"), py::arg("deviation"), py::arg("stream"));
  m.def("cuda_neighbors", &neighbors, py::arg("dtype"), py::arg("columns"), py::arg("n"),
        py::arg("p"), py::arg("ties"), py::arg("seed"), py::arg("offset"), py::arg("count"),
        py::arg("indices"), py::arg("stream"));
}

}  // namespace lcodec::bindings
