// Products with curvature matrices restricted to selected parameters, on the CPU: entry points. No
// Python, no torch.
//
// S is what a matrix is stored in and T what is computed in: float and float, double and double,
// Bfloat16 and float. Every product and sum is rounded in T, none is fused. Results are the same
// bits for every thread count and SIMD level: sums are added in one written tree.
//
// The tree of the two products, with L = 128 / sizeof(T) lanes (32 or 16):
//   dot     over the columns of a row: lane l takes elements l, l + L, ... of the first segment,
//           then those of the next one, and so on; then lanes L/2 .. L-1 are added to 0 .. L/2-1,
//           and so on.
//   sum     over rows: chunks of max(32, ceil(n / 64)) rows, each from its first row to its last;
//           then chunk 1 is added to chunk 0, 3 to 2, ..., then 2 to 0, ..., and so on. At most 64
//           chunks.
//   result  fl(fl(sum / n) + fl(damping v)).
// Columns of v are independent of each other: several at once give the bits of one by one.
//
// Error, with u the unit roundoff of T (2^-24 or 2^-53) and gamma_q = q u / (1 - q u). A term
// passes at most
//   a = 1 + sum over segments of ceil(length / L) + log2 L     roundings in a dot,
//   b = min(n, rows of a chunk) + ceil(log2(chunks)) + 5        from the dot to the result
// (a factor for the row 1 or more, its product 1, the sum, the quotient 1, the final sum 1), and by
// the standard model (Higham, Accuracy and Stability, 3.1 and 3.4), without over- or underflow,
//   |out_k - exact_k| <= gamma_{a+b} (sum_i |w_i g_ik| sum_l |g_il v_l| / n + |damping v_k|).
// For softmax_rows_product a grows by m + 2 and the row's factor is bounded by
//   |w_i p_ij| (sum_l |a_il v_jl| + sum_j' |p_ij'| sum_l |a_il v_j'l|).
// CPU and CUDA differ by at most the sum of their bounds.
#pragma once

#include <cstdint>

#include "common/bfloat16.hpp"
#include "lcodec/engine.hpp"  // Execution, Status

namespace lcodec {

// Columns [start, start + length) of a matrix; length may be 0.
struct Segment {
  std::int64_t start, length;
};

// A matrix by row, and the columns of it that are read: those of `segments`, in their order, `size`
// in all.
template <class S>
struct SelectedColumns {
  const S* data;
  std::int64_t rows;
  std::int64_t stride;  // elements from row to row
  const Segment* segments;
  std::int64_t count;  // of segments
  std::int64_t size;
};

// out_j = (1/n) sum_i w_i g_i (g_i . v_j) + damping v_j for the m rows v_j of v [m][size]; out
// likewise, and apart from the inputs. weight [n], or null for ones. With no rows the sum is 0.
//
// The selected columns are read once from memory: a tile of rows stays in the cache between its two
// products (with 5 vectors and more, whose own elements weigh more, in the third-level cache).
// 4 n m size operations. Scratch: m size elements of T for every piece of work (4 for each thread,
// from 8 to 64 in all), and 3 times that for every thread.
template <class S, class T>
Status masked_gram_product(const SelectedColumns<S>& g, const T* weight, const T* v, std::int64_t m,
                           T damping, T* out, const Execution& execution);

// out_j = (1/n) sum_i q_ij a_i + damping v_j with u_ij = a_i . v_j and
// q_ij = w_i p_ij (u_ij - sum_j' p_ij' u_ij'), j' ascending: the Hessian of the mean softmax
// cross-entropy in m rows of a linear layer with inputs a_i and probabilities p [n][m] of these
// rows. One pass over a, as above.
template <class S, class T>
Status softmax_rows_product(const SelectedColumns<S>& a, const T* p, const T* weight, const T* v,
                            std::int64_t m, T damping, T* out, const Execution& execution);

// k_ij = (delta_i . delta_j)(a_i . a_j) for all rows of delta [n][r] and a [n][d], rows
// delta_stride and a_stride apart: the Gram matrix of the rows delta_i x a_i, which are never
// formed. k [n][n] is symmetric, bit for bit. n^2 (r + d) operations; k is written once and nothing
// else is stored. Dots as above, with one segment:
//   |k_ij - exact| <= gamma_q sum |delta_i delta_j| sum |a_i a_j|,
//   q = 3 + ceil(r / L) + ceil(d / L) + 2 log2 L.
template <class T>
Status factored_gram(const T* delta, std::int64_t delta_stride, std::int64_t r, const T* a,
                     std::int64_t a_stride, std::int64_t d, std::int64_t n, T* k,
                     const Execution& execution);

}  // namespace lcodec
