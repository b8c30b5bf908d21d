// What Python passes: arguments by name in a dict, memory as addresses, types and tie rules by
// name.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/bfloat16.hpp"
#include "lcodec/engine.hpp"

namespace lcodec::bindings {

inline void expect(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// Memory of the caller as an integer, 0 for none: on a device, or of a type that NumPy lacks.
using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// A struct from a dict. Struct::each(field) calls field("name", member) for all members: each must
// be given, and nothing else.
template <class Struct>
Struct named(const pybind11::dict& given) {
  thread_local std::vector<PyObject*> names;  // interned; no other thread reads them
  Struct result;
  std::size_t fields = 0;
  result.each([&](const char* name, auto& member) {
    if (fields == names.size()) names.push_back(PyUnicode_InternFromString(name));
    PyObject* const value = PyDict_GetItem(given.ptr(), names[fields++]);
    if (!value) throw pybind11::type_error(std::string("missing argument '") + name + "'");
    member = pybind11::cast<std::decay_t<decltype(member)>>(pybind11::handle(value));
  });
  if (given.size() != fields) throw pybind11::type_error("more arguments than are known");
  return result;
}

// call(T{}) for the type that dtype names.
template <class Call>
auto with_type(const std::string& dtype, const Call& call) {
  if (dtype == "float32") return call(float{});
  if (dtype == "float64") return call(double{});
  throw std::invalid_argument("dtype must be float32 or float64");
}

// call(S{}, T{}) for the type of storage that dtype names, and the type that it is computed in.
template <class Call>
auto with_storage(const std::string& dtype, const Call& call) {
  if (dtype == "float32") return call(float{}, float{});
  if (dtype == "float64") return call(double{}, double{});
  if (dtype == "bfloat16") return call(Bfloat16{}, float{});
  throw std::invalid_argument("dtype must be float32, float64 or bfloat16");
}

inline Ties tie_rule(int ties) {
  expect(0 <= ties && ties <= 2, "unknown tie rule");
  return static_cast<Ties>(ties);
}

}  // namespace lcodec::bindings
