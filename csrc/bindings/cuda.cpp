// Bindings of the CUDA engine, in _core where CUDA is built and in _emulated. Arrays are addresses
// of device memory: the caller answers for their sizes, which cannot be checked here.
#include <cstddef>
#include <cstdint>
#include <string>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"
#include "bindings/cuda_outcome.hpp"
#include "bindings/gil.hpp"
#include "lcodec/cuda_engine.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

struct Statistics {
  std::string dtype;
  Address x;
  std::int64_t n, p;
  Address low, high, deviation;

  template <class Field>
  void each(const Field& field) {
    field("dtype", dtype);
    field("x", x);
    field("n", n);
    field("p", p);
    field("low", low);
    field("high", high);
    field("deviation", deviation);
  }
};

void column_statistics(const py::dict& given, Address stream) {
  const auto a = named<Statistics>(given);
  launched([&] {
    return with_type(a.dtype, [&](auto zero) {
      using T = decltype(zero);
      return cuda::column_statistics(pointer<const T>(a.x), a.n, a.p, pointer<T>(a.low),
                                     pointer<T>(a.high), pointer<double>(a.deviation),
                                     pointer<void>(stream));
    });
  });
}

struct Neighbors {
  std::string dtype;
  Address columns, factor;
  std::int64_t n, p;
  int ties;
  std::uint64_t seed;
  Address offset, count, indices;

  template <class Field>
  void each(const Field& field) {
    field("dtype", dtype);
    field("columns", columns);
    field("factor", factor);
    field("n", n);
    field("p", p);
    field("ties", ties);
    field("seed", seed);
    field("offset", offset);
    field("count", count);
    field("indices", indices);
  }
};

void neighbors(const py::dict& given, Address stream) {
  const auto a = named<Neighbors>(given);
  const Ties rule = tie_rule(a.ties);
  launched([&] {
    return with_type(a.dtype, [&](auto zero) {
      using T = decltype(zero);
      return cuda::neighbors(pointer<const T>(a.columns), pointer<const T>(a.factor), a.n, a.p,
                             rule, a.seed, pointer<const std::int64_t>(a.offset),
                             pointer<std::int64_t>(a.count), pointer<std::int64_t>(a.indices),
                             pointer<void>(stream));
    });
  });
}

struct Problem {
  Address x;
  std::int64_t n, p;
  Address factor, rank;
  int ties;
  std::uint64_t seed;
  Address workspace;
  std::size_t scratch;

  template <class Field>
  void each(const Field& field) {
    field("x", x);
    field("n", n);
    field("p", p);
    field("factor", factor);
    field("rank", rank);
    field("ties", ties);
    field("seed", seed);
    field("workspace", workspace);
    field("scratch", scratch);
  }
};

template <class T>
class BoundEngine {
 public:
  explicit BoundEngine(const py::dict& given) : BoundEngine(named<Problem>(given)) {}
  explicit BoundEngine(const Problem& a)
      : engine_(pointer<const T>(a.x), a.n, a.p, pointer<const T>(a.factor),
                pointer<const std::int32_t>(a.rank), tie_rule(a.ties), a.seed,
                pointer<void>(a.workspace), a.scratch) {}

  void start(Address stream) { raise_if_failed(engine_.start(pointer<void>(stream))); }
  void select(std::int64_t column, Address stream) {
    raise_if_failed(engine_.select(column, pointer<void>(stream)));
  }
  void score(Address whole, Address fraction, Address stream) {
    raise_if_failed(engine_.score(pointer<std::int64_t>(whole), pointer<std::int64_t>(fraction),
                                  pointer<void>(stream)));
  }
  void leaders(Address whole, Address fraction, Address candidate, Address out, Address stream) {
    raise_if_failed(engine_.leaders(
        pointer<const std::int64_t>(whole), pointer<const std::int64_t>(fraction),
        pointer<const std::uint8_t>(candidate), pointer<std::int64_t>(out), pointer<void>(stream)));
  }
  void row_sums(std::int64_t candidate, Address sum, Address count, Address stream) {
    raise_if_failed(engine_.row_sums(candidate, pointer<std::int64_t>(sum),
                                     pointer<std::int64_t>(count), pointer<void>(stream)));
  }

  static void bind(py::module_& m, const char* name) {
    using Guard = py::call_guard<WithoutGil>;
    py::class_<BoundEngine>(m, name)
        .def(py::init<const py::dict&>(), py::arg("given"))
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

void register_cuda(py::module_ m) {
  BoundEngine<float>::bind(m, "EngineFloat");
  BoundEngine<double>::bind(m, "EngineDouble");
  m.def("column_statistics", &column_statistics, py::arg("given"), py::arg("stream"));
  m.def("neighbors", &neighbors, py::arg("given"), py::arg("stream"));
}

}  // namespace lcodec::bindings
