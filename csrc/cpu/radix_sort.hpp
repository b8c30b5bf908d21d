// Sorting rows by the values of a column, rows of equal value in increasing order.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <utility>
#include <vector>

namespace lcodec {

// Sort word of a row: the value as an unsigned key in the same order, -0 and 0 alike.
template <class T>
struct SortWord;

template <>
struct SortWord<float> {
  using Key = std::uint32_t;
  std::uint32_t key;
  std::int32_t row;
};
template <>
struct SortWord<double> {
  using Key = std::uint64_t;
  std::uint64_t key;
  std::int32_t row;
};

template <class T>
typename SortWord<T>::Key sort_key(T value) {
  using Key = typename SortWord<T>::Key;
  constexpr Key sign = Key{1} << (sizeof(Key) * 8 - 1);
  const auto bits = std::bit_cast<Key>(value + T{0});  // -0 + 0 is 0
  return (bits & sign) ? ~bits : bits | sign;
}

// The value of a key, 0 for -0.
template <class T>
T sort_value(typename SortWord<T>::Key key) {
  using Key = typename SortWord<T>::Key;
  constexpr Key sign = Key{1} << (sizeof(Key) * 8 - 1);
  return std::bit_cast<T>((key & sign) ? key & ~sign : ~key);
}

// Least-significant-digit radix sort of words by key, in digits of `kBits`; stable. The result is
// left in `words`. Digits in which all keys agree cost nothing; discrete columns have few others.
template <class T, int kBits>
void radix_sort_by_digits(std::vector<SortWord<T>>& words, std::vector<SortWord<T>>& spare) {
  using Key = typename SortWord<T>::Key;
  constexpr std::size_t kBuckets = std::size_t{1} << kBits;
  Key differing = 0;
  for (const auto& word : words) differing |= word.key ^ words.front().key;
  spare.resize(words.size());
  for (int shift = 0; shift < static_cast<int>(sizeof(Key)) * 8; shift += kBits) {
    if (((differing >> shift) & (kBuckets - 1)) == 0) continue;
    const auto digit = [&](const SortWord<T>& word) {
      return static_cast<std::size_t>((word.key >> shift) & (kBuckets - 1));
    };
    std::array<std::uint32_t, kBuckets> place{};
    for (const auto& word : words) ++place[digit(word)];
    std::uint32_t start = 0;
    for (auto& p : place) start += std::exchange(p, start);
    for (const auto& word : words) spare[place[digit(word)]++] = word;
    words.swap(spare);
  }
}

// Sorts words, given in increasing order of their rows, by (key, row).
template <class T>
void radix_sort(std::vector<SortWord<T>>& words, std::vector<SortWord<T>>& spare) {
  if (words.size() < 512) {  // counting would take longer
    std::sort(words.begin(), words.end(), [](const SortWord<T>& a, const SortWord<T>& b) {
      return a.key != b.key ? a.key < b.key : a.row < b.row;
    });
  } else if (words.size() < 4096) {
    radix_sort_by_digits<T, 8>(words, spare);
  } else {
    radix_sort_by_digits<T, 11>(words, spare);
  }
}

}  // namespace lcodec
