// The rate of independent vector instructions, compiled for every SIMD level; see instruments.hpp.
#include "cpu/instruments.hpp"
#include "cpu/simd.hpp"

#if defined(__SSE2__)
#define LCODEC_IN_REGISTER(vector) "+x"(vector)
#elif defined(__aarch64__)
#define LCODEC_IN_REGISTER(vector) "+w"(vector)
#else
#define LCODEC_IN_REGISTER(vector) "+m"(vector)
#endif

namespace lcodec {

std::int64_t LCODEC_OF_LEVEL(saturate)(std::int64_t rounds) {
  using Value = Simd<float>::Value;
  constexpr int chains = 8;
  Value chain[chains];
  for (int c = 0; c < chains; ++c) chain[c] = static_cast<float>(c) - Value{};
  const Value factor = 1.0f - Value{};
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 8
    for (int c = 0; c < chains; ++c) {
      chain[c] = chain[c] * factor + factor;
      __asm__ volatile("" : LCODEC_IN_REGISTER(chain[c]));
    }
  }
  return rounds * chains * 2;
}

}  // namespace lcodec
