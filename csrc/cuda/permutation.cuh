// Sums of minima over pairs of rows, under permutations of the response.
//
//   sum[b][s] = sum over the pairs (i, j) of segment s, and of its groups, of
//               min(rank[p_b(i)], rank[p_b(j)])          p_b as common/philox.hpp defines it
//
// Mapping    a block takes permutations b, b + gridDim.x, ... All its threads draw the words of
//            kDrawn positions at a time into shared memory, a thread eight of them, and then turn
//            them into partners, a thread every 256th; thread 0 exchanges, since one exchange needs
//            the one before it. All threads then go over the pairs of a segment, and a warp adds to
//            sum[b][s] at once. A labeling's groups are added up by one thread, in increasing order
//            of rank.
// Arguments  those of lcodec::PermutedPairs; place and sorted [n] where there are groups; sum
//            [count][segments]; values [gridDim.x][n], and with groups by_rank, exchanged
//            [gridDim.x][n] and left [gridDim.x][groups], of int32
// Fast       Bound by the latency of thread 0's exchanges: 2 loads and 2 stores a position, about
//            400 cycles from the second-level cache; a block of 1000 rows takes 0.25 ms, and eight
//            of them share a multiprocessor. 999 permutations of 10^5 rows: 24 ms a block, one
//            block a permutation, all of them at a time. Drawing takes 20 wide products for eight
//            positions, a pair 3 loads, 1 comparison and 1 addition.
// Must not   exchange out of order, or draw from a state: a partner is a function of seed,
//            permutation and position. Sums are integers, so that atomics may add them in any
//            order.
// Twin       lcodec_ext/dependence/backends/reference.py; on the CPU cpu/permutation.cpp
#pragma once

#include <cstdint>

#include "common/philox.hpp"
#include "cuda/platform.cuh"
#include "lcodec/permutation.hpp"

namespace lcodec::cuda {

constexpr int kPermutationThreads = 256;
constexpr int kDrawn = 2048;  // positions
static_assert(kDrawn == kPermutationThreads * kWordsAtOnce);

// What a block works in.
struct PermutationSpace {
  std::int32_t* values;     // permuted ranks
  std::int32_t* exchanged;  // permuted places
  std::int32_t* by_rank;    // labels in increasing order of rank
  std::int32_t* left;       // rows of a group that are still to come
};

// Permutation `stream` of n values in place, by all threads of the block.
__device__ __forceinline__ void exchange(const PermutedPairs& pairs, std::uint64_t seed,
                                         std::uint64_t stream, std::int32_t* value) {
  LCODEC_SHARED_ARRAY(std::uint32_t, drawn, kDrawn);  // words, then partners
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t n = pairs.n;
  if (stream == 0) return;  // for all threads
  for (std::int64_t base = (n - 1) / kDrawn * kDrawn; base >= 0; base -= kDrawn) {
    std::uint32_t word[kWordsAtOnce];
    philox(seed, stream, static_cast<std::uint64_t>(base / kWordsAtOnce + thread), 0, word);
    LCODEC_UNROLL
    for (int t = 0; t < kWordsAtOnce; ++t) drawn[thread * kWordsAtOnce + t] = word[t];
    __syncthreads();
    // The rare further attempts are long code: one copy of it.
    LCODEC_NO_UNROLL
    for (int t = thread; t < kDrawn && base + t < n; t += kPermutationThreads) {
      const std::int64_t i = base + t;
      const std::int32_t low = pairs.start ? pairs.start[i] : 0;
      const auto bound = static_cast<std::uint32_t>(i - low + 1);
      const std::int32_t more =
          bounded(drawn[t], bound, seed, stream, static_cast<std::uint64_t>(i));
      drawn[t] = static_cast<std::uint32_t>(low + more);
    }
    __syncthreads();
    if (thread == 0) {
      for (std::int64_t i = base + kDrawn < n ? base + kDrawn - 1 : n - 1; i >= base; --i) {
        const auto other = static_cast<std::int32_t>(drawn[i - base]);
        const std::int32_t kept = value[i];
        value[i] = value[other];
        value[other] = kept;
      }
    }
    __syncthreads();
  }
}

__device__ __forceinline__ void add_to(std::int64_t* sum, std::int64_t more) {
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(more));
}

// sum[s] of every segment's pairs, added by all threads of the block.
__device__ __forceinline__ void add_pairs(const PermutedPairs& pairs, const std::int32_t* value,
                                          std::int64_t* sum) {
  const int thread = static_cast<int>(threadIdx.x);
  for (std::int64_t s = 0; s < pairs.segments; ++s) {
    const std::int64_t begin = pairs.begin[s];
    const std::int64_t end = pairs.begin[s + 1];
    std::int64_t own = 0;
    for (std::int64_t t = begin + thread; t < end; t += kPermutationThreads) {
      const std::int64_t row = pairs.owner ? pairs.owner[t] : t - begin;
      const std::int32_t a = value[row];
      const std::int32_t b = value[pairs.other[t]];
      own += a < b ? a : b;
    }
    for (int step = 16; step > 0; step /= 2) {
      own += __shfl_xor_sync(0xffffffff, own, step);
    }
    if (thread % 32 == 0 && own != 0) add_to(sum + s, own);
  }
}

// The groups of every labeling. Labels by rank are laid out by all threads.
__device__ __forceinline__ void add_groups(const PermutedPairs& pairs, const std::int32_t* sorted,
                                           const PermutationSpace& space, std::int64_t* sum) {
  const int thread = static_cast<int>(threadIdx.x);
  for (std::int64_t l = 0; l < pairs.labelings; ++l) {
    for (std::int64_t i = thread; i < pairs.n; i += kPermutationThreads) {
      space.by_rank[space.exchanged[i]] = pairs.label[l * pairs.n + i];
    }
    for (std::int64_t g = thread; g < pairs.groups; g += kPermutationThreads) {
      space.left[g] = pairs.size[g];
    }
    __syncthreads();
    if (thread == 0) {
      for (std::int64_t k = 0; k < pairs.n; ++k) {
        const std::int32_t g = space.by_rank[k];
        if (g < 0) continue;
        const std::int32_t later = --space.left[g];
        if (later > 0) add_to(sum + pairs.segment[g], std::int64_t{sorted[k]} * later);
      }
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kPermutationThreads)
    permuted_sums_kernel(PermutedPairs pairs, const std::int32_t* sorted, const std::int32_t* place,
                         std::uint64_t seed, std::int64_t first, std::int64_t count,
                         std::int64_t* sum, PermutationSpace spaces) {
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t n = pairs.n;
  const std::int64_t block = blockIdx.x;
  const PermutationSpace space{
      spaces.values + block * n, spaces.exchanged + (place ? block * n : 0),
      spaces.by_rank + (place ? block * n : 0), spaces.left + block * pairs.groups};
  for (std::int64_t b = block; b < count; b += gridDim.x) {
    std::int64_t* own = sum + b * pairs.segments;
    for (std::int64_t s = thread; s < pairs.segments; s += kPermutationThreads) own[s] = 0;
    std::int32_t* moved = place ? space.exchanged : space.values;
    for (std::int64_t i = thread; i < n; i += kPermutationThreads) {
      moved[i] = place ? place[i] : pairs.rank[i];
    }
    __syncthreads();
    exchange(pairs, seed, static_cast<std::uint64_t>(first + b), moved);
    if (place) {
      for (std::int64_t i = thread; i < n; i += kPermutationThreads) {
        space.values[i] = sorted[moved[i]];
      }
      __syncthreads();
    }
    add_pairs(pairs, space.values, own);
    if (place) add_groups(pairs, sorted, space, own);
    __syncthreads();  // the next permutation writes over this one
  }
}

}  // namespace lcodec::cuda
