#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/at.hpp"
#include "cpu/nearest.hpp"
#include "lcodec/engine.hpp"

namespace lcodec {
namespace {

using Index = std::int32_t;

// The points nearest to one, until their rows are k: those nearer than the k-th row, and those that
// are as near as it.
template <class T>
class Around {
 public:
  explicit Around(std::int64_t k) : k_(k) {}

  void clear() {
    far_ = std::numeric_limits<T>::infinity();
    rows_ = 0;
    nearer_.clear();
    tied_.clear();
  }

  // Points farther than this are not wanted.
  T far() const { return far_; }

  void add(Index point, std::int64_t rows, T distance) {
    if (distance == far_) {
      tied_.push_back({distance, point, rows});
      return;
    }
    nearer_.push_back({distance, point, rows});
    std::push_heap(nearer_.begin(), nearer_.end());
    rows_ += rows;
    while (rows_ >= k_) {
      far_ = nearer_.front().distance;
      tied_.clear();
      while (!nearer_.empty() && nearer_.front().distance == far_) {
        std::pop_heap(nearer_.begin(), nearer_.end());
        tied_.push_back(nearer_.back());
        nearer_.pop_back();
        rows_ -= tied_.back().rows;
      }
    }
  }

  // The sum over k rows, from sum_of(point) for a point's rows.
  template <class SumOf>
  void sum(const SumOf& sum_of, std::int64_t& whole, std::int64_t& rest, std::int64_t& tied) const {
    whole = 0;
    for (const Near& near : nearer_) whole += sum_of(near.point);
    tied = 0;
    std::int64_t of_tied = 0;
    for (const Near& near : tied_) {
      tied += near.rows;
      of_tied += sum_of(near.point);
    }
    of_tied *= k_ - rows_;  // up to 10^6 of 10^6 ranks of 10^6
    whole += of_tied / tied;
    rest = of_tied % tied;
  }

 private:
  struct Near {
    T distance;
    Index point;
    std::int64_t rows;
    bool operator<(const Near& other) const { return distance < other.distance; }
  };

  std::int64_t k_;
  T far_ = std::numeric_limits<T>::infinity();
  std::int64_t rows_ = 0;  // of the points that are nearer, less than k
  std::vector<Near> nearer_, tied_;
};

}  // namespace

template <class T>
Status nearest_minima(const Columns<T>& columns, const std::int32_t* rank, std::int64_t k,
                      std::int64_t* whole, std::int64_t* rest, std::int64_t* tied,
                      const Execution& execution) {
  const DefaultFloats floats;
  const Kernels<T> kernels = pick_kernels<T>(execution.level);
  const std::int64_t n = columns.n;
  const std::vector<T> factors(columns.factor, columns.factor + columns.p);
  // rows numbered by rank, for RankSums
  std::vector<Index> order(at(n));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](Index a, Index b) { return rank[a] != rank[b] ? rank[a] < rank[b] : a < b; });
  std::vector<Index> ascending(at(n));
  std::vector<T> table(at(columns.p * n));
  std::vector<const T*> values;
  for (std::int64_t row = 0; row < n; ++row) ascending[at(row)] = rank[order[at(row)]];
  for (std::int64_t f = 0; f < columns.p; ++f) {
    T* column = table.data() + f * n;
    for (std::int64_t row = 0; row < n; ++row) column[row] = columns.x[f * n + order[at(row)]];
    values.push_back(column);
  }
  const auto write = [&](Index own, const Around<T>& around, const auto& sum_of) {
    const Index row = order[at(own)];
    around.sum(sum_of, whole[row], rest[row], tied[row]);
  };

  if (columns.p > kTreeColumns) {
    return compare_rows(values, factors, n, k, kernels, execution, [&] {
      return [&, around = Around<T>(k)](Index own, Distances<T> others) mutable {
        around.clear();
        for (std::int64_t a = 0; a < others.size; ++a)
          if (others.distance[a] <= around.far() && others.row(a) != own)
            around.add(others.row(a), 1, others.distance[a]);
        write(own, around, [&](Index other) -> std::int64_t {
          return std::min(ascending[at(own)], ascending[at(other)]);
        });
      };
    });
  }

  Groups<T> groups(n);
  for (const T* x : values) groups.refine(x);
  Spatial<T> space;
  space.build(values, factors, groups.of_row, groups.count);
  const RankSums<T> rank_sums(space, ascending.data());
  constexpr std::int64_t block = 256;
  return parallel_for((n + block - 1) / block, execution, [&] {
    return [&, around = Around<T>(k)](std::int64_t piece) mutable {
      for (std::int64_t a = piece * block; a < std::min(n, (piece + 1) * block); ++a) {
        const Index own = space.row(a);
        const Index self = space.point_of(own);
        around.clear();
        if (space.rows_of(self) > 1) around.add(self, space.rows_of(self) - 1, T{0});
        space.within(
            kernels, self, [&] { return around.far(); },
            [&](Index point, T distance) { around.add(point, space.rows_of(point), distance); });
        write(own, around,
              [&](Index point) { return rank_sums({space.begin(point), space.end(point)}, own); });
      }
    };
  });
}

#define LCODEC_INSTANTIATE(T)                                                             \
  template Status nearest_minima<T>(const Columns<T>&, const std::int32_t*, std::int64_t, \
                                    std::int64_t*, std::int64_t*, std::int64_t*,          \
                                    const Execution&);
LCODEC_INSTANTIATE(float)
LCODEC_INSTANTIATE(double)

}  // namespace lcodec
