// Bindings of the CPU's curvature products.
#include "lcodec/curvature.hpp"

#include <cstdint>
#include <string>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"
#include "bindings/curvature_arguments.hpp"
#include "bindings/execution.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

// The segments, whose lengths add up to `size`.
const Segment* checked_segments(const RowsProduct& a) {
  expect(a.n >= 0 && a.count >= 0, "sizes are negative");
  const auto* all = pointer<const Segment>(a.segments);
  std::int64_t total = 0;
  for (std::int64_t s = 0; s < a.count; ++s) {
    expect(all[s].start >= 0 && all[s].length >= 0, "segments are negative");
    expect(all[s].length <= a.size - total, "segments do not fit");
    total += all[s].length;
  }
  expect(total == a.size, "segments do not fit");
  return all;
}

void masked_gram_product(const py::dict& given, const std::string& level, int threads) {
  const auto a = named<RowsProduct>(given);
  with_storage(a.dtype, [&](auto stored, auto zero) {
    using S = decltype(stored);
    using T = decltype(zero);
    const SelectedColumns<S> rows{pointer<const S>(a.x), a.n,     a.stride,
                                  checked_segments(a),   a.count, a.size};
    run(level, threads, [&](const Execution& execution) {
      return lcodec::masked_gram_product(rows, pointer<const T>(a.weight), pointer<const T>(a.v),
                                         a.m, static_cast<T>(a.damping), pointer<T>(a.out),
                                         execution);
    });
  });
}

void softmax_rows_product(const py::dict& given, const std::string& level, int threads) {
  const auto a = named<RowsProduct>(given);
  const Segment all{0, a.d};  // all columns; the segments given are for CUDA
  with_storage(a.dtype, [&](auto stored, auto zero) {
    using S = decltype(stored);
    using T = decltype(zero);
    const SelectedColumns<S> rows{pointer<const S>(a.x), a.n, a.stride, &all, 1, a.d};
    run(level, threads, [&](const Execution& execution) {
      return lcodec::softmax_rows_product(rows, pointer<const T>(a.p), pointer<const T>(a.weight),
                                          pointer<const T>(a.v), a.m, static_cast<T>(a.damping),
                                          pointer<T>(a.out), execution);
    });
  });
}

void factored_gram(const py::dict& given, const std::string& level, int threads) {
  const auto a = named<FactoredGram>(given);
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    run(level, threads, [&](const Execution& execution) {
      return lcodec::factored_gram(pointer<const T>(a.delta), a.delta_stride, a.r,
                                   pointer<const T>(a.a), a.a_stride, a.d, a.n, pointer<T>(a.k),
                                   execution);
    });
  });
}

}  // namespace

void register_curvature(py::module_ m) {
  m.def("masked_gram_product", &masked_gram_product, py::arg("given"), py::arg("level"),
        py::arg("threads"));
  m.def("softmax_rows_product", &softmax_rows_product, py::arg("given"), py::arg("level"),
        py::arg("threads"));
  m.def("factored_gram", &factored_gram, py::arg("given"), py::arg("level"), py::arg("threads"));
}

}  // namespace lcodec::bindings
