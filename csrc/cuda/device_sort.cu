// The primitives of device_sort.hpp, from CUB.
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <algorithm>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>
#include <cuda/std/functional>

#include "cuda/device_sort.hpp"

namespace lcodec::cuda {
namespace {

// One block sorts a segment on one of a hundred or so multiprocessors. The whole device sorts it up
// to that many times as fast, in about as many launches as the block takes for all segments. So few
// long segments are sorted one after the other; where that pays is an estimate, not a measurement.
constexpr std::int64_t kLong = 4096;

struct Start {
  int n;
  __host__ __device__ int operator()(int segment) const { return segment * n; }
};

}  // namespace

template <class Key>
cudaError_t sort_pairs(void* workspace, std::size_t& bytes, const Key* keys_in, Key* keys_out,
                       const std::int32_t* values_in, std::int32_t* values_out, std::int64_t n,
                       std::int64_t segments, int begin_bit, int end_bit, cudaStream_t stream) {
  if (!can_sort<Key>(n, segments, begin_bit, end_bit)) return cudaErrorInvalidValue;
  if (n == 0 || segments == 0) {
    bytes = 1;
    return cudaSuccess;
  }
  const bool one_by_one = segments == 1 || n / kLong >= segments;
  // CUB counts the pairs of a call in an int. DeviceSegmentedSort does not, but it has no bits and
  // waits for the device to count its segments.
  const std::int64_t at_once = one_by_one ? 1 : std::min(segments, INT32_MAX / n);

  for (std::int64_t first = 0; first < segments; first += at_once) {
    const std::int64_t start = first * n;
    const int pairs = static_cast<int>(n);
    const int runs = static_cast<int>(std::min(at_once, segments - first));
    cudaError_t error = cudaSuccess;
    if (one_by_one) {
      error = cub::DeviceRadixSort::SortPairs(workspace, bytes, keys_in + start, keys_out + start,
                                              values_in + start, values_out + start, pairs,
                                              begin_bit, end_bit, stream);
    } else {
      const auto starts =
          thrust::make_transform_iterator(thrust::make_counting_iterator(0), Start{pairs});
      error = cub::DeviceSegmentedRadixSort::SortPairs(
          workspace, bytes, keys_in + start, keys_out + start, values_in + start,
          values_out + start, runs * pairs, runs, starts, starts + 1, begin_bit, end_bit, stream);
    }
    // The first call is the largest one: its workspace serves all.
    if (error != cudaSuccess || !workspace) return error;
  }
  return cudaSuccess;
}

// The sums start from a std::int64_t so that CUB does not add std::int32_t.

template <class In>
cudaError_t inclusive_sum(void* workspace, std::size_t& bytes, const In* in, std::int64_t* out,
                          std::int64_t n, cudaStream_t stream) {
  if (n < 0) return cudaErrorInvalidValue;
  return cub::DeviceScan::InclusiveScanInit(
      workspace, bytes, in, out, ::cuda::std::plus<std::int64_t>(), std::int64_t{0}, n, stream);
}

template <class In>
cudaError_t exclusive_sum(void* workspace, std::size_t& bytes, const In* in, std::int64_t* out,
                          std::int64_t n, cudaStream_t stream) {
  if (n < 0) return cudaErrorInvalidValue;
  return cub::DeviceScan::ExclusiveScan(
      workspace, bytes, in, out, ::cuda::std::plus<std::int64_t>(), std::int64_t{0}, n, stream);
}

template cudaError_t sort_pairs(void*, std::size_t&, const std::uint32_t*, std::uint32_t*,
                                const std::int32_t*, std::int32_t*, std::int64_t, std::int64_t, int,
                                int, cudaStream_t);
template cudaError_t sort_pairs(void*, std::size_t&, const std::uint64_t*, std::uint64_t*,
                                const std::int32_t*, std::int32_t*, std::int64_t, std::int64_t, int,
                                int, cudaStream_t);
template cudaError_t inclusive_sum(void*, std::size_t&, const std::int32_t*, std::int64_t*,
                                   std::int64_t, cudaStream_t);
template cudaError_t inclusive_sum(void*, std::size_t&, const std::int64_t*, std::int64_t*,
                                   std::int64_t, cudaStream_t);
template cudaError_t exclusive_sum(void*, std::size_t&, const std::int32_t*, std::int64_t*,
                                   std::int64_t, cudaStream_t);
template cudaError_t exclusive_sum(void*, std::size_t&, const std::int64_t*, std::int64_t*,
                                   std::int64_t, cudaStream_t);

}  // namespace lcodec::cuda
