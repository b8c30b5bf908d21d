// Sorting the rows of one column after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/at.hpp"
#include "cpu/radix_sort.hpp"

namespace lcodec {

// Holds the memory for it, of one thread.
template <class T>
class ColumnSort {
 public:
  // Rows and values [n] in increasing order of (value, row); value(row).
  template <class Value>
  void operator()(std::int64_t n, const Value& value, std::int32_t* rows, T* values) {
    words_.resize(at(n));
    for (std::int64_t row = 0; row < n; ++row)
      words_[at(row)] = {sort_key(value(row)), static_cast<std::int32_t>(row)};
    radix_sort<T>(words_, spare_);
    for (std::size_t a = 0; a < words_.size(); ++a) {
      rows[a] = words_[a].row;
      values[a] = sort_value<T>(words_[a].key);
    }
  }

 private:
  std::vector<SortWord<T>> words_, spare_;
};

}  // namespace lcodec
