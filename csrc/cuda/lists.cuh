// Neighbours of rows in the selected columns, nearest first by buckets, as far as scans are likely
// to go.
//
// Mapping    a block takes one row. It goes over all rows twice: first it counts distances in 4096
//            buckets, by their exponent and leading four bits, then it puts those of the nearest
//            buckets in place. A scan needs a lower bound of what is still to come, not an order:
//            the bucket's lower edge.
// Fast       2 n (9 k + 20) instructions a row, 3 loads a column, two of which are the same for all
//            rows; the entries written once. n = 1000, k = 9: 2e8 instructions of threads for all
//            rows, 0.01 ms at 30e12/s, and 16 MB written.
// Must not   depend on the order of entries in a bucket, which differs from run to run
#pragma once

#include <cstdint>
#include <limits>

#include "cuda/groups.cuh"
#include "cuda/table.cuh"
#include "cuda/walk.cuh"

namespace lcodec::cuda {

constexpr int kChunk = 8;  // entries between two looks at the bound

template <class T>
struct alignas(16) Entry {
  std::int32_t row;    // as given
  std::uint32_t rank;  // min(own rank, that row's)
  T distance;
  T bound;  // later entries are at least this far
};

// Lists of the rows first, first + 1, ...
template <class T>
struct Lists {
  std::int64_t first;
  std::int64_t rows;
  std::int64_t stride;  // entries of a list, a multiple of kChunk; n times as many are below 2^32
  Entry<T>* entries;    // [rows][stride]
  std::int32_t* size;   // [rows] entries in use, filled up with NaN distances to whole chunks
  T* reach;             // [rows] rows that are not listed are at least this far
};

// Buckets of squared distances, by the high bits of the number, which rise with it. The last bucket
// ends at `limit`; the first one has all that lie below the others.
template <class T>
struct Buckets {
  static constexpr int count = 4096;
  static constexpr int shift = sizeof(T) == 4 ? 19 : 48;
  std::int64_t base;

  __device__ static std::int64_t high_bits(float v) { return __float_as_uint(v) >> shift; }
  __device__ static std::int64_t high_bits(double v) { return __double_as_longlong(v) >> shift; }
  __device__ explicit Buckets(T limit) : base(high_bits(limit) - (count - 1)) {
    if (base < 0) base = 0;
  }
  __device__ int of(T distance) const {
    const std::int64_t bucket = high_bits(distance) - base;
    return bucket < 0 ? 0 : static_cast<int>(bucket);
  }
  __device__ T edge(int bucket) const {
    if (bucket == 0) return 0;
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(static_cast<unsigned>(bucket + base) << shift);
    } else {
      return __longlong_as_double((bucket + base) << shift);
    }
  }
};

// Fills lists for the rows that scans take. A list of `wanted` entries is long enough.
template <class T>
__global__ void __launch_bounds__(kThreads)
    lists_kernel(Table<T> table, Groups<T> groups, Lists<T> lists, int wanted, const T* limit) {
  constexpr int kShare = Buckets<T>::count / kThreads;  // buckets of a thread
  constexpr int kWarps = kThreads / 32;
  LCODEC_SHARED_ARRAY(int, place, Buckets<T>::count);
  LCODEC_SHARED_ARRAY(int, warp_sum, kWarps);
  LCODEC_SHARED_ARRAY(int, kept, 2);  // buckets, entries
  const int slot = static_cast<int>(blockIdx.x);
  const int row = static_cast<int>(lists.first + slot);
  if (groups.is_big(row)) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int n = static_cast<int>(table.n);
  const Buckets<T> buckets(*limit);

  for (int b = thread; b < Buckets<T>::count; b += kThreads) place[b] = 0;
  if (thread < 2) kept[thread] = 0;
  __syncthreads();
  for (int j = thread; j < n; j += kThreads) {
    if (j != row) atomicAdd(&place[buckets.of(table.distance(row, j))], 1);
  }
  __syncthreads();

  // Where buckets begin, and which are kept: as many as make the list long enough and fit it.
  int sum = 0;
  for (int b = 0; b < kShare; ++b) sum += place[thread * kShare + b];
  int before = sum;  // of this and the threads before it, in the warp
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, before, static_cast<unsigned>(step));
    if (thread % 32 >= step) before += other;
  }
  if (thread % 32 == 31) warp_sum[thread / 32] = before;
  __syncthreads();
  before -= sum;
  for (int w = 0; w < thread / 32; ++w) before += warp_sum[w];
  int buckets_kept = 0;
  int entries_kept = 0;
  for (int b = 0; b < kShare; ++b) {
    const int size = place[thread * kShare + b];
    place[thread * kShare + b] = before;
    if (before < wanted && before + size <= lists.stride) {
      buckets_kept = thread * kShare + b + 1;
      entries_kept = before + size;
    }
    before += size;
  }
  if (buckets_kept > 0) {
    atomicMax(&kept[0], buckets_kept);
    atomicMax(&kept[1], entries_kept);
  }
  __syncthreads();
  buckets_kept = kept[0];
  entries_kept = kept[1];

  Entry<T>* entries = lists.entries + slot * lists.stride;
  const int own = table.rank[row];
  for (int j = thread; j < n; j += kThreads) {
    if (j == row) continue;
    const T distance = table.distance(row, j);
    const int bucket = buckets.of(distance);
    if (bucket >= buckets_kept) continue;
    entries[atomicAdd(&place[bucket], 1)] = {table.order[j],
                                             static_cast<std::uint32_t>(min(own, table.rank[j])),
                                             distance, buckets.edge(bucket)};
  }
  const int size = (entries_kept + kChunk - 1) / kChunk * kChunk;
  for (int e = entries_kept + thread; e < size; e += kThreads) {
    entries[e] = {table.order[row], 0, kNone<T>, kFar<T>};
  }
  if (thread == 0) {
    lists.size[slot] = size;
    lists.reach[slot] = entries_kept == n - 1 ? kFar<T> : buckets.edge(buckets_kept);
  }
}

}  // namespace lcodec::cuda
