#include "lcodec/engine.hpp"

#include <algorithm>
#include <vector>

#include "common/fixed_point.hpp"
#include "common/random.hpp"
#include "parallel.hpp"
#include "score_kernel.hpp"

namespace lcodec {
namespace {

template <class T>
Kernels<T> pick_kernels(SimdLevel level);
template <>
Kernels<float> pick_kernels(SimdLevel level) {
  return kernels_for(level).f32;
}
template <>
Kernels<double> pick_kernels(SimdLevel level) {
  return kernels_for(level).f64;
}

// Squared distances of row i to all rows in the conditioning set, columns added in order.
template <class T>
void distances(const Problem<T>& problem, const Kernels<T>& kernels, std::int64_t i, T* out) {
  std::fill_n(out, problem.n, T{0});
  for (std::int64_t a = 0; a < problem.k; ++a) {
    const std::int64_t f = problem.column[a];
    kernels.accumulate(problem.x + f * problem.n, problem.n, i, problem.factor[f], out);
  }
}

// Rows of one piece of work: small enough that every thread gets several pieces and that a
// cancelled call ends soon (2^28 steps are well under a second).
std::int64_t rows_per_piece(std::int64_t n, std::int64_t groups, std::int64_t steps_per_row,
                            int threads) {
  std::int64_t rows = n;
  while (rows > 16 && (groups * (n / rows) < 8 * threads || rows * steps_per_row > (1 << 28)))
    rows = (rows + 1) / 2;
  return rows;
}

std::int64_t pieces_of(std::int64_t total, std::int64_t size) { return (total + size - 1) / size; }

// Neighbours of row i used under the tie rule, in increasing order: visit(j) for each of them.
template <class T, class Visit>
void visit_neighbors(const Problem<T>& problem, const Kernels<T>& kernels, std::int64_t i,
                     const T* distance, const Visit& visit) {
  const T nearest = kernels.minimum(distance, problem.n, i);
  std::int64_t skip = 0;
  if (problem.ties == Ties::random) {
    std::int64_t tied = 0;
    for (std::int64_t j = 0; j < problem.n; ++j) tied += j != i && distance[j] == nearest;
    skip = pick(tie_hash(problem.seed, i), tied);
  }
  for (std::int64_t j = 0; j < problem.n; ++j) {
    if (j == i || distance[j] != nearest || skip-- > 0) continue;
    visit(j);
    if (problem.ties != Ties::average) return;
  }
}

// Calls row(i, distances of row i) for every row, in parallel.
template <class T, class Row>
Status for_each_row(const Problem<T>& problem, const Execution& execution, const Row& row) {
  const Kernels<T> kernels = pick_kernels<T>(execution.level);
  const std::int64_t rows =
      rows_per_piece(problem.n, 1, problem.n * (problem.k + 2), execution.threads);
  return parallel_for(pieces_of(problem.n, rows), execution, [&] {
    return [&, distance = std::vector<T>(static_cast<std::size_t>(problem.n))](
               std::int64_t piece) mutable {
      const std::int64_t end = std::min(problem.n, (piece + 1) * rows);
      for (std::int64_t i = piece * rows; i < end; ++i) {
        distances(problem, kernels, i, distance.data());
        row(i, kernels, distance.data());
      }
    };
  });
}

// Candidates packed side by side: tile[j][l] = x of row j in the l-th of them.
template <class T>
void pack(const Problem<T>& problem, const std::int64_t* candidate, std::int64_t used, int lanes,
          T* tile, T* factor) {
  std::fill_n(tile, problem.n * lanes, T{0});
  std::fill_n(factor, lanes, T{0});
  for (std::int64_t l = 0; l < used; ++l) {
    const T* column = problem.x + candidate[l] * problem.n;
    for (std::int64_t j = 0; j < problem.n; ++j) tile[j * lanes + l] = column[j];
    factor[l] = problem.factor[candidate[l]];
  }
}

}  // namespace

template <class T>
Status score(const Problem<T>& problem, const std::int64_t* candidate, std::int64_t m,
             std::int64_t* whole, std::int64_t* fraction, const Execution& execution) {
  const Kernels<T> kernels = pick_kernels<T>(execution.level);
  const std::int64_t n = problem.n;
  const int lanes = kernels.lanes;
  // Tiles that share a row's distances, as many as stay in the second-level cache.
  const std::int64_t tile_bytes = n * lanes * static_cast<std::int64_t>(sizeof(T));
  const std::int64_t tiles = std::clamp<std::int64_t>((1 << 19) / tile_bytes, 1, 8);
  const std::int64_t group = tiles * lanes;
  const std::int64_t groups = pieces_of(m, group);
  const std::int64_t rows = rows_per_piece(n, groups, n * group, execution.threads);
  const std::int64_t row_pieces = pieces_of(n, rows);
  std::fill_n(whole, m, 0);
  std::fill_n(fraction, m, 0);
  std::mutex mutex;

  struct Scratch {
    std::vector<T> distance, tile, factor;
    std::vector<std::int64_t> sum, count, whole, fraction;
  };
  return parallel_for(groups * row_pieces, execution, [&] {
    const auto size = [](std::int64_t k) { return static_cast<std::size_t>(k); };
    Scratch scratch{std::vector<T>(size(n)),
                    std::vector<T>(size(n * group)),
                    std::vector<T>(size(group)),
                    std::vector<std::int64_t>(size(lanes)),
                    std::vector<std::int64_t>(size(lanes)),
                    std::vector<std::int64_t>(size(group)),
                    std::vector<std::int64_t>(size(group))};
    return [&, s = std::move(scratch)](std::int64_t piece) mutable {
      const std::int64_t first = piece / row_pieces * group;
      const std::int64_t used = std::min(group, m - first);
      const std::int64_t used_tiles = pieces_of(used, lanes);
      for (std::int64_t t = 0; t < used_tiles; ++t)
        pack(problem, candidate + first + t * lanes, std::min<std::int64_t>(lanes, used - t * lanes),
             lanes, s.tile.data() + t * n * lanes, s.factor.data() + t * lanes);
      std::fill(s.whole.begin(), s.whole.end(), 0);
      std::fill(s.fraction.begin(), s.fraction.end(), 0);
      const std::int64_t begin = piece % row_pieces * rows;
      const std::int64_t end = std::min(n, begin + rows);
      for (std::int64_t i = begin; i < end; ++i) {
        distances(problem, kernels, i, s.distance.data());
        for (std::int64_t t = 0; t < used_tiles; ++t) {
          kernels.scan({n, i, s.distance.data(), s.tile.data() + t * n * lanes,
                        s.factor.data() + t * lanes, problem.rank, problem.ties,
                        tie_hash(problem.seed, i), s.sum.data(), s.count.data()});
          for (int l = 0; l < lanes; ++l) {
            const auto lane = static_cast<std::size_t>(l);
            const auto slot = static_cast<std::size_t>(t * lanes + l);
            const FixedPoint mean = fixed_point(s.sum[lane], s.count[lane]);
            s.whole[slot] += mean.whole;
            s.fraction[slot] += mean.fraction;
          }
        }
      }
      const std::lock_guard<std::mutex> lock(mutex);  // integers: the order does not matter
      for (std::int64_t l = 0; l < used; ++l) {
        whole[first + l] += s.whole[static_cast<std::size_t>(l)];
        fraction[first + l] += s.fraction[static_cast<std::size_t>(l)];
      }
    };
  });
}

template <class T>
Status row_sums(const Problem<T>& problem, std::int64_t* sum, std::int64_t* count,
                const Execution& execution) {
  const auto row = [&](std::int64_t i, const Kernels<T>& kernels, const T* distance) {
    std::int64_t total = 0;
    std::int64_t used = 0;
    visit_neighbors(problem, kernels, i, distance, [&](std::int64_t j) {
      total += std::min(problem.rank[i], problem.rank[j]);
      ++used;
    });
    sum[i] = total;
    count[i] = used;
  };
  return for_each_row(problem, execution, row);
}

template <class T>
Status neighbors(const Problem<T>& problem, const std::int64_t* offset, std::int64_t* count,
                 std::int64_t* indices, const Execution& execution) {
  const auto row = [&](std::int64_t i, const Kernels<T>& kernels, const T* distance) {
    std::int64_t used = 0;
    visit_neighbors(problem, kernels, i, distance, [&](std::int64_t j) {
      if (indices) indices[offset[i] + used] = j;
      ++used;
    });
    if (!indices) count[i] = used;
  };
  return for_each_row(problem, execution, row);
}

#define LCODEC_INSTANTIATE(T)                                                                     \
  template Status score<T>(const Problem<T>&, const std::int64_t*, std::int64_t, std::int64_t*,   \
                           std::int64_t*, const Execution&);                                      \
  template Status row_sums<T>(const Problem<T>&, std::int64_t*, std::int64_t*, const Execution&); \
  template Status neighbors<T>(const Problem<T>&, const std::int64_t*, std::int64_t*,             \
                               std::int64_t*, const Execution&);
LCODEC_INSTANTIATE(float)
LCODEC_INSTANTIATE(double)

}  // namespace lcodec
