// Kernels that test the emulator: each right, and wrong on demand.
#pragma once

#include <cstdint>

#include "cuda/runtime.hpp"

namespace lcodec::selftest {

// Each kernel has some of them.
enum class Bug : int {
  none,
  no_barrier,         // a barrier left out
  divergent_barrier,  // a barrier that part of the block reaches
  other_barrier,      // one barrier for part of the block, another one for the rest
  early_exit,         // threads without work end before a barrier
  wrong_mask,         // a full mask where lanes have ended
  partial_warp,       // a full mask where lanes do not exist
  foreign_mask,       // a lane outside its own mask
  outside_lane,       // a shuffle from a lane outside the mask
  uninitialised,      // shared memory read before it is written
  overrun,            // a write behind the shared memory
};

// total[0] += sum of values, by blocks of 256 that halve in shared memory.
cudaError_t sum(const int* values, int n, unsigned long long* total, Bug bug, cudaStream_t stream);

// out [columns][rows] from in [rows][columns], by tiles.
cudaError_t transpose(const float* in, float* out, int rows, int columns, Bug bug,
                      cudaStream_t stream);

// index[i]: the row nearest to row i of x [n][d], the lowest if several are; a warp a row.
cudaError_t nearest(const float* x, int n, int d, int* index, Bug bug, cudaStream_t stream);

// out[i] = values[0] + ... + values[i] for n <= 1024, one block of n threads rounded up to warps.
cudaError_t scan(const int* values, int n, int* out, Bug bug, cudaStream_t stream);

// The values that are not zero, in order, for n <= 1024; count[0] is how many, count[1] and
// count[2] whether any and all are.
cudaError_t compact(const int* values, int n, int* out, int* count, cudaStream_t stream);

// counts[v] += how often v is among the values, which are in [0, bins).
cudaError_t histogram(const int* values, int n, int* counts, int bins, Bug bug,
                      cudaStream_t stream);

// One warp; rows of out [kWarpResults][32], each what tests/test_emulation.py says.
constexpr int kWarpResults = 15;
cudaError_t warp_operations(const int* values, int width, int* out, cudaStream_t stream);

// Rows of out [kArithmeticResults][n], and atomics [kAtomicResults], likewise.
constexpr int kArithmeticResults = 13;
constexpr int kAtomicResults = 7;
cudaError_t arithmetic(const unsigned long long* a, const unsigned long long* b, int n,
                       unsigned long long* out, unsigned* atomics, cudaStream_t stream);

// total[0] += the number of threads, each of which waits for its block `barriers` times.
cudaError_t count_threads(dim3 grid, dim3 block, std::size_t shared_bytes, int barriers,
                          unsigned long long* total, cudaStream_t stream);

}  // namespace lcodec::selftest
