// The primitives of cuda/device_sort.hpp, from the standard library.
#include "cuda/device_sort.hpp"

#include <algorithm>
#include <functional>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "emulate/runtime.hpp"

namespace lcodec::cuda {
namespace {

// Answers a query, or checks the workspace and fills it as one whose contents are lost. True if
// there is work to do; otherwise `error` is the answer.
bool begin(void* workspace, std::size_t& bytes, std::size_t needed, cudaError_t& error) {
  error = cudaSuccess;
  if (!workspace) {
    bytes = std::max<std::size_t>(needed, 1);
    return false;
  }
  if (bytes < needed) {
    error = cudaErrorInvalidValue;
    return false;
  }
  std::memset(workspace, emulate::kRubbish, bytes);
  return true;
}

// Of a sum, which on a GPU grows with n.
std::size_t sum_workspace(std::int64_t n) { return static_cast<std::size_t>(n / 100 + 1); }

}  // namespace

template <class Key>
cudaError_t sort_pairs(void* workspace, std::size_t& bytes, const Key* keys_in, Key* keys_out,
                       const std::int32_t* values_in, std::int32_t* values_out, std::int64_t n,
                       std::int64_t segments, int begin_bit, int end_bit, cudaStream_t) {
  if (!can_sort<Key>(n, segments, begin_bit, end_bit)) return cudaErrorInvalidValue;
  const std::size_t needed =
      static_cast<std::size_t>(n * segments) * (sizeof(Key) + sizeof(std::int32_t));
  cudaError_t error;
  if (!begin(workspace, bytes, needed, error)) return error;

  const int width = end_bit - begin_bit;
  const auto digits = [&](Key key) {
    const Key above = static_cast<Key>(key >> begin_bit);
    return width == static_cast<int>(8 * sizeof(Key)) ? above : above & ((Key{1} << width) - 1);
  };
  std::vector<std::pair<Key, std::int32_t>> pairs(static_cast<std::size_t>(n));
  for (std::int64_t start = 0; start < n * segments; start += n) {
    for (std::int64_t i = 0; i < n; ++i) {
      pairs[static_cast<std::size_t>(i)] = {keys_in[start + i], values_in[start + i]};
    }
    std::stable_sort(pairs.begin(), pairs.end(), [&](const auto& a, const auto& b) {
      return digits(a.first) < digits(b.first);
    });
    for (std::int64_t i = 0; i < n; ++i) {
      std::tie(keys_out[start + i], values_out[start + i]) = pairs[static_cast<std::size_t>(i)];
    }
  }
  return cudaSuccess;
}

template <class In>
cudaError_t inclusive_sum(void* workspace, std::size_t& bytes, const In* in, std::int64_t* out,
                          std::int64_t n, cudaStream_t) {
  if (n < 0) return cudaErrorInvalidValue;
  cudaError_t error;
  if (!begin(workspace, bytes, sum_workspace(n), error)) return error;
  std::inclusive_scan(in, in + n, out, std::plus<std::int64_t>(), std::int64_t{0});
  return cudaSuccess;
}

template <class In>
cudaError_t exclusive_sum(void* workspace, std::size_t& bytes, const In* in, std::int64_t* out,
                          std::int64_t n, cudaStream_t) {
  if (n < 0) return cudaErrorInvalidValue;
  cudaError_t error;
  if (!begin(workspace, bytes, sum_workspace(n), error)) return error;
  std::exclusive_scan(in, in + n, out, std::int64_t{0}, std::plus<std::int64_t>());
  return cudaSuccess;
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
