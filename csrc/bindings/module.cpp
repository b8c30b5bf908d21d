#include "bindings/bindings.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled part of lcodec_ext. Private: use the functions of lcodec_ext itself.";
  lcodec::bindings::register_build_info(m);
  lcodec::bindings::register_dependence(m);
  lcodec::bindings::register_curvature(m);
#ifdef LCODEC_HAVE_CUDA
  lcodec::bindings::register_cuda(m);
  lcodec::bindings::register_cuda_curvature(m);
#endif
}
