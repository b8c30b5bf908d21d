#include <algorithm>

#include "cpu/nearest.hpp"
#include "lcodec/engine.hpp"

namespace lcodec {

template <class T>
Status neighbors(const Columns<T>& columns, Ties ties, std::uint64_t seed,
                 const std::int64_t* offset, std::int64_t* count, std::int64_t* indices,
                 const Execution& execution) {
  const DefaultFloats floats;
  const Kernels<T> kernels = pick_kernels<T>(execution.level);
  const TieRule rule{ties, seed};
  const auto report = [&](std::int32_t own, const Nearest& nearest) {
    if (count) {
      count[own] = nearest.count;
      if (indices) indices[own] = kth_row(nearest.ranges, nearest.rows, 0, own);
      return;
    }
    const std::int64_t k = rule.taken(own, nearest.count);
    std::int64_t* out = indices + offset[own];
    if (k != TieRule::kAll) {
      *out = kth_row(nearest.ranges, nearest.rows, k, own);
      return;
    }
    for (const Range& range : nearest.ranges)
      for (std::int64_t t = range.begin; t < range.end; ++t)
        if (nearest.rows[t] != own) *out++ = nearest.rows[t];
    std::sort(indices + offset[own], out);
  };
  const auto make_report = [&] { return report; };
  std::vector<const T*> values;
  for (std::int64_t f = 0; f < columns.p; ++f) values.push_back(columns.x + f * columns.n);
  const std::vector<T> factors(columns.factor, columns.factor + columns.p);
  if (!tree_pays(columns.n, columns.p))
    return nearest_of_all(values, factors, columns.n, kernels, execution, make_report);
  Groups<T> groups(columns.n);
  for (const T* x : values) groups.refine(x);
  Spatial<T> space;
  space.build(values, factors, groups.of_row, groups.count);
  return nearest_by_tree(space, kernels, execution, make_report);
}

#define LCODEC_INSTANTIATE(T)                                                               \
  template Status neighbors<T>(const Columns<T>&, Ties, std::uint64_t, const std::int64_t*, \
                               std::int64_t*, std::int64_t*, const Execution&);
LCODEC_INSTANTIATE(float)
LCODEC_INSTANTIATE(double)

}  // namespace lcodec
