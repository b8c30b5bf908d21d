// The CPU engine of the dependence coefficients: entry points and views. No Python, no torch.
//
// Calls run on the calling thread and up to `threads - 1` further ones, and return the same bits
// for every thread count and SIMD level. std::bad_alloc is passed on.
#pragma once

#include <cstdint>
#include <memory>

#include "lcodec/simd_level.hpp"

namespace lcodec {

enum class Ties : std::int32_t { average = 0, random = 1, first = 2 };

// How to run, and how to be stopped.
struct Execution {
  SimdLevel level;
  int threads;
  // Asked from the calling thread between pieces of work; true ends the call early.
  bool (*cancelled)(void*);
  void* context;
};

// Returned by every call that can take long.
enum class Status { ok, cancelled };

// Feature columns. T is float or double.
template <class T>
struct Columns {
  std::int64_t n;   // rows
  std::int64_t p;   // columns
  const T* x;       // [p][n]: column f starts at x + f * n
  const T* factor;  // [p] scaling factor of every column
  // [p][n] from sort_columns, where they are known: engines of many responses sort once.
  const std::int32_t* sorted_rows = nullptr;
};

// Lays out a table for the engine: x [n][p] by row to columns [p][n], with each column's range.
template <class T>
Status lay_out(const T* x, std::int64_t n, std::int64_t p, T* columns, T* low, T* high,
               const Execution& execution);

// Standard deviations (n - 1) of columns [p][n], in double. Sums are added in one written order:
// lane l of 64 takes rows l, l + 64, ..., then lanes 32..63 are added to 0..31, 16..31 to 0..15,
// and so on; the deviations from the mean in a second pass. Reference twin:
// lcodec_ext/dependence/backends/reference.py.
template <class T>
Status standard_deviations(const T* columns, std::int64_t n, std::int64_t p, double* deviation,
                           const Execution& execution);

// Rows of columns [p][n], each in increasing order of (value, row); -0 is 0.
template <class T>
Status sort_columns(const T* columns, std::int64_t n, std::int64_t p, std::int32_t* rows,
                    const Execution& execution);

// What scans have done so far, neighbours once listed.
struct ScanWork {
  std::int64_t comparisons = 0;   // distances with a candidate computed
  std::int64_t instructions = 0;  // vector instructions that these take at the least
  // The same if all candidates of a tile were compared until the last one stops.
  std::int64_t instructions_of_all = 0;
  double seconds = 0;  // of all threads
};

// Scores candidate columns given a conditioning set that grows step by step.
//
// For row i let the c_i neighbours used be the rows j != i at the smallest distance in the
// conditioning set and a candidate (added last), all of them or the one that the tie rule takes,
// and S_i the sum over them of min(rank_i, rank_j).
template <class T>
class Engine {
 public:
  // Keeps the pointers of `columns`: those arrays must outlive the engine. rank[n], the max ranks
  // of the response, is copied.
  Engine(const Columns<T>& columns, const std::int32_t* rank, Ties ties, std::uint64_t seed);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Adds a column to the conditioning set, after those already there. O(n).
  void select(std::int64_t column);

  // For each of m candidates the sum over rows of S_i / c_i in fixed point; whole[m] and
  // fraction[m] are overwritten.
  //
  // With floor >= 0 only the largest sum and the sums above floor are wanted: whole is -1 for a
  // candidate whose sum is found to be at most floor, or less than another one.
  //
  // With k columns selected a row is compared with its neighbours in these, nearest first, until
  // none can be nearest with the candidate: about n^(1/(k+1)) of them on continuous data. Rows
  // that share their values in the conditioning set with many others are instead sorted by the
  // candidate, O(log n) each. Memory: a packed copy of the candidates, each column sorted, and O(n)
  // for each thread.
  Status score(const std::int64_t* candidate, std::int64_t m, std::int64_t floor,
               std::int64_t* whole, std::int64_t* fraction, const Execution& execution);
  static constexpr std::int64_t kNoFloor = -1;

  // S_i and c_i of every row for one candidate: a k-d tree of 64 rows or more, about O(log n) a
  // row, up to 12 columns in all; O(n) a row and column beyond, of which most are multiply-adds of
  // a screen.
  Status row_sums(std::int64_t candidate, std::int64_t* sum, std::int64_t* count,
                  const Execution& execution);

  // For benchmarks; zeros in a build without LCODEC_INSTRUMENTS.
  ScanWork scanned() const;

 private:
  struct State;
  class Race;
  std::unique_ptr<State> state_;
};

// Neighbours used by every row in all p columns: row i's go to indices + offset[i], in increasing
// order. With count != nullptr instead how many are tied, count[n], and the lowest of each row,
// indices[n]: where each row has one, this is all. A k-d tree in few columns, O(n^2 p) in many.
template <class T>
Status neighbors(const Columns<T>& columns, Ties ties, std::uint64_t seed,
                 const std::int64_t* offset, std::int64_t* count, std::int64_t* indices,
                 const Execution& execution);

// Of each row i the sum of min(rank_i, rank_j) over the k nearest rows j in all p columns: let
// tied[i] rows be at the k-th smallest distance, of which r are wanted besides those that are
// nearer; each of them counts r / tied[i]. The sum is whole[i] + rest[i] / tied[i], rest[i] <
// tied[i]. 1 <= k < n; rank[n] are max ranks. A k-d tree in few columns, about O(k log n) a row;
// O(n p) a row in many. Reference twin: lcodec_ext/dependence/backends/reference.py.
template <class T>
Status nearest_minima(const Columns<T>& columns, const std::int32_t* rank, std::int64_t k,
                      std::int64_t* whole, std::int64_t* rest, std::int64_t* tied,
                      const Execution& execution);

}  // namespace lcodec
