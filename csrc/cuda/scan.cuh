// Rows against their neighbours in the selected columns, for 32 candidates side by side.
//
//   v(i, j) = D(i, j) + ((x_if - x_jf) c_f)^2, D from the lists; every operation rounded
//   whole_f, fraction_f += S_i / c_i in fixed point, S_i and c_i as in walk.cuh
//
// Mapping    a block takes a tile of 32 candidates and every gridDim.y-th row in turn, a warp takes
//            a row and a lane a candidate. The tile lies in shared memory if it fits, 33 words to a
//            row so that neither a row nor a column of it meets bank conflicts. The warp goes
//            through the row's list; before every eight entries it votes which lanes may still
//            gain. The last few lanes go on one by one, an entry to each lane of the warp: of 32
//            candidates the one that needs most takes twice the neighbours of the next. Lanes that
//            the end of a list leaves open go along the candidate's order.
// Arguments  see engine.cu; whole and fraction are zero, or hold the sums over other rows
// Fast       eight entries take 153 instructions (sm_90), nineteen each: a load of 16 bytes that
//            all lanes share and one of 4 bytes from shared memory, 2 for addresses, 4 of
//            arithmetic, 2 comparisons, 8 that select and add; the rest for bound and vote. Floor:
//            153 / 256 instructions a distance. n = 1000, k = 1: about 70 entries a row and tile,
//            and 4 lanes that go on alone for 2 rounds of some 30 instructions: 1.6e3 in all; p =
//            40 000: 2e9 instructions of warps, 2.2 ms at 9e11 a second (132 multiprocessors, 4 a
//            cycle, 1.7 GHz), the longest step of all. Integer sums stay in registers and are added
//            to memory once for a warp and tile.
// Must not   use fma or reassociate; let the order of rows or warps decide anything: minima and
//            integer sums do not depend on it
// Twin       cpu/scanner.hpp
#pragma once

#include <cstdint>

#include "common/fixed_point.hpp"
#include "cuda/groups.cuh"
#include "cuda/lists.cuh"
#include "cuda/table.cuh"
#include "cuda/walk.cuh"

namespace lcodec::cuda {

constexpr int kScanWarps = 16;
constexpr int kScanThreads = 32 * kScanWarps;
constexpr int kTileStride = 33;  // words of a tile's row in shared memory
constexpr int kLastLanes = 4;    // go on one by one

// Values of a candidate, by given row: from shared memory, where those of 32 candidates lie side by
// side, or from the table.
template <class T, bool kShared>
struct Candidate {
  const T* x;
  std::int64_t stride;

  __device__ __forceinline__ T operator()(int row) const {
    if constexpr (kShared) {
      return x[row * kTileStride];
    } else {
      return __ldg(x + row * stride);
    }
  }
};

template <class T>
using Found = Nearest<T, std::uint32_t>;

// For a warp: goes on with one candidate from entry `at` of a list that ends at `last`. `found` is
// what one lane has found so far; the other lanes have found nothing as near.
template <class T, class CandidateOf>
__device__ __forceinline__ void finish_alone(const CandidateOf& candidate, const Entry<T>* at,
                                             const Entry<T>* last, T x, T factor, Found<T>& found) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (; at < last && at->bound <= found.best; at += 32) {
    if (at + lane < last) {
      const Entry<T> entry = at[lane];
      const T scaled = (x - candidate(entry.row)) * factor;
      found.offer(entry.distance + scaled * scaled, entry.rank);
    }
    found.agree();
  }
}

// What a lane of a scan holds: its candidate, the row's value there and the scale of distances.
template <class T, bool kShared>
struct ScanLane {
  Candidate<T, kShared> candidate;
  T x, factor;

  __device__ __forceinline__ T distance(const Entry<T>& entry) const {
    const T scaled = (x - candidate(entry.row)) * factor;
    return entry.distance + scaled * scaled;
  }
};

// The values of a block's candidates, by given row; `column` is the lane's.
template <class T>
__device__ __forceinline__ void load_tile(const Table<T>& table, std::int64_t column, T* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < table.n; row += kScanWarps) {
    shared[row * kTileStride + lane] = column < table.p ? table.x[row * table.p + column] : T{0};
  }
  __syncthreads();
}

// Goes through a list from `at` on, for all lanes, until few may still gain: `open`.
template <class T, bool kShared>
__device__ __forceinline__ const Entry<T>* scan_list(const ScanLane<T, kShared>& own,
                                                     const Entry<T>* at, const Entry<T>* end,
                                                     Found<T>& found, unsigned& open) {
  for (; at < end; at += kChunk) {
    open = __ballot_sync(kFullWarp, found.best >= at->bound);
    if (__popc(open) <= kLastLanes) break;
    for (int u = 0; u < kChunk; ++u) {
      const Entry<T> entry = at[u];
      found.offer(own.distance(entry), entry.rank);
    }
  }
  return at;
}

// The row that a tie rule takes, of `several` in a lane: bisection by row, for all lanes side by
// side.
template <class T, bool kShared>
__device__ __forceinline__ int take_tied(const ScanLane<T, kShared>& own, const Entry<T>* begin,
                                         const Entry<T>* end, T best, bool several,
                                         std::int64_t place, int n) {
  int low = 0;
  int high = several ? n - 1 : 0;
  while (__any_sync(kFullWarp, low < high)) {
    const int middle = low + (high - low) / 2;
    int up_to = 0;
    for (const Entry<T>* e = begin; e < end; e += kChunk) {
      if (!__any_sync(kFullWarp, low < high && best >= e->bound)) break;
      for (int u = 0; u < kChunk; ++u) {
        const Entry<T> entry = e[u];
        up_to += entry.row <= middle && own.distance(entry) == best;
      }
    }
    if (low < high) {
      if (up_to > place) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
  }
  return low;
}

template <class T, bool kShared>
__global__ void __launch_bounds__(kScanThreads, 1)
    scan_kernel(Table<T> table, Groups<T> groups, Lists<T> lists, unsigned long long* whole,
                unsigned long long* fraction) {
  LCODEC_DYNAMIC_SHARED(T, shared);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * 32;
  const std::int64_t column = first + lane;
  const bool there = column < table.p;
  if constexpr (kShared) load_tile(table, column, shared);
  const auto candidate_of = [&](int other) {  // lanes past the last column look at the first
    if constexpr (kShared) {
      return Candidate<T, true>{shared + other, 0};
    } else {
      return Candidate<T, false>{table.x + (first + other < table.p ? first + other : first),
                                 table.p};
    }
  };
  ScanLane<T, kShared> own{candidate_of(lane), T{0}, there ? table.factor[column] : T{0}};
  std::int64_t wholes = 0;
  std::int64_t fractions = 0;

  for (std::int64_t slot = static_cast<std::int64_t>(blockIdx.y) * kScanWarps + warp;
       slot < lists.rows; slot += static_cast<std::int64_t>(gridDim.y) * kScanWarps) {
    const int row = static_cast<int>(lists.first + slot);
    if (groups.is_big(row)) continue;
    const Entry<T>* const begin = lists.entries + slot * lists.stride;
    const Entry<T>* const end = begin + lists.size[slot];
    own.x = own.candidate(table.order[row]);
    // -1: a lane without a candidate never gains
    Found<T> found{there ? kFar<T> : T{-1}};
    unsigned open = 0;
    const Entry<T>* const at = scan_list(own, begin, end, found, open);
    // go_on(lane, its best, x and factor) for some lanes, by the whole warp
    const auto each = [&](unsigned lanes, const auto& go_on) {
      for (; lanes != 0; lanes &= lanes - 1) {
        const int other = __ffs(static_cast<int>(lanes)) - 1;
        go_on(other, __shfl_sync(kFullWarp, found.best, other),
              __shfl_sync(kFullWarp, own.x, other), __shfl_sync(kFullWarp, own.factor, other));
      }
    };
    if (at < end) {
      each(open, [&](int other, T best, T its_x, T its_factor) {
        Found<T> its{best};
        if (lane == other) its = found;
        finish_alone(candidate_of(other), at, end, its_x, its_factor, its);
        const Sums sums = its.total();
        if (lane == other) found = {its.best, sums.count, static_cast<std::uint32_t>(sums.sum)};
      });
    }
    std::int64_t sum = found.sum;  // along the order more may be added up
    int count = found.count;
    const T reach = lists.reach[slot];
    each(__ballot_sync(kFullWarp, found.best >= reach), [&](int other, T best, T, T) {
      const Sums sums = nearest_along(table, row, first + other, best);
      if (lane == other) {
        sum = sums.sum;
        count = sums.count;
      }
    });
    // Lanes that went along the order have taken one already.
    const bool several = table.ties != Ties::average && count > 1;
    if (__any_sync(kFullWarp, several)) {
      const std::int64_t place = several ? place_taken(table, row, count) : 0;
      const int taken =
          take_tied(own, begin, end, found.best, several, place, static_cast<int>(table.n));
      if (several) {
        sum = min(table.rank[row], table.rank[taken]);
        count = 1;
      }
    }
    if (there) {
      const FixedPoint mean = fixed_point(sum, count);
      wholes += mean.whole;
      fractions += mean.fraction;
    }
  }
  if (there) {
    add_to(whole + column, wholes);
    add_to(fraction + column, fractions);
  }
}

}  // namespace lcodec::cuda
