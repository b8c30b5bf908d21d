// Fixed-point sums of S_i / c_i: integers, so that the order of additions does not matter.
#pragma once

#include <cstdint>

#include "common/random.hpp"  // LCODEC_HOST_DEVICE

namespace lcodec {

// Bits of the fraction: n * 2^43 stays below 2^63 up to n = 2^20 rows.
constexpr int kFractionBits = 43;

struct FixedPoint {
  std::int64_t whole;
  std::int64_t fraction;
};

// sum / count, rounded down to 2^-43. The fraction is 0 only where the division is exact, since
// a remainder is at least 1 / count > 2^-43. Reference twin: lcodec_ext/dependence/exact.py.
LCODEC_HOST_DEVICE static inline FixedPoint fixed_point(std::int64_t sum, std::int64_t count) {
  if (count == 1) return {sum, 0};
  const std::int64_t whole = sum / count;
  const auto rest = static_cast<std::uint64_t>(sum - whole * count);
  const std::uint64_t fraction = (rest << kFractionBits) / static_cast<std::uint64_t>(count);
  return {whole, static_cast<std::int64_t>(fraction)};
}

// fixed_point(sum, count) for one count and many sums: by its reciprocal in double, each quotient
// then corrected by its remainder. Sums below 2^53, counts below 2^20.
class FixedPointQuotient {
 public:
  explicit FixedPointQuotient(std::int64_t count)
      : count_(count), inverse_(1 / static_cast<double>(count)) {}

  FixedPoint operator()(std::int64_t sum) const {
    std::int64_t rest;
    const std::int64_t whole = floor(sum, static_cast<double>(sum) * inverse_, rest);
    const double scaled =
        static_cast<double>(rest) * static_cast<double>(std::int64_t{1} << kFractionBits);
    const std::int64_t fraction = floor(rest << kFractionBits, scaled * inverse_, rest);
    return {whole, fraction};
  }

 private:
  // floor(value / count) from an estimate that is off by less than one.
  std::int64_t floor(std::int64_t value, double estimate, std::int64_t& rest) const {
    std::int64_t quotient = static_cast<std::int64_t>(estimate);
    rest = value - quotient * count_;
    const std::int64_t correction = std::int64_t{rest >= count_} - std::int64_t{rest < 0};
    rest -= correction * count_;
    return quotient + correction;
  }

  std::int64_t count_;
  double inverse_;
};

}  // namespace lcodec
