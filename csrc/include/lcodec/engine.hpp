// The CPU engine of the dependence coefficients: entry points and views. No Python, no torch.
//
// All functions run on the calling thread and `threads - 1` further ones, return the same bits for
// every thread count and SIMD level, and keep nothing of what the caller passes. Scratch memory is
// O(n) for each thread (score: one group of packed tiles); std::bad_alloc is passed on.
#pragma once

#include <cstdint>

#include "lcodec/simd_level.hpp"

namespace lcodec {

enum class Ties : std::int32_t { average = 0, random = 1, first = 2 };

// Feature columns and ranks. T is float or double.
template <class T>
struct Problem {
  std::int64_t n;              // rows
  std::int64_t p;              // columns
  const T* x;                  // [p][n]: column f starts at x + f * n
  const T* factor;             // [p] scaling factor of every column
  const std::int32_t* rank;    // [n] max ranks of the response
  const std::int64_t* column;  // [k] the conditioning set, in the order of summation
  std::int64_t k;
  Ties ties;
  std::uint64_t seed;  // of Ties::random
};

// How to run, and how to be stopped.
struct Execution {
  SimdLevel level;
  int threads;
  // Asked from the calling thread between pieces of work; true ends the call early.
  bool (*cancelled)(void*);
  void* context;
};

// Returned by every entry point.
enum class Status { ok, cancelled };

// For each of m candidate columns: sum over rows of S_i / c_i in fixed point, where c_i counts the
// neighbours used (nearest in the conditioning set and the candidate, added last) and S_i sums
// min(rank_i, rank_j) over them. whole[m], fraction[m] are overwritten. O(n^2 (k + m)).
template <class T>
Status score(const Problem<T>& problem, const std::int64_t* candidate, std::int64_t m,
             std::int64_t* whole, std::int64_t* fraction, const Execution& execution);

// S_i and c_i of every row for neighbours in the conditioning set alone (k >= 1). O(n^2 k).
template <class T>
Status row_sums(const Problem<T>& problem, std::int64_t* sum, std::int64_t* count,
                const Execution& execution);

// Neighbours used by every row in the conditioning set. With indices == nullptr only count[n] is
// written; otherwise row i's neighbours go to indices + offset[i], in increasing order. O(n^2 k).
template <class T>
Status neighbors(const Problem<T>& problem, const std::int64_t* offset, std::int64_t* count,
                 std::int64_t* indices, const Execution& execution);

}  // namespace lcodec
