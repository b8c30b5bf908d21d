// Sums of minima under permutations of the response, on CUDA. Plain C++: no CUDA header, no torch.
//
// The same sums as lcodec/permutation.hpp. Everything is queued on a stream, pointers are to memory
// of the device, and the caller owns it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lcodec/cuda_engine.hpp"  // Outcome, Stream
#include "lcodec/permutation.hpp"

namespace lcodec::cuda {

// Bytes of device memory that permuted_sums works in.
std::size_t permuted_sums_bytes(std::int64_t n, std::int64_t groups, std::int64_t count);

// lcodec::permuted_sums with all arrays on the device. sorted[n] are the ranks in increasing order,
// and place[n] tells where each row's rank is among them; both are used where there are groups, and
// may be null otherwise.
Outcome permuted_sums(const PermutedPairs& pairs, const std::int32_t* sorted,
                      const std::int32_t* place, std::uint64_t seed, std::int64_t first,
                      std::int64_t count, std::int64_t* sum, void* workspace, Stream stream);

}  // namespace lcodec::cuda
