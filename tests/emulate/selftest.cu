#include <cfloat>

#include "cuda/platform.cuh"
#include "emulate/selftest.hpp"

namespace lcodec::selftest {
namespace {

using cuda::launch;

constexpr unsigned kFull = 0xffffffff;
constexpr int kBlock = 256;

unsigned blocks_for(int n, int size) { return static_cast<unsigned>((n + size - 1) / size); }

__global__ void __launch_bounds__(kBlock)
    sum_kernel(const int* values, int n, unsigned long long* total, Bug bug) {
  LCODEC_SHARED_ARRAY(unsigned, partial, kBlock);
  const int t = static_cast<int>(threadIdx.x);
  const int i = static_cast<int>(blockIdx.x) * kBlock + t;
  if (bug == Bug::early_exit && i >= n) return;
  if (i < n) {
    partial[t] = static_cast<unsigned>(values[i]);
  } else if (bug != Bug::uninitialised) {
    partial[t] = 0;
  }
  if (bug == Bug::other_barrier && t % 2 == 1) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  for (int half = kBlock / 2; half > 0; half /= 2) {
    if (t < half) {
      partial[t] += partial[t + half];
      if (bug == Bug::divergent_barrier) __syncthreads();
    }
    if (bug != Bug::no_barrier && bug != Bug::divergent_barrier) __syncthreads();
  }
  if (t == 0) atomicAdd(total, partial[0]);
}

constexpr int kTile = 32;
constexpr int kTileRows = 8;

__global__ void __launch_bounds__(kTile* kTileRows)
    transpose_kernel(const float* in, float* out, int rows, int columns, Bug bug) {
  using Row = float[kTile + 1];
  LCODEC_SHARED_ARRAY(Row, tile, kTile);
  const int x = static_cast<int>(threadIdx.x);
  const int column = static_cast<int>(blockIdx.x) * kTile;
  const int row = static_cast<int>(blockIdx.y) * kTile;
  for (int y = static_cast<int>(threadIdx.y); y < kTile; y += kTileRows) {
    if (row + y < rows && column + x < columns) {
      tile[y][x] = in[(row + y) * columns + column + x];
    }
  }
  if (bug != Bug::no_barrier) __syncthreads();
  for (int y = static_cast<int>(threadIdx.y); y < kTile; y += kTileRows) {
    if (column + y < columns && row + x < rows) {
      out[(column + y) * rows + row + x] = tile[x][y];
    }
  }
}

constexpr int kRows = 4;  // of a block, a warp each

__global__ void __launch_bounds__(kRows * 32)
    nearest_kernel(const float* x, int n, int d, int* index, Bug bug) {
  LCODEC_DYNAMIC_SHARED(float, tile);  // [kTile][d]
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int i = static_cast<int>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / 32;
  float best = FLT_MAX;
  int where = n;
  for (int start = 0; start < n; start += kTile) {
    const int m = min(kTile, n - start);
    for (int k = static_cast<int>(threadIdx.x); k < m * d; k += kRows * 32) {
      tile[k] = x[start * d + k];
    }
    __syncthreads();
    if (i < n && lane < m && start + lane != i) {
      float distance = 0;
      for (int f = 0; f < d; ++f) {
        const float difference = __fsub_rn(x[i * d + f], tile[lane * d + f]);
        distance = __fadd_rn(distance, __fmul_rn(difference, difference));
      }
      if (distance < best) {
        best = distance;
        where = start + lane;
      }
    }
    if (bug != Bug::no_barrier) __syncthreads();
  }
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kFull, best, step);
    const int other_where = __shfl_xor_sync(kFull, where, step);
    if (other < best || (other == best && other_where < where)) {
      best = other;
      where = other_where;
    }
  }
  if (lane == 0 && i < n) index[i] = where;
}

// Sums here wrap around, also when a bug makes them rubbish.
__device__ unsigned warp_scan(unsigned mask, unsigned value) {
  const unsigned lane = threadIdx.x % 32;
  for (unsigned step = 1; step < 32; step *= 2) {
    const unsigned before = __shfl_up_sync(mask, value, step);
    if (lane >= step) value += before;
  }
  return value;
}

__global__ void scan_kernel(const int* values, int n, int* out, Bug bug) {
  LCODEC_SHARED_ARRAY(unsigned, warp_total, 32);
  const int t = static_cast<int>(threadIdx.x);
  const int lane = t % 32;
  const int warp = t / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (bug == Bug::wrong_mask && t >= n) return;
  const unsigned mask = bug == Bug::foreign_mask && lane >= 16 ? 0xffff : kFull;
  const unsigned value = warp_scan(mask, t < n ? static_cast<unsigned>(values[t]) : 0);
  if (bug == Bug::outside_lane && lane < 31) __shfl_down_sync(0x7fffffff, value, 1);
  if (lane == 31) warp_total[warp] = value;
  if (bug != Bug::no_barrier) __syncthreads();
  if (warp == 0) {
    const unsigned total = warp_scan(kFull, lane < warps ? warp_total[lane] : 0);
    if (lane < warps) warp_total[lane] = total;
  }
  __syncthreads();
  if (t < n) out[t] = static_cast<int>(value + (warp > 0 ? warp_total[warp - 1] : 0));
}

__global__ void compact_kernel(const int* values, int n, int* out, int* count) {
  LCODEC_SHARED_ARRAY(int, kept_of_warp, 32);
  const int t = static_cast<int>(threadIdx.x);
  const int warp = t / 32;
  const bool keep = t < n && values[t] != 0;
  const unsigned kept = __ballot_sync(kFull, keep);
  if (t % 32 == 0) kept_of_warp[warp] = __popc(kept);
  const int all = __syncthreads_and(keep || t >= n);
  const int any = __syncthreads_or(keep);
  const int total = __syncthreads_count(keep);
  int place = __popc(kept & ((1u << t % 32) - 1));
  for (int before = 0; before < warp; ++before) place += kept_of_warp[before];
  if (keep) out[place] = values[t];
  if (t == 0) {
    count[0] = total;
    count[1] = any;
    count[2] = all;
  }
}

__global__ void __launch_bounds__(kBlock)
    histogram_kernel(const int* values, int n, int* counts, int bins, Bug bug) {
  LCODEC_DYNAMIC_SHARED(unsigned, mine);  // [bins]
  const int t = static_cast<int>(threadIdx.x);
  if (bug != Bug::uninitialised) {
    for (int bin = t; bin < bins + (bug == Bug::overrun); bin += kBlock) mine[bin] = 0;
  }
  if (bug != Bug::no_barrier) __syncthreads();
  const int stride = kBlock * static_cast<int>(gridDim.x);
  for (int i = static_cast<int>(blockIdx.x) * kBlock + t; i < n; i += stride) {
    atomicAdd(&mine[values[i]], 1u);
  }
  __syncthreads();
  for (int bin = t; bin < bins; bin += kBlock) {
    atomicAdd(&counts[bin], static_cast<int>(mine[bin]));
  }
}

__global__ void warp_kernel(const int* values, int width, int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const int value = values[lane];
  const auto positive = static_cast<unsigned>(value) >> 1;
  int row = 0;
  const auto write = [&](int result) { out[32 * row++ + lane] = result; };
  write(__shfl_sync(kFull, value, 3, width));
  write(__shfl_up_sync(kFull, value, 2u, width));
  write(__shfl_down_sync(kFull, value, 2u, width));
  write(__shfl_xor_sync(kFull, value, 5, width));
  write(static_cast<int>(__shfl_xor_sync(kFull, static_cast<double>(value), 1)));
  write(static_cast<int>(__shfl_sync(kFull, static_cast<long long>(value) << 32, lane / 2) >> 32));
  write(static_cast<int>(__ballot_sync(kFull, value & 1)));
  write(__any_sync(kFull, value > 0));
  write(__all_sync(kFull, value > 0));
  write(__reduce_add_sync(kFull, value));
  write(static_cast<int>(__reduce_add_sync(kFull, positive)));
  write(__reduce_min_sync(kFull, value));
  write(__reduce_max_sync(kFull, value));
  write(static_cast<int>(__reduce_or_sync(kFull, positive)));
  if (lane < 16) {
    write(__shfl_sync(0x0000ffff, value, 15));
  } else {
    write(__shfl_sync(0xffff0000, value, 16));
  }
}

__global__ void arithmetic_kernel(const unsigned long long* a, const unsigned long long* b, int n,
                                  unsigned long long* out, unsigned* atomics) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const auto low = static_cast<unsigned>(a[i]);
  const auto low_b = static_cast<unsigned>(b[i]);
  int row = 0;
  const auto write = [&](auto result) {
    out[n * row++ + i] = static_cast<unsigned long long>(result);
  };
  write(__popc(low));
  write(__popcll(a[i]));
  write(__ffs(static_cast<int>(low)));
  write(__ffsll(static_cast<long long>(a[i])));
  write(__clz(static_cast<int>(low)));
  write(__clzll(static_cast<long long>(a[i])));
  write(__brev(low));
  write(__umulhi(low, low_b));
  write(__umul64hi(a[i], b[i]));
  write(min(a[i], b[i]));
  write(max(low, low_b));
  write(__float_as_uint(__fadd_rn(__uint_as_float(low & 0x3fffffff), 1.0f)));
  write(__double_as_longlong(
      __dmul_rn(__longlong_as_double(static_cast<long long>(a[i] >> 2)), 3.0)));

  atomicAdd(&atomics[0], low);
  atomicSub(&atomics[1], low);
  atomicMin(&atomics[2], low);
  atomicMax(&atomics[3], low);
  atomicOr(&atomics[4], low);
  atomicExch(&atomics[5], 7u);
  for (unsigned seen = 0; true;) {
    const unsigned before = atomicCAS(&atomics[6], seen, seen + 1);
    if (before == seen) break;
    seen = before;
  }
}

__global__ void count_kernel(int barriers, unsigned long long* total) {
  for (int k = 0; k < barriers; ++k) __syncthreads();
  atomicAdd(total, 1ull);
}

}  // namespace

cudaError_t sum(const int* values, int n, unsigned long long* total, Bug bug, cudaStream_t stream) {
  return launch("sum_kernel", sum_kernel, blocks_for(n, kBlock), kBlock, 0, stream, values, n,
                total, bug);
}

cudaError_t transpose(const float* in, float* out, int rows, int columns, Bug bug,
                      cudaStream_t stream) {
  return launch("transpose_kernel", transpose_kernel,
                dim3(blocks_for(columns, kTile), blocks_for(rows, kTile)), dim3(kTile, kTileRows),
                0, stream, in, out, rows, columns, bug);
}

cudaError_t nearest(const float* x, int n, int d, int* index, Bug bug, cudaStream_t stream) {
  return launch("nearest_kernel", nearest_kernel, blocks_for(n, kRows), kRows * 32,
                sizeof(float) * kTile * static_cast<std::size_t>(d), stream, x, n, d, index, bug);
}

cudaError_t scan(const int* values, int n, int* out, Bug bug, cudaStream_t stream) {
  const auto threads = bug == Bug::partial_warp ? static_cast<unsigned>(n) : 32 * blocks_for(n, 32);
  return launch("scan_kernel", scan_kernel, 1, threads, 0, stream, values, n, out, bug);
}

cudaError_t compact(const int* values, int n, int* out, int* count, cudaStream_t stream) {
  return launch("compact_kernel", compact_kernel, 1, 32 * blocks_for(n, 32), 0, stream, values, n,
                out, count);
}

cudaError_t histogram(const int* values, int n, int* counts, int bins, Bug bug,
                      cudaStream_t stream) {
  return launch("histogram_kernel", histogram_kernel, 3, kBlock,
                sizeof(unsigned) * static_cast<std::size_t>(bins), stream, values, n, counts, bins,
                bug);
}

cudaError_t warp_operations(const int* values, int width, int* out, cudaStream_t stream) {
  return launch("warp_kernel", warp_kernel, 1, 32, 0, stream, values, width, out);
}

cudaError_t arithmetic(const unsigned long long* a, const unsigned long long* b, int n,
                       unsigned long long* out, unsigned* atomics, cudaStream_t stream) {
  return launch("arithmetic_kernel", arithmetic_kernel, blocks_for(n, kBlock), kBlock, 0, stream, a,
                b, n, out, atomics);
}

cudaError_t count_threads(dim3 grid, dim3 block, std::size_t shared_bytes, int barriers,
                          unsigned long long* total, cudaStream_t stream) {
  return launch("count_kernel", count_kernel, grid, block, shared_bytes, stream, barriers, total);
}

}  // namespace lcodec::selftest
