// Memory for large arrays that are written once and read often.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lcodec {

// Uninitialised memory, in huge pages where it is large and the system has them: in small pages, a
// hundred megabytes cost more than twenty thousand page faults.
template <class T>
class Pages {
 public:
  Pages() = default;
  explicit Pages(std::size_t size) {
    constexpr std::size_t huge = std::size_t{1} << 21;
    const bool large = size * sizeof(T) >= 2 * huge;
    const std::size_t alignment = large ? huge : 64;
    const std::size_t bytes = (size * sizeof(T) + alignment - 1) / alignment * alignment;
    data_.reset(static_cast<T*>(std::aligned_alloc(alignment, bytes)));
    if (!data_ && bytes > 0) throw std::bad_alloc();
#ifdef __linux__
    if (large) static_cast<void>(madvise(data_.get(), bytes, MADV_HUGEPAGE));  // may be refused
#endif
  }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace lcodec
