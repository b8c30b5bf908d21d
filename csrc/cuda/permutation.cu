#include <algorithm>

#include "cuda/outcome.hpp"
#include "cuda/permutation.cuh"
#include "lcodec/cuda_permutation.hpp"

namespace lcodec::cuda {
namespace {

constexpr std::int64_t kMostBlocks = 1056;  // eight on each of 132 multiprocessors
constexpr std::int64_t kMostBytes = std::int64_t{1} << 28;

// int32 words of a block.
std::int64_t words(std::int64_t n, std::int64_t groups) { return groups > 0 ? 3 * n + groups : n; }

std::int64_t blocks(std::int64_t n, std::int64_t groups, std::int64_t count) {
  const std::int64_t fit = kMostBytes / (4 * words(n, groups));
  return std::max<std::int64_t>(1, std::min({fit, kMostBlocks, count}));
}

}  // namespace

std::size_t permuted_sums_bytes(std::int64_t n, std::int64_t groups, std::int64_t count) {
  return static_cast<std::size_t>(4 * words(n, groups) * blocks(n, groups, count));
}

Outcome permuted_sums(const PermutedPairs& pairs, const std::int32_t* sorted,
                      const std::int32_t* place, std::uint64_t seed, std::int64_t first,
                      std::int64_t count, std::int64_t* sum, void* workspace, Stream stream) {
  if (pairs.n < 1 || pairs.n > INT32_MAX || count < 1) {
    return outcome(cudaErrorInvalidValue, "permuted_sums");
  }
  const std::int64_t grid = blocks(pairs.n, pairs.groups, count);
  auto* const values = static_cast<std::int32_t*>(workspace);
  const PermutationSpace space{values, values + grid * pairs.n, values + 2 * grid * pairs.n,
                               values + 3 * grid * pairs.n};
  const bool grouped = pairs.groups > 0;
  return run("permuted_sums", permuted_sums_kernel, dim3(static_cast<unsigned>(grid)),
             dim3(kPermutationThreads), stream, pairs, grouped ? sorted : nullptr,
             grouped ? place : nullptr, seed, first, count, sum, space);
}

}  // namespace lcodec::cuda
