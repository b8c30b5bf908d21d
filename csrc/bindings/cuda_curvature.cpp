// Bindings of the curvature products on CUDA, in _core where CUDA is built and in _emulated.
#include "lcodec/cuda_curvature.hpp"

#include <cstdint>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"
#include "bindings/cuda_outcome.hpp"
#include "bindings/curvature_arguments.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

template <class S>
cuda::SelectedColumns<S> selected(const RowsProduct& a) {
  const auto* segments = pointer<const std::int64_t>(a.segments);
  return {pointer<const S>(a.x), a.n, a.d, a.stride, segments, a.count, a.size};
}

void masked_gram_product(const py::dict& given, Address workspace, std::int64_t chunk_bytes,
                         Address stream) {
  const auto a = named<RowsProduct>(given);
  launched([&] {
    return with_storage(a.dtype, [&](auto stored, auto zero) {
      using S = decltype(stored);
      using T = decltype(zero);
      return cuda::masked_gram_product(selected<S>(a), pointer<const T>(a.weight),
                                       pointer<const T>(a.v), a.m, static_cast<T>(a.damping),
                                       pointer<T>(a.out), pointer<void>(workspace), chunk_bytes,
                                       pointer<void>(stream));
    });
  });
}

void softmax_rows_product(const py::dict& given, Address workspace, std::int64_t chunk_bytes,
                          Address stream) {
  const auto a = named<RowsProduct>(given);
  launched([&] {
    return with_storage(a.dtype, [&](auto stored, auto zero) {
      using S = decltype(stored);
      using T = decltype(zero);
      return cuda::softmax_rows_product(
          selected<S>(a), pointer<const T>(a.p), pointer<const T>(a.weight), pointer<const T>(a.v),
          a.m, static_cast<T>(a.damping), pointer<T>(a.out), pointer<void>(workspace), chunk_bytes,
          pointer<void>(stream));
    });
  });
}

void factored_gram(const py::dict& given, Address stream) {
  const auto a = named<FactoredGram>(given);
  launched([&] {
    return with_type(a.dtype, [&](auto zero) {
      using T = decltype(zero);
      return cuda::factored_gram(pointer<const T>(a.delta), a.delta_stride, a.r,
                                 pointer<const T>(a.a), a.a_stride, a.d, a.n, pointer<T>(a.k),
                                 pointer<void>(stream));
    });
  });
}

}  // namespace

void register_cuda_curvature(py::module_ m) {
  m.attr("CHUNK_BYTES") = cuda::kChunkBytes;
  m.def("row_groups", &cuda::row_groups, py::arg("n"), py::arg("size"), py::arg("itemsize"),
        py::arg("chunk_bytes"));
  m.def("rows_product_bytes", &cuda::rows_product_bytes, py::arg("n"), py::arg("size"),
        py::arg("m"), py::arg("itemsize"), py::arg("chunk_bytes"));
  m.def("masked_gram_product", &masked_gram_product, py::arg("given"), py::arg("workspace"),
        py::arg("chunk_bytes"), py::arg("stream"));
  m.def("softmax_rows_product", &softmax_rows_product, py::arg("given"), py::arg("workspace"),
        py::arg("chunk_bytes"), py::arg("stream"));
  m.def("factored_gram", &factored_gram, py::arg("given"), py::arg("stream"));
}

}  // namespace lcodec::bindings
