// Binding of the sums behind xi. The caller is lcodec_ext/dependence/backends/cpu.py; here only
// shapes are checked.
#include "lcodec/chatterjee.hpp"

#include <pybind11/numpy.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"
#include "bindings/execution.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

using Table = py::array_t<double, py::array::c_style>;

py::int_ integer(std::int64_t value) { return {value}; }

py::int_ integer(const Wide& value) {
  py::int_ low(value.low);
  if (value.high == 0) return low;
  return py::int_((py::int_(value.high) << py::int_(64)) | low);
}

py::list integers(const std::int64_t* value, std::size_t count) {
  py::list list(count);
  for (std::size_t k = 0; k < count; ++k) list[k] = integer(value[k]);
  return list;
}

py::tuple fields(const PathSums& path) {
  const std::size_t terms = path.denominator.size();
  const std::size_t responses = path.length.size() / terms;
  py::list lengths(responses);
  for (std::size_t j = 0; j < responses; ++j)
    lengths[j] = integers(path.length.data() + j * terms, terms);
  return py::make_tuple(integers(path.denominator.data(), terms), integers(path.rows.data(), terms),
                        integers(path.squares.data(), terms), std::move(lengths), path.cube);
}

py::tuple fields(const RankSums& sums) {
  return py::make_tuple(integer(sums.denominator), integer(sums.sum), integer(sums.squares),
                        integer(sums.minima), integer(sums.minima_squares),
                        integer(sums.minima_rows), integer(sums.distance_rows), sums.cube);
}

template <class Sums>
py::list list_of(const std::vector<Sums>& all) {
  py::list list(all.size());
  for (std::size_t k = 0; k < all.size(); ++k) list[k] = fields(all[k]);
  return list;
}

// The fields of all PathSums and RankSums of columns x and y, of shape (n,) or (columns, n); None
// where a value is not finite.
py::object chatterjee(const Table& x, const Table& y, int ties, std::uint64_t seed,
                      const std::string& level, int threads) {
  expect(x.ndim() >= 1 && x.ndim() <= 2 && y.ndim() >= 1 && y.ndim() <= 2,
         "wrong number of dimensions");
  const std::int64_t n = x.shape(x.ndim() - 1);
  const std::int64_t k = x.ndim() == 1 ? 1 : x.shape(0);
  const std::int64_t m = y.ndim() == 1 ? 1 : y.shape(0);
  expect(n >= 2 && n <= 1'000'000 && k >= 1 && m >= 1 && y.shape(y.ndim() - 1) == n,
         "shapes do not fit");
  const Ties rule = tie_rule(ties);
  std::vector<PathSums> paths;
  std::vector<RankSums> ranks;
  bool finite = true;
  run(level, threads, [&](const Execution& execution) {
    return lcodec::chatterjee(x.data(), k, y.data(), m, n, rule, seed, paths, ranks, finite,
                              execution);
  });
  if (!finite) return py::none();
  return py::make_tuple(list_of(paths), list_of(ranks));
}

}  // namespace

void register_chatterjee(py::module_ m) {
  m.def("chatterjee", &chatterjee, py::arg("x").noconvert(), py::arg("y").noconvert(),
        py::arg("ties"), py::arg("seed"), py::arg("level"), py::arg("threads"));
}

}  // namespace lcodec::bindings
