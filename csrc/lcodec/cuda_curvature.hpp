// Products with curvature matrices restricted to selected parameters, on CUDA: entry points. Plain
// C++: no CUDA header, no torch.
//
// lcodec/curvature.hpp says what is computed, and what S and T are. Everything is queued on a
// stream; nothing is allocated and nothing waits. Pointers are to memory of the device. Segments
// are taken on trust, and the kernels stay within the arrays whatever they hold. Sums are added in
// one written tree, other than the CPU's: the order of blocks does not change a bit.
//
// The tree of the two products:
//   dot     tiles of 4096 selected columns. In a tile lane l of 256 takes l, l + 256, ...; then
//           lanes 32 w + i are added over i in halves, and these sums over w in halves. Tiles in
//           order.
//   sum     groups of 32 rows, from the first to the last. Group z of a chunk of `groups` of them
//           (row_groups below) is added to group z of the chunks before; then z, z + 8, ... in
//           order, and these 8 sums in halves.
//   result  fl(fl(sum / n) + fl(damping v)).
// Error as in lcodec/curvature.hpp, with
//   a = 9 + min(16, ceil(size / 256)) + tiles
//   b = 8 + min(32, n) + chunks + ceil(groups / 8).
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/bfloat16.hpp"
#include "lcodec/cuda_engine.hpp"  // Outcome, Stream

namespace lcodec::cuda {

// A matrix by row, and the columns of it that are read: those of `segments`, `size` in all.
template <class S>
struct SelectedColumns {
  const S* data;
  std::int64_t rows, columns;
  std::int64_t stride;           // elements from row to row
  const std::int64_t* segments;  // [count][2]: start and length
  std::int64_t count;
  std::int64_t size;
};

// Rows are taken in chunks of about this many selected bytes, which stay in the second-level cache
// between their two products: the kernel that takes the dots of one chunk adds up the one before.
constexpr std::int64_t kChunkBytes = std::int64_t{12} << 20;

// How many groups of 32 rows a chunk has, and bytes of workspace.
std::int64_t row_groups(std::int64_t n, std::int64_t size, std::int64_t itemsize,
                        std::int64_t chunk_bytes);
std::size_t rows_product_bytes(std::int64_t n, std::int64_t size, std::int64_t m,
                               std::int64_t itemsize, std::int64_t chunk_bytes);

// lcodec::masked_gram_product. size, m >= 1; columns < 2^31.
template <class S, class T>
Outcome masked_gram_product(const SelectedColumns<S>& g, const T* weight, const T* v,
                            std::int64_t m, T damping, T* out, void* workspace,
                            std::int64_t chunk_bytes, Stream stream);

// lcodec::softmax_rows_product; p is contiguous.
template <class S, class T>
Outcome softmax_rows_product(const SelectedColumns<S>& a, const T* p, const T* weight, const T* v,
                             std::int64_t m, T damping, T* out, void* workspace,
                             std::int64_t chunk_bytes, Stream stream);

// lcodec::factored_gram. In a dot 32 products are added in order, then these sums in order:
//   |k_ij - exact| <= gamma_q sum |delta_i delta_j| sum |a_i a_j|,
//   q = 3 + min(32, r) + ceil(r / 32) + min(32, d) + ceil(d / 32).
template <class T>
Outcome factored_gram(const T* delta, std::int64_t delta_stride, std::int64_t r, const T* a,
                      std::int64_t a_stride, std::int64_t d, std::int64_t n, T* k, Stream stream);

}  // namespace lcodec::cuda
