// Asks the driver for a device and runs the probe kernel on it. Every failure becomes a sentence:
// a machine without a driver is a normal place to be for this module.
#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>

#include "cuda/probe.cuh"
#include "lcodec/cuda_info.hpp"

namespace lcodec {
namespace {

constexpr unsigned kBlock = 128;
constexpr std::size_t kCount = 300;  // not a multiple of kBlock: the last block has idle threads
constexpr unsigned kGrid = (kCount + kBlock - 1) / kBlock;
static_assert(kCount % kBlock != 0);

struct DeviceFree {
  // A failure here is one of an earlier call, which has been reported.
  void operator()(void* p) const noexcept { static_cast<void>(cudaFree(p)); }
};
using DeviceMemory = std::unique_ptr<void, DeviceFree>;

template <typename T>
using Values = std::array<T, kCount>;

// a * b + c for pairs of elements where a device that rounds differently is found out.
template <typename T>
void probe_inputs(Values<T>& a, Values<T>& b, Values<T>& c) {
  for (std::size_t i = 0; i < kCount; i += 2) {
    const T k = static_cast<T>(i + 1);
    // a * a rounded, minus itself: 0, but the product's rounding error k^2 eps^2 when fused.
    a[i] = b[i] = T{1} + k * std::numeric_limits<T>::epsilon();
    c[i] = -(a[i] * b[i]);
    // A sum of denormal numbers: 0 on a device that flushes them.
    a[i + 1] = k * std::numeric_limits<T>::denorm_min();
    b[i + 1] = T{1};
    c[i + 1] = std::numeric_limits<T>::denorm_min();
  }
}

// Runs the probe for one type and says in `correct` whether the device computed what the host does.
template <typename T>
cudaError_t run_probe(bool& correct) {
  static_assert(kCount % 2 == 0, "probe_inputs writes pairs");
  constexpr std::size_t kBytes = kCount * sizeof(T);
  correct = false;

  std::array<Values<T>, 3> inputs;
  probe_inputs(inputs[0], inputs[1], inputs[2]);

  void* raw = nullptr;
  if (const cudaError_t error = cudaMalloc(&raw, 4 * kBytes); error != cudaSuccess) {
    return error;
  }
  const DeviceMemory memory(raw);
  T* const a = static_cast<T*>(raw);
  T* const b = a + kCount;
  T* const c = b + kCount;
  T* const out = c + kCount;

  if (const cudaError_t error =
          cudaMemcpy(raw, inputs.data(), sizeof(inputs), cudaMemcpyHostToDevice);
      error != cudaSuccess) {
    return error;
  }
  // All bits set is NaN: an element that the kernel does not write cannot pass.
  if (const cudaError_t error = cudaMemset(out, 0xff, kBytes); error != cudaSuccess) {
    return error;
  }
  cuda::multiply_add_probe<T><<<kGrid, kBlock>>>(a, b, c, out, static_cast<std::int64_t>(kCount));
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    return error;
  }
  Values<T> result;
  if (const cudaError_t error = cudaMemcpy(result.data(), out, kBytes, cudaMemcpyDeviceToHost);
      error != cudaSuccess) {
    return error;
  }

  correct = true;
  for (std::size_t i = 0; i < kCount; ++i) {
    const T product = inputs[0][i] * inputs[1][i];
    correct = correct && result[i] == product + inputs[2][i];
  }
  return cudaSuccess;
}

std::string version_text(int version) {  // 13020 -> "13.2"
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

CudaProbe unusable(const std::string& why) {
  // The runtime keeps the last error until asked; it is in the sentence now.
  static_cast<void>(cudaGetLastError());
  return {false, "CUDA is not used because " + why + "."};
}

CudaProbe run() {
  int driver = 0;  // stays 0 where no driver is installed
  if (const cudaError_t error = cudaDriverGetVersion(&driver); error != cudaSuccess) {
    return unusable(std::string("the driver's version could not be read (") +
                    cudaGetErrorString(error) + ")");
  }
  if (driver == 0) {
    return unusable("no NVIDIA driver was found on this machine");
  }

  int devices = 0;
  const cudaError_t counted = cudaGetDeviceCount(&devices);
  if (counted == cudaErrorInsufficientDriver) {
    return unusable("the NVIDIA driver serves CUDA up to " + version_text(driver) +
                    " and this copy of lcodec_ext was built with CUDA " +
                    version_text(CUDART_VERSION));
  }
  if (counted == cudaErrorNoDevice || (counted == cudaSuccess && devices == 0)) {
    return unusable(
        "the NVIDIA driver shows no device (is there a GPU, and does CUDA_VISIBLE_DEVICES hide "
        "it?)");
  }
  if (counted != cudaSuccess) {
    return unusable(std::string("the driver could not be started (") + cudaGetErrorString(counted) +
                    ")");
  }

  int device = 0;
  cudaDeviceProp properties{};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaGetDeviceProperties(&properties, device);
  }
  if (error != cudaSuccess) {
    return unusable(std::string("the device's properties could not be read (") +
                    cudaGetErrorString(error) + ")");
  }
  const std::string name = std::string(properties.name) + " (compute capability " +
                           std::to_string(properties.major) + "." +
                           std::to_string(properties.minor) + ")";

  bool correct_float = false;
  bool correct_double = false;
  error = run_probe<float>(correct_float);
  if (error == cudaSuccess) {
    error = run_probe<double>(correct_double);
  }
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    return unusable("this copy of lcodec_ext has no code that runs on " + name +
                    "; build_info()['cuda_architectures'] lists what it was built for");
  }
  if (error != cudaSuccess) {
    return unusable("the probe kernel failed on " + name + " (" + cudaGetErrorString(error) + ")");
  }
  if (!correct_float || !correct_double) {
    return unusable("the probe kernel computed a wrong result on " + name);
  }
  return {true, "CUDA is usable: the probe kernel ran on " + name + "."};
}

}  // namespace

const CudaProbe& probe_cuda() {
  static const CudaProbe probe = run();
  return probe;
}

}  // namespace lcodec
