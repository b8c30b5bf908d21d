// Work without the GIL that survives the interpreter's end.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>

namespace lcodec::bindings {

// Releases the GIL while it lives. pybind11's own class does not fit: a daemon thread that asks for
// the GIL when the interpreter has ended is ended by Python with pthread_exit (before Python 3.14),
// which unwinds its stack. That must not leave a destructor, and C++ that catches it ends the
// process.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { take(); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  // Calls something that needs the GIL.
  template <class Call>
  auto with_gil(const Call& call) {
    take();
    const auto result = call();
    state_ = PyEval_SaveThread();
    return result;
  }

 private:
  // Takes the GIL. After the interpreter's end it waits for the end of the process instead, as
  // every thread does from Python 3.14 on: what the stack holds may be gone, so nothing can be
  // cleaned up.
  void take() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // pthread_exit, which is not to be left
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }

  PyThreadState* state_;
};

}  // namespace lcodec::bindings
