// The runtime library: memory, attributes, errors.
#include "emulate/runtime.hpp"

#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>

namespace lcodec::emulate {
namespace {

constexpr std::align_val_t kAlignment{256};

thread_local cudaError_t last_error = cudaSuccess;

struct Device {
  std::mutex mutex;
  std::unordered_map<void*, std::size_t> allocations;
  std::size_t allocated = 0;
  std::unordered_map<const void*, std::size_t> granted_shared;
};

Device& device() {
  static Device one;
  return one;
}

cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

Config& config() {
  static Config one;
  return one;
}

std::size_t allocated_bytes() {
  const std::lock_guard<std::mutex> lock(device().mutex);
  return device().allocated;
}

void set_last_error(cudaError_t error) { last_error = error; }

std::size_t granted_shared_bytes(const void* kernel) {
  const std::lock_guard<std::mutex> lock(device().mutex);
  const auto found = device().granted_shared.find(kernel);
  return found == device().granted_shared.end() ? 48 * 1024 : found->second;
}

}  // namespace lcodec::emulate

using lcodec::emulate::device;
using lcodec::emulate::kAlignment;
using lcodec::emulate::kRubbish;
using lcodec::emulate::report;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(lcodec::emulate::last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* ordinal) {
  *ordinal = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int ordinal) {
  return report(ordinal == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
  if (ordinal != 0) return report(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 50 * 1024 * 1024;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 * 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(lcodec::emulate::kMaxSharedBytes);
      return cudaSuccess;
  }
  return report(cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (lcodec::emulate::config().refuse_attributes) return cudaErrorInvalidDevice;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<std::size_t>(value) > lcodec::emulate::kMaxSharedBytes) {
    return report(cudaErrorInvalidValue);
  }
  const std::lock_guard<std::mutex> lock(device().mutex);
  device().granted_shared[kernel] = static_cast<std::size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  *address = nullptr;
  if (bytes == 0) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(device().mutex);
  const std::size_t limit = lcodec::emulate::config().memory;
  if (device().allocated > limit || bytes > limit - device().allocated) {
    return report(cudaErrorMemoryAllocation);
  }
  *address = ::operator new(bytes, kAlignment, std::nothrow);
  if (!*address) return report(cudaErrorMemoryAllocation);
  std::memset(*address, kRubbish, bytes);
  device().allocations[*address] = bytes;
  device().allocated += bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  if (!address) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(device().mutex);
  const auto found = device().allocations.find(address);
  if (found == device().allocations.end()) return report(cudaErrorInvalidValue);
  device().allocated -= found->second;
  device().allocations.erase(found);
  ::operator delete(address, kAlignment);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** address, std::size_t bytes, cudaStream_t) {
  return cudaMalloc(address, bytes);
}

cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
