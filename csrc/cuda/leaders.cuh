// The columns that may have the largest exact sum.
//
// Fixed point rounds every row down by less than one unit of 2^-43, so a score lies up to 2^20
// units below its exact sum, and on it where the fraction is 0.
//
// Mapping    one block goes over all columns twice: for the largest score, then for those near it
// Fast       bound by latency: 2 p / 1024 rounds; p = 40 000: 80 rounds, about 0.05 ms
// Twin       lcodec_ext/dependence/exact.py contenders
#pragma once

#include <cstdint>

#include "common/fixed_point.hpp"
#include "cuda/table.cuh"
#include "lcodec/cuda_engine.hpp"

namespace lcodec::cuda {

constexpr int kLeaderThreads = 1024;

// A sum with its fraction below one: compared in this order.
struct Score {
  std::int64_t high, low;
  __device__ Score(std::int64_t whole, std::int64_t fraction)
      : high(whole + (fraction >> kFractionBits)),
        low(fraction & ((std::int64_t{1} << kFractionBits) - 1)) {}
  __device__ bool operator<(const Score& other) const {
    return high < other.high || (high == other.high && low < other.low);
  }
};

__global__ void __launch_bounds__(kLeaderThreads)
    leaders_kernel(const std::int64_t* whole, const std::int64_t* fraction,
                   const std::uint8_t* candidate, std::int64_t p, std::int64_t* out) {
  constexpr int kWarps = kLeaderThreads / 32;
  using Pair = std::int64_t[2];
  LCODEC_SHARED_ARRAY(Pair, best_of, kWarps);
  LCODEC_SHARED_ARRAY(int, found, 1);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) found[0] = 0;
  for (int t = thread; t < kLeaderWords; t += kLeaderThreads) out[t] = 0;
  const auto running = [&](std::int64_t c) { return candidate[c] != 0 && whole[c] >= 0; };
  Score best(-1, 0);
  for (std::int64_t c = thread; c < p; c += kLeaderThreads) {
    if (!running(c)) continue;
    const Score score(whole[c], fraction[c]);
    if (best < score) best = score;
  }
  const auto raise = [&](std::int64_t high, std::int64_t low) {
    Score other(-1, 0);
    other.high = high;
    other.low = low;
    if (best < other) best = other;
  };
  for (int step = 16; step > 0; step /= 2) {
    const std::int64_t high = __shfl_xor_sync(kFullWarp, best.high, step);
    raise(high, __shfl_xor_sync(kFullWarp, best.low, step));
  }
  if (thread % 32 == 0) {
    best_of[thread / 32][0] = best.high;
    best_of[thread / 32][1] = best.low;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) raise(best_of[w][0], best_of[w][1]);

  constexpr std::int64_t kUnit = std::int64_t{1} << kFractionBits;
  constexpr std::int64_t kMaxRounding = std::int64_t{1} << 20;
  for (std::int64_t c = thread; c < p; c += kLeaderThreads) {
    if (!running(c)) continue;
    const Score score(whole[c], fraction[c]);
    const std::int64_t behind = best.high - score.high;
    if (behind > 1 || behind * kUnit + best.low - score.low > (fraction[c] == 0 ? 0 : kMaxRounding))
      continue;
    const int place = atomicAdd(&found[0], 1);
    if (place < kMostLeaders) {
      out[1 + place] = c;
      out[1 + kMostLeaders + place] = whole[c];
      out[1 + 2 * kMostLeaders + place] = fraction[c];
    }
  }
  __syncthreads();
  if (thread == 0) out[0] = found[0];
}

}  // namespace lcodec::cuda
