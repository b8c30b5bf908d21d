// Runs kernels, a block after the other, warp by warp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "ptx/memory.hpp"
#include "ptx/program.hpp"

namespace lcodec::ptx {

constexpr std::size_t kSharedUnasked = 48 * 1024;
constexpr std::size_t kMostShared = 227 * 1024;

enum class Order { forward, reversed, shuffled };

struct Config {
  Order order = Order::forward;                // of the warps of a block and the blocks of a grid
  std::uint64_t seed = 0;                      // of Order::shuffled
  std::size_t memory = std::size_t{80} << 30;  // bytes that cudaMalloc has to give in all
};
Config& config();

// The device's memory, and memory of the host that it takes for its own.
class Heap {
 public:
  void* allocate(std::size_t bytes);  // null where there is no room
  bool free(void* address);
  std::size_t allocated() const { return allocated_; }
  void adopt(unsigned char* data, std::size_t bytes);
  void disown() { adopted_.clear(); }
  Memory* find(const void* address);  // that an address lies in, or null

 private:
  static constexpr std::size_t kCapacity = std::size_t{4} << 30;
  Memory memory_{kCapacity};
  std::map<std::size_t, std::size_t> blocks_;  // offset and bytes
  std::size_t allocated_ = 0, end_ = 0;
  std::map<const unsigned char*, Memory> adopted_;  // by their ends
};
Heap& heap();

struct Size {
  unsigned x, y, z;
};

// Raises Fault.
void run_grid(Kernel& kernel, Size grid, Size block, void** arguments, std::size_t dynamic_shared);

}  // namespace lcodec::ptx
