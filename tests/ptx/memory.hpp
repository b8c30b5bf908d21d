// Memory of a device, whose every byte and word is watched.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "ptx/program.hpp"

namespace lcodec::ptx {

constexpr unsigned char kRubbish = 0xA5;  // what memory holds until it is written

// How far the threads of a warp have synchronised with each other.
struct WarpClock {
  std::uint32_t time = 0;                                          // of barriers of the warp
  std::array<std::array<std::uint32_t, kWarp>, kWarp> together{};  // the last one of two lanes

  void meet(Lanes lanes);
};

// Numbers of times between two barriers of a block: those of earlier launches are below `launch`,
// those of other blocks of this launch below `block`.
struct Epoch {
  std::uint32_t launch = 1, block = 1, now = 1;
};

enum class Scope : std::uint8_t { thread, warp, block, grid };

struct Access {
  std::uint16_t thread;  // of its block
  Scope scope;           // warp: several of its threads read at once
  bool writes;
  bool strong;                           // an atomic operation, or ordered otherwise
  std::uint32_t used = 0xffffffff;       // bytes that are looked at
  const unsigned char* value = nullptr;  // that is written, or null if it depends on what is there
};

class Memory {
 public:
  explicit Memory(std::size_t capacity);              // closed
  Memory(unsigned char* data, std::size_t capacity);  // of the host, which has written it
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  unsigned char* data() { return data_; }
  bool contains(const void* address) const { return offset(address) < capacity_; }
  std::size_t offset(const void* address) const {
    return reinterpret_cast<std::size_t>(address) - reinterpret_cast<std::size_t>(data_);
  }
  // Makes a range readable and writable, full of rubbish; or closes it.
  void open(std::size_t offset, std::size_t bytes);
  void close(std::size_t offset, std::size_t bytes);
  bool is_open(std::size_t offset, std::size_t bytes) const;
  void host_wrote(std::size_t offset, std::size_t bytes);

  // Notes an access, and says what is wrong with it, or null.
  const char* access(std::size_t offset, unsigned bytes, const Access& access, const Epoch& epoch,
                     const WarpClock& clock);

 private:
  enum State : unsigned char { closed, unwritten, written };
  struct Trace {  // of the last write of a word of four bytes, or of reads since
    std::uint32_t epoch = 0, time = 0;
    std::uint16_t thread = 0;
    Scope scope = Scope::thread;
    std::uint8_t bytes = 0;  // a bit for each
    bool strong = false;
  };
  struct Word4 {
    Trace write, read;
  };
  static bool conflict(const Trace& earlier, const Trace& now, const Epoch& epoch,
                       const WarpClock& clock);
  static bool ordered(const Trace& earlier, const Trace& now, const WarpClock& clock);
  static Trace join(const Trace& earlier, const Trace& now, const Epoch& epoch,
                    const WarpClock& clock);

  std::size_t capacity_;
  bool owns_ = true;
  unsigned char* data_;
  unsigned char* state_;
  Word4* words_;
};

}  // namespace lcodec::ptx
