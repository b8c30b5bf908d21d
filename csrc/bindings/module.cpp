#include "bindings/bindings.hpp"

// Free-threaded Python keeps its GIL off: the modules hold no state that threads share. Functions
// work on what they are given, and an engine belongs to the call that made it.
PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  using namespace lcodec::bindings;
  m.doc() = "Compiled part of lcodec_ext. Private: use the functions of lcodec_ext itself.";
  register_build_info(m);
  const auto dependence = m.def_submodule("dependence");
  register_dependence(dependence);
  register_chatterjee(dependence);
  register_permutation(dependence);
  register_curvature(m.def_submodule("curvature"));
#ifdef LCODEC_HAVE_CUDA
  const auto cuda = m.def_submodule("cuda");
  register_cuda(cuda);
  register_cuda_permutation(cuda);
  register_cuda_curvature(cuda);
#endif
}
