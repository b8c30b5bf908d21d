// Sorting columns side by side, one in each lane of a vector, with the same comparisons for all of
// them; lane_sort.cpp is compiled once for every SIMD level.
//
// What is sorted is a word of 31 bits for every row: the row's number in the low bits, as much of
// its value as there is room for above them. The order is final but for values that agree in that
// much. cpu/column_sort.hpp puts these right.
#pragma once

#include <cstdint>

#include "lcodec/simd_level.hpp"

namespace lcodec {

// The words of a column x [n]. Scaled values (x - center) * scale lie in [-1, 1]; their words keep
// the order of the values, and for values near the center of ever more of their digits.
template <class T>
struct LaneWords {
  const T* x;
  T center, scale;
  const std::int32_t* number;  // [n] the row's number: 0 .. n - 1, each once
  std::int64_t n;
  int number_bits;    // n <= 2^number_bits
  std::int32_t* out;  // word i goes to out[i * lanes]
};

struct LaneSort {
  int lanes;
  void (*fill_f32)(const LaneWords<float>&);
  void (*fill_f64)(const LaneWords<double>&);
  // Sorts every lane of words [size][lanes]; size is a power of two, kLeastLaneRows or more. Rows
  // from n on hold INT32_MAX and stay where they are.
  void (*sort)(std::int32_t* words, std::int64_t size, std::int64_t n);

  void fill(const LaneWords<float>& words) const { fill_f32(words); }
  void fill(const LaneWords<double>& words) const { fill_f64(words); }
};

constexpr std::int64_t kLeastLaneRows = 8;

LaneSort baseline_lane_sort();
LaneSort avx2_lane_sort();
LaneSort avx512_lane_sort();

// What dispatch.cpp picks for a level.
LaneSort lane_sort_for(SimdLevel level);

}  // namespace lcodec
