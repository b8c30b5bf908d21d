// Pieces of work shared among threads by an atomic counter.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdint>
#include <exception>
#include <mutex>
#include <stdexcept>

#include "cpu/pool.hpp"
#include "lcodec/engine.hpp"

namespace lcodec {

// The default floating-point environment while it lives: denormals honoured, round to nearest,
// whatever the caller has set for its thread (torch.set_flush_denormal, say).
class DefaultFloats {
 public:
  DefaultFloats() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloats() { std::fesetenv(&saved_); }
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;

 private:
  std::fenv_t saved_;
};

// Tells the helpers of a loop to leave, however the calling thread leaves it.
class Stop {
 public:
  explicit Stop(std::atomic<bool>& stop) : stop_(stop) {}
  ~Stop() { stop_ = true; }
  Stop(const Stop&) = delete;
  Stop& operator=(const Stop&) = delete;

 private:
  std::atomic<bool>& stop_;
};

// Calls work(piece) for every piece in [0, pieces); make_work() is called once on every thread that
// finds a piece left, and holds its scratch memory. The calling thread works too and asks
// execution.cancelled between its pieces. Rethrows the first exception of any thread, after all of
// them have left.
template <class MakeWork>
Status parallel_for(std::int64_t pieces, const Execution& execution, const MakeWork& make_work) {
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> stop{false};
  bool cancelled = false;
  std::mutex mutex;
  std::exception_ptr error;
  const auto run = [&](const Helpers* own) {  // the calling thread's; a helper has none
    if (stop || next >= pieces) return;
    const DefaultFloats floats;
    try {
      auto work = make_work();
      for (std::int64_t piece; !stop && (piece = next++) < pieces;) {
        work(piece);
        if (!own) continue;
        if (execution.cancelled && execution.cancelled(execution.context)) cancelled = true;
        if (cancelled || own->lost()) stop = true;
      }
    } catch (const std::exception&) {  // nothing else is thrown; pthread_exit is not to be caught
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
      stop = true;
    }
  };
  {
    Helpers helpers(std::min<std::int64_t>(execution.threads, pieces) - 1,
                    [&run] { run(nullptr); });
    const Stop at_end(stop);
    run(&helpers);
    if (helpers.lost()) throw std::runtime_error("the process was forked during this call");
  }
  if (error) std::rethrow_exception(error);
  return cancelled ? Status::cancelled : Status::ok;
}

}  // namespace lcodec
