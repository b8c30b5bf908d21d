#include "cpu/pool.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

#if __has_include(<pthread.h>)
#include <pthread.h>
#include <signal.h>
#define LCODEC_PTHREADS
#endif

namespace lcodec {
namespace {

// Threads that start while it lives take no signals but those of their own faults. A program that
// waits for a signal in one thread blocks it in all others, and in those that it has not started it
// cannot.
class WithoutSignals {
 public:
  WithoutSignals(const WithoutSignals&) = delete;
  WithoutSignals& operator=(const WithoutSignals&) = delete;
#ifdef LCODEC_PTHREADS
  WithoutSignals() {
    sigset_t blocked;
    sigfillset(&blocked);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&blocked, fault);
    pthread_sigmask(SIG_SETMASK, &blocked, &before_);
  }
  ~WithoutSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
#else
  WithoutSignals() = default;
#endif
};

}  // namespace

// The threads, and those who want help. It is never destroyed: its threads end with the process, at
// whatever they are, and nobody waits for them.
class Pool {
 public:
  void open(Helpers& helpers) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++busy_;
    helpers.next_ = first_;
    if (first_) first_->previous_ = &helpers;
    first_ = &helpers;
    wake();
  }

  void close(Helpers& helpers) {
    std::unique_lock<std::mutex> lock(mutex_);
    (helpers.previous_ ? helpers.previous_->next_ : first_) = helpers.next_;
    if (helpers.next_) helpers.next_->previous_ = helpers.previous_;
    --busy_;
    wake();
    helpers.left_.wait(lock, [&] { return helpers.inside_ == 0; });
  }

 private:
  // How many threads may become busy for these.
  std::int64_t room(const Helpers& helpers) const { return helpers.most_busy_ - busy_; }

  // How many threads may join all those who want help.
  std::int64_t wanted() const {
    std::int64_t all = 0;
    for (const Helpers* each = first_; each; each = each->next_)
      all += std::clamp<std::int64_t>(room(*each) - all, 0, each->wanted_);
    return all;
  }

  // Who may be helped, if anybody.
  Helpers* next() const {
    Helpers* found = first_;
    while (found && (found->wanted_ == 0 || room(*found) <= 0)) found = found->next_;
    return found;
  }

  // Wakes up to two threads, each of which wakes two more: soon all that are wanted. Starts those
  // that are missing; a thread that has been woken is not at work yet, and is counted for one only.
  void wake() {
    const std::int64_t missing = wanted();
    if (threads_ < working_ + missing) start(working_ + missing);
    for (std::int64_t t = std::min<std::int64_t>(missing, 2); t > 0; --t) work_.notify_one();
  }

  void start(std::int64_t threads) {
    const WithoutSignals blocked;
    try {
      for (; threads_ < threads; ++threads_) std::thread([this] { serve(); }).detach();
    } catch (const std::exception&) {
      // The system has no further thread, or no memory for one. Those that run are enough.
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Helpers* const found = next();
      if (!found) {
        work_.wait(lock);
        continue;
      }
      --found->wanted_;
      ++found->inside_;
      ++busy_;
      ++working_;
      wake();
      lock.unlock();
      found->run_();
      lock.lock();
      --working_;
      --busy_;
      found->wanted_ = 0;  // nothing is left to do
      if (--found->inside_ == 0) found->left_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_;
  Helpers* first_ = nullptr;
  std::int64_t threads_ = 0;
  std::int64_t working_ = 0;  // of the threads
  std::int64_t busy_ = 0;     // working, and callers with helpers
};

namespace {

alignas(Pool) std::array<std::byte, sizeof(Pool)> memory;
Pool* pool = new (memory.data()) Pool;
std::atomic<std::int64_t> forks{0};

#ifdef LCODEC_PTHREADS
// A forked process has none of the threads, and maybe a mutex that one of them had locked.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  ++forks;
  pool = new (memory.data()) Pool;
});
#endif

}  // namespace

const std::int64_t Helpers::kCpus = std::thread::hardware_concurrency();

Helpers::Helpers(std::int64_t most, std::function<void()> run, std::int64_t cpus)
    : run_(std::move(run)),
      most_(std::max<std::int64_t>(most, 0)),
      most_busy_(std::max(most_ + 1, cpus)),
      forks_(forks),
      wanted_(most_) {
  if (most_ > 0) pool->open(*this);
}

Helpers::~Helpers() {
  if (most_ > 0 && !lost()) pool->close(*this);
}

bool Helpers::lost() const { return most_ > 0 && forks_ != forks; }

}  // namespace lcodec
