// How calls of the CPU's functions are run: SIMD level, threads, without the GIL, and Ctrl-C.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <string>

#include "bindings/arguments.hpp"
#include "bindings/gil.hpp"
#include "lcodec/dispatch.hpp"
#include "lcodec/engine.hpp"

namespace lcodec::bindings {

// Lets Python see a pending Ctrl-C about ten times a second while the GIL is released.
class Signals {
 public:
  explicit Signals(WithoutGil& released) : released_(released) {}
  static bool poll(void* self) { return static_cast<Signals*>(self)->pending(); }
  bool pending() {
    const auto now = std::chrono::steady_clock::now();
    if (now < next_) return false;
    next_ = now + std::chrono::milliseconds(100);
    // the Python error stays set for run()
    return released_.with_gil([] { return PyErr_CheckSignals() != 0; });
  }

 private:
  WithoutGil& released_;
  std::chrono::steady_clock::time_point next_ =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
};

template <class Call>
void run(const std::string& level, int threads, const Call& call) {
  const auto resolved = resolve_simd_level(level);
  expect(threads >= 1, "threads must be positive");
  Status status;
  {
    WithoutGil released;
    Signals signals(released);
    status = call(Execution{resolved, threads, Signals::poll, &signals});
  }
  if (status == Status::cancelled) throw pybind11::error_already_set();
}

}  // namespace lcodec::bindings
