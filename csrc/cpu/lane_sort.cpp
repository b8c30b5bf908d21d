// Bitonic merge sort of every lane of an array of vectors. A vector holds the same place of all
// columns, so that nothing is ever shuffled: a comparison is one minimum and one maximum for as
// many columns as a vector has lanes. n log2(n) (log2(n) + 1) / 4 comparisons, 27 for each of 1000
// rows.
//
// What makes it fast: a pass over the rows makes the comparisons of three levels, on eight rows in
// registers, and passes over parts are finished before the next part is begun, in the first-level
// cache. All comparisons put the smaller word first, so that rows of largest words at the end need
// no work.

#include "cpu/lane_sort.hpp"

#include "cpu/simd.hpp"

namespace lcodec {
namespace {

using Words = Simd<float>::Int;
constexpr int kLanes = kWidth<float>;
constexpr int kRowsInRegisters = 8;
static_assert(kRowsInRegisters == kLeastLaneRows);

// The compilers have a minimum and a maximum of integer vectors for these.
LCODEC_INLINE void compare(Words& low, Words& high) {
  const Words least = low < high ? low : high;
  high = low > high ? low : high;
  low = least;
}

// Comparisons at distances `from`, `from` / 2, ... 1 of kRows rows.
template <int kRows>
LCODEC_INLINE void compare_within(Words* row, int from) {
#pragma GCC unroll 4
  for (int distance = from; distance > 0; distance /= 2)
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k)
      if ((k & distance) == 0) compare(row[k], row[k + distance]);
}

// The first kLevels levels of a merge of `size` rows. With kMirrored of two sorted halves, which
// are compared from both ends; else of rows of which no level is left but these and finer ones.
template <int kLevels, bool kMirrored>
inline void merge_levels(std::int32_t* words, std::int64_t size) {
  constexpr int kRows = 1 << kLevels;
  const std::int64_t stride = size / kRows;
  for (std::int64_t j = 0; j < stride; ++j) {
    std::int32_t* place[kRowsInRegisters];
    Words row[kRowsInRegisters];
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      const bool from_end = kMirrored && k >= kRows / 2;
      place[k] =
          words + kLanes * (from_end ? size - 1 - ((kRows - 1 - k) * stride + j) : k * stride + j);
      __builtin_memcpy(&row[k], place[k], sizeof row[k]);
    }
    if constexpr (kMirrored) {
#pragma GCC unroll 4
      for (int k = 0; k < kRows / 2; ++k) compare(row[k], row[kRows - 1 - k]);
    }
    compare_within<kRows>(row, kMirrored ? kRows / 4 : kRows / 2);
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) __builtin_memcpy(place[k], &row[k], sizeof row[k]);
  }
}

// The other levels of a merge, three at a time.
void finish_merge(std::int32_t* words, std::int64_t size, std::int64_t n) {
  merge_levels<3, false>(words, size);
  const std::int64_t part = size / 8;
  if (part == 1) return;
  for (std::int64_t begin = 0; begin < n && begin < size; begin += part)
    finish_merge(words + begin * kLanes, part, n - begin);
}

// Eight rows in registers: Batcher's 19 comparisons.
LCODEC_INLINE void sort_eight(std::int32_t* words) {
  Words row[8];
  __builtin_memcpy(row, words, sizeof row);
  constexpr int kPairs[][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6},
                               {5, 7}, {1, 2}, {5, 6}, {0, 4}, {1, 5}, {2, 6}, {3, 7},
                               {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
#pragma GCC unroll 19
  for (const auto& pair : kPairs) compare(row[pair[0]], row[pair[1]]);
  __builtin_memcpy(words, row, sizeof row);
}

void sort(std::int32_t* words, std::int64_t size, std::int64_t n) {
  if (size == kRowsInRegisters) return sort_eight(words);
  const std::int64_t half = size / 2;
  sort(words, half, n);
  if (n <= half) return;
  sort(words + half * kLanes, half, n - half);
  // as many levels first as leave a multiple of three
  const int first = (__builtin_ctzll(static_cast<unsigned long long>(size)) - 1) % 3 + 1;
  if (first == 1) merge_levels<1, true>(words, size);
  if (first == 2) merge_levels<2, true>(words, size);
  if (first == 3) merge_levels<3, true>(words, size);
  const std::int64_t part = size >> first;
  for (std::int64_t begin = 0; begin < n && begin < size; begin += part)
    finish_merge(words + begin * kLanes, part, n - begin);
}

// A scaled value's bits as a float rise with its size. Those below 2^-31 count as 0: what is left
// are 31 powers of two, 23 bits each, for either sign.
template <class T>
void fill(const LaneWords<T>& a) {
  constexpr std::int32_t kLeast = (127 - 31) << 23;
  constexpr std::int32_t kMiddle = 32 << 23;
  constexpr int kBits = 29;
  const int room = 31 - a.number_bits < kBits ? 31 - a.number_bits : kBits;
  const int shift = kBits - room;
  constexpr std::int64_t kBlock = 64;
  std::int32_t word[kBlock];  // vectors first, then one word at a time to its lane
  for (std::int64_t start = 0; start < a.n; start += kBlock) {
    const std::int64_t size = a.n - start < kBlock ? a.n - start : kBlock;
    for (std::int64_t t = 0; t < size; ++t) {
      const auto scaled = static_cast<float>((a.x[start + t] - a.center) * a.scale);
      const auto bits = __builtin_bit_cast(std::int32_t, scaled);
      const std::int32_t above = (bits & 0x7fffffff) - kLeast;
      const std::int32_t magnitude = above > 0 ? above : 0;
      const std::int32_t key = kMiddle + (bits < 0 ? -magnitude : magnitude);
      word[t] = (key >> shift) << a.number_bits | a.number[start + t];
    }
    for (std::int64_t t = 0; t < size; ++t) a.out[(start + t) * kLanes] = word[t];
  }
}

}  // namespace

LaneSort LCODEC_OF_LEVEL(lane_sort)() { return {kLanes, fill<float>, fill<double>, sort}; }

}  // namespace lcodec
