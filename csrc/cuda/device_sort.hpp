// Sorting and prefix sums over a whole device: CUB for a GPU (device_sort.cu), the standard library
// under emulation (tests/emulate/device_sort.cpp).
//
// Every function is called twice, with the same sizes: without workspace it writes to `bytes` how
// much it needs, at least 1, and does nothing else; then with that much workspace. Nothing is
// allocated and nothing waits. A size or bit that is out of range is cudaErrorInvalidValue.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/runtime.hpp"

namespace lcodec::cuda {

// Sorts `segments` runs of n pairs each, which lie one after another, every run by bits
// [begin_bit, end_bit) of its keys; pairs whose bits are equal stay in order. Key is std::uint32_t
// or std::uint64_t; n and segments are below 2^31. The outputs overlap neither the inputs nor each
// other.
//
// Cost: about bits / 8 passes over one long run, or bits / 6 passes over many, a block each.
template <class Key>
cudaError_t sort_pairs(void* workspace, std::size_t& bytes, const Key* keys_in, Key* keys_out,
                       const std::int32_t* values_in, std::int32_t* values_out, std::int64_t n,
                       std::int64_t segments, int begin_bit, int end_bit, cudaStream_t stream);

// out[i] = in[0] + ... + in[i], or without in[i]; added as std::int64_t. In is std::int32_t or
// std::int64_t, and out may be in.
template <class In>
cudaError_t inclusive_sum(void* workspace, std::size_t& bytes, const In* in, std::int64_t* out,
                          std::int64_t n, cudaStream_t stream);
template <class In>
cudaError_t exclusive_sum(void* workspace, std::size_t& bytes, const In* in, std::int64_t* out,
                          std::int64_t n, cudaStream_t stream);

// Whether sort_pairs takes these sizes.
template <class Key>
constexpr bool can_sort(std::int64_t n, std::int64_t segments, int begin_bit, int end_bit) {
  return 0 <= n && n <= INT32_MAX && 0 <= segments && segments <= INT32_MAX && 0 <= begin_bit &&
         begin_bit < end_bit && end_bit <= static_cast<int>(8 * sizeof(Key));
}

}  // namespace lcodec::cuda
