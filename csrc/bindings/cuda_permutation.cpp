// Bindings of the sums under permutations on CUDA, in _core where CUDA is built and in _emulated.
#include "lcodec/cuda_permutation.hpp"

#include <cstdint>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"
#include "bindings/cuda_outcome.hpp"

namespace py = pybind11;

namespace lcodec::bindings {
namespace {

struct Permuted {
  std::int64_t n;
  Address rank, start;
  std::int64_t segments;
  Address begin, owner, other;
  std::int64_t labelings;
  Address label;
  std::int64_t groups;
  Address size, segment, sorted, place;
  std::uint64_t seed;
  std::int64_t first, count;
  Address sum, workspace;

  template <class Field>
  void each(const Field& field) {
    field("n", n);
    field("rank", rank);
    field("start", start);
    field("segments", segments);
    field("begin", begin);
    field("owner", owner);
    field("other", other);
    field("labelings", labelings);
    field("label", label);
    field("groups", groups);
    field("size", size);
    field("segment", segment);
    field("sorted", sorted);
    field("place", place);
    field("seed", seed);
    field("first", first);
    field("count", count);
    field("sum", sum);
    field("workspace", workspace);
  }
};

void permuted_sums(const py::dict& given, Address stream) {
  const auto a = named<Permuted>(given);
  using Rows = const std::int32_t;
  const PermutedPairs pairs{a.n,
                            pointer<Rows>(a.rank),
                            pointer<Rows>(a.start),
                            a.segments,
                            pointer<const std::int64_t>(a.begin),
                            pointer<Rows>(a.owner),
                            pointer<Rows>(a.other),
                            a.labelings,
                            pointer<Rows>(a.label),
                            a.groups,
                            pointer<Rows>(a.size),
                            pointer<Rows>(a.segment)};
  launched([&] {
    return cuda::permuted_sums(pairs, pointer<Rows>(a.sorted), pointer<Rows>(a.place), a.seed,
                               a.first, a.count, pointer<std::int64_t>(a.sum),
                               pointer<void>(a.workspace), pointer<void>(stream));
  });
}

}  // namespace

void register_cuda_permutation(py::module_ m) {
  m.def("permuted_sums_bytes", &cuda::permuted_sums_bytes, py::arg("n"), py::arg("groups"),
        py::arg("count"));
  m.def("permuted_sums", &permuted_sums, py::arg("given"), py::arg("stream"));
}

}  // namespace lcodec::bindings
