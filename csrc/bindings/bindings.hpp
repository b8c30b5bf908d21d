// The compiled module, lcodec_ext._core: a submodule for each topic, and one register_* function.
#pragma once

#include <pybind11/pybind11.h>

namespace lcodec::bindings {

void register_build_info(pybind11::module_ m);        // build_info.cpp, _core itself
void register_dependence(pybind11::module_ m);        // dependence.cpp, _core.dependence
void register_chatterjee(pybind11::module_ m);        // chatterjee.cpp, _core.dependence
void register_permutation(pybind11::module_ m);       // permutation.cpp, _core.dependence
void register_curvature(pybind11::module_ m);         // curvature.cpp, _core.curvature
void register_cuda(pybind11::module_ m);              // cuda.cpp, _core.cuda
void register_cuda_permutation(pybind11::module_ m);  // cuda_permutation.cpp, _core.cuda
void register_cuda_curvature(pybind11::module_ m);    // cuda_curvature.cpp, _core.cuda

}  // namespace lcodec::bindings
