// The sums behind Chatterjee's xi.
//
// A response is ranked once and a column x is sorted once; a pair of them takes one pass over the
// ranks in the order of x. Where rows tie in x, every order of a group is as likely as any other: a
// step inside a group of s joins a random pair of it, so that its s - 1 steps make (2 / s)
// sum_{a < b} |R_a - R_b|, and the step on to a group of t makes the mean over the s t pairs. Both
// are weighted sums of the group's ranks in increasing order, which one pass over the rows in the
// order of y delivers.
#include "lcodec/chatterjee.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <numeric>

#include "common/random.hpp"
#include "cpu/at.hpp"
#include "cpu/column_sort.hpp"
#include "cpu/parallel.hpp"

namespace lcodec {
namespace {

__extension__ typedef unsigned __int128 Sum;

Wide wide(Sum sum) {
  return {static_cast<std::uint64_t>(sum >> 64), static_cast<std::uint64_t>(sum)};
}

Sum square(std::int64_t value) {
  return static_cast<Sum>(static_cast<std::uint64_t>(value)) * static_cast<std::uint64_t>(value);
}

// The values of a column in increasing order.
struct Ascending {
  std::vector<double> value;

  void take(const double* column, const std::int32_t* rows, std::int64_t n) {
    value.resize(at(n));
    for (std::int64_t k = 0; k < n; ++k) value[at(k)] = column[rows[k]];
  }

  // Where the group of equal values that begins at `first` ends.
  std::int64_t group_end(std::int64_t first) const {
    std::int64_t end = first + 1;
    const auto n = static_cast<std::int64_t>(value.size());
    while (end < n && value[at(end)] == value[at(first)]) ++end;
    return end;
  }
};

// The eigenvalues of the centred minima are those of n q_s p_t, s <= t, over thresholds 1 to n of
// the ranks: p_t is the share of ranks that reach t, and q_t = 1 - p_t. Those
// between two ranks agree. The sum over s <= t <= u of q_s^2 (q_t p_t) p_u^2,
// times the orders that s, t, u have.
double cube_of_minima(const Ascending& y, std::int64_t n) {
  double cube = 0;
  double singles = 0;  // over thresholds passed: sum q^2,
  double doubles = 0;  // sum q^3 p,
  double pairs = 0;    // and over pairs of them sum q_s^2 q_t p_t
  for (std::int64_t first = 0, end; first < n; first = end) {
    end = y.group_end(first);
    const double q = static_cast<double>(first) / static_cast<double>(n);
    const double p = static_cast<double>(n - first) / static_cast<double>(n);
    for (std::int64_t t = first; t < end; ++t) {
      cube += 6 * pairs * (p * p) + 3 * (doubles * (p * p) + singles * (q * p * p * p)) +
              (q * p) * (q * p) * (q * p);
      pairs += singles * (q * p);
      doubles += q * q * q * p;
      singles += q * q;
    }
  }
  return cube;
}

// Ranks of a response by row, from its values and its rows in increasing order.
void rank_response(const Ascending& y, const std::int32_t* order, std::int64_t n,
                   std::int32_t* rank, RankSums& sums) {
  for (std::int64_t first = 0, end; first < n; first = end) {
    end = y.group_end(first);
    const std::int64_t above = n - first;
    sums.denominator += (end - first) * above * first;
    sums.sum += (end - first) * end;
    sums.squares += (end - first) * end * end;
    for (std::int64_t k = first; k < end; ++k) rank[order[k]] = static_cast<std::int32_t>(end);
  }
  // In this order R_i is the minimum of 2 (n - 1 - i) + 1 pairs.
  Sum minima_squares = 0;
  Sum minima_rows = 0;
  Sum distance_rows = 0;
  std::int64_t before = 0;
  for (std::int64_t k = 0; k < n; ++k) {
    const std::int64_t r = rank[order[k]];
    const std::int64_t pairs = 2 * (n - 1 - k) + 1;
    before += r;
    const std::int64_t row = before + (n - 1 - k) * r;
    sums.minima += pairs * r;
    minima_squares += static_cast<std::uint64_t>(pairs * r * r);
    minima_rows += square(row);
    distance_rows += square(n * r + sums.sum - 2 * row);
  }
  sums.minima_squares = wide(minima_squares);
  sums.minima_rows = wide(minima_rows);
  sums.distance_rows = wide(distance_rows);
  sums.cube = cube_of_minima(y, n);
}

// A sum over one of the denominators.
struct Share {
  std::size_t place;
  std::int64_t times;
};

// A column x: its rows in increasing order, and its groups of tied rows where they are averaged.
struct Order {
  std::int32_t* row;
  std::vector<std::int32_t> group;  // of a row; empty where no rows tie, or ties are broken
  std::vector<std::int64_t> begin;  // group g has the places begin[g], ..., begin[g + 1] - 1
  std::vector<Share> inside;        // of a group's steps: over its size
  std::vector<Share> onward;        // of the step on to the next group: over the product of sizes
};

void break_ties(const Ascending& x, std::int32_t* row, std::uint64_t seed) {
  const auto n = static_cast<std::int64_t>(x.value.size());
  for (std::int64_t first = 0, end; first < n; first = end) {
    end = x.group_end(first);
    if (end == first + 1) continue;
    std::sort(row + first, row + end, [seed](std::int32_t a, std::int32_t b) {
      const std::uint64_t word_a = tie_hash(seed, a);
      const std::uint64_t word_b = tie_hash(seed, b);
      return word_a != word_b ? word_a < word_b : a < b;
    });
  }
}

// Up to here sums are kept over one denominator, the least common multiple of all: lengths are n^2
// at most, so that n^2 times as much is below 2^60.
constexpr std::int64_t kLargestCommon = 1 << 20;

// The denominators of tied groups and what of the weights does not depend on the response.
void weigh_groups(Order& order, PathSums& path) {
  const std::size_t groups = order.begin.size() - 1;
  const auto size = [&](std::size_t g) { return order.begin[g + 1] - order.begin[g]; };
  auto& denominator = path.denominator;
  for (std::size_t g = 0; g < groups; ++g) {
    denominator.push_back(size(g));
    if (g + 1 < groups) denominator.push_back(size(g) * size(g + 1));
  }
  std::sort(denominator.begin(), denominator.end());
  denominator.erase(std::unique(denominator.begin(), denominator.end()), denominator.end());
  std::int64_t common = 1;
  for (const std::int64_t each : denominator)
    if (common <= kLargestCommon) common = std::lcm(common, each);
  if (common <= kLargestCommon) denominator.assign(1, common);
  path.rows.assign(denominator.size(), 0);
  path.squares.assign(denominator.size(), 0);
  const auto share = [&](std::int64_t value) -> Share {
    if (common <= kLargestCommon) return {0, common / value};
    const auto found = std::lower_bound(denominator.begin(), denominator.end(), value);
    return {static_cast<std::size_t>(found - denominator.begin()), 1};
  };
  for (std::size_t g = 0; g < groups; ++g) {
    const std::int64_t beside = (g > 0) + (g + 1 < groups);
    const std::int64_t row = 2 * size(g) - 2 + beside;
    const Share inside = share(size(g));
    order.inside.push_back(inside);
    path.rows[inside.place] += row * row * inside.times;
    path.squares[inside.place] += 2 * (size(g) - 1) * inside.times;
    if (g + 1 == groups) break;
    const Share onward = share(size(g) * size(g + 1));
    order.onward.push_back(onward);
    path.squares[onward.place] += onward.times;
  }
}

// The trace of (a H)^3, with H = I - 1 1'/n. Within a group of s, a is 1 / s; between groups of s
// and t it is 1 / (2 s t). tr a^3 has triples inside a group, and those of two rows of one and one
// of the group beside it.
double cube_of_weights(const Order& order) {
  const std::size_t groups = order.begin.size() - 1;
  const auto size = [&](std::size_t g) {
    return static_cast<double>(order.begin[g + 1] - order.begin[g]);
  };
  const auto row_sum = [&](std::size_t g) {
    return (2 * size(g) - 2 + (g > 0) + (g + 1 < groups)) / (2 * size(g));
  };
  double trace = 0;
  double once = 0;   // 1' a^2 1
  double twice = 0;  // 1' a^3 1
  for (std::size_t g = 0; g < groups; ++g) {
    const double s = size(g);
    const double a = row_sum(g);
    trace += (s - 1) * (s - 2) / (s * s);
    once += s * a * a;
    twice += (s - 1) * a * a;
    if (g + 1 == groups) break;
    const double t = size(g + 1);
    trace += 3 * (s - 1) / (4 * s * s * t) + 3 * (t - 1) / (4 * t * t * s);
    twice += a * row_sum(g + 1);
  }
  const auto n = static_cast<double>(order.begin.back());
  const double all = (n - 1) / n;  // 1' a 1 / n
  return trace - 3 * twice / n + 3 * all * once / n - all * all * all;
}

void order_column(const Ascending& x, std::int64_t n, Ties ties, std::uint64_t seed, Order& order,
                  PathSums& path) {
  if (ties == Ties::random) break_ties(x, order.row, seed);
  const auto& value = x.value;
  if (ties != Ties::average || std::adjacent_find(value.begin(), value.end()) == value.end()) {
    // the weights are 1/2 on both sides of every row but the first and the last one
    path = {{1}, {4 * (n - 2) + 2}, {n - 1}, {}, 0};
    return;
  }
  order.group.resize(at(n));
  for (std::int64_t first = 0, end; first < n; first = end) {
    end = x.group_end(first);
    for (std::int64_t k = first; k < end; ++k)
      order.group[at(order.row[k])] = static_cast<std::int32_t>(order.begin.size());
    order.begin.push_back(first);
  }
  order.begin.push_back(n);
  weigh_groups(order, path);
  path.cube = cube_of_weights(order);
}

// Sum over a < b of |v_a - v_b| of values in increasing order: the k-th of s enters with weight
// 2 k - (s - 1).
std::int64_t within(const std::int32_t* value, std::int64_t size) {
  std::int64_t sum = 0;
  for (std::int64_t k = 0; k < size; ++k) sum += (2 * k - (size - 1)) * value[k];
  return sum;
}

// Sum of |a - b| over the values of two groups, each in increasing order.
std::int64_t between(const std::int32_t* a, std::int64_t size_a, const std::int32_t* b,
                     std::int64_t size_b) {
  std::int64_t total = 0;
  for (std::int64_t k = 0; k < size_a; ++k) total += a[k];
  std::int64_t sum = 0;
  std::int64_t below = 0;
  std::int64_t passed = 0;
  for (std::int64_t k = 0; k < size_b; ++k) {
    while (passed < size_a && a[passed] <= b[k]) below += a[passed++];
    sum += (2 * passed - size_a) * b[k] + total - 2 * below;
  }
  return sum;
}

// The length of a response in the order of x. Sums of one denominator stay below n^3 / 2 < 2^63:
// 2 within <= s^2 n / 2 and between <= s t n.
void add_length(const Order& order, std::int64_t n, const std::int32_t* rank,
                const std::int32_t* by_rank, std::vector<std::int64_t>& next,
                std::vector<std::int32_t>& value, std::int64_t* length) {
  if (order.group.empty()) {
    std::int64_t last = rank[order.row[0]];
    for (std::int64_t k = 1; k < n; ++k) {
      const std::int64_t here = rank[order.row[k]];
      length[0] += std::abs(here - last);
      last = here;
    }
    return;
  }
  next = order.begin;
  value.resize(at(n));
  for (std::int64_t k = 0; k < n; ++k) {
    const std::int32_t row = by_rank[k];
    value[at(next[at(order.group[at(row)])]++)] = rank[row];
  }
  const std::size_t groups = order.begin.size() - 1;
  for (std::size_t g = 0; g < groups; ++g) {
    const std::int32_t* here = value.data() + order.begin[g];
    const std::int64_t size = order.begin[g + 1] - order.begin[g];
    length[order.inside[g].place] += 2 * within(here, size) * order.inside[g].times;
    if (g + 1 == groups) break;
    length[order.onward[g].place] +=
        between(here, size, here + size, order.begin[g + 2] - order.begin[g + 1]) *
        order.onward[g].times;
  }
}

}  // namespace

Status chatterjee(const double* x, std::int64_t k, const double* y, std::int64_t m, std::int64_t n,
                  Ties ties, std::uint64_t seed, std::vector<PathSums>& paths,
                  std::vector<RankSums>& ranks, bool& finite, const Execution& execution) {
  std::vector<std::int32_t> rank(at(m * n));
  std::vector<std::int32_t> rows(at((k + m) * n));  // of x, then of y, in increasing order
  std::vector<std::int32_t> as_given(at(n));
  std::iota(as_given.begin(), as_given.end(), 0);
  const auto values = [&](std::int64_t column) {
    return column < k ? x + column * n : y + (column - k) * n;
  };
  std::atomic<bool> usable{true};
  const auto look = [&](std::int64_t column) {
    const double* own = values(column);
    if (std::all_of(own, own + n, [](double value) { return std::isfinite(value); }))
      return Unsorted<double>{own, rows.data() + column * n};
    usable = false;
    return Unsorted<double>{};
  };
  const Status sorted = sort_side_by_side<double>(k + m, as_given, as_given, execution, look);
  finite = usable;
  if (sorted != Status::ok || !finite) return sorted;
  std::vector<Order> orders(at(k));
  paths.assign(at(k), {});
  ranks.assign(at(m), {});
  const Status prepared = parallel_for(k + m, execution, [&] {
    return [&, ascending = Ascending()](std::int64_t piece) mutable {
      std::int32_t* own = rows.data() + piece * n;
      ascending.take(values(piece), own, n);
      if (piece < k) {
        Order& order = orders[at(piece)];
        order.row = own;
        order_column(ascending, n, ties, seed, order, paths[at(piece)]);
      } else {
        const std::int64_t j = piece - k;
        rank_response(ascending, own, n, rank.data() + j * n, ranks[at(j)]);
      }
    };
  });
  if (prepared != Status::ok) return prepared;
  for (PathSums& path : paths) path.length.assign(at(m) * path.denominator.size(), 0);
  return parallel_for(k * m, execution, [&] {
    return [&, next = std::vector<std::int64_t>(),
            value = std::vector<std::int32_t>()](std::int64_t pair) mutable {
      const std::int64_t j = pair % m;
      PathSums& path = paths[at(pair / m)];
      add_length(orders[at(pair / m)], n, rank.data() + j * n, rows.data() + (k + j) * n, next,
                 value, path.length.data() + at(j) * path.denominator.size());
    };
  });
}

}  // namespace lcodec
