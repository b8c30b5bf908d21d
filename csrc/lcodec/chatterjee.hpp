// The sums behind Chatterjee's coefficient xi, of many columns x and many responses y. No Python.
//
// Everything is an integer, or a double that is added up in one order, so results are the same for
// every thread count. n is 10^6 at most.
#pragma once

#include <cstdint>
#include <vector>

#include "lcodec/engine.hpp"  // Execution, Status, Ties

namespace lcodec {

// An unsigned integer of 128 bits.
struct Wide {
  std::uint64_t high = 0;
  std::uint64_t low = 0;
};

// What xi and its null distribution know of a response, with max ranks R and L = #{y_j >= y_i}.
struct RankSums {
  std::int64_t denominator = 0;  // sum L_i (n - L_i)
  std::int64_t sum = 0;          // sum R_i
  std::int64_t squares = 0;      // sum R_i^2
  std::int64_t minima = 0;       // sum_ij k_ij, with k_ij = min(R_i, R_j)
  Wide minima_squares;           // sum_ij k_ij^2
  Wide minima_rows;              // sum_i (sum_j k_ij)^2
  Wide distance_rows;            // sum_i (sum_j |R_i - R_j|)^2
  double cube = 0;               // trace of the cube of k, centred by rows and columns, over n^3
};

// The lengths sum |R_(k+1) - R_(k)| in the order of one column x, of all responses; with
// Ties::average their expectations over the orders of tied rows, which are sums of fractions:
// of response j it is sum_d length[j][d] / denominator[d].
//
// Over pairs of rows the length is sum_{i != j} a_ij |R_i - R_j|. With row sums a_i. of a,
// sum_i a_i.^2 = sum_d rows[d] / denominator[d] / 4, sum_ij a_ij^2 = sum_d squares[d] /
// denominator[d] / 2.
struct PathSums {
  std::vector<std::int64_t> denominator;  // increasing; only the common one up to 2^20
  std::vector<std::int64_t> rows;
  std::vector<std::int64_t> squares;
  std::vector<std::int64_t> length;  // [responses][denominators]
  double cube = 0;                   // trace of the cube of a, centred; 0 where nothing is averaged
};

// The sums of x [k][n] and y [m][n]; `finite` is false, and nothing else is filled, where a value
// is not. O((k + m) n log n + k m n) time, O((k + m) n) memory. Twin:
// lcodec_ext/dependence/backends/reference.py.
Status chatterjee(const double* x, std::int64_t k, const double* y, std::int64_t m, std::int64_t n,
                  Ties ties, std::uint64_t seed, std::vector<PathSums>& paths,
                  std::vector<RankSums>& ranks, bool& finite, const Execution& execution);

}  // namespace lcodec
