#include "cuda/columns.cuh"
#include "cuda/outcome.hpp"

namespace lcodec::cuda {
namespace {

// Few columns: a thread for every lane, a sector of a row in a block. Many: a line of a row, eight
// lanes a thread.
using Narrow = ColumnTile<8, 64, 16>;
using Wide = ColumnTile<32, 8, 1>;
constexpr std::int64_t kWide = 1 << 14;  // from here on, 512 wide blocks and more

template <class Tile, class T>
Outcome run_tile(const T* x, std::int64_t n, std::int64_t p, T* low, T* high, double* deviation,
                 Stream stream) {
  const auto blocks = static_cast<unsigned>((p + Tile::columns - 1) / Tile::columns);
  return run("column_statistics", column_statistics_kernel<T, Tile>, dim3(blocks),
             dim3(Tile::columns, Tile::row_threads), stream, x, n, p, low, high, deviation);
}

}  // namespace

template <class T>
Outcome column_statistics(const T* x, std::int64_t n, std::int64_t p, T* low, T* high,
                          double* deviation, Stream stream) {
  if (n < 2 || p < 1 || p > INT32_MAX) return outcome(cudaErrorInvalidValue, "column_statistics");
  return p < kWide ? run_tile<Narrow>(x, n, p, low, high, deviation, stream)
                   : run_tile<Wide>(x, n, p, low, high, deviation, stream);
}

#define LCODEC_INSTANTIATE(T)                                                                  \
  template Outcome column_statistics<T>(const T*, std::int64_t, std::int64_t, T*, T*, double*, \
                                        Stream);
LCODEC_INSTANTIATE(float)
LCODEC_INSTANTIATE(double)

}  // namespace lcodec::cuda
