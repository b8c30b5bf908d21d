// The kernels of selftest.cu and the primitives of device_sort.hpp, as functions of arrays.
#pragma once

#include <pybind11/pybind11.h>

namespace lcodec::bindings {

void register_selftests(pybind11::module_ m);  // emulated, and in the PTX interpreter

}  // namespace lcodec::bindings
