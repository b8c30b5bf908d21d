// Random permutations: which row each position is exchanged with, a function of seed, permutation
// and position alone. Philox4x64-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
// easy as 1, 2, 3" (2011).
//
// Fisher and Yates: for i = n - 1, ..., 0 exchange i with start_i + d_i, where d_i is drawn from
// the bound_i = i - start_i + 1 integers from 0 on, and start_i is where the block of position i
// begins (0 where there are no blocks).
//
//   word     half i % 8 (low halves first) of Philox with key (seed, 0) and counter
//            (i / 8, attempt, permutation, 0), attempt = 0, 1, ...
//   d_i      floor(word bound / 2^32) of the first attempt with (word bound) mod 2^32 >=
//            2^32 mod bound (Lemire 2019): every integer has the same number of words
//
// Reference twin: lcodec_ext/_random.py.
#pragma once

#include <cstdint>

#include "common/random.hpp"  // LCODEC_HOST_DEVICE

namespace lcodec {

// Internal linkage for the reason in common/random.hpp.

LCODEC_HOST_DEVICE static inline std::uint64_t high_product(std::uint64_t a, std::uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  __extension__ typedef unsigned __int128 Wide;
  return static_cast<std::uint64_t>((static_cast<Wide>(a) * b) >> 64);
#endif
}

constexpr int kWordsAtOnce = 8;

// The halves of a Philox block.
LCODEC_HOST_DEVICE static inline void philox(std::uint64_t seed, std::uint64_t stream,
                                             std::uint64_t block, std::uint64_t attempt,
                                             std::uint32_t (&word)[kWordsAtOnce]) {
  std::uint64_t c0 = block;
  std::uint64_t c1 = attempt;
  std::uint64_t c2 = stream;
  std::uint64_t c3 = 0;
  std::uint64_t k0 = seed;
  std::uint64_t k1 = 0;
  for (int round = 0; round < 10; ++round) {
    constexpr std::uint64_t m0 = 0xD2E7470EE14C6C93u;
    constexpr std::uint64_t m1 = 0xCA5A826395121157u;
    const std::uint64_t high0 = high_product(m0, c0);
    const std::uint64_t high1 = high_product(m1, c2);
    const std::uint64_t low0 = m0 * c0;
    const std::uint64_t low1 = m1 * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B97F4A7C15u;
    k1 += 0xBB67AE8584CAA73Bu;
  }
  const std::uint64_t result[4] = {c0, c1, c2, c3};
  for (int w = 0; w < 4; ++w) {
    word[2 * w] = static_cast<std::uint32_t>(result[w]);
    word[2 * w + 1] = static_cast<std::uint32_t>(result[w] >> 32);
  }
}

// d_i from the word of attempt 0.
LCODEC_HOST_DEVICE static inline std::int32_t bounded(std::uint32_t word, std::uint32_t bound,
                                                      std::uint64_t seed, std::uint64_t stream,
                                                      std::uint64_t i) {
  std::uint64_t product = std::uint64_t{word} * bound;
  if (static_cast<std::uint32_t>(product) < bound) {  // rare
    const std::uint32_t least = (0u - bound) % bound;
    for (std::uint64_t attempt = 1; static_cast<std::uint32_t>(product) < least; ++attempt) {
      std::uint32_t more[kWordsAtOnce];
      philox(seed, stream, i / kWordsAtOnce, attempt, more);
      product = std::uint64_t{more[i % kWordsAtOnce]} * bound;
    }
  }
  return static_cast<std::int32_t>(product >> 32);
}

}  // namespace lcodec
