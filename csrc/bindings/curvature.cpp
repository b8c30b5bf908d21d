// Bindings of the CPU's curvature products. Matrices are addresses as integers, 0 for none: NumPy
// has no bfloat16. lcodec_ext/curvature/kernels.py, the one caller, answers for them.
#include "lcodec/curvature.hpp"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/address.hpp"
#include "bindings/bindings.hpp"
#include "bindings/execution.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

// call(S{}, T{}) for the type of storage that dtype names.
template <class Call>
void with_storage(const std::string& dtype, const Call& call) {
  if (dtype == "float32") {
    call(float{}, float{});
  } else if (dtype == "float64") {
    call(double{}, double{});
  } else if (dtype == "bfloat16") {
    call(Bfloat16{}, float{});
  } else {
    throw std::invalid_argument("dtype must be float32, float64 or bfloat16");
  }
}

template <class S>
SelectedColumns<S> selected(Address x, std::int64_t n, std::int64_t stride, Address segments,
                            std::int64_t count, std::int64_t size) {
  expect(n >= 0 && count >= 0, "sizes are negative");
  const auto* all = at<const Segment>(segments);
  std::int64_t total = 0;
  for (std::int64_t s = 0; s < count; ++s) {
    expect(all[s].start >= 0 && all[s].length >= 0, "segments are negative");
    expect(all[s].length <= size - total, "segments do not fit");
    total += all[s].length;
  }
  expect(total == size, "segments do not fit");
  return {at<const S>(x), n, stride, all, count, size};
}

void masked_gram_product(const std::string& dtype, Address g, std::int64_t n, std::int64_t stride,
                         Address segments, std::int64_t count, std::int64_t size, Address weight,
                         Address v, std::int64_t m, double damping, Address out,
                         const std::string& level, int threads) {
  with_storage(dtype, [&](auto stored, auto zero) {
    using S = decltype(stored);
    using T = decltype(zero);
    const auto rows = selected<S>(g, n, stride, segments, count, size);
    run(level, threads, [&](const Execution& execution) {
      return lcodec::masked_gram_product(rows, at<const T>(weight), at<const T>(v), m,
                                         static_cast<T>(damping), at<T>(out), execution);
    });
  });
}

void softmax_rows_product(const std::string& dtype, Address a, std::int64_t n, std::int64_t stride,
                          std::int64_t d, Address p, Address weight, Address v, std::int64_t m,
                          double damping, Address out, const std::string& level, int threads) {
  const Segment all{0, d};
  with_storage(dtype, [&](auto stored, auto zero) {
    using S = decltype(stored);
    using T = decltype(zero);
    const SelectedColumns<S> rows{at<const S>(a), n, stride, &all, 1, d};
    run(level, threads, [&](const Execution& execution) {
      return lcodec::softmax_rows_product(rows, at<const T>(p), at<const T>(weight), at<const T>(v),
                                          m, static_cast<T>(damping), at<T>(out), execution);
    });
  });
}

void factored_gram(const std::string& dtype, Address delta, std::int64_t delta_stride,
                   std::int64_t r, Address a, std::int64_t a_stride, std::int64_t d, std::int64_t n,
                   Address k, const std::string& level, int threads) {
  expect(dtype != "bfloat16", "dtype must be float32 or float64");
  with_storage(dtype, [&](auto, auto zero) {
    using T = decltype(zero);
    run(level, threads, [&](const Execution& execution) {
      return lcodec::factored_gram(at<const T>(delta), delta_stride, r, at<const T>(a), a_stride, d,
                                   n, at<T>(k), execution);
    });
  });
}

}  // namespace

void register_curvature(py::module_& m) {
  m.def("masked_gram_product", &masked_gram_product, py::arg("dtype"), py::arg("g"), py::arg("n"),
        py::arg("stride"), py::arg("segments"), py::arg("count"), py::arg("size"),
        py::arg("weight"), py::arg("v"), py::arg("m"), py::arg("damping"), py::arg("out"),
        py::arg("level"), py::arg("threads"));
  m.def("softmax_rows_product", &softmax_rows_product, py::arg("dtype"), py::arg("a"), py::arg("n"),
        py::arg("stride"), py::arg("d"), py::arg("p"), py::arg("weight"), py::arg("v"),
        py::arg("m"), py::arg("damping"), py::arg("out"), py::arg("level"), py::arg("threads"));
  m.def("factored_gram", &factored_gram, py::arg("dtype"), py::arg("delta"),
        py::arg("delta_stride"), py::arg("r"), py::arg("a"), py::arg("a_stride"), py::arg("d"),
        py::arg("n"), py::arg("k"), py::arg("level"), py::arg("threads"));
}

}  // namespace lcodec::bindings
