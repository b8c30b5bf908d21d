// Types and functions of CUDA's runtime, for host code that launches no kernel by itself.
#pragma once

#if defined(LCODEC_EMULATE)
#include "emulate/cuda.hpp"
#else
#include <cuda_runtime.h>
#endif
