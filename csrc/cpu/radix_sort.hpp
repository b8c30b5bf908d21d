// Sorting rows by the values of a column, rows of equal value in increasing order.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
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

// Least-significant-digit radix sort of words by key; stable. The result is left in `words`.
template <class T>
void radix_sort(std::vector<SortWord<T>>& words, std::vector<SortWord<T>>& spare) {
  using Key = typename SortWord<T>::Key;
  constexpr int kBits = 8;
  constexpr std::size_t kPasses = sizeof(Key) * 8 / kBits;
  constexpr std::size_t kBuckets = std::size_t{1} << kBits;
  std::array<std::array<std::uint32_t, kBuckets>, kPasses> counts{};
  for (const auto& word : words)
    for (std::size_t pass = 0; pass < kPasses; ++pass)
      ++counts[pass][(word.key >> (pass * kBits)) & (kBuckets - 1)];
  spare.resize(words.size());
  for (std::size_t pass = 0; pass < kPasses; ++pass) {
    auto& count = counts[pass];
    const auto digit = [&](const SortWord<T>& word) {
      return (word.key >> (pass * kBits)) & (kBuckets - 1);
    };
    if (count[digit(words.front())] == words.size()) continue;  // one digit for all
    std::uint32_t start = 0;
    for (auto& c : count) {
      const std::uint32_t size = c;
      c = start;
      start += size;
    }
    for (const auto& word : words) spare[count[digit(word)]++] = word;
    words.swap(spare);
  }
}

}  // namespace lcodec
