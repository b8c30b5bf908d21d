// Sums of minima over pairs of rows, under permutations of the response. No Python, no torch.
//
// Permutation b is a function of seed and b (common/philox.hpp); permutation 0 leaves the rows as
// they are. The sums are integers: the same for every thread count, on the CPU and on CUDA.
#pragma once

#include <cstdint>

#include "lcodec/engine.hpp"  // Execution, Status

namespace lcodec {

// Pairs of rows in segments, each of which has a sum of its own, and groups of rows all of whose
// pairs are added up.
struct PermutedPairs {
  std::int64_t n;             // rows
  const std::int32_t* rank;   // [n] from 0 to n
  const std::int32_t* start;  // [n] where the block of a row begins, or null: one block
  std::int64_t segments;
  const std::int64_t* begin;  // [segments + 1] segment s has pairs begin[s], ..., begin[s + 1] - 1
  const std::int32_t* owner;  // first row of every pair, or null: pair t of a segment has row t
  const std::int32_t* other;  // second row
  std::int64_t labelings;
  const std::int32_t* label;  // [labelings][n] group of a row, or -1
  std::int64_t groups;
  const std::int32_t* size;     // [groups] rows of a group
  const std::int32_t* segment;  // [groups] where its sum goes
};

// sum[b][s], b = 0, ..., count - 1, for the permutations first + b: with rank' the permuted ranks,
// the sum over the pairs of segment s, and over all pairs of rows of its groups, of min(rank'_i,
// rank'_j). The caller answers for sums below 2^63. O(n + pairs + n labelings) a permutation, about
// 3 ns an element for drawing and 1.5 ns a pair; O(n) memory for each thread.
Status permuted_sums(const PermutedPairs& pairs, std::uint64_t seed, std::int64_t first,
                     std::int64_t count, std::int64_t* sum, const Execution& execution);

// row[b][i]: whose response row i has under permutation first + b.
Status permutations(std::int64_t n, const std::int32_t* start, std::uint64_t seed,
                    std::int64_t first, std::int64_t count, std::int32_t* row,
                    const Execution& execution);

}  // namespace lcodec
