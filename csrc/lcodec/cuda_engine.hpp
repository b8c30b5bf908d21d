// The CUDA engine of the dependence coefficients: entry points. Plain C++: no CUDA header, no
// torch.
//
// The same results, bit for bit, as the CPU engine (lcodec/engine.hpp) and the reference.
// Everything is queued on a stream, and nothing is allocated: pointers are to memory of the device,
// which the caller owns and keeps until the stream is done with it. Only select waits for the
// stream: the first time, and while rows are alike in groups.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "lcodec/engine.hpp"  // Ties

namespace lcodec::cuda {

using Stream = void*;  // a cudaStream_t

// The outcome of a call: code is a cudaError_t, 0 for success; kernel says where it failed.
struct Outcome {
  int code = 0;
  const char* kernel = nullptr;
  bool ok() const { return code == 0; }
};

// The text of an Outcome's code.
const char* error_text(int code);

// Of every column of x [n][p], by row: smallest and largest value, and the standard deviation
// (n - 1) in double, added in the order of lcodec_ext/dependence/backends/reference.py.
// O(n p), two passes.
template <class T>
Outcome column_statistics(const T* x, std::int64_t n, std::int64_t p, T* low, T* high,
                          double* deviation, Stream stream);

// The result of a step, read back as one array of kLeaderWords words: how many columns may have the
// largest exact sum, then column, whole and fraction of up to kMostLeaders of them, in any order.
constexpr int kMostLeaders = 64;
constexpr int kLeaderWords = 1 + 3 * kMostLeaders;

// Scores candidate columns given a conditioning set that grows step by step, as lcodec/engine.hpp
// defines it: all p columns except those selected.
template <class T>
class Engine {
 public:
  // Bytes of device memory for a table, in addition to x, factor and rank. `scratch` is for what
  // can be done piece by piece: neighbour lists, keys to be sorted, prefix sums; more is faster, up
  // to what the table can use, beyond which it is not counted.
  static std::size_t workspace_bytes(std::int64_t n, std::int64_t p, std::size_t scratch);
  static constexpr std::size_t kScratch = std::size_t{1} << 28;  // a good size
  static std::size_t least_scratch(std::int64_t n);              // what one row or column takes

  // x [n][p] by row, factor [p], rank [n]: the max ranks of the response; all on the device.
  Engine(const T* x, std::int64_t n, std::int64_t p, const T* factor, const std::int32_t* rank,
         Ties ties, std::uint64_t seed, void* workspace, std::size_t scratch);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Numbers rows by rank, sorts every column. To be called first. O(n p).
  Outcome start(Stream stream);
  // Adds a column to the conditioning set, after those already there. O(n), and O(n k) for each
  // group of 64 or more rows alike. What it does depends on how many rows are alike: the first call
  // reads back the longest run of equal values of every column; and while groups may be large,
  // every call reads back whether any is.
  Outcome select(std::int64_t column, Stream stream);
  // whole[p] and fraction[p] (device) of every column, -1 for selected ones.
  Outcome score(std::int64_t* whole, std::int64_t* fraction, Stream stream);
  // The contenders among the columns with candidate[column] != 0 (device, [p]).
  Outcome leaders(const std::int64_t* whole, const std::int64_t* fraction,
                  const std::uint8_t* candidate, std::int64_t* out, Stream stream);
  // S_i and c_i of every row for one candidate; sum[n], count[n] on the device.
  Outcome row_sums(std::int64_t candidate, std::int64_t* sum, std::int64_t* count, Stream stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Neighbours used by every row in all p columns of columns [p][n] (by column, on the device),
// with factor [p] or, where that is null, without scaling. A first call with indices == nullptr
// writes count[n], how many each row uses; a second one row i's neighbours to indices + offset[i],
// in increasing order. O(n^2 p).
template <class T>
Outcome neighbors(const T* columns, const T* factor, std::int64_t n, std::int64_t p, Ties ties,
                  std::uint64_t seed, const std::int64_t* offset, std::int64_t* count,
                  std::int64_t* indices, Stream stream);

}  // namespace lcodec::cuda
