// Bindings of the sums under permutations on the CPU. Arguments are those of
// lcodec_ext/dependence/backends/cpu.py; here only what is read by index is checked.
#include "lcodec/permutation.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <string>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"
#include "bindings/execution.hpp"
#include "cpu/instruments.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Rows = Array<std::int32_t>;

template <class T>
bool within(const Array<T>& values, std::int64_t low, std::int64_t high) {
  const T* first = values.data();
  return std::all_of(first, first + values.size(),
                     [=](T value) { return low <= value && value <= high; });
}

// Null for an array without elements.
const std::int32_t* given(const Rows& values) { return values.size() ? values.data() : nullptr; }

// Where the blocks of n rows begin; none for one block.
const std::int32_t* checked_start(const Rows& start, std::int64_t n) {
  expect(start.ndim() == 1 && (start.size() == 0 || start.size() == n), "shapes do not fit");
  for (std::int64_t i = 0; i < start.size(); ++i)
    expect(0 <= start.at(i) && start.at(i) <= i, "a block begins behind its row");
  return given(start);
}

Array<std::int64_t> permuted_sums(const Rows& rank, const Rows& start,
                                  const Array<std::int64_t>& begin, const Rows& owner,
                                  const Rows& other, const Rows& label, const Rows& size,
                                  const Rows& segment, std::uint64_t seed, std::int64_t first,
                                  std::int64_t count, const std::string& level, int threads) {
  expect(rank.ndim() == 1 && begin.ndim() == 1 && owner.ndim() == 1 && other.ndim() == 1 &&
             label.ndim() == 2 && size.ndim() == 1 && segment.ndim() == 1,
         "wrong number of dimensions");
  const std::int64_t n = rank.size();
  const std::int64_t segments = begin.size() - 1;
  expect(n >= 1 && segments >= 1 && first >= 0 && count >= 0, "sizes are too small");
  expect(within(rank, 0, n), "ranks are out of range");
  expect(begin.at(0) == 0 && begin.at(segments) == other.size(), "segments do not fit");
  for (std::int64_t s = 0; s < segments; ++s) {
    expect(begin.at(s) <= begin.at(s + 1), "segments do not fit");
    expect(owner.size() > 0 || begin.at(s + 1) - begin.at(s) <= n, "segments do not fit");
  }
  expect(owner.size() == 0 || owner.size() == other.size(), "shapes do not fit");
  expect(within(owner, 0, n - 1) && within(other, 0, n - 1), "rows are out of range");
  expect(label.shape(1) == n && size.size() == segment.size(), "shapes do not fit");
  expect(within(label, -1, size.size() - 1) && within(segment, 0, segments - 1),
         "groups are out of range");
  const PermutedPairs pairs{n,
                            rank.data(),
                            checked_start(start, n),
                            segments,
                            begin.data(),
                            given(owner),
                            other.data(),
                            label.shape(0),
                            label.data(),
                            size.size(),
                            size.data(),
                            segment.data()};
  Array<std::int64_t> sum({count, segments});
  std::int64_t* out = sum.mutable_data();
  run(level, threads, [&](const Execution& execution) {
    return lcodec::permuted_sums(pairs, seed, first, count, out, execution);
  });
  return sum;
}

Rows permutations(std::int64_t n, const Rows& start, std::uint64_t seed, std::int64_t first,
                  std::int64_t count, const std::string& level, int threads) {
  expect(n >= 1 && first >= 0 && count >= 0, "sizes are too small");
  const std::int32_t* blocks = checked_start(start, n);
  Rows row({count, n});
  std::int32_t* out = row.mutable_data();
  run(level, threads, [&](const Execution& execution) {
    return lcodec::permutations(n, blocks, seed, first, count, out, execution);
  });
  return row;
}

#ifdef LCODEC_INSTRUMENTS
std::int64_t bare_permutations(const Rows& rank, const Rows& other, std::uint64_t seed,
                               std::int64_t count) {
  expect(rank.ndim() == 1 && other.ndim() == 1 && rank.size() == other.size(), "shapes do not fit");
  expect(within(other, 0, rank.size() - 1), "rows are out of range");
  const WithoutGil released;
  return lcodec::bare_permutations(rank.data(), other.data(), rank.size(), seed, count);
}
#endif

}  // namespace

void register_permutation(py::module_ m) {
  m.def("permuted_sums", &permuted_sums, py::arg("rank").noconvert(), py::arg("start").noconvert(),
        py::arg("begin").noconvert(), py::arg("owner").noconvert(), py::arg("other").noconvert(),
        py::arg("label").noconvert(), py::arg("size").noconvert(), py::arg("segment").noconvert(),
        py::arg("seed"), py::arg("first"), py::arg("count"), py::arg("level"), py::arg("threads"));
  m.def("permutations", &permutations, py::arg("n"), py::arg("start").noconvert(), py::arg("seed"),
        py::arg("first"), py::arg("count"), py::arg("level"), py::arg("threads"));
#ifdef LCODEC_INSTRUMENTS
  m.def("bare_permutations", &bare_permutations, py::arg("rank").noconvert(),
        py::arg("other").noconvert(), py::arg("seed"), py::arg("count"),
        "Draws permutations and adds minima of pairs, and nothing else; returns the sum.");
#endif
}

}  // namespace lcodec::bindings
