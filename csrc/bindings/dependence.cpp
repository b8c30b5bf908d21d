// Bindings of the CPU engine. Arguments are validated by lcodec_ext/_native.py, the one caller;
// here only shapes are checked, so that a slip there cannot read out of bounds.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <chrono>
#include <stdexcept>

#include "bindings/bindings.hpp"
#include "lcodec/dispatch.hpp"
#include "lcodec/engine.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void expect(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// Lets Python see a pending Ctrl-C about ten times a second while the GIL is released.
class Signals {
 public:
  static bool poll(void* self) { return static_cast<Signals*>(self)->pending(); }
  bool pending() {
    const auto now = std::chrono::steady_clock::now();
    if (now < next_) return false;
    next_ = now + std::chrono::milliseconds(100);
    const py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;  // the Python error stays set for finish()
  }

 private:
  std::chrono::steady_clock::time_point next_ =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
};

template <class Call>
void run(const std::string& level, int threads, const Call& call) {
  Signals signals;
  const Execution execution{resolve_simd_level(level), threads, Signals::poll, &signals};
  expect(threads >= 1, "threads must be positive");
  Status status;
  {
    const py::gil_scoped_release release;
    status = call(execution);
  }
  if (status == Status::cancelled) throw py::error_already_set();
}

// A view of validated arrays: x [p][n], factor [p], rank [n], columns [k].
template <class T>
Problem<T> problem(const Array<T>& x, const Array<T>& factor, const Array<std::int32_t>& rank,
                   const Array<std::int64_t>& columns, int ties, std::uint64_t seed) {
  expect(x.ndim() == 2 && factor.ndim() == 1 && rank.ndim() == 1 && columns.ndim() == 1,
         "wrong number of dimensions");
  expect(x.shape(1) >= 2 && factor.shape(0) == x.shape(0) && rank.shape(0) == x.shape(1),
         "shapes do not fit");
  expect(0 <= ties && ties <= 2, "unknown tie rule");
  for (py::ssize_t a = 0; a < columns.shape(0); ++a)
    expect(0 <= columns.at(a) && columns.at(a) < x.shape(0), "column out of range");
  return {x.shape(1),    x.shape(0),     x.data(),          factor.data(),
          rank.data(),   columns.data(), columns.shape(0),  static_cast<Ties>(ties),
          seed};
}

template <class T>
void bind(py::module_& m) {
  m.def(
      "score",
      [](const Array<T>& x, const Array<T>& factor, const Array<std::int32_t>& rank,
         const Array<std::int64_t>& columns, const Array<std::int64_t>& candidates, int ties,
         std::uint64_t seed, const std::string& level, int threads) {
        const Problem<T> view = problem(x, factor, rank, columns, ties, seed);
        expect(candidates.ndim() == 1, "wrong number of dimensions");
        for (py::ssize_t a = 0; a < candidates.shape(0); ++a)
          expect(0 <= candidates.at(a) && candidates.at(a) < view.p, "candidate out of range");
        Array<std::int64_t> whole(candidates.shape(0));
        Array<std::int64_t> fraction(candidates.shape(0));
        const std::int64_t* candidate = candidates.data();
        const std::int64_t count = candidates.shape(0);
        std::int64_t* whole_out = whole.mutable_data();
        std::int64_t* fraction_out = fraction.mutable_data();
        run(level, threads, [&](const Execution& execution) {
          return score(view, candidate, count, whole_out, fraction_out, execution);
        });
        return py::make_tuple(whole, fraction);
      },
      py::arg("x").noconvert(), py::arg("factor").noconvert(), py::arg("rank").noconvert(),
      py::arg("columns").noconvert(), py::arg("candidates").noconvert(), py::arg("ties"),
      py::arg("seed"), py::arg("level"), py::arg("threads"));
  m.def(
      "row_sums",
      [](const Array<T>& x, const Array<T>& factor, const Array<std::int32_t>& rank,
         const Array<std::int64_t>& columns, int ties, std::uint64_t seed, const std::string& level,
         int threads) {
        const Problem<T> view = problem(x, factor, rank, columns, ties, seed);
        Array<std::int64_t> sum(view.n);
        Array<std::int64_t> count(view.n);
        std::int64_t* sum_out = sum.mutable_data();
        std::int64_t* count_out = count.mutable_data();
        run(level, threads, [&](const Execution& execution) {
          return row_sums(view, sum_out, count_out, execution);
        });
        return py::make_tuple(sum, count);
      },
      py::arg("x").noconvert(), py::arg("factor").noconvert(), py::arg("rank").noconvert(),
      py::arg("columns").noconvert(), py::arg("ties"), py::arg("seed"), py::arg("level"),
      py::arg("threads"));
  m.def(
      "neighbors",
      [](const Array<T>& x, const Array<T>& factor, const Array<std::int32_t>& rank,
         const Array<std::int64_t>& columns, int ties, std::uint64_t seed, const std::string& level,
         int threads) {
        const Problem<T> view = problem(x, factor, rank, columns, ties, seed);
        Array<std::int64_t> offset(view.n + 1);
        std::int64_t* starts = offset.mutable_data();
        starts[0] = 0;
        if (view.ties == Ties::average) {
          run(level, threads, [&](const Execution& execution) {
            return neighbors(view, nullptr, starts + 1, nullptr, execution);
          });
        } else {
          std::fill_n(starts + 1, view.n, 1);
        }
        for (std::int64_t i = 0; i < view.n; ++i) starts[i + 1] += starts[i];
        Array<std::int64_t> indices(starts[view.n]);
        std::int64_t* indices_out = indices.mutable_data();
        run(level, threads, [&](const Execution& execution) {
          return neighbors(view, starts, nullptr, indices_out, execution);
        });
        return py::make_tuple(offset, indices);
      },
      py::arg("x").noconvert(), py::arg("factor").noconvert(), py::arg("rank").noconvert(),
      py::arg("columns").noconvert(), py::arg("ties"), py::arg("seed"), py::arg("level"),
      py::arg("threads"));
}

}  // namespace

void register_dependence(py::module_& m) {
  bind<float>(m);
  bind<double>(m);
}

}  // namespace lcodec::bindings
