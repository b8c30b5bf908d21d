// Sums of minima under permutations of the response.
//
// A thread takes whole permutations: it copies the ranks, exchanges them in place, and adds up.
// Eight positions share one block of random words. A group of rows needs no list of its pairs: with
// the rows in increasing order of rank, a row is the smaller one of its pairs with all later rows
// of its group, so that a pass over all rows adds up every group.
#include "lcodec/permutation.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/philox.hpp"
#include "cpu/at.hpp"
#include "cpu/instruments.hpp"
#include "cpu/parallel.hpp"

namespace lcodec {
namespace {

template <bool kBlocks>
void exchange(std::int32_t* value, std::int64_t n, [[maybe_unused]] const std::int32_t* start,
              std::uint64_t seed, std::uint64_t stream) {
  for (std::int64_t block = (n - 1) / kWordsAtOnce; block >= 0; --block) {
    std::uint32_t word[kWordsAtOnce];
    philox(seed, stream, static_cast<std::uint64_t>(block), 0, word);
    const std::int64_t base = block * kWordsAtOnce;
    for (std::int64_t t = std::min<std::int64_t>(kWordsAtOnce, n - base) - 1; t >= 0; --t) {
      const std::int64_t i = base + t;
      std::int64_t low = 0;
      if constexpr (kBlocks) low = start[i];
      const auto bound = static_cast<std::uint32_t>(i - low + 1);
      std::swap(value[i],
                value[low + bounded(word[t], bound, seed, stream, static_cast<std::uint64_t>(i))]);
    }
  }
}

// Permutation `stream` of n values in place.
void shuffle(std::int32_t* value, std::int64_t n, const std::int32_t* start, std::uint64_t seed,
             std::uint64_t stream) {
  if (stream == 0) return;
  start ? exchange<true>(value, n, start, seed, stream)
        : exchange<false>(value, n, start, seed, stream);
}

// Ranks in increasing order, and every row's place among them: equal ones in the order of rows.
struct Order {
  std::vector<std::int32_t> sorted, place;

  Order(const std::int32_t* rank, std::int64_t n) : sorted(at(n)), place(at(n)) {
    std::vector<std::int32_t> next(at(n) + 2, 0);
    for (std::int64_t i = 0; i < n; ++i) ++next[at(rank[i]) + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int32_t k = next[at(rank[i])]++;
      place[at(i)] = k;
      sorted[at(k)] = rank[i];
    }
  }
};

// A thread's memory and its way through one permutation.
class Worker {
 public:
  Worker(const PermutedPairs& pairs, const Order* order, std::uint64_t seed)
      : pairs_(pairs), order_(order), seed_(seed), rank_(at(pairs.n)) {
    if (!order) return;
    place_.resize(at(pairs.n));
    by_rank_.resize(at(pairs.n));
    left_.resize(at(pairs.groups));
  }

  void operator()(std::uint64_t stream, std::int64_t* sum) {
    const std::int64_t n = pairs_.n;
    if (order_) {
      std::copy(order_->place.begin(), order_->place.end(), place_.begin());
      shuffle(place_.data(), n, pairs_.start, seed_, stream);
      for (std::int64_t i = 0; i < n; ++i) rank_[at(i)] = order_->sorted[at(place_[at(i)])];
    } else {
      std::copy_n(pairs_.rank, n, rank_.begin());
      shuffle(rank_.data(), n, pairs_.start, seed_, stream);
    }
    for (std::int64_t s = 0; s < pairs_.segments; ++s) sum[s] = of_segment(s);
    for (std::int64_t l = 0; l < pairs_.labelings; ++l) add_groups(pairs_.label + l * n, sum);
  }

 private:
  std::int64_t of_segment(std::int64_t s) const {
    const std::int64_t begin = pairs_.begin[s];
    const std::int64_t end = pairs_.begin[s + 1];
    const std::int32_t* rank = rank_.data();
    std::int64_t sum = 0;
    if (pairs_.owner) {
      for (std::int64_t t = begin; t < end; ++t)
        sum += std::min(rank[pairs_.owner[t]], rank[pairs_.other[t]]);
    } else {
      for (std::int64_t t = begin; t < end; ++t)
        sum += std::min(rank[t - begin], rank[pairs_.other[t]]);
    }
    return sum;
  }

  void add_groups(const std::int32_t* label, std::int64_t* sum) {
    const std::int64_t n = pairs_.n;
    for (std::int64_t i = 0; i < n; ++i) by_rank_[at(place_[at(i)])] = label[i];
    std::copy_n(pairs_.size, pairs_.groups, left_.begin());
    for (std::int64_t k = 0; k < n; ++k) {
      const std::int32_t g = by_rank_[at(k)];
      if (g < 0) continue;
      const std::int32_t later = --left_[at(g)];
      sum[pairs_.segment[g]] += std::int64_t{order_->sorted[at(k)]} * later;
    }
  }

  const PermutedPairs& pairs_;
  const Order* order_;
  std::uint64_t seed_;
  std::vector<std::int32_t> rank_, place_, by_rank_, left_;
};

// Permutations that a thread takes at once.
std::int64_t batch(std::int64_t n) { return std::max<std::int64_t>(1, (1 << 14) / n); }

template <class MakeWork>
Status for_each_permutation(std::int64_t n, std::int64_t count, const Execution& execution,
                            const MakeWork& make_work) {
  const std::int64_t size = batch(n);
  return parallel_for((count + size - 1) / size, execution, [&] {
    return [&, work = make_work()](std::int64_t piece) mutable {
      for (std::int64_t b = piece * size; b < std::min(count, (piece + 1) * size); ++b) work(b);
    };
  });
}

}  // namespace

Status permuted_sums(const PermutedPairs& pairs, std::uint64_t seed, std::int64_t first,
                     std::int64_t count, std::int64_t* sum, const Execution& execution) {
  std::vector<Order> order;
  if (pairs.labelings > 0) order.emplace_back(pairs.rank, pairs.n);
  return for_each_permutation(pairs.n, count, execution, [&] {
    return [&, worker = Worker(pairs, order.empty() ? nullptr : order.data(), seed)](
               std::int64_t b) mutable {
      worker(static_cast<std::uint64_t>(first + b), sum + b * pairs.segments);
    };
  });
}

Status permutations(std::int64_t n, const std::int32_t* start, std::uint64_t seed,
                    std::int64_t first, std::int64_t count, std::int32_t* row,
                    const Execution& execution) {
  return for_each_permutation(n, count, execution, [&] {
    return [&](std::int64_t b) {
      std::iota(row + b * n, row + (b + 1) * n, 0);
      shuffle(row + b * n, n, start, seed, static_cast<std::uint64_t>(first + b));
    };
  });
}

#ifdef LCODEC_INSTRUMENTS
std::int64_t bare_permutations(const std::int32_t* rank, const std::int32_t* other, std::int64_t n,
                               std::uint64_t seed, std::int64_t count) {
  std::vector<std::int32_t> value(at(n));
  std::int64_t sum = 0;
  for (std::int64_t b = 1; b <= count; ++b) {
    std::copy_n(rank, n, value.begin());
    shuffle(value.data(), n, nullptr, seed, static_cast<std::uint64_t>(b));
    for (std::int64_t i = 0; i < n; ++i) sum += std::min(value[at(i)], value[at(other[i])]);
  }
  return sum;
}
#endif

}  // namespace lcodec
