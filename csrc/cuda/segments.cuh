// Stretches of arrays: where each begins in the vector of all of them, gather and scaled addition.
//
// Mapping    block (s, y) takes every kSlices-th piece of kSegmentThreads elements of segment s. It
//            first adds up the lengths of the segments before.
// Arguments  segments [count][kWords], the last two words start and length; addresses by value
// Fast       2 size elements moved (gather), 3 (add), and 64 bytes for every pair of segments: with
//            the ten to hundred segments of a few units bound by the launch. 46 000 floats: 0.4 MB.
// Must not   touch memory outside of the arrays, whatever the segments hold; add twice to an
//            element (the caller's segments do not overlap).
// Twin       cpu/curvature.cpp
#pragma once

#include <cstdint>

#include "cuda/platform.cuh"
#include "cuda/storage.cuh"

namespace lcodec::cuda {

constexpr int kSegmentThreads = 256;
constexpr unsigned kSlices = 8;
constexpr int kMostParameters = 192;  // 3 of the 4 KB that a launch takes

struct Addresses {
  std::uintptr_t data[kMostParameters];
  std::int64_t size[kMostParameters];
};

// The sum of the lengths before segment s, or `size` if that is less, for every thread of the
// block. Lengths may be anything: nothing overflows.
template <int kWords>
__device__ __forceinline__ std::int64_t segment_offset(const std::int64_t* segments, std::int64_t s,
                                                       std::int64_t size) {
  LCODEC_SHARED_ARRAY(std::int64_t, partial, kSegmentThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const auto more = [size](std::int64_t sum, std::int64_t length) {
    return length < size - sum ? sum + length : size;
  };
  std::int64_t sum = 0;
  for (std::int64_t t = thread; t < s; t += kSegmentThreads) {
    const std::int64_t length = segments[t * kWords + kWords - 1];
    if (length > 0) sum = more(sum, length);
  }
  partial[thread] = sum;
  __syncthreads();
  for (int width = kSegmentThreads / 2; width > 0; width /= 2) {
    if (thread < width) partial[thread] = more(partial[thread], partial[thread + width]);
    __syncthreads();
  }
  return partial[0];
}

// each(position in the vector of all, position in the array) for this block's part of segment s.
template <int kWords, class Each>
__device__ __forceinline__ void for_segment(const std::int64_t* segments, std::int64_t s,
                                            std::int64_t size, const Each& each) {
  const std::int64_t offset = segment_offset<kWords>(segments, s, size);
  const std::int64_t start = segments[s * kWords + kWords - 2];
  const std::int64_t length = segments[s * kWords + kWords - 1];
  for (std::int64_t j = static_cast<std::int64_t>(blockIdx.y) * kSegmentThreads + threadIdx.x;
       j < length && offset + j < size; j += kSegmentThreads * kSlices) {
    // The sum of unsigned words: wrong segments wrap around, and each() looks where they are.
    each(offset + j, static_cast<std::int64_t>(static_cast<std::uint64_t>(start) +
                                               static_cast<std::uint64_t>(j)));
  }
}

// column[k] = the k-th selected column, brought into [0, columns). The block behind the segments'
// fills up what they leave of size.
__global__ void __launch_bounds__(kSegmentThreads)
    columns_kernel(const std::int64_t* segments, std::int64_t count, std::int64_t columns,
                   std::int64_t size, std::int32_t* column) {
  const std::int64_t s = blockIdx.x;
  if (s < count) {
    for_segment<2>(segments, s, size, [&](std::int64_t k, std::int64_t c) {
      const std::int64_t within = c < 0 ? 0 : c < columns ? c : columns - 1;
      column[k] = static_cast<std::int32_t>(within);
    });
    return;
  }
  const std::int64_t offset = segment_offset<2>(segments, count, size);
  for (std::int64_t k =
           offset + static_cast<std::int64_t>(blockIdx.y) * kSegmentThreads + threadIdx.x;
       k < size; k += kSegmentThreads * kSlices) {
    column[k] = 0;
  }
}

// Of the parameters [first, first + kMostParameters) out of `all`, those at `addresses`.
template <class S>
__global__ void __launch_bounds__(kSegmentThreads)
    segments_gather_kernel(Addresses addresses, std::int64_t first, std::int64_t all,
                           const std::int64_t* segments, std::int64_t size, S* out) {
  const std::int64_t s = blockIdx.x;
  const std::int64_t parameter = segments[s * 3] - first;
  const std::int64_t left = all - first;
  if (parameter < 0 || parameter >= kMostParameters || parameter >= left) return;
  const S* data = reinterpret_cast<const S*>(addresses.data[parameter]);
  const std::int64_t elements = addresses.size[parameter];
  for_segment<3>(segments, s, size, [&](std::int64_t k, std::int64_t j) {
    out[k] = 0 <= j && j < elements ? data[j] : S{};
  });
}

template <class S, class T>
__global__ void __launch_bounds__(kSegmentThreads)
    segments_add_kernel(Addresses addresses, std::int64_t first, std::int64_t all,
                        const std::int64_t* segments, std::int64_t size, T alpha, const T* x) {
  const std::int64_t s = blockIdx.x;
  const std::int64_t parameter = segments[s * 3] - first;
  const std::int64_t left = all - first;
  if (parameter < 0 || parameter >= kMostParameters || parameter >= left) return;
  S* data = reinterpret_cast<S*>(addresses.data[parameter]);
  const std::int64_t elements = addresses.size[parameter];
  for_segment<3>(segments, s, size, [&](std::int64_t k, std::int64_t j) {
    if (0 <= j && j < elements) store(data + j, widen(data[j]) + alpha * x[k]);
  });
}

}  // namespace lcodec::cuda
