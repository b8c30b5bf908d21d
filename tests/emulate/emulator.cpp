// Fibers, and the order in which they run.
//
// A fiber is a stack on which threads run, one after another, until one waits; that thread keeps
// the fiber until it ends. Kernels without barriers so need one fiber and no switch, and a barrier
// costs a thread two switches of some nanoseconds. Fibers live as long as their OS thread.
//
// Threads that may run are on a stack of their own, so that in forward and reversed order a warp
// whose lanes have met runs on, as far as it can, before the next one begins; in shuffled order
// any of them may be next.
#include <sys/mman.h>

#include <array>
#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulate/runtime.hpp"

#if defined(__SANITIZE_ADDRESS__)
#define LCODEC_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LCODEC_ASAN 1
#endif
#endif

#ifdef LCODEC_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(fake_stack, bottom, size) static_cast<void>(fake_stack)
#define __sanitizer_finish_switch_fiber(fake_stack, bottom, size) static_cast<void>(fake_stack)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(address)
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

// ------------------------------------------------------------------------------------------------
// Switching stacks

#if defined(__x86_64__) && defined(__ELF__)

// Saves what the ABI has a function keep, and the stack pointer to *from; continues at `to`.
extern "C" void lcodec_emulate_switch(void** from, void* to);
asm(R"(
.text
.type lcodec_emulate_switch, @function
lcodec_emulate_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lcodec_emulate_switch, . - lcodec_emulate_switch
)");

namespace {

using Context = void*;

void switch_context(Context& from, Context& to) { lcodec_emulate_switch(&from, to); }

// `size` is a multiple of 16.
void make_context(Context& context, char* stack, std::size_t size, void (*entry)()) {
  // Six registers, the address to return to, and the address to which entry must not return.
  std::array<void*, 8> frame{};
  frame[6] = reinterpret_cast<void*>(entry);
  char* const top = stack + size - sizeof(frame);
  std::memcpy(top, frame.data(), sizeof(frame));
  context = top;
}

}  // namespace

#else

#include <ucontext.h>

namespace {

using Context = ucontext_t;

void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

void make_context(Context& context, char* stack, std::size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

}  // namespace

#endif

namespace lcodec::emulate {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxBlock = 1024;

class Fiber {
 public:
  Fiber(std::size_t index, void (*entry)()) {
    void* const memory =
        mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    // A stack that overflows meets a page that cannot be written.
    mprotect(memory_, kGuard, PROT_NONE);
    // Stacks that begin at different cache lines.
    make_context(context, stack(), kStack - index % 8 * 512, entry);
  }
  ~Fiber() {
    ASAN_UNPOISON_MEMORY_REGION(memory_, kGuard + kStack);  // its frames have not been left
    munmap(memory_, kGuard + kStack);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  char* stack() const { return memory_ + kGuard; }

  static constexpr std::size_t kStack = 128 * 1024;
  Context context;
  void* fake_stack = nullptr;  // ASan's

 private:
  static constexpr std::size_t kGuard = 16 * 1024;  // a multiple of every usual page size
  char* memory_;
};

enum class State : std::uint8_t { ready, at_block, at_warp, ended };

struct Thread {
  State state = State::ready;
  Fiber* fiber = nullptr;  // on which it has begun
  // Where it waits, and with what.
  Place place{};
  unsigned mask = 0;
  std::uint64_t value = 0;
  Fold fold = nullptr;  // null: it gets the value of lane `source`
  unsigned source = 0;
};

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

// What all threads that meet have in common.
bool same_meeting(const Thread& a, const Thread& b) {
  const std::source_location& here = a.place.where;
  const std::source_location& there = b.place.where;
  return a.state == b.state && a.mask == b.mask && here.line() == there.line() &&
         here.column() == there.column() && same(here.file_name(), there.file_name());
}

std::string text(const char* what, const uint3& v) {
  return std::string(what) + " (" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " +
         std::to_string(v.z) + ")";
}

std::string hex(unsigned mask) {
  std::array<char, 16> digits{};
  std::snprintf(digits.data(), digits.size(), "0x%08x", mask);
  return digits.data();
}

std::string text(const Place& place) {
  return std::string(place.operation) + " (" + place.where.file_name() + ":" +
         std::to_string(place.where.line()) + ")";
}

// The index in three dimensions.
uint3 unravel(std::size_t index, const dim3& extent) {
  const std::size_t row = index / extent.x;
  return {static_cast<unsigned>(index % extent.x), static_cast<unsigned>(row % extent.y),
          static_cast<unsigned>(row / extent.y)};
}

class SharedArray {
 public:
  SharedArray(const void* key, std::size_t bytes)
      : key_(key), bytes_(bytes), memory_(new unsigned char[bytes + kBehind]) {
    fill();
  }
  void fill() { std::memset(memory_.get(), kRubbish, bytes_ + kBehind); }
  bool overrun() const {
    for (std::size_t i = bytes_; i < bytes_ + kBehind; ++i) {
      if (memory_[i] != kRubbish) return true;
    }
    return false;
  }
  const void* key() const { return key_; }
  std::size_t bytes() const { return bytes_; }
  void* memory() const { return memory_.get(); }

 private:
#ifdef LCODEC_ASAN
  static constexpr std::size_t kBehind = 0;
#else
  static constexpr std::size_t kBehind = 64;
#endif
  const void* key_;
  std::size_t bytes_;
  std::unique_ptr<unsigned char[]> memory_;
};

// ------------------------------------------------------------------------------------------------

// Runs the blocks of a launch. Members without a comment are of the running launch or block.
class Machine {
 public:
  void run(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes,
           const std::function<void()>& body);

  // For the running thread.
  unsigned lane() const { return current_ % kWarp; }
  std::uint64_t meet(State state, const Place& place, unsigned mask, std::uint64_t value, Fold fold,
                     unsigned source);
  void* shared_memory(const void* key, std::size_t bytes);
  void* dynamic_shared_memory() const { return shared_.front().memory(); }

 private:
  void run_block();
  void run_threads();
  static void fiber_entry();
  void resume(Fiber& fiber);
  void suspend();

  void release(std::span<const unsigned> group);
  unsigned choose();
  void take(unsigned thread);
  void meet_if_complete(std::span<const unsigned> group);
  std::span<const unsigned> lanes(unsigned thread, unsigned mask);

  [[noreturn]] void fail(const std::string& what) const;
  [[noreturn]] void explain_deadlock();
  std::string name_of(unsigned thread) const { return text("thread", indices_[thread]); }

  const char* name_ = "";
  const std::function<void()>* body_ = nullptr;
  Order order_{};
  std::mt19937_64 random_;
  std::vector<SharedArray> shared_;  // the dynamic one first

  std::vector<uint3> indices_;
  std::vector<unsigned> everyone_;
  std::vector<Thread> threads_;
  std::vector<unsigned> arrived_;  // per warp: lanes at a warp operation
  unsigned at_block_ = 0;
  unsigned ended_ = 0;
  std::vector<unsigned> ready_;  // the next one at the back
  unsigned current_ = 0;

  std::vector<unsigned> group_;        // scratch of lanes()
  std::vector<std::uint64_t> values_;  // scratch of meet_if_complete()

  // Of the OS thread.
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  Fiber* active_ = nullptr;
  Context main_{};
  void* main_fake_stack_ = nullptr;
  const void* main_stack_ = nullptr;
  std::size_t main_size_ = 0;
  std::exception_ptr error_;
};

std::mutex launch_mutex;
Machine* machine = nullptr;  // that runs a launch

void Machine::run(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes,
                  const std::function<void()>& body) {
  name_ = name;
  body_ = &body;
  order_ = config().order;
  random_.seed(config().seed);
  blockDim = block;
  gridDim = grid;

  everyone_.resize(std::size_t{block.x} * block.y * block.z);
  std::iota(everyone_.begin(), everyone_.end(), 0u);
  indices_.clear();
  for (const unsigned thread : everyone_) indices_.push_back(unravel(thread, block));

  std::vector<std::size_t> blocks(std::size_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), std::size_t{0});
  if (order_ == Order::reversed) std::reverse(blocks.begin(), blocks.end());
  if (order_ == Order::shuffled) std::shuffle(blocks.begin(), blocks.end(), random_);

  shared_.clear();
  shared_.emplace_back(nullptr, shared_bytes);
  try {
    for (const std::size_t index : blocks) {
      blockIdx = unravel(index, grid);
      run_block();
    }
  } catch (...) {
    // Threads that have not ended hold fibers, and nothing ends them.
    idle_.clear();
    fibers_.clear();
    throw;
  }
}

void Machine::run_block() {
  for (SharedArray& array : shared_) array.fill();
  threads_.assign(everyone_.size(), Thread{});
  arrived_.assign((everyone_.size() + kWarp - 1) / kWarp, 0);
  at_block_ = 0;
  ended_ = 0;
  ready_.clear();
  release(everyone_);

  while (!ready_.empty()) {
    take(choose());
    Thread& thread = threads_[current_];
    if (!thread.fiber) {
      if (idle_.empty()) {
        fibers_.push_back(std::make_unique<Fiber>(fibers_.size(), &Machine::fiber_entry));
        idle_.push_back(fibers_.back().get());
      }
      thread.fiber = idle_.back();
      idle_.pop_back();
    }
    resume(*thread.fiber);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }
  if (ended_ < threads_.size()) explain_deadlock();
  for (const SharedArray& array : shared_) {
    if (array.overrun()) {
      fail("a thread wrote behind a shared array of " + std::to_string(array.bytes()) + " bytes");
    }
  }
}

void Machine::fiber_entry() {
  __sanitizer_finish_switch_fiber(nullptr, &machine->main_stack_, &machine->main_size_);
  for (;;) {
    try {
      machine->run_threads();
    } catch (...) {
      machine->error_ = std::current_exception();
    }
    machine->idle_.push_back(machine->active_);
    machine->suspend();
  }
}

// Runs the current thread, and the next ones as long as they have not begun elsewhere.
void Machine::run_threads() {
  for (;;) {
    (*body_)();
    threads_[current_].state = State::ended;
    ++ended_;
    if (ready_.empty()) return;
    const unsigned next = choose();
    if (threads_[next].fiber) return;
    take(next);
    threads_[next].fiber = active_;
  }
}

void Machine::resume(Fiber& fiber) {
  active_ = &fiber;
  __sanitizer_start_switch_fiber(&main_fake_stack_, fiber.stack(), Fiber::kStack);
  switch_context(main_, fiber.context);
  __sanitizer_finish_switch_fiber(main_fake_stack_, nullptr, nullptr);
}

void Machine::suspend() {
  Fiber& fiber = *active_;
  __sanitizer_start_switch_fiber(&fiber.fake_stack, main_stack_, main_size_);
  switch_context(fiber.context, main_);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &main_stack_, &main_size_);
}

// ------------------------------------------------------------------------------------------------
// The order

void Machine::release(std::span<const unsigned> group) {
  if (order_ == Order::reversed) {
    ready_.insert(ready_.end(), group.begin(), group.end());
  } else {
    ready_.insert(ready_.end(), group.rbegin(), group.rend());
  }
}

// The thread to run next, which is now at the back of ready_.
unsigned Machine::choose() {
  if (order_ == Order::shuffled) std::swap(ready_.back(), ready_[random_() % ready_.size()]);
  return ready_.back();
}

void Machine::take(unsigned thread) {
  ready_.pop_back();
  current_ = thread;
  threadIdx = indices_[thread];
}

// ------------------------------------------------------------------------------------------------
// Waiting

// The threads in the lanes of the thread's warp that are in mask.
std::span<const unsigned> Machine::lanes(unsigned thread, unsigned mask) {
  group_.clear();
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) group_.push_back(thread / kWarp * kWarp + lane);
  }
  return group_;
}

std::uint64_t Machine::meet(State state, const Place& place, unsigned mask, std::uint64_t value,
                            Fold fold, unsigned source) {
  Thread& thread = threads_[current_];
  thread = {state, thread.fiber, place, mask, value, fold, source};
  if (state == State::at_block) {
    if (++at_block_ == threads_.size()) meet_if_complete(everyone_);
  } else {
    const unsigned first = current_ / kWarp * kWarp;
    const unsigned lanes_here =
        static_cast<unsigned>(std::min<std::size_t>(kWarp, threads_.size() - first));
    if (!(mask >> lane() & 1)) {
      fail(name_of(current_) + " at " + text(place) + " is not in its own mask " + hex(mask));
    }
    if (lanes_here < kWarp && mask >> lanes_here) {
      fail(name_of(current_) + " at " + text(place) + " has lanes in its mask " + hex(mask) +
           " that do not exist: its warp has " + std::to_string(lanes_here));
    }
    unsigned& arrived = arrived_[current_ / kWarp];
    arrived |= 1u << lane();
    if ((arrived & mask) == mask) meet_if_complete(lanes(current_, mask));
  }
  suspend();
  return threads_[current_].value;
}

// If all of the group, which all wait, wait at the same place, they go on with their values.
void Machine::meet_if_complete(std::span<const unsigned> group) {
  const Thread& first = threads_[group.front()];
  for (const unsigned t : group) {
    if (!same_meeting(threads_[t], first)) return;
  }
  values_.clear();
  if (first.fold) {
    std::uint64_t total = first.value;
    for (const unsigned t : group.subspan(1)) total = first.fold(total, threads_[t].value);
    values_.assign(group.size(), total);
  } else {
    for (const unsigned t : group) {
      const Thread& thread = threads_[t];
      if (!(thread.mask >> thread.source & 1)) {
        fail(name_of(t) + " at " + text(thread.place) + " reads from lane " +
             std::to_string(thread.source) + ", which is not in the mask " + hex(thread.mask));
      }
      values_.push_back(threads_[t / kWarp * kWarp + thread.source].value);
    }
  }
  if (first.state == State::at_block) {
    at_block_ = 0;
  } else {
    arrived_[group.front() / kWarp] &= ~first.mask;
  }
  for (std::size_t k = 0; k < group.size(); ++k) {
    threads_[group[k]].state = State::ready;
    threads_[group[k]].value = values_[k];
  }
  release(group);
}

// ------------------------------------------------------------------------------------------------
// Shared memory and errors

void* Machine::shared_memory(const void* key, std::size_t bytes) {
  std::size_t total = bytes;
  for (const SharedArray& array : shared_) {
    if (array.key() == key) return array.memory();
    total += array.bytes();
  }
  if (total > kMaxSharedBytes) fail("shared arrays take " + std::to_string(total) + " bytes");
  return shared_.emplace_back(key, bytes).memory();
}

void Machine::fail(const std::string& what) const {
  throw std::runtime_error(std::string("kernel ") + name_ + ", " + text("block", blockIdx) + ": " +
                           what);
}

// No thread can run. Names one that waits, at a warp operation if there is one, and one that it
// waits for in vain.
void Machine::explain_deadlock() {
  const auto describe = [this](unsigned t) {
    const Thread& thread = threads_[t];
    if (thread.state == State::ended) return name_of(t) + ", which has ended";
    return name_of(t) + ", which waits at " + text(thread.place) +
           (thread.state == State::at_warp ? " with mask " + hex(thread.mask) : "");
  };
  for (const State state : {State::at_warp, State::at_block}) {
    for (const unsigned t : everyone_) {
      const Thread& thread = threads_[t];
      if (thread.state != state) continue;
      for (const unsigned other : state == State::at_warp ? lanes(t, thread.mask) : everyone_) {
        if (!same_meeting(thread, threads_[other])) {
          fail(name_of(t) + " waits at " + text(thread.place) +
               (state == State::at_warp ? " with mask " + hex(thread.mask) : "") + " for " +
               describe(other));
        }
      }
    }
  }
  fail("threads wait for each other");  // not reached: who waits in vain does so for another
}

bool within_limits(dim3 grid, dim3 block) {
  return block.x >= 1 && block.y >= 1 && block.z >= 1 && grid.x >= 1 && grid.y >= 1 &&
         grid.z >= 1 && std::uint64_t{block.x} * block.y * block.z <= kMaxBlock && block.z <= 64 &&
         grid.x <= 0x7fffffff && grid.y <= 0xffff && grid.z <= 0xffff;
}

}  // namespace

void run_grid(const char* name, const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
              const std::function<void()>& body) {
  if (!within_limits(grid, block)) {
    set_last_error(cudaErrorInvalidConfiguration);
    return;
  }
  if (shared_bytes > granted_shared_bytes(kernel)) {
    set_last_error(cudaErrorInvalidValue);
    return;
  }
  // A fiber belongs to the OS thread that made it.
  static thread_local Machine own;
  const std::lock_guard<std::mutex> lock(launch_mutex);
  machine = &own;
  own.run(name, grid, block, shared_bytes, body);
}

std::uint64_t meet_block(const Place& place, std::uint64_t value, Fold fold) {
  return machine->meet(State::at_block, place, 0, value, fold, 0);
}

std::uint64_t meet_warp(const Place& place, unsigned mask, std::uint64_t value, Fold fold) {
  return machine->meet(State::at_warp, place, mask, value, fold, 0);
}

std::uint64_t trade_warp(const Place& place, unsigned mask, std::uint64_t value, unsigned source) {
  return machine->meet(State::at_warp, place, mask, value, nullptr, source);
}

unsigned lane() { return machine->lane(); }
void* shared_memory(const void* key, std::size_t bytes) {
  return machine->shared_memory(key, bytes);
}
void* dynamic_shared_memory() { return machine->dynamic_shared_memory(); }

}  // namespace lcodec::emulate
