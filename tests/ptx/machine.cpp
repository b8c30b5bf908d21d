#include "ptx/machine.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>

namespace lcodec::ptx {
namespace {

// Of 227 KB, and gaps between variables.
constexpr std::size_t kSharedCapacity = std::size_t{1} << 19;

// Where generic addresses of shared memory lie.
constexpr std::uint64_t kSharedWindow = std::uint64_t{1} << 60;

Epoch& epoch_of_all() {
  static Epoch one;
  return one;
}

enum class State { runs, waits_for_warp, waits_for_block, ended };

struct Warp {
  unsigned first = 0;  // thread of its block
  std::array<int, kWarp> pc{};
  std::array<State, kWarp> state{};
  std::vector<Register> registers;
  WarpClock clock;

  Lanes in(State wanted) const {
    Lanes lanes = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      lanes |= static_cast<Lanes>(state[lane] == wanted) << lane;
    }
    return lanes;
  }
  Word& at(int number, unsigned lane) { return registers[static_cast<std::size_t>(number)][lane]; }
};

template <class Body>
void each(Lanes lanes, const Body& body) {
  for (; lanes != 0; lanes &= lanes - 1) body(static_cast<unsigned>(std::countr_zero(lanes)));
}

template <class T>
T cast(Word word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <class T>
Word combine(Mode mode, Word old, Word value, Word swapped) {
  const T a = cast<T>(old);
  const T b = cast<T>(value);
  T result = b;  // Mode::exchange
  if (mode == Mode::add) result = static_cast<T>(a + b);
  if (mode == Mode::min) result = std::min(a, b);
  if (mode == Mode::max) result = std::max(a, b);
  if (mode == Mode::swap) result = a == b ? cast<T>(swapped) : a;
  if constexpr (std::is_integral_v<T>) {
    if (mode == Mode::bit_or) result = a | b;
    if (mode == Mode::bit_and) result = a & b;
  }
  Word word = 0;
  std::memcpy(&word, &result, sizeof result);
  return word;
}

Word combine(const Instruction& i, Word old, Word value, Word swapped = 0) {
  const bool is_signed = i.is_signed && i.mode != Mode::add;  // sums wrap around
  if (i.is_float) {
    return i.bytes == 4 ? combine<float>(i.mode, old, value, swapped)
                        : combine<double>(i.mode, old, value, swapped);
  }
  if (i.bytes == 8) {
    return is_signed ? combine<std::int64_t>(i.mode, old, value, swapped)
                     : combine<std::uint64_t>(i.mode, old, value, swapped);
  }
  return is_signed ? combine<std::int32_t>(i.mode, old, value, swapped)
                   : combine<std::uint32_t>(i.mode, old, value, swapped);
}

class Machine {
 public:
  Machine(Kernel& kernel, Size grid, Size block, void** arguments, std::size_t dynamic_shared)
      : kernel_(kernel), grid_(grid), block_(block), dynamic_shared_(dynamic_shared) {
    params_.assign(kernel.param_bytes, 0);
    for (std::size_t k = 0; k < kernel.params.size(); ++k) {
      std::memcpy(params_.data() + kernel.params[k].offset, arguments[k], kernel.params[k].bytes);
    }
    random_.seed(config().seed);
    threads_ = block.x * block.y * block.z;
    local_.resize(threads_ * kernel.local_bytes);
    warps_.resize((threads_ + kWarp - 1) / kWarp);
    for (Warp& warp : warps_) {
      warp.registers.resize(static_cast<std::size_t>(kernel.registers));
      for (const auto& [value, number] : kernel.constants) {
        warp.registers[static_cast<std::size_t>(number)].fill(value);
      }
    }
  }

  void run() {
    epoch_.launch = epoch_.now + 1;
    shared().close(0, kSharedCapacity);
    for (const std::uint64_t number : make_order(std::uint64_t{grid_.x} * grid_.y * grid_.z)) {
      index_ = {static_cast<unsigned>(number % grid_.x),
                static_cast<unsigned>(number / grid_.x % grid_.y),
                static_cast<unsigned>(number / grid_.x / grid_.y)};
      run_block();
    }
  }

 private:
  // ------------------------------------------------------------------------------------------
  // What is said of a mistake

  std::string thread_name(const Warp& warp, unsigned lane) const {
    const unsigned t = warp.first + lane;
    if (t >= threads_) return "lane " + std::to_string(lane);
    return "thread (" + std::to_string(t % block_.x) + ", " +
           std::to_string(t / block_.x % block_.y) + ", " +
           std::to_string(t / block_.x / block_.y) + ")";
  }

  [[noreturn]] void fail(const Warp& warp, unsigned lane, const Instruction& i,
                         const std::string& what) const {
    throw Fault("kernel " + kernel_.name + ", block (" + std::to_string(index_.x) + ", " +
                std::to_string(index_.y) + ", " + std::to_string(index_.z) + "), " +
                thread_name(warp, lane) + ", " + i.place + ", " + i.text + ": " + what);
  }

  const Instruction& instruction(const Warp& warp, unsigned lane) const {
    return kernel_.code[static_cast<std::size_t>(warp.pc[lane])];
  }

  // ------------------------------------------------------------------------------------------
  // Blocks

  // Blocks of CUB's kernels wait for earlier ones, in the order in which a device starts them.
  std::vector<std::uint64_t> make_order(std::uint64_t count) {
    std::vector<std::uint64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (kernel_.name.starts_with("_ZN6lcodec")) reorder(order);
    return order;
  }

  template <class T>
  void reorder(std::vector<T>& order) {
    if (config().order == Order::reversed) std::reverse(order.begin(), order.end());
    if (config().order == Order::shuffled) std::shuffle(order.begin(), order.end(), random_);
  }

  void set_up_block() {
    epoch_.block = ++epoch_.now;
    for (const Variable& v : kernel_.shared) shared().open(v.offset, v.bytes);
    shared().open(kernel_.shared_end, dynamic_shared_);
    std::fill(local_.begin(), local_.end(), kRubbish);
    for (std::size_t w = 0; w < warps_.size(); ++w) {
      Warp& warp = warps_[w];
      warp.first = static_cast<unsigned>(w) * kWarp;
      warp.pc.fill(0);
      warp.clock = {};
      for (unsigned lane = 0; lane < kWarp; ++lane) {
        const bool exists = warp.first + lane < threads_;
        warp.state[lane] = exists ? State::runs : State::ended;
        for (auto& with : warp.clock.together) {
          if (!exists) with[lane] = UINT32_MAX;
        }
        for (const auto& [name, number] : kernel_.specials) {
          warp.at(number, lane) = special(name, warp.first + lane, lane);
        }
      }
    }
  }

  static unsigned part(Size size, char axis) {
    return axis == 'x' ? size.x : axis == 'y' ? size.y : size.z;
  }

  Word special(const std::string& name, unsigned thread, unsigned lane) const {
    const Size mine{thread % block_.x, thread / block_.x % block_.y, thread / block_.x / block_.y};
    if (name.starts_with("%tid")) return part(mine, name.back());
    if (name.starts_with("%ntid")) return part(block_, name.back());
    if (name.starts_with("%ctaid")) return part(index_, name.back());
    if (name.starts_with("%nctaid")) return part(grid_, name.back());
    const Lanes below = (Lanes{1} << lane) - 1;
    if (name == "%laneid") return lane;
    if (name == "%lanemask_lt") return below;
    if (name == "%lanemask_le") return below << 1 | 1;
    if (name == "%lanemask_ge") return ~below;
    return ~(below << 1 | 1);  // %lanemask_gt
  }

  void run_block() {
    set_up_block();
    std::vector<Warp*> order;
    for (Warp& warp : warps_) order.push_back(&warp);
    reorder(order);
    do {
      for (Warp* warp : order) run_warp(*warp);
    } while (pass_block_barrier());
  }

  // All threads that have not ended wait: for each other, or it is a mistake.
  bool pass_block_barrier() {
    const Warp* first = nullptr;
    unsigned first_lane = 0;
    for (const Warp& warp : warps_) {
      if (const Lanes lanes = warp.in(State::waits_for_block); lanes != 0 && !first) {
        first = &warp;
        first_lane = static_cast<unsigned>(std::countr_zero(lanes));
      }
    }
    if (!first) return false;
    const int pc = first->pc[first_lane];
    const Instruction& i = instruction(*first, first_lane);
    Word sum = 0;
    for (Warp& warp : warps_) {
      each(existing(warp), [&](unsigned lane) {
        const bool ended = warp.state[lane] == State::ended;
        if (ended || warp.pc[lane] != pc) {
          fail(*first, first_lane, i,
               "waits for " + thread_name(warp, lane) +
                   (ended ? ", which has ended"
                          : ", which waits at another barrier, " + instruction(warp, lane).place));
        }
        if (i.mode != Mode::none) sum += warp.at(i.from[0], lane);
      });
    }
    const Word result = i.mode == Mode::count ? sum
                        : i.mode == Mode::any ? sum > 0
                                              : sum == threads_;
    for (Warp& warp : warps_) {
      each(existing(warp), [&](unsigned lane) {
        if (i.mode != Mode::none) warp.at(i.to[0], lane) = result;
        warp.state[lane] = State::runs;
        ++warp.pc[lane];
      });
    }
    ++epoch_.now;
    return true;
  }

  Lanes existing(const Warp& warp) const {
    const unsigned count = threads_ - warp.first;
    return count >= kWarp ? 0xffffffff : (Lanes{1} << count) - 1;
  }

  // ------------------------------------------------------------------------------------------
  // Warps

  // Until all lanes wait or have ended. Of lanes that have parted, those that are behind run.
  void run_warp(Warp& warp) {
    while (const Lanes running = warp.in(State::runs)) {
      int pc = INT32_MAX;
      each(running, [&](unsigned lane) { pc = std::min(pc, warp.pc[lane]); });
      Lanes lanes = 0;
      int next = INT32_MAX;  // where others are met
      each(running, [&](unsigned lane) {
        if (warp.pc[lane] == pc) {
          lanes |= Lanes{1} << lane;
        } else {
          next = std::min(next, warp.pc[lane]);
        }
      });
      run_lanes(warp, lanes, pc, next);
    }
    if (const Lanes waiting = warp.in(State::waits_for_warp)) fail_waiting(warp, waiting);
  }

  // While the lanes stay together and behind `next`.
  void run_lanes(Warp& warp, Lanes lanes, int pc, int next) {
    while (pc < next) {
      Instruction& i = kernel_.code[static_cast<std::size_t>(pc)];
      const Lanes on = i.guard < 0 ? lanes : guarded(warp, i, lanes);
      i.executed += on != 0;
      switch (i.kind) {
        case Kind::compute:
          if (on != 0) i.compute(i, warp.registers.data(), on);
          break;
        case Kind::load:
        case Kind::store:
        case Kind::atomic:
          if (on != 0) access_memory(warp, i, on);
          break;
        case Kind::branch:
          if (on == lanes) {
            pc = i.target;
            continue;
          }
          if (on != 0) return part_ways(warp, lanes, pc + 1, on, i.target, State::runs);
          break;
        case Kind::exit:
          if (on != 0) return part_ways(warp, lanes, pc + 1, on, pc, State::ended);
          break;
        case Kind::meet_block:
          if (on != 0) return part_ways(warp, lanes, pc + 1, on, pc, State::waits_for_block);
          break;
        case Kind::shuffle:
        case Kind::vote:
        case Kind::meet_warp:
          if (on == 0) break;
          part_ways(warp, lanes, pc + 1, on, pc, State::waits_for_warp);
          return meet_in_warp(warp, i, on);
      }
      ++pc;
    }
    each(lanes, [&](unsigned lane) { warp.pc[lane] = pc; });
  }

  static Lanes guarded(Warp& warp, const Instruction& i, Lanes lanes) {
    Lanes on = 0;
    const Register& guard = warp.registers[static_cast<std::size_t>(i.guard)];
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      on |= static_cast<Lanes>((guard[lane] != 0) != i.negated) << lane;
    }
    return on & lanes;
  }

  static void part_ways(Warp& warp, Lanes lanes, int pc, Lanes on, int other, State state) {
    each(lanes, [&](unsigned lane) {
      const bool parts = (on >> lane & 1) != 0;
      warp.pc[lane] = parts ? other : pc;
      if (parts) warp.state[lane] = state;
    });
  }

  // ------------------------------------------------------------------------------------------
  // Operations of a warp

  static std::string hexadecimal(Lanes mask) {
    static const char* const kDigits = "0123456789abcdef";
    std::string text = "0x";
    for (int shift = 28; shift >= 0; shift -= 4) text += kDigits[mask >> shift & 15];
    return text;
  }

  [[noreturn]] void fail_waiting(Warp& warp, Lanes waiting) {
    const auto lane = static_cast<unsigned>(std::countr_zero(waiting));
    const Instruction& i = instruction(warp, lane);
    const auto mask = static_cast<Lanes>(warp.at(i.from[0], lane));
    const auto missing =
        static_cast<unsigned>(std::countr_zero(mask & ~warp_meeting(warp, lane, mask)));
    fail(warp, lane, i,
         "waits with mask " + hexadecimal(mask) + " for " + thread_name(warp, missing) +
             ", which " + whereabouts(warp, missing));
  }

  std::string whereabouts(const Warp& warp, unsigned lane) const {
    if ((existing(warp) >> lane & 1) == 0) return "does not exist";
    if (warp.state[lane] == State::ended) return "has ended";
    return "waits at " + instruction(warp, lane).place + ", " + instruction(warp, lane).text;
  }

  // The lanes that wait where this one does, with the same mask.
  Lanes warp_meeting(Warp& warp, unsigned lane, Lanes mask) {
    Lanes there = 0;
    each(warp.in(State::waits_for_warp), [&](unsigned other) {
      const bool same =
          warp.pc[other] == warp.pc[lane] && warp.at(instruction(warp, other).from[0], other) ==
                                                 warp.at(instruction(warp, lane).from[0], lane);
      there |= static_cast<Lanes>(same) << other;
    });
    return there & mask;
  }

  // Goes on where all lanes of a mask have come.
  void meet_in_warp(Warp& warp, const Instruction& i, Lanes came) {
    while (came != 0) {
      const auto lane = static_cast<unsigned>(std::countr_zero(came));
      const auto mask = static_cast<Lanes>(warp.at(i.from[0], lane));
      if ((mask >> lane & 1) == 0) {
        fail(warp, lane, i, "is not in its own mask " + hexadecimal(mask));
      }
      const Lanes there = warp_meeting(warp, lane, mask);
      came &= ~(there | Lanes{1} << lane);
      if (there != mask) continue;
      if (i.kind == Kind::shuffle) shuffle(warp, i, mask);
      if (i.kind == Kind::vote) vote(warp, i, mask);
      if (i.kind == Kind::meet_warp) warp.clock.meet(mask);
      each(mask, [&](unsigned each_lane) {
        warp.state[each_lane] = State::runs;
        ++warp.pc[each_lane];
      });
    }
  }

  void shuffle(Warp& warp, const Instruction& i, Lanes mask) {
    Register result{};
    Register inside{};
    each(mask, [&](unsigned lane) {
      const auto b = static_cast<unsigned>(warp.at(i.from[2], lane)) & 31;
      const auto c = static_cast<unsigned>(warp.at(i.from[3], lane));
      const unsigned segment = c >> 8 & 31;
      const unsigned last = (lane & segment) | (c & 31 & ~segment);
      unsigned source = lane;
      bool is_inside = false;
      if (i.mode == Mode::up) {
        source = lane - b;
        is_inside = static_cast<int>(source) >= static_cast<int>(last);
      } else {
        source = i.mode == Mode::down        ? lane + b
                 : i.mode == Mode::butterfly ? lane ^ b
                                             : (lane & segment) | (b & ~segment);
        is_inside = source <= last;
      }
      if (!is_inside) source = lane;
      if ((mask >> source & 1) == 0) {
        fail(warp, lane, i,
             "reads from lane " + std::to_string(source) + ", which is not in the mask " +
                 hexadecimal(mask));
      }
      result[lane] = warp.at(i.from[1], source) & 0xffffffff;
      inside[lane] = is_inside;
    });
    each(mask, [&](unsigned lane) {
      warp.at(i.to[0], lane) = result[lane];
      if (i.to[1] >= 0) warp.at(i.to[1], lane) = inside[lane];
    });
  }

  void vote(Warp& warp, const Instruction& i, Lanes mask) {
    Lanes ballot = 0;
    const auto first = static_cast<unsigned>(std::countr_zero(mask));
    Word folded = warp.at(i.from[1], first);
    Instruction fold = i;
    fold.bytes = 4;
    each(mask, [&](unsigned lane) {
      const Word value = warp.at(i.from[1], lane);
      ballot |= static_cast<Lanes>(value != 0) << lane;
      if (lane != first) folded = combine(fold, folded, value);
    });
    Word result = folded & 0xffffffff;  // redux
    if (i.mode == Mode::ballot) result = ballot;
    if (i.mode == Mode::any) result = ballot != 0;
    if (i.mode == Mode::all) result = ballot == mask;
    each(mask, [&](unsigned lane) { warp.at(i.to[0], lane) = result; });
  }

  // ------------------------------------------------------------------------------------------
  // Memory

  static Memory& shared() {
    static Memory memory(kSharedCapacity);
    return memory;
  }

  void access_memory(Warp& warp, const Instruction& i, Lanes on) {
    const bool all_read_one = i.kind == Kind::load && on == 0xffffffff && is_uniform(warp, i);
    if (!all_read_one) {
      each(on, [&](unsigned lane) { access_lane(warp, i, lane, Scope::thread); });
      return;
    }
    access_lane(warp, i, 0, Scope::warp);
    for (int k = 0; k < i.count; ++k) {
      Register& to = warp.registers[static_cast<std::size_t>(i.to[static_cast<std::size_t>(k)])];
      to.fill(to[0]);
    }
  }

  static bool is_uniform(const Warp& warp, const Instruction& i) {
    const Register& address = warp.registers[static_cast<std::size_t>(i.address)];
    return std::all_of(address.begin(), address.end(),
                       [&](Word word) { return word == address[0]; });
  }

  void access_lane(Warp& warp, const Instruction& i, unsigned lane, Scope scope) {
    const unsigned bytes = i.bytes * static_cast<unsigned>(i.count);
    std::uint64_t address = warp.at(i.address, lane) + static_cast<std::uint64_t>(i.offset);
    if (i.space == Space::shared) address &= 0xffffffff;
    if (address % bytes != 0) {
      fail(warp, lane, i,
           "misaligned address, " + std::to_string(address % bytes) +
               " bytes behind a multiple of " + std::to_string(bytes));
    }
    std::array<unsigned char, 32> stored{};
    const Access access{static_cast<std::uint16_t>(warp.first + lane),
                        scope,
                        i.kind != Kind::load,
                        i.strong,
                        i.used,
                        i.kind == Kind::store ? stored.data() : nullptr};
    for (int k = 0; i.kind == Kind::store && k < i.count; ++k) {
      const Word value = warp.at(i.from[static_cast<std::size_t>(k)], lane);
      std::memcpy(stored.data() + static_cast<unsigned>(k) * i.bytes, &value, i.bytes);
    }
    unsigned char* const data = resolve(warp, i, lane, address, bytes, access);
    if (i.kind == Kind::store) {
      std::memcpy(data, stored.data(), bytes);
    } else if (i.kind == Kind::atomic) {
      Word old = 0;
      std::memcpy(&old, data, i.bytes);
      const Word swapped = i.mode == Mode::swap ? warp.at(i.from[1], lane) : 0;
      const Word value = combine(i, old, warp.at(i.from[0], lane), swapped);
      std::memcpy(data, &value, i.bytes);
      warp.at(i.to[0], lane) = old;
    } else {
      for (int k = 0; k < i.count; ++k) {
        warp.at(i.to[static_cast<std::size_t>(k)], lane) =
            element(data + static_cast<unsigned>(k) * i.bytes, i);
      }
    }
  }

  static Word element(const unsigned char* data, const Instruction& i) {
    Word word = 0;
    std::memcpy(&word, data, i.bytes);
    const unsigned above = 64 - 8 * i.bytes;
    if (!i.is_signed || above == 0) return word;
    return static_cast<Word>(static_cast<std::int64_t>(word << above) >> above);
  }

  unsigned char* resolve(Warp& warp, const Instruction& i, unsigned lane, std::uint64_t address,
                         unsigned bytes, const Access& access) {
    Space space = i.space;
    if (space == Space::generic) {
      space = address >= kSharedWindow ? Space::shared : Space::global;
      address &= kSharedWindow - 1;
    }
    if (space == Space::param || space == Space::local) {
      std::vector<unsigned char>& memory = space == Space::param ? params_ : local_;
      const std::size_t size = space == Space::param ? params_.size() : kernel_.local_bytes;
      if (address > size || bytes > size - address) fail(warp, lane, i, "out of bounds");
      return memory.data() + address +
             (space == Space::param ? 0 : (warp.first + lane) * kernel_.local_bytes);
    }
    const bool is_shared = space == Space::shared;
    Memory* const memory =
        is_shared ? &shared() : heap().find(reinterpret_cast<const void*>(address));
    if (!memory) fail(warp, lane, i, "out of bounds of all device memory");
    const std::size_t offset =
        is_shared ? address : memory->offset(reinterpret_cast<const void*>(address));
    Epoch epoch = epoch_;
    if (is_shared) epoch.launch = epoch.block;  // it is the block's own
    if (const char* mistake = memory->access(offset, bytes, access, epoch, warp.clock)) {
      fail(warp, lane, i, mistake);
    }
    return memory->data() + offset;
  }

  Kernel& kernel_;
  Size grid_, block_;
  Size index_{};  // of the running block
  std::size_t dynamic_shared_;
  unsigned threads_;
  std::vector<unsigned char> params_, local_;
  std::vector<Warp> warps_;
  Epoch& epoch_ = epoch_of_all();
  std::mt19937_64 random_;
};

}  // namespace

Config& config() {
  static Config one;
  return one;
}

Heap& heap() {
  static Heap one;
  return one;
}

void* Heap::allocate(std::size_t bytes) {
  constexpr std::size_t kAlignment = 256;
  const std::size_t limit = std::min(config().memory, kCapacity);
  const std::size_t room = (bytes / kAlignment + 2) * kAlignment;  // with a gap behind it
  if (allocated_ > limit || bytes > limit - allocated_) return nullptr;
  if (blocks_.empty()) end_ = 0;
  std::size_t offset = end_;
  if (room > kCapacity - end_) {  // the first gap that is large enough
    offset = 0;
    for (const auto& [begin, size] : blocks_) {
      if (begin - offset >= room) break;
      offset = begin + (size / kAlignment + 2) * kAlignment;
    }
    if (offset > kCapacity || room > kCapacity - offset) return nullptr;
  }
  end_ = std::max(end_, offset + room);
  memory_.open(offset, bytes);
  blocks_[offset] = bytes;
  allocated_ += bytes;
  return memory_.data() + offset;
}

bool Heap::free(void* address) {
  const auto found = blocks_.find(memory_.offset(address));
  if (found == blocks_.end()) return false;
  memory_.close(found->first, found->second);
  allocated_ -= found->second;
  blocks_.erase(found);
  return true;
}

void Heap::adopt(unsigned char* data, std::size_t bytes) {
  const unsigned char* const end = data + bytes;
  auto known = adopted_.upper_bound(data);
  if (known != adopted_.end() && known->first == end && known->second.data() == data) return;
  while (known != adopted_.end() && known->second.data() < end) known = adopted_.erase(known);
  adopted_.try_emplace(end, data, bytes);
}

Memory* Heap::find(const void* address) {
  if (memory_.contains(address)) return &memory_;
  const auto known = adopted_.upper_bound(static_cast<const unsigned char*>(address));
  return known != adopted_.end() && known->second.contains(address) ? &known->second : nullptr;
}

void run_grid(Kernel& kernel, Size grid, Size block, void** arguments, std::size_t dynamic_shared) {
  ++kernel.launches;
  Machine(kernel, grid, block, arguments, dynamic_shared).run();
}

}  // namespace lcodec::ptx
