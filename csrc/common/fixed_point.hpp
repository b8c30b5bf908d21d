// Fixed-point sums of S_i / c_i: integers, so that the order of additions does not matter.
#pragma once

#include <cstdint>

#include "random.hpp"  // LCODEC_HOST_DEVICE

namespace lcodec {

// Bits of the fraction: n * 2^43 stays below 2^63 up to n = 2^20 rows.
constexpr int kFractionBits = 43;

struct FixedPoint {
  std::int64_t whole;
  std::int64_t fraction;
};

// sum / count, rounded down to 2^-43. The fraction is 0 only where the division is exact, since
// a remainder is at least 1 / count > 2^-43. Reference twin: lcodec_ext/_exact.py.
LCODEC_HOST_DEVICE static inline FixedPoint fixed_point(std::int64_t sum, std::int64_t count) {
  if (count == 1) return {sum, 0};
  const std::int64_t whole = sum / count;
  const auto rest = static_cast<std::uint64_t>(sum - whole * count);
  const std::uint64_t fraction = (rest << kFractionBits) / static_cast<std::uint64_t>(count);
  return {whole, static_cast<std::int64_t>(fraction)};
}

}  // namespace lcodec
