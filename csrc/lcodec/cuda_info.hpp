// What this build and this machine offer in CUDA. Plain C++: no CUDA type crosses this header, and
// every build has what it declares (csrc/cuda/device_info.cu, or device_info_stub.cpp in a build
// without CUDA).
#pragma once

#include <string>

namespace lcodec {

struct CudaProbe {
  bool usable;         // built with CUDA, driver and device there, and the probe kernel was right
  std::string reason;  // one plain sentence: why CUDA is, or is not, usable
};

// Runs the probe kernel (csrc/cuda/probe.cuh) on the current device, on the first call: that makes
// the device's CUDA context, if the process has none yet (some 100 ms, and memory on the device).
// Later calls return the first call's answer. Thread-safe; throws nothing but std::bad_alloc.
const CudaProbe& probe_cuda();

}  // namespace lcodec
