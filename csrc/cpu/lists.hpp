// The neighbours of rows in the conditioning set, nearest first, as far as a scan is likely to go.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/radix_sort.hpp"
#include "cpu/spatial.hpp"

namespace lcodec {

// Points and their squared distances from one row.
template <class T>
struct Near {
  std::vector<std::int32_t> point;
  std::vector<T> distance;
  std::vector<std::uint8_t> bucket;  // scratch
  void clear() {
    point.clear();
    distance.clear();
  }
};

// The list of one row. It is bucketed by distance, not sorted: a scan needs only a lower bound of
// what is still to come.
template <class T>
class RowList {
 public:
  using Index = std::int32_t;

  NeighborList<T> view() const {
    return {static_cast<std::int64_t>(bound_.size()),
            index_.data(),
            rank_.data(),
            distance_.data(),
            bound_.data(),
            reach_};
  }
  std::int64_t size() const { return static_cast<std::int64_t>(rows_); }
  T radius() const { return radius_; }

  // Searches the tree and lists at least `wanted` rows, or all, and few more. `radius` is a first
  // guess.
  void search(const Kernels<T>& kernels, const Spatial<T>& space, const std::int32_t* ranks,
              std::int64_t position, std::int64_t wanted, T radius, Near<T>& near) {
    const Index self = space.point_of(space.row(position));
    if (!(radius > 0)) radius = kAll;
    for (int attempt = 0;; ++attempt) {
      near.clear();
      std::int64_t size = space.end(self) - space.begin(self) - 1;
      space.within(
          kernels, self, [&] { return radius; },
          [&](Index point, T distance) {
            near.point.push_back(point);
            near.distance.push_back(distance);
            size += space.end(point) - space.begin(point);
          });
      if (size >= wanted || radius == kAll) break;
      const double times = 1.5 * static_cast<double>(wanted) / static_cast<double>(size + 1);
      radius = attempt < 6 ? radius * std::max(space.grow(times), T{2}) : kAll;
    }
    fill(space, ranks, position, near, radius, wanted + wanted / 4);
  }

  // The same in one column, where rows are in its order: value[position]. A chunk takes as many
  // rows from the left as from the right.
  void along(const T* value, std::int64_t n, T factor, const std::int32_t* ranks,
             std::int64_t position, std::int64_t wanted) {
    constexpr std::int64_t half = kChunk / 2;
    const std::int64_t farther = std::max(position, n - 1 - position);
    const std::int64_t chunks =
        std::min((wanted + kChunk - 1) / kChunk, (farther + half - 1) / half);
    rows_ = static_cast<std::size_t>(chunks * kChunk);
    index_.resize(rows_);
    rank_.resize(rows_);
    distance_.resize(rows_);
    bound_.resize(static_cast<std::size_t>(chunks));
    const std::int32_t own = ranks[position];
    const auto distance = [&](std::int64_t j) {
      const T scaled = (value[position] - value[j]) * factor;
      return scaled * scaled;
    };
    // nearest row not listed when `taken` are on either side
    const auto next = [&](std::int64_t taken) {
      const T left = position > taken ? distance(position - taken - 1) : kAll;
      return position + taken + 1 < n ? std::min(left, distance(position + taken + 1)) : left;
    };
    std::size_t place = 0;
    const auto put = [&](std::int64_t j) {
      const bool there = 0 <= j && j < n;
      const std::int64_t row = there ? j : 0;
      index_[place] = static_cast<Index>(row);
      rank_[place] = std::min(own, ranks[row]);
      distance_[place++] = there ? distance(row) : std::numeric_limits<T>::quiet_NaN();
    };
    for (std::int64_t c = 0; c < chunks; ++c) {
      bound_[static_cast<std::size_t>(c)] = next(c * half);
      for (std::int64_t u = 1; u <= half; ++u) put(position - c * half - u);
      for (std::int64_t u = 1; u <= half; ++u) put(position + c * half + u);
    }
    reach_ = next(chunks * half);
    radius_ = reach_;
  }

  // Lists the rows of `near`: all rows within `radius` except the row itself. Those beyond the
  // `most` nearest ones may be left out.
  void fill(const Spatial<T>& space, const std::int32_t* ranks, std::int64_t position,
            Near<T>& near, T radius, std::int64_t most) {
    if (space.single()) {
      fill_rows<true>(space, ranks, position, near, radius, most);
    } else {
      fill_rows<false>(space, ranks, position, near, radius, most);
    }
  }

  static constexpr T kAll = std::numeric_limits<T>::infinity();

 private:
  // kSingle: every point is one row.
  template <bool kSingle>
  void fill_rows(const Spatial<T>& space, const std::int32_t* ranks, std::int64_t position,
                 Near<T>& near, T radius, std::int64_t most) {
    const std::size_t points = near.point.size();
    const Index* point = near.point.data();
    const T* far = near.distance.data();
    T farthest = radius;
    if (radius == kAll) {
      farthest = 0;
      for (std::size_t a = 0; a < points; ++a) farthest = std::max(farthest, far[a]);
    }
    // Buckets are spaced evenly in the logarithm of the distance, 2^kPerOctave of them to a factor
    // of two: the high bits of the number itself, which rise with it.
    const std::int64_t base = high_bits(farthest) - static_cast<std::int64_t>(kBuckets - 1);
    const Index self = space.point_of(space.row(position));
    near.bucket.resize(points);
    std::array<std::uint32_t, kBuckets + 1> count{};
    if constexpr (!kSingle) count[1] += space.rows_of(self) - 1;
    for (std::size_t a = 0; a < points; ++a) {
      const auto b = static_cast<std::size_t>(std::max<std::int64_t>(high_bits(far[a]) - base, 0));
      near.bucket[a] = static_cast<std::uint8_t>(b);
      count[b + 1] += kSingle ? 1 : space.rows_of(point[a]);
    }
    std::size_t used = kBuckets;  // buckets that are kept
    for (std::size_t b = 1; b <= kBuckets; ++b) {
      count[b] += count[b - 1];
      if (used == kBuckets && static_cast<std::int64_t>(count[b]) >= most) used = b;
    }
    rows_ = count[used];
    radius_ = radius;
    reach_ = radius == kAll ? kAll : std::nextafter(radius, kAll);
    const std::size_t chunks = (rows_ + kChunk - 1) / kChunk;
    index_.resize(chunks * kChunk);
    rank_.resize(chunks * kChunk);
    distance_.resize(chunks * kChunk);
    bound_.resize(chunks);
    const std::int32_t own = ranks[position];
    const auto put = [&](std::size_t place, Index row, T distance) {
      index_[place] = row;
      rank_[place] = std::min(own, ranks[row]);
      distance_[place] = distance;
    };
    if constexpr (!kSingle)
      for (Index j = space.begin(self); j < space.end(self); ++j)
        if (j != position) put(count[0]++, j, T{0});
    for (std::size_t a = 0; a < points; ++a) {
      const std::size_t b = near.bucket[a];
      if (b >= used) {
        reach_ = std::min(reach_, far[a]);
      } else if constexpr (kSingle) {
        put(count[b]++, point[a], far[a]);
      } else {
        for (Index j = space.begin(point[a]); j < space.end(point[a]); ++j)
          put(count[b]++, j, far[a]);
      }
    }
    for (std::size_t a = rows_; a < index_.size(); ++a)
      put(a, 0, std::numeric_limits<T>::quiet_NaN());
    T least = reach_;
    for (std::size_t c = chunks; c-- > 0;) {
      const T* chunk = distance_.data() + c * kChunk;
      for (int u = 0; u < kChunk; ++u) least = chunk[u] < least ? chunk[u] : least;  // not NaN
      bound_[c] = least;
    }
  }

  static constexpr std::size_t kBuckets = 128;
  static constexpr int kPerOctave = 4;  // bits: 16 buckets

  // Sign, exponent and the leading bits of the mantissa of a number >= 0: monotone in it.
  static std::int64_t high_bits(T distance) {
    constexpr int mantissa = std::numeric_limits<T>::digits - 1;
    const auto bits = std::bit_cast<typename SortWord<T>::Key>(distance);
    return static_cast<std::int64_t>(bits >> (mantissa - kPerOctave));
  }

  std::size_t rows_ = 0;
  T radius_{0};
  T reach_{0};
  std::vector<Index> index_;
  std::vector<std::int32_t> rank_;
  std::vector<T> distance_, bound_;
};

// Makes the lists of neighbouring rows of the tree together: leaves near any of them are found
// once, and their points are compared with every row. Each thread has one.
template <class T>
class ListMaker {
 public:
  using Index = std::int32_t;

  // ranks[position]
  ListMaker(const Kernels<T>& kernels, const Spatial<T>& space, const std::int32_t* ranks)
      : kernels_(kernels), space_(space), ranks_(ranks) {}

  // Lists at least `wanted` rows, or all, for the rows at `count` ascending positions.
  void build(RowList<T>* lists, const Index* position, std::int64_t count, std::int64_t wanted) {
    if (space_.dims() == 1) {
      if (value_.empty())
        for (std::int64_t i = 0; i < space_.rows_in_all(); ++i)
          value_.push_back(space_.points()[space_.point_of(space_.row(i))]);
      for (std::int64_t a = 0; a < count; ++a) along(lists[a], position[a], wanted);
      return;
    }
    const Index first = space_.point_of(space_.row(position[0]));
    const Index last = space_.point_of(space_.row(position[count - 1])) + 1;
    if (!(radius_ > 0)) radius_ = space_.guess_radius(kernels_, first, wanted);
    const auto dims = static_cast<std::size_t>(space_.dims());
    const auto g = static_cast<std::size_t>(space_.size());
    point_.clear();
    space_.near_block(first, last, radius_, [&](Index a, Index b) {
      for (Index point = a; point < b; ++point) point_.push_back(point);
    });
    const std::size_t size = point_.size();
    coordinate_.resize(dims * size);
    for (std::size_t d = 0; d < dims; ++d)
      for (std::size_t a = 0; a < size; ++a)
        coordinate_[d * size + a] = space_.points()[d * g + static_cast<std::size_t>(point_[a])];
    distance_.resize(size);
    inside_.resize(size);
    std::int64_t found = 0;
    for (std::int64_t a = 0; a < count; ++a) {
      const Index self = space_.point_of(space_.row(position[a]));
      const auto points = static_cast<std::int64_t>(size);
      kernels_.distances(coordinate_.data(), points, points, space_.dims(), space_.query(self),
                         space_.factors(), distance_.data());
      const std::int64_t inside =
          kernels_.within(distance_.data(), points, radius_, inside_.data());
      near_.point.resize(static_cast<std::size_t>(inside));
      near_.distance.resize(static_cast<std::size_t>(inside));
      std::size_t others = 0;
      for (std::size_t b = 0; b < static_cast<std::size_t>(inside); ++b) {
        const auto c = static_cast<std::size_t>(inside_[b]);
        near_.point[others] = point_[c];
        near_.distance[others] = distance_[c];
        others += point_[c] != self;
      }
      near_.point.resize(others);
      near_.distance.resize(others);
      auto near_rows = static_cast<std::int64_t>(others);
      if (!space_.single()) {
        near_rows = space_.rows_of(self) - 1;
        for (const Index point : near_.point) near_rows += space_.rows_of(point);
      }
      found += near_rows;
      if (2 * near_rows >= wanted) {  // if a scan wants more, extend() adds it
        lists[a].fill(space_, ranks_, position[a], near_, radius_, wanted + wanted / 4);
      } else {  // in a thinner place than its neighbours
        lists[a].search(kernels_, space_, ranks_, position[a], wanted, 2 * radius_, near_);
      }
    }
    // The next rows lie close by: aim at half as many again as wanted.
    const double times = 1.5 * static_cast<double>(wanted * count) / static_cast<double>(found + 1);
    radius_ = radius_ * space_.grow(std::clamp(times, 0.125, 8.0));
    if (!(radius_ < RowList<T>::kAll)) radius_ = 0;
  }

  // Makes the list of one row longer.
  void extend(RowList<T>& list, std::int64_t position) {
    if (space_.dims() == 1) return along(list, position, 4 * list.size());
    list.search(kernels_, space_, ranks_, position, 4 * list.size() + 64,
                list.radius() * space_.grow(4), near_);
  }

 private:
  void along(RowList<T>& list, std::int64_t position, std::int64_t wanted) {
    list.along(value_.data(), space_.rows_in_all(), space_.factors()[0], ranks_, position, wanted);
  }

  const Kernels<T>& kernels_;
  const Spatial<T>& space_;
  const std::int32_t* ranks_;
  std::vector<T> value_;  // by position, in one column
  T radius_{0};           // 0: not known
  std::vector<Index> point_, inside_;
  std::vector<T> coordinate_, distance_;
  Near<T> near_;
};

}  // namespace lcodec
