// The compiled module, lcodec_ext._core, one register_* function per topic.
#pragma once

#include <pybind11/pybind11.h>

namespace lcodec::bindings {

void register_build_info(pybind11::module_& m);      // build_info.cpp
void register_dependence(pybind11::module_& m);      // dependence.cpp
void register_curvature(pybind11::module_& m);       // curvature.cpp
void register_cuda(pybind11::module_& m);            // cuda.cpp
void register_cuda_curvature(pybind11::module_& m);  // cuda_curvature.cpp

}  // namespace lcodec::bindings
