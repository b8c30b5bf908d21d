// Scoring a column of few distinct values: without sorting, in one pass over the rows by rank.
//
// Rows in one group of the conditioning set and of one value form a cell: they are at distance 0
// from each other, and nearest. With rows in order of rank, a row's sum over the others of its cell
// is the sum of the ranks seen there so far, plus its own rank for each row that is still to come.
// A row alone in its cell asks the tree for the nearest cells, and these for the same two numbers.
// O(n) for a candidate, about a nanosecond for each of three passes.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "common/fixed_point.hpp"
#include "common/random.hpp"
#include "cpu/radix_sort.hpp"
#include "cpu/spatial.hpp"

namespace lcodec {

// A column's distinct values, and which one a row has.
template <class T>
struct Coded {
  static constexpr std::size_t kMostLevels = 256;
  std::vector<T> level;            // ascending
  std::vector<std::uint8_t> code;  // [n] by row; empty for a column of more values

  // Finds them by hashing, which costs a column of many values next to nothing. value(row).
  template <class Value>
  static Coded of(std::size_t n, const Value& value) {
    constexpr std::size_t slots = 1024;
    constexpr std::size_t sample = 16;
    using Key = typename SortWord<T>::Key;
    std::array<T, sample> seen;
    std::size_t different = 0;
    for (std::size_t row = 0; row < std::min(n, sample); ++row) {
      const T x = value(row);
      if (std::find(seen.begin(), seen.begin() + different, x) == seen.begin() + different)
        seen[different++] = x;
    }
    if (4 * different > 3 * sample) return {};  // most likely many
    struct Slot {
      Key key;
      std::uint16_t number;
    };
    std::array<Slot, slots> table{};  // number 0: empty
    std::vector<Key> keys;
    Coded result;
    result.code.resize(n);
    for (std::size_t row = 0; row < n; ++row) {
      const Key key = sort_key(value(row));
      std::size_t at = static_cast<std::size_t>(mix64(key) % slots);
      while (table[at].number != 0 && table[at].key != key) at = (at + 1) % slots;
      if (table[at].number == 0) {
        if (keys.size() == kMostLevels) return {};
        keys.push_back(key);
        table[at] = {key, static_cast<std::uint16_t>(keys.size())};
      }
      result.code[row] = static_cast<std::uint8_t>(table[at].number - 1);
    }
    std::vector<std::uint8_t> order(keys.size());
    std::iota(order.begin(), order.end(), std::uint8_t{0});
    std::sort(order.begin(), order.end(),
              [&](std::uint8_t a, std::uint8_t b) { return keys[a] < keys[b]; });
    std::vector<std::uint8_t> renumbered(keys.size());
    for (std::size_t v = 0; v < order.size(); ++v) {
      renumbered[order[v]] = static_cast<std::uint8_t>(v);
      result.level.push_back(sort_value<T>(keys[order[v]]));
    }
    for (std::uint8_t& c : result.code) c = renumbered[c];
    return result;
  }

  // Rows [n] in increasing order of (value, row).
  void sort(std::int32_t* rows) const {
    std::array<std::size_t, kMostLevels + 1> start{};
    for (const std::uint8_t c : code) ++start[c + std::size_t{1}];
    std::partial_sum(start.begin(), start.end(), start.begin());
    for (std::size_t row = 0; row < code.size(); ++row)
      rows[start[code[row]]++] = static_cast<std::int32_t>(row);
  }
};

template <class T>
class CodedGroups {
 public:
  using Index = std::int32_t;

  // rank[row] ascends.
  CodedGroups(const Kernels<T>& kernels, const Spatial<T>& space,
              const std::vector<std::int32_t>& rank)
      : kernels_(kernels), space_(space), rank_(rank) {
    point_.resize(rank.size());
    for (std::size_t row = 0; row < rank.size(); ++row)
      point_[row] = space.point_of(static_cast<Index>(row));
  }

  // Whether a candidate of so many levels is best scored this way. Groups must not be at distance 0
  // from each other.
  static bool suits(const Spatial<T>& space, std::size_t levels) {
    return static_cast<std::int64_t>(levels) * space.size() * kRowsPerCell <=
           std::max(space.rows_in_all(), kSmall);
  }

  // Sum over the rows, or false where too many are alone in their cells, or values too close.
  bool score(const Coded<T>& column, T factor, FixedPoint& total) {
    const std::size_t levels = column.level.size();
    for (std::size_t v = 1; v < levels; ++v)
      if (!(squared(column.level[v] - column.level[v - 1], factor) > 0)) return false;
    const std::size_t cells = levels * static_cast<std::size_t>(space_.size());
    return cells <= kFewCells ? score_in<kStretches>(column, factor, total)
                              : score_in<1>(column, factor, total);
  }

 private:
  // Rows for each cell that make the passes over rows outweigh those over cells.
  static constexpr std::int64_t kRowsPerCell = 4;
  static constexpr std::int64_t kSmall = 1024;
  // A search costs as much as so many rows that are not alone.
  static constexpr std::int64_t kSearchCost = 64;

  // Rows are taken from several stretches of the order in turn: where cells are few, the next row
  // would otherwise often wait for the same cell to be written.
  static constexpr std::size_t kStretches = 4;
  static constexpr std::size_t kFewCells = 256;

  // Of the rows of a stretch and those before it.
  struct Cell {
    std::int64_t below = 0;  // sum of the ranks seen
    std::int64_t seen = 0;
    std::int64_t count = 0;        // of all rows
    std::int64_t* sums = nullptr;  // of its rows over the others
  };

  template <std::size_t kParts>
  bool score_in(const Coded<T>& column, T factor, FixedPoint& total) {
    const std::size_t n = rank_.size();
    const std::size_t levels = column.level.size();
    const std::size_t cells = levels * static_cast<std::size_t>(space_.size());
    const std::size_t length = (n + kParts - 1) / kParts;
    cell_.assign(kParts * cells, Cell{});
    cell_of_.resize(n);
    sum_.resize(n);
    // look(part, row) for every row
    const auto in_turn = [&](const auto& look) {
      for (std::size_t t = 0; t < length; ++t)
        for (std::size_t part = 0; part < kParts; ++part)
          if (const std::size_t row = part * length + t; row < n) look(part, row);
    };
    in_turn([&](std::size_t part, std::size_t row) {
      const std::size_t at = static_cast<std::size_t>(point_[row]) * levels + column.code[row];
      cell_of_[row] = static_cast<std::uint32_t>(at);
      Cell& cell = cell_[part * cells + at];
      ++cell.seen;
      cell.below += rank_[row];
    });
    std::int64_t alone = 0;
    std::int64_t* next = sum_.data();
    for (std::size_t at = 0; at < cells; ++at) {
      std::int64_t below = 0;
      std::int64_t count = 0;
      for (std::size_t part = 0; part < kParts; ++part) {
        Cell& cell = cell_[part * cells + at];
        below += std::exchange(cell.below, below);
        count += std::exchange(cell.seen, count);
      }
      for (std::size_t part = 0; part < kParts; ++part) {
        cell_[part * cells + at].count = count;
        cell_[part * cells + at].sums = next;
      }
      alone += count == 1;
      next += count;
    }
    if (alone * kSearchCost > static_cast<std::int64_t>(n)) return false;
    total = {0, 0};
    in_turn([&](std::size_t part, std::size_t row) {
      const std::int64_t own = rank_[row];
      Cell* now = cell_.data() + part * cells;
      Cell& cell = now[cell_of_[row]];
      if (cell.count > 1) {
        cell.sums[cell.seen] = cell.below + (cell.count - 1 - cell.seen) * own;
      } else {
        const FixedPoint mean = search(now, column, factor, static_cast<Index>(row));
        total.whole += mean.whole;
        total.fraction += mean.fraction;
      }
      cell.below += own;
      ++cell.seen;
    });
    for (std::size_t at = 0; at < cells; ++at)
      if (const Cell& cell = cell_[at]; cell.count > 1)
        kernels_.quotients(cell.sums, cell.count, cell.count - 1, &total.whole, &total.fraction);
    return true;
  }

  static T squared(T difference, T factor) {
    const T scaled = difference * factor;
    return scaled * scaled;
  }

  // A row that is alone in its cell; `now` are the cells of its stretch as of this row.
  FixedPoint search(const Cell* now, const Coded<T>& column, T factor, Index row) {
    const std::size_t levels = column.level.size();
    const Index self = point_[static_cast<std::size_t>(row)];
    const std::uint8_t code = column.code[static_cast<std::size_t>(row)];
    const std::int64_t own = rank_[static_cast<std::size_t>(row)];
    T best = std::numeric_limits<T>::infinity();
    nearest_.clear();
    const auto look = [&](Index point, T base) {
      for (std::size_t v = 0; v < levels; ++v) {
        const std::size_t cell = static_cast<std::size_t>(point) * levels + v;
        if (now[cell].count == 0 || (point == self && v == code)) continue;
        const T distance = base + squared(column.level[code] - column.level[v], factor);
        if (distance > best) continue;
        if (distance < best) nearest_.clear();
        best = distance;
        nearest_.push_back(cell);
      }
    };
    look(self, T{0});
    space_.within(kernels_, self, [&] { return best; }, look);
    std::int64_t sum = 0;
    std::int64_t count = 0;
    for (const std::size_t at : nearest_) {
      const Cell& cell = now[at];
      sum += cell.below + (cell.count - cell.seen) * own;
      count += cell.count;
    }
    return fixed_point(sum, count);
  }

  const Kernels<T>& kernels_;
  const Spatial<T>& space_;
  const std::vector<std::int32_t>& rank_;
  std::vector<Index> point_;            // [n] by row
  std::vector<Cell> cell_;              // [point][level]
  std::vector<std::uint32_t> cell_of_;  // [n] by row
  std::vector<std::int64_t> sum_;       // [n] by cell
  std::vector<std::size_t> nearest_;
};

}  // namespace lcodec
