#include <algorithm>

#include "cuda/factored_gram.cuh"
#include "cuda/outcome.hpp"
#include "cuda/rows_product.cuh"
#include "cuda/segments.cuh"
#include "lcodec/cuda_curvature.hpp"

namespace lcodec::cuda {
namespace {

constexpr std::int64_t kMostGroups = 1024;
constexpr std::int64_t kMostBlocks = INT32_MAX;
constexpr std::int64_t kMostBlocksY = 65535;
constexpr std::size_t kAlignment = 256;

std::int64_t quotient_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::size_t aligned(std::int64_t elements, std::size_t itemsize) {
  return (static_cast<std::size_t>(elements) * itemsize + kAlignment - 1) / kAlignment * kAlignment;
}

dim3 grid_of(std::int64_t x, std::int64_t y = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

// Arrays of the workspace, in elements.
struct Sizes {
  std::int64_t column, dots, partial;
  Sizes(std::int64_t n, std::int64_t size, std::int64_t m, std::int64_t groups)
      : column(size),
        dots(n > 0 ? 2 * groups * kGroupRows * m * quotient_up(size, kTilePositions) : 0),
        partial(n > 0 ? groups * m * size : 0) {}
};

template <class S, class T, int kVectors>
Outcome run_chunks(const RowsProduct<S, T>& a, Stream stream) {
  const std::int64_t vector_groups = quotient_up(a.m, kVectors);
  if (vector_groups > kMostBlocksY) return outcome(cudaErrorInvalidValue, "rows_product");
  const std::int64_t pieces = quotient_up(a.size, kProductThreads);
  const std::int64_t chunk_rows = a.groups * kGroupRows;
  const std::int64_t chunks = quotient_up(a.n, chunk_rows);
  const auto rows_of = [&](std::int64_t chunk) {
    return std::clamp<std::int64_t>(a.n - chunk * chunk_rows, 0, chunk_rows);
  };
  for (std::int64_t chunk = 0; chunk <= chunks; ++chunk) {
    const std::int64_t adding =
        chunk > 0 ? quotient_up(rows_of(chunk - 1), kGroupRows) * pieces : 0;
    const std::int64_t blocks = adding + quotient_up(rows_of(chunk), kDotRows) * a.tiles;
    if (blocks > kMostBlocks) return outcome(cudaErrorInvalidValue, "rows_product");
    const Outcome result =
        run("rows_product", rows_product_kernel<S, T, kVectors>, grid_of(blocks, vector_groups),
            dim3(kProductThreads), stream, a, chunk, adding);
    if (!result.ok()) return result;
  }
  return {};
}

template <class S, class T>
Outcome rows_product(const SelectedColumns<S>& x, const T* p, const T* weight, const T* v,
                     std::int64_t m, T damping, T* out, void* workspace, std::int64_t chunk_bytes,
                     Stream stream) {
  const std::int64_t n = x.rows;
  const std::int64_t size = x.size;
  const std::int64_t columns = x.columns;
  const std::int64_t elements = m * size;
  if (n < 0 || columns < 1 || columns > INT32_MAX || size < 1 || m < 1 || x.count >= kMostBlocks ||
      quotient_up(elements, kProductThreads) > kMostBlocks) {
    return outcome(cudaErrorInvalidValue, "rows_product");
  }
  const std::int64_t groups = row_groups(n, size, sizeof(S), chunk_bytes);
  const Sizes sizes(n, size, m, groups);
  unsigned char* const base = static_cast<unsigned char*>(workspace);
  auto* const column = reinterpret_cast<std::int32_t*>(base);
  T* const dots = reinterpret_cast<T*>(base + aligned(sizes.column, sizeof(std::int32_t)));
  T* const partial = dots + aligned(sizes.dots, sizeof(T)) / sizeof(T);
  const RowsProduct<S, T> a{x.data, n, x.stride, size, m,       column,
                            v,      p, weight,   dots, partial, quotient_up(size, kTilePositions),
                            groups};
  if (n > 0) {
    const Outcome result =
        run("columns", columns_kernel, grid_of(x.count + 1, kSlices), dim3(kSegmentThreads), stream,
            x.segments, x.count, columns, size, column);
    if (!result.ok()) return result;
    const Outcome added = m == 1 ? run_chunks<S, T, 1>(a, stream) : run_chunks<S, T, 4>(a, stream);
    if (!added.ok()) return added;
  }
  return run("finish", finish_kernel<S, T>, grid_of(quotient_up(elements, kProductThreads)),
             dim3(kProductThreads), stream, a, damping, out);
}

}  // namespace

std::int64_t row_groups(std::int64_t n, std::int64_t size, std::int64_t itemsize,
                        std::int64_t chunk_bytes) {
  const std::int64_t group_bytes = kGroupRows * std::max<std::int64_t>(size, 1) * itemsize;
  const std::int64_t most = std::clamp<std::int64_t>(quotient_up(n, kGroupRows), 1, kMostGroups);
  return std::clamp<std::int64_t>(chunk_bytes / group_bytes, 1, most);
}

std::size_t rows_product_bytes(std::int64_t n, std::int64_t size, std::int64_t m,
                               std::int64_t itemsize, std::int64_t chunk_bytes) {
  const Sizes sizes(n, size, m, row_groups(n, size, itemsize, chunk_bytes));
  const std::size_t computed = itemsize == sizeof(double) ? sizeof(double) : sizeof(float);
  return aligned(sizes.column, sizeof(std::int32_t)) + aligned(sizes.dots, computed) +
         aligned(sizes.partial, computed);
}

template <class S, class T>
Outcome masked_gram_product(const SelectedColumns<S>& g, const T* weight, const T* v,
                            std::int64_t m, T damping, T* out, void* workspace,
                            std::int64_t chunk_bytes, Stream stream) {
  return rows_product<S, T>(g, nullptr, weight, v, m, damping, out, workspace, chunk_bytes, stream);
}

template <class S, class T>
Outcome softmax_rows_product(const SelectedColumns<S>& a, const T* p, const T* weight, const T* v,
                             std::int64_t m, T damping, T* out, void* workspace,
                             std::int64_t chunk_bytes, Stream stream) {
  return rows_product(a, p, weight, v, m, damping, out, workspace, chunk_bytes, stream);
}

template <class T>
Outcome factored_gram(const T* delta, std::int64_t delta_stride, std::int64_t r, const T* a,
                      std::int64_t a_stride, std::int64_t d, std::int64_t n, T* k, Stream stream) {
  const std::int64_t tiles = quotient_up(n, kGramTile);
  if (n < 1 || tiles > kMostBlocksY) return outcome(cudaErrorInvalidValue, "factored_gram");
  return run("factored_gram", factored_gram_kernel<T>, grid_of(tiles, tiles),
             dim3(kGramThreads, kGramThreads), stream, delta, delta_stride, r, a, a_stride, d, n,
             k);
}

#define LCODEC_INSTANTIATE(S, T)                                                                  \
  template Outcome masked_gram_product<S, T>(const SelectedColumns<S>&, const T*, const T*,       \
                                             std::int64_t, T, T*, void*, std::int64_t, Stream);   \
  template Outcome softmax_rows_product<S, T>(const SelectedColumns<S>&, const T*, const T*,      \
                                              const T*, std::int64_t, T, T*, void*, std::int64_t, \
                                              Stream);
LCODEC_INSTANTIATE(float, float)
LCODEC_INSTANTIATE(double, double)
LCODEC_INSTANTIATE(Bfloat16, float)

#define LCODEC_INSTANTIATE_GRAM(T)                                                                \
  template Outcome factored_gram<T>(const T*, std::int64_t, std::int64_t, const T*, std::int64_t, \
                                    std::int64_t, std::int64_t, T*, Stream);
LCODEC_INSTANTIATE_GRAM(float)
LCODEC_INSTANTIATE_GRAM(double)

}  // namespace lcodec::cuda
