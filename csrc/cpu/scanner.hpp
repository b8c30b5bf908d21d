// Scoring by scanning: rows against their neighbours in the conditioning set, for all candidates
// side by side in packed tiles (kernels.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

#include "cpu/at.hpp"
#include "cpu/conditioned.hpp"
#include "cpu/instruments.hpp"
#include "cpu/lists.hpp"
#include "cpu/pages.hpp"
#include "cpu/parallel.hpp"

namespace lcodec {

template <class T>
class Scanner {
 public:
  using Index = std::int32_t;

  explicit Scanner(const Conditioned<T>& given) : given_(given) {}

  // To be called when the conditioning set has changed.
  void reset() {
    const Spatial<T>& space = given_.space();
    const std::int64_t n = given_.columns.n;
    source_.resize(at(n));
    ranks_.resize(at(n));
    for (std::int64_t position = 0; position < n; ++position) {
      source_[at(position)] = given_.order[at(space.row(position))];
      ranks_[at(position)] = given_.rank[at(space.row(position))];
    }
    // A scan takes about 2 n^(1/2) neighbours in one column and 3 n^(1/(k+1)) in k columns;
    // outliers take more. Threads start from here and learn.
    const auto k = static_cast<double>(given_.k());
    wanted_ = 64 + static_cast<std::int64_t>(5 * std::pow(static_cast<double>(n), 1 / (k + 1)));
  }

  // Lays candidates side by side. Their columns must be sorted.
  Status pack(const std::int64_t* candidate, std::int64_t m, const Execution& execution) {
    lanes_ = pick_kernels<T>(execution.level).lanes;
    candidate_.assign(candidate, candidate + m);
    const Columns<T>& columns = given_.columns;
    const std::int64_t n = columns.n;
    const std::int64_t tiles = (m + lanes_ - 1) / lanes_;
    if (packed_size_ <
        at(tiles * n * lanes_)) {  // kept: new memory costs a page fault for every 4 KiB
      packed_size_ = at(tiles * n * lanes_);
      packed_ = Pages<T>();  // before the larger one
      packed_ = Pages<T>(packed_size_);
    }
    factor_.assign(at(tiles * lanes_), T{0});
    return parallel_for(tiles, execution, [&] {
      return [&](std::int64_t tile) {
        T* out = packed_.data() + tile * n * lanes_;
        std::vector<const T*> x(at(lanes_), columns.x + candidate[tile * lanes_] * n);
        for (std::int64_t l = 0; l < std::min(lanes_, m - tile * lanes_); ++l) {
          const std::int64_t column = candidate[tile * lanes_ + l];
          factor_[at(tile * lanes_ + l)] = columns.factor[column];
          x[at(l)] = columns.x + column * n;
        }
        // A cache line of lanes at a time: that many columns fit the second-level cache.
        constexpr auto line = static_cast<std::int64_t>(64 / sizeof(T));
        for (std::int64_t first = 0; first < lanes_; first += line) {
          const std::int64_t last = std::min(lanes_, first + line);
          for (std::int64_t position = 0; position < n; ++position)
            for (std::int64_t l = first; l < last; ++l)
              out[position * lanes_ + l] = x[at(l)][source_[at(position)]];
        }
      };
    });
  }

  // Scans rows at ascending positions against the packed candidates, except tiles in which none is
  // `alive` [m]. A block of rows against all tiles at a time; each thread calls make_report() for
  // its report(first candidate, candidates, row, sums, counts, whether all counts are 1).
  template <class MakeReport>
  Status scan(const std::vector<Index>& positions, const std::vector<std::uint8_t>& alive,
              const Execution& execution, const MakeReport& make_report) {
    const Kernels<T> kernels = pick_kernels<T>(execution.level);
    const auto m = static_cast<std::int64_t>(candidate_.size());
    const std::vector<std::int64_t> tiles = live_tiles(alive);
    // A block's lists stay in the cache for all tiles, and so do the rows of a tile that they name.
    const auto rows = static_cast<std::int64_t>(positions.size());
    const std::int64_t share = rows / (2 * static_cast<std::int64_t>(execution.threads));
    const std::int64_t block =
        std::clamp(kListEntries / wanted_, kLeastBlock, std::max(kLeastBlock, share));
    const std::int64_t wanted = wanted_;  // threads that end early write it
    std::mutex mutex;
    return parallel_for((rows + block - 1) / block, execution, [&] {
      return [&, s = Scratch(*this, wanted, block, kernels, mutex),
              report = make_report()](std::int64_t piece) mutable {
        const std::int64_t begin = piece * block;
        const std::int64_t size = std::min(rows, begin + block) - begin;
        const Index* position = positions.data() + begin;
        for (std::int64_t a = 0; a < size; a += kListBlock)
          s.maker.build(s.lists.data() + a, position + a, std::min(size - a, kListBlock), s.wanted);
        s.unlisted = 0;
        const Stopwatch stopwatch(s.seconds);
        for (const std::int64_t tile : tiles)
          for (std::int64_t a = 0; a < size; ++a) {
            const std::int64_t used = std::min(lanes_, m - tile * lanes_);
            const bool unique = scan_row(kernels, tile, used, position[a], s, s.lists[at(a)]);
            report(tile * lanes_, used, given_.space().row(position[a]), s.sum.data(),
                   s.count.data(), unique);
          }
        s.learn(size * s.wanted);
      };
    });
  }

  // Of all scans so far.
  ScanWork work() const {
    return {count_.comparisons, count_.instructions, count_.instructions_of_all, seconds_};
  }

 private:
  // Neighbouring rows of the tree whose lists are made together, and the least that a thread takes.
  static constexpr std::int64_t kListBlock = 32;
  static constexpr std::int64_t kLeastBlock = 8;
  // Neighbours listed at a time on a thread: 12 or 16 bytes each, for the second-level cache.
  static constexpr std::int64_t kListEntries = std::int64_t{1} << 16;
  // Costs in entries of a list: to finish one candidate, and to make a list longer.
  static constexpr std::int64_t kFinishCost = 16;
  static constexpr std::int64_t kExtendCost = 1024;

  // What a thread needs to scan rows. When it ends, the scanner keeps what it has learned.
  struct Scratch {
    Scanner* scanner;
    std::mutex* mutex;
    std::vector<RowList<T>> lists;
    std::vector<T> best;
    std::vector<std::int64_t> sum, count;
    ListMaker<T> maker;
    std::int64_t wanted;              // neighbours in a list
    std::int64_t rows = 0, tied = 0;  // scans so far, and those that met ties
    ScanCount count_so_far;
    double seconds = 0;
    std::int64_t unlisted = 0;   // cost of what the lists of a block did not answer
    std::vector<Index> nearest;  // of one row and candidate

    Scratch(Scanner& s, std::int64_t first_wanted, std::int64_t block, const Kernels<T>& kernels,
            std::mutex& m)
        : scanner(&s),
          mutex(&m),
          lists(at(block)),
          best(at(s.lanes_)),
          sum(at(s.lanes_)),
          count(at(s.lanes_)),
          maker(kernels, s.given_.space(), s.ranks_.data()),
          wanted(first_wanted) {}
    Scratch(Scratch&& other) = default;
    // Longer lists cost more to make, shorter ones leave more to be found without them.
    void learn(std::int64_t entries) {
      if (4 * unlisted > entries) {
        wanted += wanted / 2;
      } else if (8 * unlisted < entries) {
        wanted = std::max<std::int64_t>(16, wanted - wanted / 8);
      }
    }
    ~Scratch() {
      if (lists.empty()) return;  // moved from
      const std::lock_guard<std::mutex> lock(*mutex);
      scanner->count_ += count_so_far;
      scanner->seconds_ += seconds;
      scanner->wanted_ = wanted;
    }
  };

  // Tiles in which a candidate is alive.
  std::vector<std::int64_t> live_tiles(const std::vector<std::uint8_t>& alive) const {
    std::vector<std::int64_t> tiles;
    const auto m = static_cast<std::int64_t>(candidate_.size());
    for (std::int64_t first = 0; first < m; first += lanes_) {
      const auto begin = alive.begin() + first;
      const auto end = begin + std::min(lanes_, m - first);
      if (std::find(begin, end, 1) != end) tiles.push_back(first / lanes_);
    }
    return tiles;
  }

  // One row against one tile: sums and counts are left in the scratch. Whether all counts are 1.
  bool scan_row(const Kernels<T>& kernels, std::int64_t tile, std::int64_t used, Index position,
                Scratch& s, RowList<T>& list) const {
    const T* values = packed_.data() + tile * given_.columns.n * lanes_;
    const T* factors = factor_.data() + tile * lanes_;
    const auto scan_with = [&](auto* kernel) {
      for (;;) {
        ScanResult result = kernel({list.view(), values, values + position * lanes_, factors,
                                    s.best.data(), s.sum.data(), s.count.data()});
        s.count_so_far += result.count;
        const T reach = list.view().reach;
        if (result.complete || reach == std::numeric_limits<T>::infinity()) return result.unique;
        if (!result.unique && kernel != kernels.scan_ties) return false;  // counted next
        if (finish(tile, used, position, reach, s, result)) return result.unique;
        s.maker.extend(list, position);
        s.unlisted += kExtendCost;
      }
    };
    // Scans that only notice ties are faster by a third; where these are common, they are counted
    // at once.
    bool unique = s.tied * 8 <= s.rows && scan_with(kernels.scan);
    if (!unique) unique = scan_with(kernels.scan_ties);
    ++s.rows;
    s.tied += !unique;
    if (!unique && !given_.rule.averages())
      for (std::int64_t l = 0; l < used; ++l)
        if (s.count[at(l)] > 1) take_one(list.view(), values, factors, position, l, s);
    return unique;
  }

  // Lanes that are open at the end of the list: a row that lies far out in the candidate has its
  // neighbours along the candidate's own order. False where that would be long.
  bool finish(std::int64_t tile, std::int64_t used, Index position, T reach, Scratch& s,
              ScanResult& result) const {
    const Index own = given_.space().row(position);
    if (result.unique) std::fill(s.count.begin(), s.count.end(), 1);
    for (std::int64_t l = 0; l < used; ++l) {
      if (s.best[at(l)] < reach) continue;
      s.unlisted += kFinishCost;
      const std::int64_t column = candidate_[at(tile * lanes_ + l)];
      if (!given_.nearest_along(column, own, s.best[at(l)], s.nearest)) return false;
      if (given_.rule.averages()) {
        std::int64_t sum = 0;
        for (const Index row : s.nearest)
          sum += std::min(given_.rank[at(row)], given_.rank[at(own)]);
        s.sum[at(l)] = sum;
        s.count[at(l)] = static_cast<std::int64_t>(s.nearest.size());
      } else {
        s.sum[at(l)] = given_.take(s.nearest, own);
        s.count[at(l)] = 1;
      }
      result.unique &= s.count[at(l)] == 1;
    }
    return true;
  }

  // Of one lane's tied neighbours, the one that the tie rule takes.
  void take_one(const NeighborList<T>& list, const T* tile, const T* factor, Index position,
                std::int64_t l, Scratch& s) const {
    const T best = s.best[at(l)];
    s.nearest.clear();
    for (std::int64_t c = 0; c < list.chunks && list.bound[c] <= best; ++c)
      for (std::int64_t a = c * kChunk; a < (c + 1) * kChunk; ++a) {
        const std::int64_t j = list.index[a];
        const T scaled = (tile[position * lanes_ + l] - tile[j * lanes_ + l]) * factor[l];
        if (list.distance[a] + scaled * scaled == best) s.nearest.push_back(given_.space().row(j));
      }
    s.sum[at(l)] = given_.take(s.nearest, given_.space().row(position));
    s.count[at(l)] = 1;
  }

  const Conditioned<T>& given_;
  std::vector<Index> source_;        // [n] given row of a position
  std::vector<std::int32_t> ranks_;  // [n] by position
  std::int64_t wanted_ = 0;          // neighbours in a list, to start with
  std::int64_t lanes_ = 0;
  std::vector<std::int64_t> candidate_;  // packed
  std::vector<T> factor_;                // [tile][lanes]
  Pages<T> packed_;                      // [tile][n][lanes]
  std::size_t packed_size_ = 0;
  ScanCount count_;
  double seconds_ = 0;
};

}  // namespace lcodec
