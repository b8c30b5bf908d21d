// What benchmarks measure the scans with. Only a build with LCODEC_INSTRUMENTS counts anything: the
// development build does, a wheel does not.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace lcodec {

#ifdef LCODEC_INSTRUMENTS
constexpr bool kInstruments = true;
#else
constexpr bool kInstruments = false;
#endif

// Adds the seconds that it lives to a sum.
class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds) {
    if constexpr (kInstruments) start_ = Clock::now();
  }
  ~Stopwatch() {
    if constexpr (kInstruments)
      seconds_ += std::chrono::duration<double>(Clock::now() - start_).count();
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  double& seconds_;
  Clock::time_point start_;
};

// Issues `rounds` times 16 vector instructions that do not wait for each other, at a SIMD level,
// and returns how many: the rate that scans are measured against. With LCODEC_INSTRUMENTS only.
std::int64_t saturate(const std::string& level, std::int64_t rounds);
std::int64_t baseline_saturate(std::int64_t rounds);
std::int64_t avx2_saturate(std::int64_t rounds);
std::int64_t avx512_saturate(std::int64_t rounds);

// Draws permutations 1 to count of n ranks (common/philox.hpp) and adds min(rank'_i,
// rank'_other[i]) of all rows, on one thread: what a permutation test must do at the least. With
// LCODEC_INSTRUMENTS only.
std::int64_t bare_permutations(const std::int32_t* rank, const std::int32_t* other, std::int64_t n,
                               std::uint64_t seed, std::int64_t count);

}  // namespace lcodec
