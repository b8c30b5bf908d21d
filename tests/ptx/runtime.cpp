// A stand-in for CUDA's runtime library: what nvcc's host code and CUB call. A module registers its
// kernels' PTX with it as with the real one. A mistake of a kernel is cudaErrorLaunchFailure, whose
// text says what was wrong.
#include "ptx/runtime.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "ptx/machine.hpp"

namespace lcodec::ptx {
namespace {

struct Configuration {
  dim3 grid, block;
  std::size_t shared;
  cudaStream_t stream;
};

struct Runtime {
  std::map<const void*, std::string> name_of;  // a kernel's host function
  std::map<std::string, std::string> sources;  // that are not parsed yet
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  std::map<std::string, std::size_t> granted_shared;
  std::vector<Configuration> configurations;  // of launches that are being made
  std::string fault;                          // of a kernel; nothing runs after it
  cudaError_t last_error = cudaSuccess;
};

Runtime& runtime() {
  static Runtime one;
  return one;
}

cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) runtime().last_error = error;
  return error;
}

Kernel& kernel_named(const std::string& name) {
  Runtime& r = runtime();
  std::unique_ptr<Kernel>& kernel = r.kernels[name];
  if (!kernel) {
    const auto source = r.sources.find(name);
    if (source == r.sources.end()) throw Fault("there is no PTX of the kernel " + name);
    kernel = parse_kernel(name, source->second);
  }
  return *kernel;
}

// The PTX texts in what nvcc hands to the runtime: a header, then entries with headers.
struct FatHeader {
  std::uint32_t magic;
  std::uint16_t version, header_bytes;
  std::uint64_t bytes;
};
struct FatEntry {
  std::uint16_t kind, version;
  std::uint32_t header_bytes;
  std::uint64_t bytes;
};

void register_texts(const unsigned char* data) {
  constexpr std::uint16_t kPtx = 1;
  FatHeader header;
  std::memcpy(&header, data, sizeof header);
  const unsigned char* const end = data + header.header_bytes + header.bytes;
  for (const unsigned char* at = data + header.header_bytes; at < end;) {
    FatEntry entry;
    std::memcpy(&entry, at, sizeof entry);
    if (entry.kind == kPtx) {
      const auto* const text = reinterpret_cast<const char*>(at + entry.header_bytes);
      const std::string ptx(text, strnlen(text, entry.bytes));
      if (ptx.find(".version") == std::string::npos) {
        runtime().fault = "PTX of a module is compressed: compile with --compress-mode=none";
      }
      for (auto& [name, source] : split_module(ptx)) runtime().sources[name] = source;
    }
    at += entry.header_bytes + entry.bytes;
  }
}

// What a device refuses to launch.
cudaError_t check_launch(const Kernel& kernel, dim3 grid, dim3 block, std::size_t shared) {
  constexpr unsigned kMostOther = 65535;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || grid.x > INT32_MAX ||
      grid.y > kMostOther || grid.z > kMostOther || block.z > 64 || threads > kernel.most_threads ||
      kernel.shared_bytes > kSharedUnasked) {
    return cudaErrorInvalidConfiguration;
  }
  constexpr std::size_t kMostParams = 4096;
  const auto granted = runtime().granted_shared.find(kernel.name);
  const std::size_t allowed = granted == runtime().granted_shared.end()
                                  ? kSharedUnasked - kernel.shared_bytes
                                  : granted->second;
  if (shared > allowed || shared + kernel.shared_bytes > kMostShared ||
      kernel.param_bytes > kMostParams) {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments,
                   std::size_t shared) {
  Runtime& r = runtime();
  if (!r.fault.empty()) return report(cudaErrorLaunchFailure);
  const auto name = r.name_of.find(function);
  if (name == r.name_of.end()) return report(cudaErrorInvalidDeviceFunction);
  try {
    Kernel& kernel = kernel_named(name->second);
    const cudaError_t refused = check_launch(kernel, grid, block, shared);
    if (refused != cudaSuccess) return report(refused);
    run_grid(kernel, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, arguments, shared);
  } catch (const Fault& fault) {
    r.fault = fault.what();
    return report(cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}

// Copies and fills must lie in what was allocated, on the device's side.
cudaError_t on_device(const void* address, std::size_t bytes) {
  if (!runtime().fault.empty()) return report(cudaErrorLaunchFailure);
  const Memory* const memory = heap().find(address);
  const bool right = memory && memory->is_open(memory->offset(address), bytes);
  return report(bytes == 0 || right ? cudaSuccess : cudaErrorInvalidValue);
}

void host_wrote(void* address, std::size_t bytes) {
  if (bytes == 0) return;
  Memory& memory = *heap().find(address);
  memory.host_wrote(memory.offset(address), bytes);
}

}  // namespace

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& [name, source] : runtime().sources) names.push_back(name);
  return names;
}

std::string kernel_source(const std::string& name) { return kernel_named(name).source; }

void replace_source(const std::string& name, const std::string& source) {
  runtime().kernels[name] = parse_kernel(name, source);
}

std::vector<Coverage> coverage() {
  std::vector<Coverage> all;
  for (const auto& [name, kernel] : runtime().kernels) {
    if (!kernel || kernel->launches == 0) continue;
    Coverage c{name, kernel->launches, 0, kernel->code.size() - 1, {}};
    std::map<std::string, bool> reached;
    for (std::size_t k = 0; k < c.instructions; ++k) {
      const Instruction& i = kernel->code[k];
      c.executed += i.executed > 0;
      reached[i.place] = reached[i.place] || i.executed > 0;
    }
    for (const auto& [place, was] : reached) {
      if (!was && !place.ends_with(":0")) c.never.push_back(place);
    }
    all.push_back(c);
  }
  return all;
}

void reset() {
  heap().disown();
  runtime().fault.clear();
  runtime().last_error = cudaSuccess;
}

}  // namespace lcodec::ptx

using lcodec::ptx::heap;
using lcodec::ptx::host_wrote;
using lcodec::ptx::kernel_named;
using lcodec::ptx::on_device;
using lcodec::ptx::report;
using lcodec::ptx::runtime;

// ------------------------------------------------------------------------------------------------
// What nvcc's host code calls

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper);
void __cudaRegisterFatBinaryEnd(void** handle);
void __cudaUnregisterFatBinary(void** handle);
void __cudaRegisterFunction(void** handle, const char* function, char* device_function,
                            const char* name, int thread_limit, uint3* thread, uint3* block,
                            dim3* block_size, dim3* grid_size, int* warp_size);
void __cudaRegisterVar(void** handle, char* variable, char* address, const char* name, int external,
                       std::size_t size, int constant, int global);
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared,
                                     struct CUstream_st* stream);
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream);
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function);
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               std::size_t shared, cudaStream_t stream);

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    std::int32_t magic, version;
    const unsigned char* data;
  };
  lcodec::ptx::register_texts(static_cast<const Wrapper*>(wrapper)->data);
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  runtime().name_of[function] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared,
                                     struct CUstream_st* stream) {
  runtime().configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  const auto last = runtime().configurations.back();
  runtime().configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}
// A kernel's handle is its host function.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               std::size_t shared, cudaStream_t) {
  return lcodec::ptx::launch(kernel, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             std::size_t shared, cudaStream_t) {
  return lcodec::ptx::launch(function, grid, block, arguments, shared);
}

// ------------------------------------------------------------------------------------------------
// Devices and kernels

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strncpy(properties->name, "PTX interpreter", sizeof properties->name - 1);
  properties->major = 9;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<cudaDeviceAttr, int> values{
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrMaxSharedMemoryPerBlock, lcodec::ptx::kSharedUnasked},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, lcodec::ptx::kMostShared},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMaxGridDimX, INT32_MAX},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrWarpSize, 32}};
  const auto found = values.find(attribute);
  if (found == values.end()) return report(cudaErrorInvalidValue);
  *value = found->second;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto name = runtime().name_of.find(function);
  if (name == runtime().name_of.end()) return report(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  const std::size_t taken = kernel_named(name->second).shared_bytes;
  if (value < 0 || static_cast<std::size_t>(value) + taken > lcodec::ptx::kMostShared) {
    return report(cudaErrorInvalidValue);
  }
  runtime().granted_shared[name->second] = static_cast<std::size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  *attributes = {};
  const auto name = runtime().name_of.find(function);
  if (name == runtime().name_of.end()) return report(cudaErrorInvalidDeviceFunction);
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxThreadsPerBlock = static_cast<int>(kernel_named(name->second).most_threads);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                   std::size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------
// Errors

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
    case cudaErrorLaunchFailure:
      return runtime().fault.c_str();
    default:
      return "unrecognized error code";
  }
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    default:
      return cudaGetErrorString(error);
  }
}
cudaError_t cudaGetLastError() {  // that of a kernel stays
  return runtime().fault.empty() ? std::exchange(runtime().last_error, cudaSuccess)
                                 : cudaErrorLaunchFailure;
}
cudaError_t cudaPeekAtLastError() { return runtime().last_error; }

// ------------------------------------------------------------------------------------------------
// Memory

cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  *address = heap().allocate(bytes);
  return report(*address ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* address) {
  return report(!address || heap().free(address) ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  const bool to_device = kind == cudaMemcpyHostToDevice;
  if (const cudaError_t error = on_device(to_device ? to : from, bytes); error != cudaSuccess) {
    return error;
  }
  if (bytes > 0) std::memcpy(to, from, bytes);
  if (to_device) host_wrote(to, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  if (const cudaError_t error = on_device(to, bytes); error != cudaSuccess) return error;
  if (bytes > 0) std::memset(to, value, bytes);
  host_wrote(to, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, std::size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return report(runtime().fault.empty() ? cudaSuccess : cudaErrorLaunchFailure);
}
cudaError_t cudaDeviceSynchronize() { return cudaStreamSynchronize(nullptr); }

}  // extern "C"
