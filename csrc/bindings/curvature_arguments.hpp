// Arguments of the curvature products, on the CPU and on CUDA; lcodec/curvature.hpp says what they
// are. The caller, lcodec_ext/curvature/kernels.py, answers for the sizes of the arrays.
#pragma once

#include <cstdint>
#include <string>

#include "bindings/arguments.hpp"

namespace lcodec::bindings {

// Of masked_gram_product and softmax_rows_product: x is G or A. p is null for the former.
struct RowsProduct {
  std::string dtype;
  Address x;
  std::int64_t n, d, stride;
  Address segments;
  std::int64_t count, size;
  Address p, weight, v;
  std::int64_t m;
  double damping;
  Address out;

  template <class Field>
  void each(const Field& field) {
    field("dtype", dtype);
    field("x", x);
    field("n", n);
    field("d", d);
    field("stride", stride);
    field("segments", segments);
    field("count", count);
    field("size", size);
    field("p", p);
    field("weight", weight);
    field("v", v);
    field("m", m);
    field("damping", damping);
    field("out", out);
  }
};

struct FactoredGram {
  std::string dtype;
  Address delta;
  std::int64_t delta_stride, r;
  Address a;
  std::int64_t a_stride, d, n;
  Address k;

  template <class Field>
  void each(const Field& field) {
    field("dtype", dtype);
    field("delta", delta);
    field("delta_stride", delta_stride);
    field("r", r);
    field("a", a);
    field("a_stride", a_stride);
    field("d", d);
    field("n", n);
    field("k", k);
  }
};

}  // namespace lcodec::bindings
