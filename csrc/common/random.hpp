// The one random choice of the engines: which of a row's tied neighbours is taken.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LCODEC_HOST_DEVICE __host__ __device__
#else
#define LCODEC_HOST_DEVICE
#endif

namespace lcodec {

// Internal linkage on purpose: this header is compiled at several SIMD levels, and a shared inline
// function could be linked in the version of a level that the CPU does not have.

// Finaliser of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64-bit words.
LCODEC_HOST_DEVICE static inline std::uint64_t mix64(std::uint64_t word) {
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
  return word ^ (word >> 31);
}

// A word per row, a function of seed and row alone. Reference twin: lcodec_ext/_random.py.
LCODEC_HOST_DEVICE static inline std::uint64_t tie_hash(std::uint64_t seed, std::int64_t row) {
  constexpr std::uint64_t gamma = 0x9E3779B97F4A7C15u;
  return mix64(mix64(seed + gamma) + (static_cast<std::uint64_t>(row) + 1) * gamma);
}

// floor(word * count / 2^64) without 128-bit arithmetic; count < 2^32.
LCODEC_HOST_DEVICE static inline std::int64_t pick(std::uint64_t word, std::int64_t count) {
  const auto c = static_cast<std::uint64_t>(count);
  const std::uint64_t low = (word & 0xFFFFFFFFu) * c;
  return static_cast<std::int64_t>(((word >> 32) * c + (low >> 32)) >> 32);
}

}  // namespace lcodec
