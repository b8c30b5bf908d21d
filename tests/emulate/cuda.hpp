// The part of CUDA that this project's sources use, for a C++ compiler. cuda/platform.cuh includes
// it in place of nvcc's header, and nothing else does.
//
// A block's threads are fibers of one OS thread, each of which runs until it waits or ends, in an
// order that the tests choose: where a barrier is missing, some order should give a wrong result.
// Mistakes that a GPU may let pass raise std::runtime_error with kernel, block, thread, file and
// line: a thread that ends before a barrier of its block, or waits elsewhere than those that wait
// for it; a warp operation with lanes in its mask that have ended or do not exist, or by a lane
// outside it; a shuffle from outside it; a write just past a shared array (without a line).
//
// Shared memory and what cudaMalloc returns are of their exact size, so that ASan sees the byte
// past the end, and filled with 0xA5. Blocks run one after another, launches and copies at once,
// and streams are all the same. One launch at a time: a second OS thread waits.
//
// Left out on purpose: __shared__ (LCODEC_SHARED_ARRAY is checked and filled), __activemask and
// anything else whose result a GPU does not promise. Not seen: an update that should be atomic (a
// thread is interrupted only where it waits), threads that wait for each other in loops over
// memory (they hang), one helper's barrier that threads reach by two ways, a block larger than
// __launch_bounds__.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

// ------------------------------------------------------------------------------------------------
// Types and names of the language

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define LCODEC_VECTOR_2(name, T)       \
  struct alignas(2 * sizeof(T)) name { \
    T x, y;                            \
  };                                   \
  constexpr name make_##name(T x, T y) { return {x, y}; }
#define LCODEC_VECTOR_4(name, T)       \
  struct alignas(4 * sizeof(T)) name { \
    T x, y, z, w;                      \
  };                                   \
  constexpr name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
LCODEC_VECTOR_2(float2, float)
LCODEC_VECTOR_2(double2, double)
LCODEC_VECTOR_2(int2, int)
LCODEC_VECTOR_2(longlong2, long long)
LCODEC_VECTOR_4(float4, float)
LCODEC_VECTOR_4(int4, int)
LCODEC_VECTOR_4(uint4, unsigned)
#undef LCODEC_VECTOR_2
#undef LCODEC_VECTOR_4

struct uint3 {
  unsigned x, y, z;
};
constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// Of the running thread; set by the emulator.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = 32;

// ------------------------------------------------------------------------------------------------
// The emulator

namespace lcodec::emulate {

enum class Order { forward, reversed, shuffled };

struct Config {
  Order order = Order::forward;                // of the threads of a block and the blocks of a grid
  std::uint64_t seed = 0;                      // of Order::shuffled
  std::size_t memory = std::size_t{80} << 30;  // bytes that cudaMalloc has to give in all
  bool refuse_attributes = false;  // cudaFuncSetAttribute fails, and leaves no last error behind
};
Config& config();

std::size_t allocated_bytes();  // by cudaMalloc, and not yet freed

// Runs body() as every thread of the grid. What a GPU would refuse to launch sets the error that
// cudaGetLastError returns.
void run_grid(const char* name, const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
              const std::function<void()>& body);

template <class... P>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
            const P&... arguments) {
  run_grid(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
           [&] { kernel(arguments...); });
}

// A place in the source where threads wait for each other.
struct Place {
  const char* operation;
  std::source_location where;
};

// Combines the values that all threads bring, in any order.
using Fold = std::uint64_t (*)(std::uint64_t, std::uint64_t);

// Waits for all threads of the block; returns their values combined.
std::uint64_t meet_block(const Place& place, std::uint64_t value, Fold fold);
// Waits for the lanes in mask; returns their values combined.
std::uint64_t meet_warp(const Place& place, unsigned mask, std::uint64_t value, Fold fold);
// Waits for the lanes in mask; returns the value of lane `source`.
std::uint64_t trade_warp(const Place& place, unsigned mask, std::uint64_t value, unsigned source);

unsigned lane();  // of the running thread in its warp

// The running block's memory for the array declared at `key`; made when a thread first asks for it.
void* shared_memory(const void* key, std::size_t bytes);
void* dynamic_shared_memory();

template <class T>
concept Shareable = alignof(T) <= 16 && std::is_trivially_default_constructible_v<T>;

template <Shareable T, std::size_t count>
auto shared_array(const void* key) -> T (&)[count] {
  return *static_cast<T(*)[count]>(shared_memory(key, sizeof(T[count])));
}
template <Shareable T>
T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared_memory());
}

// What __shfl_*_sync and __reduce_*_sync take; as words.
template <class T>
concept Word = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <Word T>
std::uint64_t pack(T value) {
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <Word T>
T unpack(std::uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

constexpr std::uint64_t first_of(std::uint64_t a, std::uint64_t) { return a; }
constexpr std::uint64_t sum_of(std::uint64_t a, std::uint64_t b) { return a + b; }
constexpr std::uint64_t and_of(std::uint64_t a, std::uint64_t b) { return a & b; }
constexpr std::uint64_t or_of(std::uint64_t a, std::uint64_t b) { return a | b; }
template <Word T>
std::uint64_t min_of(std::uint64_t a, std::uint64_t b) {
  return pack(std::min(unpack<T>(a), unpack<T>(b)));
}
template <Word T>
std::uint64_t max_of(std::uint64_t a, std::uint64_t b) {
  return pack(std::max(unpack<T>(a), unpack<T>(b)));
}

template <class T, class... U>
concept OneOf = (std::same_as<T, U> || ...);

}  // namespace lcodec::emulate

#define LCODEC_SHARED_ARRAY(T, name, count) \
  static constexpr char name##_key = 0;     \
  auto& name = ::lcodec::emulate::shared_array<T, count>(&name##_key)

#define LCODEC_DYNAMIC_SHARED(T, name) T* const name = ::lcodec::emulate::dynamic_shared<T>()

// ------------------------------------------------------------------------------------------------
// Barriers, votes, shuffles

namespace lcodec::emulate::functions {

#define LCODEC_WHERE std::source_location where = std::source_location::current()

inline void __syncthreads(LCODEC_WHERE) { meet_block({"__syncthreads", where}, 0, first_of); }
inline int __syncthreads_or(int predicate, LCODEC_WHERE) {
  return meet_block({"__syncthreads_or", where}, predicate != 0, or_of) != 0;
}
inline int __syncthreads_and(int predicate, LCODEC_WHERE) {
  return meet_block({"__syncthreads_and", where}, predicate != 0, and_of) != 0;
}
inline int __syncthreads_count(int predicate, LCODEC_WHERE) {
  return static_cast<int>(meet_block({"__syncthreads_count", where}, predicate != 0, sum_of));
}

inline void __syncwarp(unsigned mask = 0xffffffff, LCODEC_WHERE) {
  meet_warp({"__syncwarp", where}, mask, 0, first_of);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, LCODEC_WHERE) {
  return static_cast<unsigned>(
      meet_warp({"__ballot_sync", where}, mask, std::uint64_t{predicate != 0} << lane(), or_of));
}
inline int __any_sync(unsigned mask, int predicate, LCODEC_WHERE) {
  return meet_warp({"__any_sync", where}, mask, predicate != 0, or_of) != 0;
}
inline int __all_sync(unsigned mask, int predicate, LCODEC_WHERE) {
  return meet_warp({"__all_sync", where}, mask, predicate != 0, and_of) != 0;
}

// The lanes that one may read from are those of its own `width` lanes, and for xor also those of
// earlier ones; otherwise its own value returns.
template <Word T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, LCODEC_WHERE) {
  const unsigned within = static_cast<unsigned>(width) - 1;
  const unsigned from = (lane() & ~within) | (static_cast<unsigned>(source) & within);
  return unpack<T>(trade_warp({"__shfl_sync", where}, mask, pack(value), from));
}
template <Word T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, LCODEC_WHERE) {
  const unsigned me = lane();
  const unsigned within = static_cast<unsigned>(width) - 1;
  const unsigned from = (me & within) >= delta ? me - delta : me;
  return unpack<T>(trade_warp({"__shfl_up_sync", where}, mask, pack(value), from));
}
template <Word T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, LCODEC_WHERE) {
  const unsigned me = lane();
  const unsigned within = static_cast<unsigned>(width) - 1;
  const unsigned from = within - (me & within) >= delta ? me + delta : me;
  return unpack<T>(trade_warp({"__shfl_down_sync", where}, mask, pack(value), from));
}
template <Word T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, LCODEC_WHERE) {
  const unsigned me = lane();
  const unsigned within = static_cast<unsigned>(width) - 1;
  const unsigned other = me ^ static_cast<unsigned>(lane_mask);
  const unsigned from = other <= (me | within) ? other : me;
  return unpack<T>(trade_warp({"__shfl_xor_sync", where}, mask, pack(value), from));
}

// On a GPU these need compute capability 8.0.
template <OneOf<int, unsigned> T>
T __reduce_add_sync(unsigned mask, T value, LCODEC_WHERE) {
  return unpack<T>(meet_warp({"__reduce_add_sync", where}, mask, pack(value), sum_of));
}
template <OneOf<int, unsigned> T>
T __reduce_min_sync(unsigned mask, T value, LCODEC_WHERE) {
  return unpack<T>(meet_warp({"__reduce_min_sync", where}, mask, pack(value), min_of<T>));
}
template <OneOf<int, unsigned> T>
T __reduce_max_sync(unsigned mask, T value, LCODEC_WHERE) {
  return unpack<T>(meet_warp({"__reduce_max_sync", where}, mask, pack(value), max_of<T>));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, LCODEC_WHERE) {
  return static_cast<unsigned>(meet_warp({"__reduce_or_sync", where}, mask, value, or_of));
}

#undef LCODEC_WHERE

// A thread is interrupted only where it waits: memory is in order.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// ------------------------------------------------------------------------------------------------
// Atomic operations, for the types that CUDA has them for. std::int64_t is long, and not among
// them.

template <OneOf<int, unsigned, unsigned long long, float, double> T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  if constexpr (std::same_as<T, int>) {
    *address = static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));
  } else {
    *address = old + value;
  }
  return old;
}
template <OneOf<int, unsigned> T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = static_cast<T>(static_cast<unsigned>(old) - static_cast<unsigned>(value));
  return old;
}
template <OneOf<int, unsigned, long long, unsigned long long> T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}
template <OneOf<int, unsigned, long long, unsigned long long> T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <OneOf<int, unsigned, unsigned long long> T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old | value;
  return old;
}
template <OneOf<int, unsigned, unsigned long long, float> T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = value;
  return old;
}
template <OneOf<int, unsigned, unsigned long long> T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}

// ------------------------------------------------------------------------------------------------
// Arithmetic

template <class T>
T __ldg(const T* address) {
  return *address;
}

constexpr int __popc(unsigned v) { return std::popcount(v); }
constexpr int __popcll(unsigned long long v) { return std::popcount(v); }
constexpr int __ffs(int v) { return v == 0 ? 0 : std::countr_zero(static_cast<unsigned>(v)) + 1; }
constexpr int __ffsll(long long v) {
  return v == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(v)) + 1;
}
constexpr int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
constexpr int __clzll(long long v) { return std::countl_zero(static_cast<unsigned long long>(v)); }
constexpr unsigned __brev(unsigned v) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (v >> bit & 1u) << (31 - bit);
  return reversed;
}

constexpr int __float_as_int(float v) { return std::bit_cast<int>(v); }
constexpr float __int_as_float(int v) { return std::bit_cast<float>(v); }
constexpr unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
constexpr float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
constexpr long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
constexpr double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }

constexpr unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(std::uint64_t{a} * b >> 32);
}
constexpr unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ typedef unsigned __int128 Wide;
  return static_cast<unsigned long long>(static_cast<Wide>(a) * b >> 64);
}

// The project is compiled with -ffp-contract=off, so that this is what they say.
constexpr float __fadd_rn(float a, float b) { return a + b; }
constexpr float __fsub_rn(float a, float b) { return a - b; }
constexpr float __fmul_rn(float a, float b) { return a * b; }
constexpr double __dadd_rn(double a, double b) { return a + b; }
constexpr double __dsub_rn(double a, double b) { return a - b; }
constexpr double __dmul_rn(double a, double b) { return a * b; }

// Of NaN and a number, the number, as CUDA has it.
template <class T>
  requires std::is_arithmetic_v<T>
T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return std::min(a, b);
}
template <class T>
  requires std::is_arithmetic_v<T>
T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return std::max(a, b);
}

}  // namespace lcodec::emulate::functions

using namespace lcodec::emulate::functions;

// ------------------------------------------------------------------------------------------------
// The runtime library, with the values of an H100

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

cudaError_t cudaMalloc(void** address, std::size_t bytes);
cudaError_t cudaFree(void* address);
cudaError_t cudaMallocAsync(void** address, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaFreeAsync(void* address, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
