// The inner loops; kernels.cpp is compiled once for every SIMD level.
#pragma once

#include <cstdint>

#include "lcodec/simd_level.hpp"

namespace lcodec {

constexpr int kChunk = 8;  // neighbours between two looks at the stopping bound

// A row's neighbours in the conditioning set, nearest first in chunks of kChunk: every entry of a
// chunk is at least as far as bound[chunk], and bounds do not fall. The last chunk is filled up
// with NaN distances, which no comparison takes.
template <class T>
struct NeighborList {
  std::int64_t chunks;
  const std::int32_t* index;  // [chunks * kChunk] row positions
  const std::int32_t* rank;   // [chunks * kChunk] min(own rank, that row's rank)
  const T* distance;          // [chunks * kChunk]
  const T* bound;             // [chunks]
  T reach;                    // rows that are not listed are at least this far
};

// One row against its list, for the candidates of a tile side by side:
//   best_l = min_j v_j,  v_j = distance_j + ((own_l - tile[j][l]) * factor_l)^2
//   count_l = #{j : v_j = best_l},  sum_l = sum over those j of the list's rank
template <class T>
struct ScanArgs {
  NeighborList<T> list;
  const T* tile;        // [n][lanes]
  const T* own;         // [lanes] the row's own values
  const T* factor;      // [lanes]
  T* best;              // [lanes] out
  std::int64_t* sum;    // [lanes] out
  std::int64_t* count;  // [lanes] out
};

// What a scan does: distances with a candidate, the vector instructions that these take at the
// least, and those of a scan that goes on with all lanes until the last one stops.
struct ScanCount {
  std::int64_t comparisons = 0;
  std::int64_t instructions = 0;
  std::int64_t instructions_of_all = 0;
  ScanCount& operator+=(const ScanCount& more) {
    comparisons += more.comparisons;
    instructions += more.instructions;
    instructions_of_all += more.instructions_of_all;
    return *this;
  }
};

struct ScanResult {
  bool complete;  // no unlisted row can be nearest or tied, for any lane
  bool unique;  // every count is 1; if not, the sums of scan() are of no use. It writes no counts.
  ScanCount count;
};

// Rows of one group sorted by value, so that nearest neighbours are adjacent: adds up
// min(rank_t, rank of the neighbour) for those t in [begin, end) that plainly have one nearest
// neighbour within limit, and flags the others, which need a closer look. Reads value and rank from
// begin - 2 to end + 1 and up to a vector beyond, and writes flags up to a vector beyond end.
template <class T>
struct AdjacentArgs {
  std::int64_t begin, end;
  const T* value;  // ascending
  const std::int32_t* rank;
  T factor;
  T limit;  // a nearest neighbour at this distance or more needs a closer look
  std::uint8_t* flag;
};

constexpr int kBeyond = 32;  // elements that `adjacent` may touch past the end

template <class T>
struct Kernels {
  int lanes;                                    // candidates in a tile
  ScanResult (*scan)(const ScanArgs<T>&);       // notices ties
  ScanResult (*scan_ties)(const ScanArgs<T>&);  // counts them
  std::int64_t (*adjacent)(const AdjacentArgs<T>&);
  // out[a] = sum over d of ((query[d] - point[d][a]) * factor[d])^2, in the order of d, for size
  // points; point[d] starts at points + d * stride.
  void (*distances)(const T* points, std::int64_t stride, std::int64_t size, std::int64_t dims,
                    const T* query, const T* factor, T* out);
  // Indices a of the distances up to radius, in order; returns how many. [size] out, all scratch.
  std::int64_t (*within)(const T* distance, std::int64_t size, T radius, std::int32_t* out);
  // distance[r][j] += ((x[rows[r]] - x[j]) * factor)^2 for kRows rows and all j
  void (*accumulate)(const T* x, std::int64_t n, const std::int64_t* rows, T factor, T* distance);
  // Smallest and largest of n values.
  void (*range)(const T* x, std::int64_t n, T* low, T* high);
  // lane[l] += sum over rows l, l + kSumLanes, ... in this order of x, or of (x - *center)^2.
  void (*lane_sums)(const T* x, std::int64_t n, const double* center, double* lane);
  // min over j != i of distance[j]
  T (*minimum)(const T* distance, std::int64_t n, std::int64_t i);
  // Adds fixed_point(sum[t], count) of `size` sums. Sums below 2^53, counts below 2^20.
  void (*quotients)(const std::int64_t* sum, std::int64_t size, std::int64_t count,
                    std::int64_t* whole, std::int64_t* fraction);
};

constexpr int kSumLanes = 64;
constexpr int kRows = 4;  // rows that `accumulate` takes at once

struct LevelKernels {
  Kernels<float> f32;
  Kernels<double> f64;
};

LevelKernels baseline_kernels();
LevelKernels avx2_kernels();
LevelKernels avx512_kernels();

// What dispatch.cpp picks for a level.
LevelKernels kernels_for(SimdLevel level);

template <class T>
Kernels<T> pick_kernels(SimdLevel level) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return kernels_for(level).f32;
  } else {
    return kernels_for(level).f64;
  }
}

}  // namespace lcodec
