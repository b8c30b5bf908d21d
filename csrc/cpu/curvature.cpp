#include "lcodec/curvature.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/curvature_kernels.hpp"
#include "cpu/pages.hpp"
#include "cpu/parallel.hpp"

namespace lcodec {
namespace {

constexpr std::int64_t kLeastRows = 32;          // of a chunk
constexpr std::int64_t kMostChunks = 64;         // more would be much scratch
constexpr std::int64_t kTileBytes = 512 * 1024;  // half of a common second-level cache
constexpr std::int64_t kLeastTileRows = 4;       // which share loads; 4 rows wider than that are
constexpr std::int64_t kMostTileRows = 32;       // in the third-level cache
constexpr std::int64_t kReducedAtOnce = std::int64_t{1} << 14;  // elements of a piece of work
constexpr std::int64_t kMostGramRows = 32;  // whose dots with one row are taken at once

template <class S, class T>
CurvatureKernels<S, T> pick(SimdLevel level) {
  const LevelCurvatureKernels kernels = curvature_kernels_for(level);
  if constexpr (std::is_same_v<S, Bfloat16>) {
    return kernels.bf16;
  } else if constexpr (std::is_same_v<S, float>) {
    return kernels.f32;
  } else {
    return kernels.f64;
  }
}

std::int64_t quotient_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// out_j = (1/n) sum_i c_ij x_i + damping v_j, where factors(i, u) replaces u_j = x_i . v_j by c_ij.
template <class S, class T, class Factors>
Status rows_product(const SelectedColumns<S>& x, const T* v, std::int64_t m, T damping, T* out,
                    const Execution& execution, const Factors& factors) {
  const auto kernels = pick<S, T>(execution.level);
  const std::int64_t n = x.rows;
  const std::int64_t size = x.size * m;
  if (size == 0) return Status::ok;
  const std::int64_t chunk_rows = std::max(kLeastRows, quotient_up(n, kMostChunks));
  const std::int64_t chunks = quotient_up(n, chunk_rows);
  const std::int64_t row_bytes = x.size * static_cast<std::int64_t>(sizeof(S));
  const std::int64_t tile_rows = std::clamp(kTileBytes / row_bytes, kLeastTileRows, kMostTileRows);
  const Pages<T> partial(static_cast<std::size_t>(chunks * size));

  const Status status = parallel_for(chunks, execution, [&] {
    return [&, dot = std::vector<T>(static_cast<std::size_t>(tile_rows * m)),
            row = std::vector<T>(static_cast<std::size_t>(m))](std::int64_t chunk) mutable {
      T* sum = partial.data() + chunk * size;
      std::fill_n(sum, size, T{0});
      const std::int64_t end = std::min(n, (chunk + 1) * chunk_rows);
      for (std::int64_t i = chunk * chunk_rows; i < end; i += tile_rows) {
        SelectedColumns<S> tile = x;
        tile.data = x.data + i * x.stride;
        tile.rows = std::min(tile_rows, end - i);
        for (std::int64_t j = 0; j < m; ++j)
          kernels.dots(tile, v + j * x.size, dot.data() + j * tile_rows);
        const auto at = [&](std::int64_t j, std::int64_t r) -> T& {
          return dot[static_cast<std::size_t>(j * tile_rows + r)];
        };
        for (std::int64_t r = 0; r < tile.rows; ++r) {
          for (std::int64_t j = 0; j < m; ++j) row[static_cast<std::size_t>(j)] = at(j, r);
          factors(i + r, row.data());
          for (std::int64_t j = 0; j < m; ++j) at(j, r) = row[static_cast<std::size_t>(j)];
        }
        // The last vector's sums fetch the next tile, whose dots would have to wait for it.
        const std::int64_t ahead = i + 2 * tile_rows <= end ? tile_rows * x.stride : 0;
        for (std::int64_t j = 0; j < m; ++j)
          kernels.accumulate(tile, dot.data() + j * tile_rows, j == m - 1 ? ahead : 0,
                             sum + j * x.size);
      }
    };
  });
  if (status != Status::ok) return status;

  const std::int64_t pieces = quotient_up(size, kReducedAtOnce);
  return parallel_for(pieces, execution, [&] {
    return [&](std::int64_t piece) {
      const std::int64_t begin = piece * kReducedAtOnce;
      const std::int64_t end = std::min(size, begin + kReducedAtOnce);
      T* const sum = partial.data();
      for (std::int64_t step = 1; step < chunks; step *= 2) {
        for (std::int64_t c = 0; c + step < chunks; c += 2 * step) {
          T* into = sum + c * size;
          const T* from = sum + (c + step) * size;
          for (std::int64_t k = begin; k < end; ++k) into[k] = into[k] + from[k];
        }
      }
      if (n == 0) {
        for (std::int64_t k = begin; k < end; ++k) out[k] = damping * v[k];
      } else {
        const T rows = static_cast<T>(n);
        for (std::int64_t k = begin; k < end; ++k) out[k] = sum[k] / rows + damping * v[k];
      }
    };
  });
}

float as_float(Bfloat16 value) {
  const std::uint32_t word = static_cast<std::uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

// To nearest, ties to even; NaN stays NaN.
Bfloat16 as_bfloat16(float value) {
  std::uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  if (value != value) return {static_cast<std::uint16_t>(word >> 16 | 0x40)};
  return {static_cast<std::uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}

}  // namespace

template <class S, class T>
Status masked_gram_product(const SelectedColumns<S>& g, const T* weight, const T* v, std::int64_t m,
                           T damping, T* out, const Execution& execution) {
  return rows_product(g, v, m, damping, out, execution, [=](std::int64_t i, T* u) {
    if (!weight) return;
    for (std::int64_t j = 0; j < m; ++j) u[j] = weight[i] * u[j];
  });
}

template <class S, class T>
Status softmax_rows_product(const SelectedColumns<S>& a, const T* p, const T* weight, const T* v,
                            std::int64_t m, T damping, T* out, const Execution& execution) {
  return rows_product(a, v, m, damping, out, execution, [=](std::int64_t i, T* u) {
    const T* own = p + i * m;
    T mean = 0;
    for (std::int64_t j = 0; j < m; ++j) mean = mean + own[j] * u[j];
    for (std::int64_t j = 0; j < m; ++j) {
      u[j] = own[j] * (u[j] - mean);
      if (weight) u[j] = weight[i] * u[j];
    }
  });
}

// Tiles of rows i against all rows j <= i: the rows of a tile stay in the cache.
template <class T>
Status factored_gram(const T* delta, std::int64_t delta_stride, std::int64_t r, const T* a,
                     std::int64_t a_stride, std::int64_t d, std::int64_t n, T* k,
                     const Execution& execution) {
  const auto dots = pick<T, T>(execution.level).dots;
  const Segment all_delta{0, r};
  const Segment all_a{0, d};
  // Few enough for the cache, and for pieces of work to go round.
  const std::int64_t row_bytes =
      std::max<std::int64_t>(d * static_cast<std::int64_t>(sizeof(T)), 1);
  const std::int64_t tile_rows = std::clamp(
      std::min(kTileBytes / row_bytes, quotient_up(n, kMostChunks)), kLeastTileRows, kMostGramRows);
  const std::int64_t pieces = quotient_up(n, tile_rows);
  return parallel_for(pieces, execution, [&] {
    return [&](std::int64_t piece) {
      // the longest first
      const std::int64_t i = (pieces - 1 - piece) * tile_rows;
      const std::int64_t rows = std::min(tile_rows, n - i);
      const SelectedColumns<T> own_delta{
          delta + i * delta_stride, rows, delta_stride, &all_delta, 1, r};
      const SelectedColumns<T> own_a{a + i * a_stride, rows, a_stride, &all_a, 1, d};
      for (std::int64_t j = 0; j < i + rows; ++j) {
        T left[kMostGramRows];
        T right[kMostGramRows];
        dots(own_delta, delta + j * delta_stride, left);
        dots(own_a, a + j * a_stride, right);
        for (std::int64_t t = 0; t < rows; ++t) {
          if (j > i + t) continue;  // its mirror image is written elsewhere
          k[(i + t) * n + j] = k[j * n + i + t] = left[t] * right[t];
        }
      }
    };
  });
}

template <class S>
void segments_gather(const S* const* parameters, const ParameterSegment* segments,
                     std::int64_t count, S* out) {
  for (std::int64_t s = 0; s < count; ++s) {
    const ParameterSegment& segment = segments[s];
    out = std::copy_n(parameters[segment.parameter] + segment.start, segment.length, out);
  }
}

template <class S, class T>
void segments_add(S* const* parameters, const ParameterSegment* segments, std::int64_t count,
                  T alpha, const T* x) {
  const DefaultFloats floats;
  for (std::int64_t s = 0; s < count; ++s) {
    const std::int64_t length = segments[s].length;
    S* own = parameters[segments[s].parameter] + segments[s].start;
    for (std::int64_t k = 0; k < length; ++k) {
      if constexpr (std::is_same_v<S, Bfloat16>) {
        own[k] = as_bfloat16(as_float(own[k]) + alpha * x[k]);
      } else {
        own[k] = own[k] + alpha * x[k];
      }
    }
    x += length;
  }
}

#define LCODEC_INSTANTIATE(S, T)                                                                \
  template Status masked_gram_product<S, T>(const SelectedColumns<S>&, const T*, const T*,      \
                                            std::int64_t, T, T*, const Execution&);             \
  template Status softmax_rows_product<S, T>(const SelectedColumns<S>&, const T*, const T*,     \
                                             const T*, std::int64_t, T, T*, const Execution&);  \
  template void segments_gather<S>(const S* const*, const ParameterSegment*, std::int64_t, S*); \
  template void segments_add<S, T>(S* const*, const ParameterSegment*, std::int64_t, T, const T*);
LCODEC_INSTANTIATE(float, float)
LCODEC_INSTANTIATE(double, double)
LCODEC_INSTANTIATE(Bfloat16, float)

#define LCODEC_INSTANTIATE_GRAM(T)                                                               \
  template Status factored_gram<T>(const T*, std::int64_t, std::int64_t, const T*, std::int64_t, \
                                   std::int64_t, std::int64_t, T*, const Execution&);
LCODEC_INSTANTIATE_GRAM(float)
LCODEC_INSTANTIATE_GRAM(double)

}  // namespace lcodec
