// The rows nearest to every row, by all n^2 distances.
//
//   D(i, j) = sum over columns f, in order, of ((x_if - x_jf) c_f)^2   every operation rounded
//   row i's ties are all j != i with the smallest D(i, j); it uses all of them, one drawn by seed
//   and row (common/random.hpp), or the first, in increasing order
//
// Mapping    a block of 2 x 4 warps takes 16 rows, each half of the warps 8 of them, and goes over
//            tiles of candidates j, 16 bytes of a column for a lane: 4 (float) or 2 (double)
//            candidates, 128 apart. A thread holds the distances of 8 rows x its candidates in
//            registers; columns are the inner loop. A warp keeps one smallest distance for each
//            row, the same in all lanes, and a lane how many of its candidates are there and the
//            first. Rows that use several neighbours, or not the first, take a second sweep: warps
//            vote on a tile, a word for 32 candidates, and a row's words are written in order by
//            one warp. A block without such rows ends before it, others when all ties are found.
// Arguments  columns [p][n], factor [p], T float or double; without kScaled factor is unused and
// c_f
//            is 1; offset, count [n] and indices of int64; all
//            contiguous. 2 <= n < 2^31 - 512, p >= 1. indices == nullptr: count[i] = how many ties
//            there are; otherwise row i's neighbours go to indices + offset[i], and count is unused
// Fast       A column of 8 rows x 4 candidates (float) is 96 operations for 4 + 2 loads: words,
//            and four words at a time from shared memory. Two columns take 216 instructions, 192 of
//            them these (sm_90), with the loads of both on their way at a time. A block reads a
//            column once for 16 rows, a quarter (float) or half (double) of a byte for a pair of
//            rows. In addition a pair takes 1.5 instructions (double: 2): comparisons with the
//            smallest distance so far, a vote and a branch for 32 lanes, which leave out the rest
//            but where the warp finds a nearer or equal row: about ln(n / 128) times a row without
//            ties. Floor of a sweep: n^2 (3 p + 1.5) instructions; n = 20 000, p = 4: 5.4e9, 0.18
//            ms at the 30e12/s of an H100; n = 2000, p = 1000: 1.2e10, 0.41 ms; double is half as
//            fast. Continuous data take a sweep to count and one to write, ties == first only the
//            latter, tied data a further one.
// Must not   use fma, matrix products or centred values, which round otherwise; tell row i from its
//            neighbours by its distance of 0, which others may share: it is left out by its index;
//            let the order of warps decide anything: minima, integer sums and words in order do not
//            depend on it
// Twin       lcodec_ext/dependence/backends/reference.py, nearest; on the CPU cpu/nearest.hpp,
//            nearest_of_all
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "common/random.hpp"
#include "cuda/platform.cuh"
#include "lcodec/engine.hpp"  // Ties

namespace lcodec::cuda {

constexpr unsigned kWholeWarp = 0xffffffff;

template <class T>
struct NeighborTile {
  static constexpr int held = 8;    // rows of a thread
  static constexpr int groups = 2;  // of warps, with rows of their own
  static constexpr int across = 4;  // warps of a group
  static constexpr int rows = held * groups;
  static constexpr int warps = across * groups;
  static constexpr int threads = 32 * warps;
  static constexpr int stride = 32 * across;  // between a thread's candidates
  static constexpr int candidates = 16 / static_cast<int>(sizeof(T));  // of a thread
  static constexpr int size = stride * candidates;                     // candidates of a block
  static constexpr int words = size / 32;
  static constexpr int chunk = 128;           // columns of the rows in shared memory
  static constexpr int owned = rows / warps;  // rows that a warp writes neighbours of
  static_assert(held * candidates <= 32 && rows % warps == 0);

  static constexpr T far = std::numeric_limits<T>::infinity();
  static constexpr T none = std::numeric_limits<T>::quiet_NaN();  // neither less nor equal

  // A column of the block's rows.
  struct alignas(16) Own {
    T value[rows];
  };
  using Values = T[std::size_t{candidates}];  // of a thread's candidates
  using Distances = Values[held];
};

// Values of the block's rows in `size` columns; rows past the last one repeat it.
template <class T>
__device__ __forceinline__ void load_rows(const T* columns, int n, int first_row, int size,
                                          typename NeighborTile<T>::Own* own) {
  using Tile = NeighborTile<T>;
  for (int t = static_cast<int>(threadIdx.x); t < size * Tile::rows; t += Tile::threads) {
    const int f = t / Tile::rows;
    const int r = t % Tile::rows;
    own[f].value[r] = columns[static_cast<std::int64_t>(f) * n + min(first_row + r, n - 1)];
  }
}

// Adds kColumns columns to a thread's distances, one after the other; x is its first candidate in
// the first of them, and `left` candidates exist from there on. All loads come first.
template <class T, bool kWhole, bool kScaled, int kColumns>
__device__ __forceinline__ void add_columns(const T* x, const T* factor, int n, int left,
                                            const typename NeighborTile<T>::Own* own, int group,
                                            typename NeighborTile<T>::Distances& distance) {
  using Tile = NeighborTile<T>;
  typename Tile::Values value[std::size_t{kColumns}];
  for (int f = 0; f < kColumns; ++f) {
    for (int k = 0; k < Tile::candidates; ++k) {
      value[f][k] = kWhole || k * Tile::stride < left ? x[k * Tile::stride] : T{0};
    }
    x += n;
  }
  for (int f = 0; f < kColumns; ++f) {
    for (int q = 0; q < Tile::held; ++q) {
      const T mine = own[f].value[group * Tile::held + q];
      for (int k = 0; k < Tile::candidates; ++k) {
        T difference = mine - value[f][k];
        if constexpr (kScaled) difference = difference * factor[f];
        distance[q][k] = distance[q][k] + difference * difference;
      }
    }
  }
}

template <class T, bool kWhole, bool kScaled>
__device__ __forceinline__ void add_chunk(const T* x, const T* factor, int n, int left, int size,
                                          const typename NeighborTile<T>::Own* own, int group,
                                          typename NeighborTile<T>::Distances& distance) {
  int f = 0;
  for (; f + 2 <= size; f += 2) {
    add_columns<T, kWhole, kScaled, 2>(x, kScaled ? factor + f : factor, n, left, own + f, group,
                                       distance);
    x += 2 * static_cast<std::int64_t>(n);
  }
  if (f < size)
    add_columns<T, kWhole, kScaled, 1>(x, kScaled ? factor + f : factor, n, left, own + f, group,
                                       distance);
}

// Distances between a thread's rows and its candidates of the tile that begins at `base`; NaN where
// no candidate exists, or it is the row itself. `own` holds all columns if they fit.
template <class T, bool kScaled>
__device__ __forceinline__ void tile_distances(const T* columns, const T* factor, int n,
                                               std::int64_t p, int first_row, int base,
                                               typename NeighborTile<T>::Own* own, int group,
                                               typename NeighborTile<T>::Distances& distance) {
  using Tile = NeighborTile<T>;
  const int first = base + static_cast<int>(threadIdx.x) % Tile::stride;
  const bool whole = base + Tile::size <= n;
  for (int q = 0; q < Tile::held; ++q) {
    for (int k = 0; k < Tile::candidates; ++k) distance[q][k] = 0;
  }
  for (std::int64_t f = 0; f < p; f += Tile::chunk) {
    const int size = p - f < Tile::chunk ? static_cast<int>(p - f) : Tile::chunk;
    const T* x = columns + f * n;
    if (p > Tile::chunk) {
      __syncthreads();
      load_rows(x, n, first_row, size, own);
      __syncthreads();
    }
    if (whole) {
      add_chunk<T, true, kScaled>(x + first, kScaled ? factor + f : factor, n, n - first, size, own,
                                  group, distance);
    } else {
      add_chunk<T, false, kScaled>(x + first, kScaled ? factor + f : factor, n, n - first, size,
                                   own, group, distance);
    }
  }
  if (whole && (base >= first_row + Tile::rows || base + Tile::size <= first_row)) return;
  for (int q = 0; q < Tile::held; ++q) {
    for (int k = 0; k < Tile::candidates; ++k) {
      const int j = first + k * Tile::stride;
      if (j >= n || j == first_row + group * Tile::held + q) distance[q][k] = Tile::none;
    }
  }
}

// The smallest distances that a warp has seen from its rows, how many there are and the first.
template <class T>
struct WarpNearest {
  using Tile = NeighborTile<T>;
  T best[Tile::held];     // of the warp
  int tied[Tile::held];   // of the lane, at the warp's best
  int place[Tile::held];  // the first of these

  __device__ __forceinline__ WarpNearest() {
    for (int q = 0; q < Tile::held; ++q) {
      best[q] = Tile::far;
      tied[q] = 0;
      place[q] = INT_MAX;
    }
  }

  // Takes a thread's distances, from candidate `first` on.
  __device__ __forceinline__ void look(const typename Tile::Distances& distance, int first) {
    for (int q = 0; q < Tile::held; ++q) {
      bool near = false;
      for (int k = 0; k < Tile::candidates; ++k) near = near || distance[q][k] <= best[q];
      if (!__any_sync(kWholeWarp, near)) continue;
      T least = best[q];
      for (int k = 0; k < Tile::candidates; ++k) {
        least = distance[q][k] < least ? distance[q][k] : least;
      }
      if (__any_sync(kWholeWarp, least < best[q])) {
        for (int step = 16; step > 0; step /= 2) {
          const T other = __shfl_xor_sync(kWholeWarp, least, step);
          least = other < least ? other : least;
        }
        best[q] = least;
        tied[q] = 0;
        place[q] = INT_MAX;
      }
      for (int k = 0; k < Tile::candidates; ++k) {
        if (distance[q][k] == best[q]) {
          ++tied[q];
          place[q] = min(place[q], first + k * Tile::stride);
        }
      }
    }
  }

  // Counts and first places of all lanes.
  __device__ __forceinline__ void add_lanes() {
    for (int q = 0; q < Tile::held; ++q) {
      for (int step = 16; step > 0; step /= 2) {
        tied[q] += __shfl_xor_sync(kWholeWarp, tied[q], step);
        place[q] = min(place[q], __shfl_xor_sync(kWholeWarp, place[q], step));
      }
    }
  }
};

// What the warps of a block know of its rows: smallest distance, count and first place.
template <class T>
struct BlockNearest {
  using Tile = NeighborTile<T>;
  using Parts = T[Tile::across];
  using Numbers = int[Tile::across];
  Parts* best;
  Numbers* count;
  Numbers* first;

  // Of all warps, for one row.
  __device__ __forceinline__ void of_row(int row, T& nearest, int& all, int& lowest) const {
    nearest = best[row][0];
    for (int w = 1; w < Tile::across; ++w) {
      nearest = best[row][w] < nearest ? best[row][w] : nearest;
    }
    all = 0;
    lowest = INT_MAX;
    for (int w = 0; w < Tile::across; ++w) {
      if (best[row][w] == nearest) {
        all += count[row][w];
        lowest = min(lowest, first[row][w]);
      }
    }
  }
};

// What the second sweep looks for, by row: its distance (NaN: nothing), which of its ties is taken,
// and after how many ties the row is done.
template <class T>
struct Sought {
  static constexpr int kAll = -1;
  T* distance;
  int* taken;
  int* needed;
};

// For a thread with a row of its own: writes what is known after the first sweep, and says whether
// the row needs a second one.
template <class T>
__device__ __forceinline__ bool settle(const BlockNearest<T>& block, int n, int first_row,
                                       Ties ties, std::uint64_t seed, const std::int64_t* offset,
                                       std::int64_t* count, std::int64_t* indices,
                                       const Sought<T>& sought) {
  const int thread = static_cast<int>(threadIdx.x);
  T nearest;
  int all;
  int lowest;
  block.of_row(thread, nearest, all, lowest);
  const std::int64_t i = std::int64_t{first_row} + thread;
  int take = Sought<T>::kAll;
  bool open = false;
  if (i < n && !indices) count[i] = all;
  if (i < n && indices) {
    if (ties != Ties::average) {
      take = ties == Ties::first ? 0 : static_cast<int>(pick(tie_hash(seed, i), all));
    }
    open = all > 1 && take != 0;
    if (all > 0 && !open) indices[offset[i]] = lowest;
  }
  sought.distance[thread] = open ? nearest : NeighborTile<T>::none;
  sought.taken[thread] = take;
  sought.needed[thread] = !open ? 0 : take == Sought<T>::kAll ? all : take + 1;
  return open;
}

// A warp's votes on a tile: which of its rows' distances are those sought.
template <class T>
__device__ __forceinline__ void vote(const typename NeighborTile<T>::Distances& distance,
                                     const T (&goal)[NeighborTile<T>::held], int group,
                                     unsigned (*votes)[NeighborTile<T>::words]) {
  using Tile = NeighborTile<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  unsigned word = 0;  // lane q * candidates + k has the vote on candidates k for row q
  for (int q = 0; q < Tile::held; ++q) {
    for (int k = 0; k < Tile::candidates; ++k) {
      const unsigned found = __ballot_sync(kWholeWarp, distance[q][k] == goal[q]);
      if (lane == q * Tile::candidates + k) word = found;
    }
  }
  if (lane < Tile::held * Tile::candidates) {
    const int q = lane / Tile::candidates;
    const int k = lane % Tile::candidates;
    votes[group * Tile::held + q][k * Tile::across + warp % Tile::across] = word;
  }
}

// For a warp: writes the ties that a tile's votes name to `out`, all of them or the one taken.
template <class T>
__device__ __forceinline__ void write_ties(const unsigned (&votes)[NeighborTile<T>::words],
                                           int base, int take, std::int64_t* out, int& found) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int w = 0; w < NeighborTile<T>::words; ++w) {
    const unsigned vote = votes[w];
    if (vote == 0) continue;
    const int rank = found + __popc(vote & ((1u << lane) - 1));
    if ((vote >> lane & 1u) != 0 && (take == Sought<T>::kAll || take == rank)) {
      out[take == Sought<T>::kAll ? rank : 0] = base + 32 * w + lane;
    }
    found += __popc(vote);
  }
}

template <class T, bool kScaled>
__global__ void __launch_bounds__(NeighborTile<T>::threads, 2)
    neighbors_kernel(const T* columns, const T* factor, int n, std::int64_t p, Ties ties,
                     std::uint64_t seed, const std::int64_t* offset, std::int64_t* count,
                     std::int64_t* indices) {
  using Tile = NeighborTile<T>;
  using Own = typename Tile::Own;
  using Parts = typename BlockNearest<T>::Parts;
  using Numbers = typename BlockNearest<T>::Numbers;
  using Words = unsigned[Tile::rows][Tile::words];
  LCODEC_SHARED_ARRAY(Own, own, Tile::chunk);
  LCODEC_SHARED_ARRAY(Parts, best_of, Tile::rows);  // of warps
  LCODEC_SHARED_ARRAY(Numbers, count_of, Tile::rows);
  LCODEC_SHARED_ARRAY(Numbers, first_of, Tile::rows);
  LCODEC_SHARED_ARRAY(T, sought, Tile::rows);
  LCODEC_SHARED_ARRAY(int, taken, Tile::rows);
  LCODEC_SHARED_ARRAY(int, needed, Tile::rows);
  LCODEC_SHARED_ARRAY(Words, votes, 2);

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int group = warp / Tile::across;
  const int first_row = static_cast<int>(blockIdx.x) * Tile::rows;
  if (p <= Tile::chunk) {
    load_rows(columns, n, first_row, static_cast<int>(p), own);
    __syncthreads();
  }
  typename Tile::Distances distance;

  WarpNearest<T> nearest;
  for (int base = 0; base < n; base += Tile::size) {
    tile_distances<T, kScaled>(columns, factor, n, p, first_row, base, own, group, distance);
    nearest.look(distance, base + thread % Tile::stride);
  }
  nearest.add_lanes();
  if (thread % 32 == 0) {
    for (int q = 0; q < Tile::held; ++q) {
      best_of[group * Tile::held + q][warp % Tile::across] = nearest.best[q];
      count_of[group * Tile::held + q][warp % Tile::across] = nearest.tied[q];
      first_of[group * Tile::held + q][warp % Tile::across] = nearest.place[q];
    }
  }
  __syncthreads();
  bool open = false;
  if (thread < Tile::rows) {
    open = settle<T>({best_of, count_of, first_of}, n, first_row, ties, seed, offset, count,
                     indices, {sought, taken, needed});
  }
  if (!__syncthreads_or(open)) return;

  // All ties in order, for the rows that need them.
  T goal[Tile::held];
  for (int q = 0; q < Tile::held; ++q) goal[q] = sought[group * Tile::held + q];
  int found[Tile::owned];
  for (int r = 0; r < Tile::owned; ++r) found[r] = 0;
  int side = 0;  // of votes: while one is read, the other one is written
  for (int base = 0; base < n; base += Tile::size) {
    tile_distances<T, kScaled>(columns, factor, n, p, first_row, base, own, group, distance);
    vote<T>(distance, goal, group, votes[side]);
    open = false;
    for (int r = 0; r < Tile::owned; ++r) {
      open = open || found[r] < needed[warp * Tile::owned + r];
    }
    if (!__syncthreads_or(open)) return;
    for (int r = 0; r < Tile::owned; ++r) {
      const int row = warp * Tile::owned + r;
      if (found[r] >= needed[row]) continue;
      write_ties<T>(votes[side][row], base, taken[row], indices + offset[first_row + row],
                    found[r]);
    }
    side = 1 - side;
  }
}

// count[i] = 1, for tie rules by which every row uses one neighbour. Written once, 8 n bytes.
constexpr int kOneThreads = 256;

__global__ void __launch_bounds__(kOneThreads)
    count_one_kernel(std::int64_t n, std::int64_t* count) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kOneThreads + threadIdx.x;
  if (i < n) count[i] = 1;
}

}  // namespace lcodec::cuda
