// Memory of the caller as integers, 0 for none: of a device, or of types that NumPy does not have.
#pragma once

#include <cstdint>

namespace lcodec::bindings {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace lcodec::bindings
