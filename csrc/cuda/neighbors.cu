#include "cuda/neighbors.cuh"
#include "cuda/outcome.hpp"

namespace lcodec::cuda {

template <class T>
Outcome neighbors(const T* columns, const T* factor, std::int64_t n, std::int64_t p, Ties ties,
                  std::uint64_t seed, const std::int64_t* offset, std::int64_t* count,
                  std::int64_t* indices, Stream stream) {
  using Tile = NeighborTile<T>;
  if (n < 2 || n >= INT32_MAX - Tile::size || p < 1) {
    return outcome(cudaErrorInvalidValue, "neighbors");
  }
  const auto blocks = [n](int rows) { return dim3(static_cast<unsigned>((n + rows - 1) / rows)); };
  if (!indices && ties != Ties::average) {
    return run("count_one", count_one_kernel, blocks(kOneThreads), dim3(kOneThreads), stream, n,
               count);
  }
  const auto kernel = factor ? neighbors_kernel<T, true> : neighbors_kernel<T, false>;
  return run("neighbors", kernel, blocks(Tile::rows), dim3(Tile::threads), stream, columns, factor,
             static_cast<int>(n), p, ties, seed, offset, count, indices);
}

#define LCODEC_INSTANTIATE(T)                                                                     \
  template Outcome neighbors<T>(const T*, const T*, std::int64_t, std::int64_t, Ties,             \
                                std::uint64_t, const std::int64_t*, std::int64_t*, std::int64_t*, \
                                Stream);
LCODEC_INSTANTIATE(float)
LCODEC_INSTANTIATE(double)

}  // namespace lcodec::cuda
