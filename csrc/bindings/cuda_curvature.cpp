// Bindings of the curvature products on CUDA, in _core where CUDA is built and in _emulated. Arrays
// are addresses of device memory as integers, 0 for none, whose sizes the caller answers for.
#include "lcodec/cuda_curvature.hpp"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/address.hpp"
#include "bindings/bindings.hpp"
#include "bindings/cuda_outcome.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

// call(S{}, T{}) for the type of storage that dtype names, without the GIL; raises what fails.
template <class Call>
void with_storage(const std::string& dtype, const Call& call) {
  const py::gil_scoped_release release;
  if (dtype == "float32") {
    raise_if_failed(call(float{}, float{}));
  } else if (dtype == "float64") {
    raise_if_failed(call(double{}, double{}));
  } else if (dtype == "bfloat16") {
    raise_if_failed(call(Bfloat16{}, float{}));
  } else {
    throw std::invalid_argument("dtype must be float32, float64 or bfloat16");
  }
}

void masked_gram_product(const std::string& dtype, Address g, std::int64_t n, std::int64_t d,
                         std::int64_t stride, Address segments, std::int64_t count,
                         std::int64_t size, Address weight, Address v, std::int64_t m,
                         double damping, Address out, Address workspace, std::int64_t chunk_bytes,
                         Address stream) {
  with_storage(dtype, [&](auto stored, auto zero) {
    using S = decltype(stored);
    using T = decltype(zero);
    const cuda::SelectedColumns<S> rows{at<const S>(g), n,   d, stride, at<std::int64_t>(segments),
                                        count,          size};
    return cuda::masked_gram_product(rows, at<const T>(weight), at<const T>(v), m,
                                     static_cast<T>(damping), at<T>(out), at<void>(workspace),
                                     chunk_bytes, at<void>(stream));
  });
}

void softmax_rows_product(const std::string& dtype, Address a, std::int64_t n, std::int64_t d,
                          std::int64_t stride, Address segments, Address p, Address weight,
                          Address v, std::int64_t m, double damping, Address out, Address workspace,
                          std::int64_t chunk_bytes, Address stream) {
  with_storage(dtype, [&](auto stored, auto zero) {
    using S = decltype(stored);
    using T = decltype(zero);
    const cuda::SelectedColumns<S> rows{
        at<const S>(a), n, d, stride, at<std::int64_t>(segments), 1, d};
    return cuda::softmax_rows_product(rows, at<const T>(p), at<const T>(weight), at<const T>(v), m,
                                      static_cast<T>(damping), at<T>(out), at<void>(workspace),
                                      chunk_bytes, at<void>(stream));
  });
}

void factored_gram(const std::string& dtype, Address delta, std::int64_t delta_stride,
                   std::int64_t r, Address a, std::int64_t a_stride, std::int64_t d, std::int64_t n,
                   Address k, Address stream) {
  if (dtype == "bfloat16") throw std::invalid_argument("dtype must be float32 or float64");
  with_storage(dtype, [&](auto, auto zero) {
    using T = decltype(zero);
    return cuda::factored_gram(at<const T>(delta), delta_stride, r, at<const T>(a), a_stride, d, n,
                               at<T>(k), at<void>(stream));
  });
}

}  // namespace

void register_cuda_curvature(py::module_& m) {
  m.attr("CUDA_CHUNK_BYTES") = cuda::kChunkBytes;
  m.def("cuda_row_groups", &cuda::row_groups, py::arg("n"), py::arg("size"), py::arg("itemsize"),
        py::arg("chunk_bytes"));
  m.def("cuda_rows_product_bytes", &cuda::rows_product_bytes, py::arg("n"), py::arg("size"),
        py::arg("m"), py::arg("itemsize"), py::arg("chunk_bytes"));
  m.def("cuda_masked_gram_product", &masked_gram_product, py::arg("dtype"), py::arg("g"),
        py::arg("n"), py::arg("d"), py::arg("stride"), py::arg("segments"), py::arg("count"),
        py::arg("size"), py::arg("weight"), py::arg("v"), py::arg("m"), py::arg("damping"),
        py::arg("out"), py::arg("workspace"), py::arg("chunk_bytes"), py::arg("stream"));
  m.def("cuda_softmax_rows_product", &softmax_rows_product, py::arg("dtype"), py::arg("a"),
        py::arg("n"), py::arg("d"), py::arg("stride"), py::arg("segments"), py::arg("p"),
        py::arg("weight"), py::arg("v"), py::arg("m"), py::arg("damping"), py::arg("out"),
        py::arg("workspace"), py::arg("chunk_bytes"), py::arg("stream"));
  m.def("cuda_factored_gram", &factored_gram, py::arg("dtype"), py::arg("delta"),
        py::arg("delta_stride"), py::arg("r"), py::arg("a"), py::arg("a_stride"), py::arg("d"),
        py::arg("n"), py::arg("k"), py::arg("stream"));
}

}  // namespace lcodec::bindings
