#include "emulate/bind_selftests.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device_sort.hpp"
#include "emulate/selftest.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Words = std::vector<py::ssize_t>;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorName(error));
}

// An array in device memory while it lives.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(std::size_t size) : size_(size) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, size * sizeof(T)));
    data_ = static_cast<T*>(memory);
  }
  explicit OnDevice(const Array<T>& values) : OnDevice(static_cast<std::size_t>(values.size())) {
    check(cudaMemcpyAsync(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~OnDevice() { static_cast<void>(cudaFree(data_)); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  T* data() const { return data_; }
  void clear() { check(cudaMemsetAsync(data_, 0, size_ * sizeof(T))); }
  Array<T> to_host(const Words& shape) const {
    Array<T> values(shape);
    check(cudaMemcpyAsync(values.mutable_data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  std::size_t size_;
  T* data_;
};

template <class T>
int count(const Array<T>& values) {
  return static_cast<int>(values.size());
}

// ------------------------------------------------------------------------------------------------
// Device-wide primitives, in both their calls

template <class Call>
void with_workspace(const Call& call) {
  std::size_t bytes = 0;
  check(call(nullptr, bytes));
  const OnDevice<unsigned char> workspace(bytes);
  check(call(workspace.data(), bytes));
}

template <class Key>
py::tuple sort_pairs(const Array<Key>& keys, const Array<std::int32_t>& values,
                     std::int64_t segments, int begin_bit, int end_bit) {
  const auto size = static_cast<std::size_t>(keys.size());
  const OnDevice<Key> keys_in(keys);
  const OnDevice<Key> keys_out(size);
  const OnDevice<std::int32_t> values_in(values);
  const OnDevice<std::int32_t> values_out(size);
  with_workspace([&](void* workspace, std::size_t& bytes) {
    return cuda::sort_pairs(workspace, bytes, keys_in.data(), keys_out.data(), values_in.data(),
                            values_out.data(), segments > 0 ? keys.size() / segments : 0, segments,
                            begin_bit, end_bit, nullptr);
  });
  return py::make_tuple(keys_out.to_host({keys.size()}), values_out.to_host({keys.size()}));
}

template <class In>
py::tuple sums(const Array<In>& values) {
  const OnDevice<In> in(values);
  const OnDevice<std::int64_t> inclusive(static_cast<std::size_t>(values.size()));
  const OnDevice<std::int64_t> exclusive(static_cast<std::size_t>(values.size()));
  with_workspace([&](void* workspace, std::size_t& bytes) {
    return cuda::inclusive_sum(workspace, bytes, in.data(), inclusive.data(), values.size(),
                               nullptr);
  });
  with_workspace([&](void* workspace, std::size_t& bytes) {
    return cuda::exclusive_sum(workspace, bytes, in.data(), exclusive.data(), values.size(),
                               nullptr);
  });
  return py::make_tuple(inclusive.to_host({values.size()}), exclusive.to_host({values.size()}));
}

// ------------------------------------------------------------------------------------------------
// Kernels of selftest.cu

using selftest::Bug;

unsigned long long sum(const Array<int>& values, Bug bug) {
  const OnDevice<int> in(values);
  OnDevice<unsigned long long> total(1);
  total.clear();
  check(selftest::sum(in.data(), count(values), total.data(), bug, nullptr));
  return total.to_host({1}).at(0);
}

Array<float> transpose(const Array<float>& values, Bug bug) {
  const OnDevice<float> in(values);
  const OnDevice<float> out(static_cast<std::size_t>(values.size()));
  check(selftest::transpose(in.data(), out.data(), static_cast<int>(values.shape(0)),
                            static_cast<int>(values.shape(1)), bug, nullptr));
  return out.to_host({values.shape(1), values.shape(0)});
}

Array<int> nearest(const Array<float>& x, Bug bug) {
  const OnDevice<float> in(x);
  const OnDevice<int> index(static_cast<std::size_t>(x.shape(0)));
  check(selftest::nearest(in.data(), static_cast<int>(x.shape(0)), static_cast<int>(x.shape(1)),
                          index.data(), bug, nullptr));
  return index.to_host({x.shape(0)});
}

Array<int> scan(const Array<int>& values, Bug bug) {
  const OnDevice<int> in(values);
  const OnDevice<int> out(static_cast<std::size_t>(values.size()));
  check(selftest::scan(in.data(), count(values), out.data(), bug, nullptr));
  return out.to_host({values.size()});
}

py::tuple compact(const Array<int>& values) {
  const OnDevice<int> in(values);
  const OnDevice<int> out(static_cast<std::size_t>(values.size()));
  const OnDevice<int> counts(3);
  check(selftest::compact(in.data(), count(values), out.data(), counts.data(), nullptr));
  return py::make_tuple(out.to_host({values.size()}), counts.to_host({3}));
}

Array<int> histogram(const Array<int>& values, int bins, Bug bug) {
  const OnDevice<int> in(values);
  OnDevice<int> counts(static_cast<std::size_t>(bins));
  counts.clear();
  check(selftest::histogram(in.data(), count(values), counts.data(), bins, bug, nullptr));
  return counts.to_host({bins});
}

Array<int> warp_operations(const Array<int>& values, int width) {
  const OnDevice<int> in(values);
  const OnDevice<int> out(selftest::kWarpResults * 32);
  check(selftest::warp_operations(in.data(), width, out.data(), nullptr));
  return out.to_host({selftest::kWarpResults, 32});
}

py::tuple arithmetic(const Array<unsigned long long>& a, const Array<unsigned long long>& b,
                     const Array<unsigned>& atomics) {
  const OnDevice<unsigned long long> a_in(a);
  const OnDevice<unsigned long long> b_in(b);
  const OnDevice<unsigned long long> out(static_cast<std::size_t>(a.size()) *
                                         selftest::kArithmeticResults);
  const OnDevice<unsigned> results(atomics);
  check(selftest::arithmetic(a_in.data(), b_in.data(), count(a), out.data(), results.data(),
                             nullptr));
  return py::make_tuple(out.to_host({selftest::kArithmeticResults, a.size()}),
                        results.to_host({selftest::kAtomicResults}));
}

unsigned long long count_threads(const std::array<unsigned, 3>& grid,
                                 const std::array<unsigned, 3>& block, std::size_t shared_bytes,
                                 int barriers) {
  OnDevice<unsigned long long> total(1);
  total.clear();
  check(selftest::count_threads(dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                                shared_bytes, barriers, total.data(), nullptr));
  return total.to_host({1}).at(0);
}

}  // namespace

void register_selftests(py::module_ m) {
  m.def("sort_pairs", &sort_pairs<std::uint32_t>);
  m.def("sort_pairs", &sort_pairs<std::uint64_t>);
  m.def("sums", &sums<std::int32_t>);
  m.def("sums", &sums<std::int64_t>);

  py::enum_<Bug>(m, "Bug", py::module_local())
      .value("none", Bug::none)
      .value("no_barrier", Bug::no_barrier)
      .value("divergent_barrier", Bug::divergent_barrier)
      .value("other_barrier", Bug::other_barrier)
      .value("early_exit", Bug::early_exit)
      .value("wrong_mask", Bug::wrong_mask)
      .value("partial_warp", Bug::partial_warp)
      .value("foreign_mask", Bug::foreign_mask)
      .value("outside_lane", Bug::outside_lane)
      .value("uninitialised", Bug::uninitialised)
      .value("overrun", Bug::overrun);
  m.def("sum", &sum, py::arg("values"), py::arg("bug") = Bug::none);
  m.def("transpose", &transpose, py::arg("values"), py::arg("bug") = Bug::none);
  m.def("nearest", &nearest, py::arg("x"), py::arg("bug") = Bug::none);
  m.def("scan", &scan, py::arg("values"), py::arg("bug") = Bug::none);
  m.def("compact", &compact, py::arg("values"));
  m.def("histogram", &histogram, py::arg("values"), py::arg("bins"), py::arg("bug") = Bug::none);
  m.def("warp_operations", &warp_operations, py::arg("values"), py::arg("width"));
  m.def("arithmetic", &arithmetic, py::arg("a"), py::arg("b"), py::arg("atomics"));
  m.def("count_threads", &count_threads, py::arg("grid"), py::arg("block"),
        py::arg("shared_bytes") = 0, py::arg("barriers") = 0);
}

}  // namespace lcodec::bindings
