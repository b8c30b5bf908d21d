// Threads that stay from one call to the next.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>

namespace lcodec {

// Threads of the pool that run a function beside the calling thread, while it lives.
//
// They join while fewer threads are busy, callers included, than this call may have or the machine
// has CPUs: several callers have a CPU each instead of waiting for each other. Threads are started
// when they are first wanted, sleep when there is nothing to do, and leave signals to others.
class Helpers {
 public:
  // run() is called by up to `most` threads, and must not throw. Fewer join where others are busy,
  // or where the system has no further thread.
  Helpers(std::int64_t most, std::function<void()> run, std::int64_t cpus = kCpus);
  // Nobody joins any more; waits until those who did have left. Also where an exception, or
  // pthread_exit, passes.
  ~Helpers();
  Helpers(const Helpers&) = delete;
  Helpers& operator=(const Helpers&) = delete;

  // Whether this is a fork of the process that began: helpers have stayed behind, and their work.
  bool lost() const;

 private:
  friend class Pool;
  static const std::int64_t kCpus;  // asking takes longer than a short call

  const std::function<void()> run_;
  const std::int64_t most_;
  const std::int64_t most_busy_;  // threads of all calls, while these join
  const std::int64_t forks_;      // of this process, before
  std::int64_t wanted_;           // further threads that may join
  std::int64_t inside_ = 0;       // threads that have joined and not left
  std::condition_variable left_;
  Helpers* previous_ = nullptr;  // in the pool's list
  Helpers* next_ = nullptr;
};

}  // namespace lcodec
