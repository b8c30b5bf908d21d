// Which columns a list of segments selects.
//
// Mapping    block (s, y) takes every kSlices-th piece of kSegmentThreads columns of segment s. It
//            first adds up the lengths of the segments before it.
// Arguments  segments [count][2], start and length
// Fast       4 size bytes written, and 16 read for every pair of segments: with the ten to hundred
//            segments of a few units, bound by the launch.
// Must not   write outside of column, or name a column outside of the matrix, whatever the segments
//            hold.
#pragma once

#include <cstdint>

#include "cuda/platform.cuh"

namespace lcodec::cuda {

constexpr int kSegmentThreads = 256;
constexpr unsigned kSlices = 8;

// The sum of the lengths before segment s, or `size` if that is less, for every thread of the
// block. Lengths may be anything: nothing overflows.
__device__ __forceinline__ std::int64_t segment_offset(const std::int64_t* segments, std::int64_t s,
                                                       std::int64_t size) {
  LCODEC_SHARED_ARRAY(std::int64_t, partial, kSegmentThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const auto more = [size](std::int64_t sum, std::int64_t length) {
    return length < size - sum ? sum + length : size;
  };
  std::int64_t sum = 0;
  for (std::int64_t t = thread; t < s; t += kSegmentThreads) {
    const std::int64_t length = segments[2 * t + 1];
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

// column[k] = the k-th selected column, brought into [0, columns). The block after the last
// segment's fills what the segments leave of size.
__global__ void __launch_bounds__(kSegmentThreads)
    columns_kernel(const std::int64_t* segments, std::int64_t count, std::int64_t columns,
                   std::int64_t size, std::int32_t* column) {
  const std::int64_t s = blockIdx.x;
  const std::int64_t offset = segment_offset(segments, s, size);
  const bool behind = s == count;
  const std::int64_t start = behind ? 0 : segments[2 * s];
  const std::int64_t length = behind ? size : segments[2 * s + 1];
  for (std::int64_t j = static_cast<std::int64_t>(blockIdx.y) * kSegmentThreads + threadIdx.x;
       j < length && offset + j < size; j += kSegmentThreads * kSlices) {
    // A sum of unsigned words: with wrong segments it wraps around.
    const auto c = static_cast<std::int64_t>(static_cast<std::uint64_t>(start) +
                                             static_cast<std::uint64_t>(j));
    const std::int64_t within = c < 0 ? 0 : c < columns ? c : columns - 1;
    column[offset + j] = behind ? 0 : static_cast<std::int32_t>(within);
  }
}

}  // namespace lcodec::cuda
