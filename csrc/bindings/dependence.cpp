// Bindings of the CPU engine. Arguments are validated by lcodec_ext/dependence/backends/cpu.py, the
// one caller; here only shapes are checked, so that a slip there cannot read out of bounds.
#include <pybind11/numpy.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <list>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"
#include "bindings/execution.hpp"
#include "bindings/gil.hpp"
#include "cpu/instruments.hpp"
#include "cpu/parallel.hpp"
#include "cpu/pool.hpp"
#include "lcodec/engine.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// A view of x [p][n] and factor [p].
template <class T>
Columns<T> columns(const Array<T>& x, const Array<T>& factor) {
  expect(x.ndim() == 2 && factor.ndim() == 1, "wrong number of dimensions");
  expect(x.shape(0) >= 1 && x.shape(1) >= 2 && factor.shape(0) == x.shape(0), "shapes do not fit");
  return {x.shape(1), x.shape(0), x.data(), factor.data()};
}

// The same with the rows of every column in order, if these are given: [p][n], else [0][0].
template <class T>
Columns<T> columns(const Array<T>& x, const Array<T>& factor,
                   const Array<std::int32_t>& sorted_rows) {
  Columns<T> view = columns(x, factor);
  expect(sorted_rows.ndim() == 2, "wrong number of dimensions");
  if (sorted_rows.size() == 0) return view;
  for (const py::ssize_t axis : {0, 1})
    expect(sorted_rows.shape(axis) == x.shape(axis), "shapes do not fit");
  view.sorted_rows = sorted_rows.data();
  return view;
}

// The engine and the arrays it points into. n, p >= 1 and the ranks are checked by the caller.
template <class T>
class BoundEngine {
 public:
  BoundEngine(Array<T> x, Array<T> factor, const Array<std::int32_t>& rank, int ties,
              std::uint64_t seed, Array<std::int32_t> sorted_rows)
      : x_(std::move(x)),
        factor_(std::move(factor)),
        sorted_rows_(std::move(sorted_rows)),
        engine_(columns(x_, factor_, sorted_rows_), checked(rank, x_), tie_rule(ties), seed) {}

  void select(std::int64_t column) {
    expect_column(column);
    engine_.select(column);
  }

  py::tuple score(const Array<std::int64_t>& candidates, std::int64_t floor,
                  const std::string& level, int threads) {
    expect(candidates.ndim() == 1, "wrong number of dimensions");
    expect(floor >= Engine<T>::kNoFloor, "floor is negative");
    for (py::ssize_t a = 0; a < candidates.shape(0); ++a) expect_column(candidates.at(a));
    const std::int64_t m = candidates.shape(0);
    Array<std::int64_t> whole(m);
    Array<std::int64_t> fraction(m);
    const std::int64_t* candidate = candidates.data();
    std::int64_t* whole_out = whole.mutable_data();
    std::int64_t* fraction_out = fraction.mutable_data();
    run(level, threads, [&](const Execution& execution) {
      return engine_.score(candidate, m, floor, whole_out, fraction_out, execution);
    });
    return py::make_tuple(whole, fraction);
  }

  py::tuple row_sums(std::int64_t candidate, const std::string& level, int threads) {
    expect_column(candidate);
    Array<std::int64_t> sum(x_.shape(1));
    Array<std::int64_t> count(x_.shape(1));
    std::int64_t* sum_out = sum.mutable_data();
    std::int64_t* count_out = count.mutable_data();
    run(level, threads, [&](const Execution& execution) {
      return engine_.row_sums(candidate, sum_out, count_out, execution);
    });
    return py::make_tuple(sum, count);
  }

  // The sums of row_sums added up for each number of neighbours: two lists, sums and numbers.
  py::tuple sums_by_count(std::int64_t candidate, const std::string& level, int threads) {
    expect_column(candidate);
    const auto n = static_cast<std::size_t>(x_.shape(1));
    std::vector<std::int64_t> sum(n), count(n), of_count(n, 0);  // of a row; of 1 .. n - 1
    run(level, threads, [&](const Execution& execution) {
      return engine_.row_sums(candidate, sum.data(), count.data(), execution);
    });
    for (std::size_t i = 0; i < n; ++i) of_count[static_cast<std::size_t>(count[i])] += sum[i];
    py::list sums, counts;
    for (std::size_t c = 1; c < n; ++c) {
      if (of_count[c] == 0) continue;
      sums.append(of_count[c]);
      counts.append(c);
    }
    return py::make_tuple(sums, counts);
  }

  static void bind(py::module_& m, const char* name) {
    py::class_<BoundEngine> engine(m, name);
    engine
        .def(py::init<Array<T>, Array<T>, const Array<std::int32_t>&, int, std::uint64_t,
                      Array<std::int32_t>>(),
             py::arg("x").noconvert(), py::arg("factor").noconvert(), py::arg("rank").noconvert(),
             py::arg("ties"), py::arg("seed"), py::arg("sorted_rows").noconvert())
        .def("select", &BoundEngine::select, py::arg("column"), py::call_guard<WithoutGil>())
        .def("score", &BoundEngine::score, py::arg("candidates").noconvert(), py::arg("floor"),
             py::arg("level"), py::arg("threads"))
        .def("row_sums", &BoundEngine::row_sums, py::arg("candidate"), py::arg("level"),
             py::arg("threads"))
        .def("sums_by_count", &BoundEngine::sums_by_count, py::arg("candidate"), py::arg("level"),
             py::arg("threads"));
#ifdef LCODEC_INSTRUMENTS
    engine.def_property_readonly("scanned", [](const BoundEngine& self) {
      const ScanWork work = self.engine_.scanned();
      return py::make_tuple(work.comparisons, work.instructions, work.instructions_of_all,
                            work.seconds);
    });
#endif
  }

 private:
  void expect_column(std::int64_t column) const {
    expect(0 <= column && column < x_.shape(0), "column out of range");
  }
  static const std::int32_t* checked(const Array<std::int32_t>& rank, const Array<T>& x) {
    expect(rank.ndim() == 1 && rank.shape(0) == x.shape(1), "shapes do not fit");
    return rank.data();
  }

  Array<T> x_;
  Array<T> factor_;
  Array<std::int32_t> sorted_rows_;
  Engine<T> engine_;
};

template <class T>
py::tuple laid_out(const Array<T>& x, const std::string& level, int threads) {
  expect(x.ndim() == 2 && x.shape(0) >= 1 && x.shape(1) >= 1, "shapes do not fit");
  const std::int64_t n = x.shape(0);
  const std::int64_t p = x.shape(1);
  Array<T> columns({p, n});
  Array<T> low(p);
  Array<T> high(p);
  T* columns_out = columns.mutable_data();
  T* low_out = low.mutable_data();
  T* high_out = high.mutable_data();
  run(level, threads, [&](const Execution& execution) {
    return lay_out(x.data(), n, p, columns_out, low_out, high_out, execution);
  });
  return py::make_tuple(columns, low, high);
}

template <class T>
Array<std::int32_t> sorted(const Array<T>& x, const std::string& level, int threads) {
  expect(x.ndim() == 2 && x.shape(1) >= 1, "shapes do not fit");
  Array<std::int32_t> rows({x.shape(0), x.shape(1)});
  std::int32_t* out = rows.mutable_data();
  run(level, threads, [&](const Execution& execution) {
    return sort_columns(x.data(), x.shape(1), x.shape(0), out, execution);
  });
  return rows;
}

template <class T>
Array<double> deviations(const Array<T>& x, const std::string& level, int threads) {
  expect(x.ndim() == 2 && x.shape(1) >= 2, "shapes do not fit");
  Array<double> deviation(x.shape(0));
  double* out = deviation.mutable_data();
  run(level, threads, [&](const Execution& execution) {
    return standard_deviations(x.data(), x.shape(1), x.shape(0), out, execution);
  });
  return deviation;
}

// (offset, indices): row i's neighbours are indices[offset[i]], ..., up to offset[i + 1].
template <class T>
py::tuple all_neighbors(const Array<T>& x, const Array<T>& factor, int ties, std::uint64_t seed,
                        const std::string& level, int threads) {
  const Columns<T> view = columns(x, factor);
  const Ties rule = tie_rule(ties);
  Array<std::int64_t> offset(view.n + 1);
  std::int64_t* starts = offset.mutable_data();
  starts[0] = 0;
  Array<std::int64_t> lowest(rule == Ties::average ? view.n : 0);
  if (rule == Ties::average) {
    std::int64_t* lowest_out = lowest.mutable_data();
    run(level, threads, [&](const Execution& execution) {
      return neighbors(view, rule, seed, nullptr, starts + 1, lowest_out, execution);
    });
  } else {
    std::fill_n(starts + 1, view.n, 1);
  }
  for (std::int64_t i = 0; i < view.n; ++i) starts[i + 1] += starts[i];
  if (rule == Ties::average && starts[view.n] == view.n) return py::make_tuple(offset, lowest);
  Array<std::int64_t> indices(starts[view.n]);
  std::int64_t* indices_out = indices.mutable_data();
  run(level, threads, [&](const Execution& execution) {
    return neighbors(view, rule, seed, starts, nullptr, indices_out, execution);
  });
  return py::make_tuple(offset, indices);
}

template <class T>
py::tuple minima(const Array<T>& x, const Array<T>& factor, const Array<std::int32_t>& rank,
                 std::int64_t k, const std::string& level, int threads) {
  const Columns<T> view = columns(x, factor);
  expect(rank.ndim() == 1 && rank.shape(0) == view.n, "shapes do not fit");
  expect(1 <= k && k < view.n, "k out of range");
  Array<std::int64_t> whole(view.n);
  Array<std::int64_t> rest(view.n);
  Array<std::int64_t> tied(view.n);
  std::int64_t* whole_out = whole.mutable_data();
  std::int64_t* rest_out = rest.mutable_data();
  std::int64_t* tied_out = tied.mutable_data();
  run(level, threads, [&](const Execution& execution) {
    return nearest_minima(view, rank.data(), k, whole_out, rest_out, tied_out, execution);
  });
  return py::make_tuple(whole, rest, tied);
}

#ifdef LCODEC_INSTRUMENTS
// Calls of 1 ms each, of which one on another thread than the calling one throws.
void throw_in_a_helper(const std::string& level, int threads) {
  const auto caller = std::this_thread::get_id();
  run(level, threads, [&](const Execution& execution) {
    return parallel_for(10'000, execution, [&] {
      return [&](std::int64_t) {
        if (std::this_thread::get_id() != caller) throw std::range_error("thrown in a helper");
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      };
    });
  });
}

// How many of `calls` at once have the one helper that each wants, on two CPUs for each.
int helped_at_once(int calls) {
  const WithoutGil released;
  std::atomic<int> inside{0};
  const auto meet = [&] {
    for (int ms = 0; ms < 5000 && inside < calls; ++ms)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  const auto help = [&] {
    ++inside;
    meet();
  };
  std::list<Helpers> helpers;
  for (int call = 0; call < calls; ++call) helpers.emplace_back(1, help, 2 * calls);
  meet();
  return inside;
}
#endif

template <class T>
void bind(py::module_& m, const char* engine_name) {
  BoundEngine<T>::bind(m, engine_name);
  m.def("lay_out", &laid_out<T>, py::arg("x").noconvert(), py::arg("level"), py::arg("threads"));
  m.def("sort_columns", &sorted<T>, py::arg("columns").noconvert(), py::arg("level"),
        py::arg("threads"));
  m.def("standard_deviations", &deviations<T>, py::arg("columns").noconvert(), py::arg("level"),
        py::arg("threads"));
  m.def("neighbors", &all_neighbors<T>, py::arg("x").noconvert(), py::arg("factor").noconvert(),
        py::arg("ties"), py::arg("seed"), py::arg("level"), py::arg("threads"));
  m.def("nearest_minima", &minima<T>, py::arg("x").noconvert(), py::arg("factor").noconvert(),
        py::arg("rank").noconvert(), py::arg("k"), py::arg("level"), py::arg("threads"));
}

}  // namespace

void register_dependence(py::module_ m) {
  bind<float>(m, "EngineFloat");
  bind<double>(m, "EngineDouble");
#ifdef LCODEC_INSTRUMENTS
  m.def("saturate", &saturate, py::arg("level"), py::arg("rounds"), py::call_guard<WithoutGil>(),
        "Issues vector instructions; returns how many.");
  m.def("throw_in_a_helper", &throw_in_a_helper, py::arg("level"), py::arg("threads"),
        "Throws in a thread of the pool, for tests.");
  m.def("helped_at_once", &helped_at_once, py::arg("calls"),
        "How many of several calls have a helper, for tests.");
#endif
}

}  // namespace lcodec::bindings
