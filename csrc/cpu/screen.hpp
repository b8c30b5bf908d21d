// Which rows may be among the k nearest to each row, found by matrix products in float32: in many
// columns these cost a tenth of exact distances, and leave k rows, or few more, to look at exactly.
//
// The screen leaves out row j for row i only where the *computed* distance D_ij
// (docs/dependence.md) is proven larger than k others of row i. All k nearest rows are left, and
// those tied with them.
//
// Proof. Let u = 2^-24 and gamma_k = k u / (1 - k u). Let v_i be the exact values of row i, less a
// center, times the factors and a power of two s: Delta_ij = |v_i - v_j|^2 is then s^2 times the
// exact distance. Norms are Euclidean; a_i is row i as packed, r_i its norm and q_i = r_i^2.
//
// 1. a_i is v_i computed in double and rounded to float once: |a_i - v_i| <= e r_i + w, with
//    e = u (1 + 2^-10) and w = sqrt(d) 2^-149. So sqrt(Delta_ij) is within h = e (r_i + r_j) + 2 w
//    of |a_i - a_j| <= r_i + r_j, and
//      |Delta_ij - |a_i - a_j|^2| <= 2 h (r_i + r_j) + h^2
//                                 <= 4.1 e (q_i + q_j) + 4 w (r_i + r_j) + 8 w^2.
// 2. |a_i - a_j|^2 = q_i + q_j - 2 a_i a_j. The computed product p_ij sums blocks of kProductBlock
//    terms and then the blocks, fused or not: a term has at most m = min(d, kProductBlock) +
//    d / kProductBlock + 1 roundings, and d products may underflow by 2^-150. So
//      2 |p_ij - a_i a_j| <= 2 gamma_m r_i r_j + d 2^-148 <= gamma_m (q_i + q_j) + d 2^-148.
// 3. Keys, low_j - p_ij and high_j - p_ij, are rounded once, by (q_j + q_i / 2) u (1 + 2^-8).
//    Their double is off by 2.1 u (q_i + q_j). With slack = (m + 8) u (1 + 2^-8), which is more
//    than gamma_m + 4.1 e + 2.1 u and leaves enough for what is rounded in double,
//      low_i = (q_i - slack q_i - 9 w r_i - d 2^-147) / 2  and  high_i = (q_i + ...) / 2,
//    rounded outward, hold
//      low_i + (low_j - p_ij) <= Delta_ij / 2 <= high_i + (high_j - p_ij)  with keys as computed.
// 4. A term of D_ij is not negative, has at most d + 4 roundings in the unit t = 2^-24 or 2^-53 and
//    may underflow by the least positive number z. With g = (d + 4) t / (1 - (d + 4) t),
//      (1 - g) Delta_ij - 2 d z s^2 <= s^2 D_ij <= (1 + g) Delta_ij + 2 d z s^2.
// With U_i = the k-th smallest of the keys high_j - p_ij, row j can therefore be one of the k
// nearest to row i only where
//      low_j - p_ij <= limit_i = ((1 + g) (high_i + U_i) + 2 d z s^2) / (1 - g) - low_i.
// U_i may be that of some of the rows j, for it only falls with more. None of this needs a good
// center; it makes norms small, and so the bounds tight.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

#include "cpu/at.hpp"
#include "cpu/kernels.hpp"
#include "cpu/pages.hpp"
#include "cpu/parallel.hpp"
#include "cpu/screen_kernels.hpp"

namespace lcodec {

constexpr std::int64_t kFewRows = 64;  // fewer are compared with each other, in any columns

template <class T>
class Screen {
 public:
  using Index = std::int32_t;
  static constexpr Index kMost = 32;  // rows that are kept for a row

  // Whether it is faster than comparing all rows: as measured in 13 to 300 columns, and where many
  // more are kept than the k nearest, so that ties of columns of 0 and 1 have room, too.
  static bool pays(std::int64_t n, std::int64_t columns, std::int64_t k) {
    return n >= kFewRows && k <= kMost / 4 &&
           columns <= (std::int64_t{1} << 20);  // the proof needs this limit
  }

  // Columns x[f] [n] with their factors; distances between rows are finite.
  Screen(const std::vector<const T*>& x, const std::vector<T>& factor, std::int64_t n,
         std::int64_t k, const Execution& execution)
      : x_(x),
        n_(n),
        d_(static_cast<std::int64_t>(x.size())),
        k_(k),
        execution_(execution),
        kernels_(pick_screen_kernels<T>(execution.level)),
        factor_(factor.begin(), factor.end()),
        center_(x.size()),
        tile_(tile_rows(n, kernels_.width, execution.threads)),
        tiles_((n + tile_ - 1) / tile_),
        count_(at(n), 0),
        kept_(at(n * kMost)),
        locks_(at(tiles_)) {
    for (auto* bound : {&low_, &high_, &least_})
      bound->assign(at(tiles_ * tile_), std::numeric_limits<float>::infinity());
  }

  // Finds them. Gives up, and then keeps all for every row, where a part of the pairs shows that
  // the bounds tell little.
  Status run() {
    if (center() != Status::ok || pack() != Status::ok) return Status::cancelled;
    std::vector<Tile> tiles;  // those on the diagonal first, so that limits fall early
    for (Index a = 0; a < tiles_; ++a) tiles.push_back({a, a});
    if (compare(tiles) != Status::ok) return Status::cancelled;
    const auto full =
        std::count_if(count_.begin(), count_.end(), [](Index c) { return c > kMost; });
    if (2 * full > n_) {
      std::fill(count_.begin(), count_.end(), kMost + 1);
      return Status::ok;
    }
    tiles.clear();
    for (Index apart = 1; apart < tiles_; ++apart)
      for (Index a = 0; a + apart < tiles_; ++a) tiles.push_back({a, a + apart});
    return compare(tiles);
  }

  // Whether all rows have to be looked at for a row.
  bool all(std::int64_t row) const { return count_[at(row)] > kMost; }

  // Otherwise those that have to, in increasing order.
  void candidates(std::int64_t row, std::vector<Index>& result) const {
    result.clear();
    const Kept* kept = kept_.data() + row * kMost;
    const float limit = limit_of(row, lowered(row, kept, count_[at(row)]));
    for (const Kept* k = kept; k < kept + count_[at(row)]; ++k)
      if (key(*k) <= limit) result.push_back(k->row);
    std::sort(result.begin(), result.end());
  }

 private:
  static constexpr double kFar = 0x1p126;

  // A multiple of a panel; smaller ones where all threads would not have tiles of kTile.
  static std::int64_t tile_rows(std::int64_t n, std::int64_t width, int threads) {
    const auto across =
        threads == 1 ? 1 : static_cast<std::int64_t>(std::ceil(2 * std::sqrt(threads)));
    const std::int64_t panels = (n + across * width - 1) / (across * width);
    return std::min(panels * width, kTile);
  }

  struct Tile {
    Index left, right;
  };
  struct Kept {
    float product;
    Index row;
  };

  static float below(double value) {
    return std::nextafter(static_cast<float>(value), -std::numeric_limits<float>::infinity());
  }
  // At most kFar, which is above every key of two rows.
  static float above(double value) {
    return std::nextafter(static_cast<float>(std::min(value, kFar)),
                          std::numeric_limits<float>::max());
  }

  // Finds the center and the scale, by which norms are at most 2^60 and no product overflows.
  Status center() {
    std::vector<double> span(at(d_));
    constexpr std::int64_t some = 16;  // columns
    const Status status = parallel_for((d_ + some - 1) / some, execution_, [&] {
      return [&, kernels = pick_kernels<T>(execution_.level)](std::int64_t piece) {
        for (std::int64_t f = piece * some; f < std::min(d_, (piece + 1) * some); ++f) {
          T low, high;
          kernels.range(x_[at(f)], n_, &low, &high);
          span[at(f)] = (static_cast<double>(high) - static_cast<double>(low)) * factor_[at(f)];
          center_[at(f)] = middle(x_[at(f)]);
        }
      };
    });
    double largest = 0;
    for (const double s : span) largest = std::hypot(largest, s);
    if (largest > 0) scale_ = std::ldexp(1.0, std::min(59 - std::ilogb(largest), 500));
    return status;
  }

  Status pack() {
    const std::int64_t width = kernels_.width;
    const std::int64_t panels = (n_ + width - 1) / width;
    packed_ = Pages<float>(at(panels * width * d_));
    const auto columns = static_cast<double>(d_);
    const auto unit = static_cast<double>(std::numeric_limits<T>::epsilon()) / 2;
    const auto least = static_cast<double>(std::numeric_limits<T>::denorm_min());
    const double g = (columns + 4) * unit / (1 - (columns + 4) * unit);
    ratio_ = (1 + g) / (1 - g);
    beyond_ = 2 * columns * least * scale_ * scale_ / (1 - g);
    const double slack =
        static_cast<double>(std::min(d_, kProductBlock) + d_ / kProductBlock + 9) * 0x1.01p-24;
    const double w = std::sqrt(columns) * 0x1p-149;
    return parallel_for(panels, execution_, [&] {
      return [&, squares = std::vector<double>(at(width))](std::int64_t panel) mutable {
        const std::int64_t first = panel * width;
        const std::int64_t count = std::min(width, n_ - first);
        kernels_.pack(x_.data(), d_, first, count, center_.data(), factor_.data(), scale_,
                      packed_.data() + first * d_, squares.data());
        for (std::int64_t l = 0; l < count; ++l) {
          const double q = squares[at(l)];
          const double doubt = slack * q + 9 * w * std::sqrt(q) + columns * 0x1p-147;
          low_[at(first + l)] = below((q - doubt) / 2);
          high_[at(first + l)] = above((q + doubt) / 2);
        }
      };
    });
  }

  // The median of a few rows, which rows far out do not move.
  double middle(const T* x) const {
    constexpr std::int64_t few = 15;
    T value[few];
    for (std::int64_t a = 0; a < few; ++a) value[a] = x[a * (n_ - 1) / (few - 1)];
    std::nth_element(value, value + few / 2, value + few);
    return static_cast<double>(value[few / 2]);
  }

  Status compare(const std::vector<Tile>& tiles) {
    return parallel_for(static_cast<std::int64_t>(tiles.size()), execution_, [&] {
      return [&, product = Pages<float>(at(kTile * kTile)),
              place = Pages<Index>(at(kTile * kTile))](std::int64_t piece) mutable {
        compare_tile(tiles[at(piece)], product.data(), place.data());
      };
    });
  }

  void compare_tile(const Tile& tile, float* product, Index* place) {
    const bool diagonal = tile.left == tile.right;
    const std::int64_t a0 = tile.left * tile_;
    const std::int64_t b0 = tile.right * tile_;
    const std::int64_t rows = std::min(tile_, n_ - a0);
    const std::int64_t panels = panels_from(b0);
    const std::int64_t columns = panels * kernels_.width;
    kernels_.products(packed_.data() + a0 * d_, panels_from(a0), packed_.data() + b0 * d_, panels,
                      d_, product);
    if (diagonal)  // a row is not compared with itself
      for (std::int64_t a = 0; a < rows; ++a)
        product[a * kTile + a] = -std::numeric_limits<float>::infinity();
    float of_left[kTile], of_right[kTile], left_limit[kTile], right_limit[kTile];
    if (k_ == 1)
      kernels_.least(product, rows, columns, high_.data() + a0, high_.data() + b0, of_left,
                     of_right);
    else
      kth_least(tile, product, rows, columns, of_left, of_right);
    lower(tile.left, of_left, left_limit);
    if (diagonal)
      std::fill_n(right_limit, kTile, -std::numeric_limits<float>::infinity());
    else
      lower(tile.right, of_right, right_limit);
    const std::int64_t found = kernels_.hits(product, rows, columns, low_.data() + a0,
                                             low_.data() + b0, left_limit, right_limit, place);
    const auto keep_all = [&](Index own, const auto& keep) {
      const std::lock_guard<std::mutex> lock(locks_[at(own)]);
      for (std::int64_t h = 0; h < found; ++h) keep(place[h] / kTile, place[h] % kTile);
    };
    keep_all(tile.left, [&](std::int64_t a, std::int64_t b) {
      const Kept other{product[a * kTile + b], static_cast<Index>(b0 + b)};
      if (key(other) <= left_limit[a]) keep(a0 + a, other);
    });
    if (diagonal) return;
    keep_all(tile.right, [&](std::int64_t a, std::int64_t b) {
      const Kept other{product[a * kTile + b], static_cast<Index>(a0 + a)};
      if (key(other) <= right_limit[b]) keep(b0 + b, other);
    });
  }

  float key(const Kept& other) const { return low_[at(other.row)] - other.product; }

  // The k-th smallest keys of a tile on the diagonal. Others lower U where they fill what is kept.
  void kth_least(const Tile& tile, const float* product, std::int64_t rows, std::int64_t columns,
                 float* of_left, float* of_right) const {
    std::fill_n(of_left, kTile, std::numeric_limits<float>::infinity());
    std::fill_n(of_right, kTile, std::numeric_limits<float>::infinity());
    if (tile.left != tile.right || k_ > columns) return;
    const float* high = high_.data() + tile.right * tile_;
    float keys[kTile];
    for (std::int64_t a = 0; a < rows; ++a) {
      for (std::int64_t b = 0; b < columns; ++b) keys[b] = high[b] - product[a * kTile + b];
      std::nth_element(keys, keys + k_ - 1, keys + columns);
      of_left[a] = keys[k_ - 1];
    }
  }

  std::int64_t panels_from(std::int64_t row) const {
    return (std::min(tile_, n_ - row) + kernels_.width - 1) / kernels_.width;
  }

  // Lowers U of a tile's rows, and tells their limits.
  void lower(Index tile, const float* to, float* limit) {
    const std::lock_guard<std::mutex> lock(locks_[at(tile)]);
    for (std::int64_t a = 0; a < tile_; ++a) {
      const std::int64_t row = tile * tile_ + a;
      limit[a] = -std::numeric_limits<float>::infinity();  // where nothing is to be kept
      if (row >= n_) continue;
      if (to[a] < least_[at(row)]) least_[at(row)] = to[a];
      if (!all(row)) limit[a] = limit_of(row, least_[at(row)]);
    }
  }

  // With the lock of the row's tile.
  void keep(std::int64_t row, const Kept& kept) {
    Index& count = count_[at(row)];
    if (count > kMost) return;
    Kept* all = kept_.data() + row * kMost;
    if (count == kMost) {
      least_[at(row)] = lowered(row, all, count);
      const float limit = limit_of(row, least_[at(row)]);
      count = static_cast<Index>(
          std::remove_if(all, all + count, [&](const Kept& k) { return key(k) > limit; }) - all);
    }
    if (count < kMost) all[count] = kept;
    ++count;
  }

  // A row's U, lowered by the rows that are kept for it.
  float lowered(std::int64_t row, const Kept* kept, Index count) const {
    const float least = least_[at(row)];
    if (k_ == 1 || count < k_) return least;
    float keys[kMost];
    for (Index a = 0; a < count; ++a) keys[a] = high_[at(kept[a].row)] - kept[a].product;
    std::nth_element(keys, keys + k_ - 1, keys + count);
    return std::min(least, keys[k_ - 1]);
  }

  float limit_of(std::int64_t row, float least) const {
    const double upper = static_cast<double>(high_[at(row)]) + static_cast<double>(least);
    return above(upper * ratio_ + beyond_ - static_cast<double>(low_[at(row)]));
  }

  const std::vector<const T*>& x_;
  std::int64_t n_, d_, k_;
  const Execution& execution_;
  ScreenKernels<T> kernels_;
  std::vector<double> factor_, center_;  // [d]
  std::int64_t tile_, tiles_;
  double scale_ = 1;
  double ratio_ = 1, beyond_ = 0;
  Pages<float> packed_;                    // [panels][d][width]
  std::vector<float> low_, high_, least_;  // [tiles * tile], infinity beyond n
  std::vector<Index> count_;               // [n] of `kept_`; kMost + 1: all rows
  Pages<Kept> kept_;                       // [n][kMost]
  std::vector<std::mutex> locks_;          // [tiles]
};

}  // namespace lcodec
