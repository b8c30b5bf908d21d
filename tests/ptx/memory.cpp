#include "ptx/memory.hpp"

#include <sys/mman.h>

#include <cstring>
#include <new>

namespace lcodec::ptx {
namespace {

void* reserve(std::size_t bytes) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

}  // namespace

void WarpClock::meet(Lanes lanes) {
  ++time;
  for (std::size_t a = 0; a < kWarp; ++a) {
    for (std::size_t b = 0; b < kWarp; ++b) {
      if ((lanes >> a & 1) != 0 && (lanes >> b & 1) != 0) together[a][b] = time;
    }
  }
}

Memory::Memory(std::size_t capacity)
    : capacity_(capacity),
      data_(static_cast<unsigned char*>(reserve(capacity))),
      state_(static_cast<unsigned char*>(reserve(capacity))),
      words_(static_cast<Word4*>(reserve((capacity / 4 + 1) * sizeof(Word4)))) {}

Memory::Memory(unsigned char* data, std::size_t capacity)
    : capacity_(capacity),
      owns_(false),
      data_(data),
      state_(static_cast<unsigned char*>(reserve(capacity))),
      words_(static_cast<Word4*>(reserve((capacity / 4 + 1) * sizeof(Word4)))) {
  host_wrote(0, capacity);
}

Memory::~Memory() {
  if (owns_) munmap(data_, capacity_);
  munmap(state_, capacity_);
  munmap(words_, (capacity_ / 4 + 1) * sizeof(Word4));
}

void Memory::open(std::size_t offset, std::size_t bytes) {
  std::memset(data_ + offset, kRubbish, bytes);
  std::memset(state_ + offset, unwritten, bytes);
}

void Memory::close(std::size_t offset, std::size_t bytes) {
  std::memset(state_ + offset, closed, bytes);
}

bool Memory::is_open(std::size_t offset, std::size_t bytes) const {
  return offset <= capacity_ && bytes <= capacity_ - offset &&
         (bytes == 0 || !std::memchr(state_ + offset, closed, bytes));
}

void Memory::host_wrote(std::size_t offset, std::size_t bytes) {
  std::memset(state_ + offset, written, bytes);
}

const char* Memory::access(std::size_t offset, unsigned bytes, const Access& access,
                           const Epoch& epoch, const WarpClock& clock) {
  if (!is_open(offset, bytes)) return "out of bounds";
  unsigned char* const state = state_ + offset;
  const bool reads = !access.writes || !access.value;
  if (reads && std::memchr(state, unwritten, bytes)) {
    for (unsigned k = 0; k < bytes; ++k) {
      if (state[k] == unwritten && (access.used >> k & 1) != 0) return "reads what was not written";
    }
  }
  if (access.writes) std::memset(state, written, bytes);

  Trace now{epoch.now, clock.time, access.thread, access.scope, 0, access.strong};
  for (std::size_t at = offset; at < offset + bytes;) {  // word by word
    const std::size_t first = at % 4;
    const std::size_t count = std::min(offset + bytes - at, 4 - first);
    now.bytes = static_cast<std::uint8_t>(((1u << count) - 1) << first);
    Word4& word = words_[at / 4];
    if (!access.writes) {
      if (conflict(word.write, now, epoch, clock)) return "reads what another thread writes";
      word.read = join(word.read, now, epoch, clock);
    } else {
      if (conflict(word.read, now, epoch, clock)) return "writes what another thread reads";
      if (conflict(word.write, now, epoch, clock) &&
          !(access.value && std::memcmp(data_ + at, access.value + (at - offset), count) == 0)) {
        return "writes what another thread writes";  // something else than is there
      }
      word.write = now;
    }
    at += count;
  }
  return nullptr;
}

bool Memory::conflict(const Trace& earlier, const Trace& now, const Epoch& epoch,
                      const WarpClock& clock) {
  if ((earlier.bytes & now.bytes) == 0 || (earlier.strong && now.strong)) return false;
  if (earlier.epoch < epoch.launch) return false;
  if (earlier.epoch < epoch.block || earlier.scope == Scope::grid) return true;
  if (earlier.epoch < epoch.now) return false;  // a barrier lies between
  if (earlier.scope == Scope::block || earlier.thread / kWarp != now.thread / kWarp) return true;
  return !ordered(earlier, now, clock);
}

// Two accesses by a warp: by one thread, or with a barrier of all these threads between them.
bool Memory::ordered(const Trace& earlier, const Trace& now, const WarpClock& clock) {
  const bool alone = now.scope == Scope::thread;
  if (alone && earlier.scope == Scope::thread) {
    return earlier.thread == now.thread ||
           clock.together[now.thread % kWarp][earlier.thread % kWarp] > earlier.time;
  }
  const auto& with = clock.together[(alone ? now : earlier).thread % kWarp];
  return *std::min_element(with.begin(), with.end()) > earlier.time;
}

// The threads that have read since the last barrier, as far as a later write must know.
Memory::Trace Memory::join(const Trace& earlier, const Trace& now, const Epoch& epoch,
                           const WarpClock& clock) {
  Trace joined = now;
  if (earlier.epoch < epoch.launch) return joined;
  joined.bytes |= earlier.bytes;
  joined.strong = joined.strong && earlier.strong;
  if (earlier.epoch < epoch.block || earlier.scope == Scope::grid) {
    joined.scope = Scope::grid;
  } else if (earlier.epoch < epoch.now) {
    return now;
  } else if (earlier.scope == Scope::block || earlier.thread / kWarp != now.thread / kWarp) {
    joined.scope = Scope::block;
  } else if (now.scope == Scope::thread && earlier.scope == Scope::thread &&
             earlier.thread == now.thread) {
    return joined;
  } else if (ordered(earlier, now, clock)) {
    return now;
  } else {
    joined.scope = Scope::warp;
  }
  return joined;
}

}  // namespace lcodec::ptx
