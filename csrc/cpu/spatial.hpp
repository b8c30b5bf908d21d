// Rows grouped by their values in the conditioning set, and a k-d tree over the groups.
//
// Bounds are exact in floating point: the tree computes the distance from a row to a box with the
// operations of the distance between rows, in the same order, and rounding is monotone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/at.hpp"
#include "cpu/kernels.hpp"
#include "lcodec/engine.hpp"

namespace lcodec {

template <class T>
class Spatial {
 public:
  using Index = std::int32_t;

  // columns: k of them, each [n] by row; group[row]: 0 .. groups - 1, rows of equal values alike.
  void build(const std::vector<const T*>& columns, const std::vector<T>& factors,
             const std::vector<Index>& group, Index groups) {
    dims_ = static_cast<std::int64_t>(columns.size());
    factor_ = factors;
    const std::size_t n = group.size();
    const auto g = static_cast<std::size_t>(groups);
    std::vector<Index> example(g);
    for (std::size_t row = n; row-- > 0;) example[at(group[row])] = static_cast<Index>(row);
    // by_tree[point] = group, reordered in place while the tree is built
    std::vector<Index> by_tree(g);
    std::iota(by_tree.begin(), by_tree.end(), 0);
    points_.resize(at(dims_) * g);
    std::vector<T> raw(at(dims_) * g);
    for (std::size_t d = 0; d < columns.size(); ++d)
      for (std::size_t a = 0; a < g; ++a) raw[d * g + a] = columns[d][example[a]];
    if (dims_ == 1)  // rows at neighbouring positions are neighbours then
      std::sort(by_tree.begin(), by_tree.end(),
                [&](Index a, Index b) { return raw[at(a)] < raw[at(b)]; });
    nodes_.clear();
    boxes_.clear();
    split(raw, by_tree, 0, groups);
    queries_.resize(points_.size());
    for (std::size_t d = 0; d < columns.size(); ++d)
      for (std::size_t a = 0; a < g; ++a) {
        points_[d * g + a] = raw[d * g + at(by_tree[a])];
        queries_[a * columns.size() + d] = points_[d * g + a];
      }
    std::vector<Index> place(g);
    for (std::size_t a = 0; a < g; ++a) place[at(by_tree[a])] = static_cast<Index>(a);
    offset_.assign(g + 1, 0);
    point_.resize(n);
    for (std::size_t row = 0; row < n; ++row) {
      point_[row] = place[at(group[row])];
      ++offset_[at(point_[row]) + 1];
    }
    std::partial_sum(offset_.begin(), offset_.end(), offset_.begin());
    row_.resize(n);
    std::vector<Index> cursor(offset_.begin(), offset_.end() - 1);
    for (std::size_t row = 0; row < n; ++row)
      row_[at(cursor[at(point_[row])]++)] = static_cast<Index>(row);
  }

  Index size() const { return static_cast<Index>(offset_.size()) - 1; }
  Index begin(Index point) const { return offset_[at(point)]; }
  Index end(Index point) const { return offset_[at(point) + 1]; }
  std::uint32_t rows_of(Index point) const {
    return static_cast<std::uint32_t>(end(point) - begin(point));
  }
  bool single() const { return offset_.size() == row_.size() + 1; }  // no two rows in one point
  Index row(std::int64_t position) const { return row_[at(position)]; }
  const Index* rows() const { return row_.data(); }
  std::int64_t rows_in_all() const { return static_cast<std::int64_t>(row_.size()); }
  Index point_of(Index row) const { return point_[at(row)]; }
  const std::vector<Index>& offsets() const { return offset_; }

  // Visits every point but `self` whose squared distance from it is at most `limit()`, which may
  // fall meanwhile: visit(point, distance). Begins with the own leaf and its neighbours, so that
  // a falling limit falls early.
  template <class Limit, class Visit>
  void within(const Kernels<T>& kernels, Index self, const Limit& limit, const Visit& visit) const {
    const T* query = this->query(self);
    std::int32_t stack[64];
    int top = 0;
    T near[kLeaf];
    const auto look = [&](const Node& leaf) {
      kernels.distances(points_.data() + leaf.begin, size(), leaf.end - leaf.begin, dims_, query,
                        factor_.data(), near);
      for (Index a = leaf.begin; a < leaf.end; ++a)
        if (near[a - leaf.begin] <= limit() && a != self) visit(a, near[a - leaf.begin]);
    };
    std::int32_t own = 0;
    while (nodes_[at(own)].right != 0) {
      const std::int32_t right = nodes_[at(own)].right;
      const bool to_right = self >= nodes_[at(right)].begin;
      stack[top++] = to_right ? own + 1 : right;
      own = to_right ? right : own + 1;
    }
    look(nodes_[at(own)]);
    while (top > 0) {
      const std::int32_t id = stack[--top];
      const Node& node = nodes_[at(id)];
      if (box_distance(id, query) > limit()) continue;
      if (node.right == 0) {
        look(node);
        continue;
      }
      const bool left_first = query[node.dim] <= node.middle;
      stack[top++] = left_first ? node.right : id + 1;
      stack[top++] = left_first ? id + 1 : node.right;
    }
  }

  // Points [begin, end) of all leaves that may hold one within a squared radius of one of the
  // points [first, last): visit(begin, end), in increasing order.
  template <class Visit>
  void near_block(Index first, Index last, T radius, const Visit& visit) const {
    std::vector<T> box;
    for (std::int64_t d = 0; d < dims_; ++d) {
      const T* column = points_.data() + at(d) * at(size());
      const auto [low, high] = std::minmax_element(column + first, column + last);
      box.push_back(*low);
      box.push_back(*high);
    }
    std::int32_t stack[64];
    int top = 0;
    stack[top++] = 0;
    while (top > 0) {
      const std::int32_t id = stack[--top];
      const Node& node = nodes_[at(id)];
      const T* other = boxes_.data() + at(id) * at(2 * dims_);
      T sum = 0;
      for (std::size_t d = 0; d < at(dims_); ++d) {
        const T gap = box[2 * d + 1] < other[2 * d]   ? other[2 * d] - box[2 * d + 1]
                      : other[2 * d + 1] < box[2 * d] ? box[2 * d] - other[2 * d + 1]
                                                      : T{0};
        const T scaled = gap * factor_[d];
        sum = sum + scaled * scaled;
      }
      if (sum > radius) continue;
      if (node.right != 0) {
        stack[top++] = node.right;
        stack[top++] = id + 1;
      } else {
        visit(node.begin, node.end);
      }
    }
  }

  const T* query(Index point) const { return queries_.data() + at(point) * at(dims_); }
  const T* points() const { return points_.data(); }
  const T* factors() const { return factor_.data(); }

  // Squared distance from a point to the nearest other one; infinity for a single point.
  T nearest(const Kernels<T>& kernels, Index self) const {
    T best = std::numeric_limits<T>::infinity();
    within(kernels, self, [&] { return best; }, [&](Index, T d) { best = std::min(best, d); });
    return best;
  }

  // A first guess of the radius that holds about `wanted` points around one.
  T guess_radius(const Kernels<T>& kernels, Index self, std::int64_t wanted) const {
    // the farthest point of the own leaf, scaled by volume
    std::int32_t id = 0;
    while (nodes_[at(id)].right != 0) {
      const std::int32_t right = nodes_[at(id)].right;
      id = self >= nodes_[at(right)].begin ? right : id + 1;
    }
    const Node& node = nodes_[at(id)];
    T near[kLeaf];
    kernels.distances(points_.data() + node.begin, size(), node.end - node.begin, dims_,
                      query(self), factor_.data(), near);
    const T far = *std::max_element(near, near + (node.end - node.begin));
    return far * grow(static_cast<double>(wanted) / (node.end - node.begin));
  }

  // By what to scale a squared radius to hold `times` as many points.
  T grow(double times) const {
    double factor = times * times;  // in one dimension
    if (dims_ == 2) factor = times;
    if (dims_ > 2) factor = std::pow(times, 2.0 / static_cast<double>(dims_));
    return static_cast<T>(std::min(factor, 1e6));
  }

  std::int64_t dims() const { return dims_; }

 private:
  static constexpr Index kLeaf = 16;  // two or four vectors of distances

  struct Node {
    Index begin, end;    // points
    std::int32_t right;  // the right child, 0 for a leaf; the left one follows its parent
    std::int32_t dim;    // split along this column
    T middle;
  };

  std::int32_t split(const std::vector<T>& raw, std::vector<Index>& order, Index begin, Index end) {
    const auto id = static_cast<std::int32_t>(nodes_.size());
    const std::size_t g = order.size();
    nodes_.push_back({begin, end, 0, 0, T{0}});
    T widest = -1;
    std::int32_t dim = 0;
    for (std::int64_t d = 0; d < dims_; ++d) {
      T low = std::numeric_limits<T>::infinity();
      T high = -low;
      for (Index a = begin; a < end; ++a) {
        const T value = raw[at(d) * g + at(order[at(a)])];
        low = std::min(low, value);
        high = std::max(high, value);
      }
      boxes_.push_back(low);
      boxes_.push_back(high);
      if ((high - low) * factor_[at(d)] > widest) {
        widest = (high - low) * factor_[at(d)];
        dim = static_cast<std::int32_t>(d);
      }
    }
    if (end - begin <= kLeaf) return id;
    const Index middle = begin + (end - begin) / 2;
    const T* column = raw.data() + at(dim) * g;
    if (dims_ > 1)
      std::nth_element(order.begin() + begin, order.begin() + middle, order.begin() + end,
                       [&](Index a, Index b) { return column[a] < column[b]; });
    nodes_[at(id)].dim = dim;
    nodes_[at(id)].middle = column[order[at(middle)]];
    split(raw, order, begin, middle);
    const std::int32_t right = split(raw, order, middle, end);
    nodes_[at(id)].right = right;
    return id;
  }

  T box_distance(std::int32_t id, const T* query) const {
    const T* box = boxes_.data() + at(id) * at(2 * dims_);
    T sum = 0;
    for (std::size_t d = 0; d < at(dims_); ++d) {
      const T low = box[2 * d];
      const T high = box[2 * d + 1];
      const T gap = query[d] < low ? low - query[d] : query[d] > high ? query[d] - high : T{0};
      const T scaled = gap * factor_[d];
      sum = sum + scaled * scaled;
    }
    return sum;
  }

  std::int64_t dims_ = 0;
  std::vector<T> factor_;   // [k]
  std::vector<T> points_;   // [k][points] in tree order
  std::vector<T> queries_;  // [points][k], the same
  std::vector<T> boxes_;    // [node][k][low, high]
  std::vector<Node> nodes_;
  std::vector<Index> offset_;  // [points + 1] positions of a point's rows
  std::vector<Index> row_;     // [n] row at a position; rows of a point in increasing order
  std::vector<Index> point_;   // [n] point of a row
};

}  // namespace lcodec
