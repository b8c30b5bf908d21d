#include "lcodec/curvature.hpp"

#include <algorithm>
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
constexpr std::int64_t kManyVectors = 5;         // whose elements outweigh those of 4 rows
constexpr std::int64_t kBlockBytes = 4 * 1024;   // of a row: some of them fit a first-level cache
constexpr std::int64_t kLeastPieces = 8;         // of work, so that Ctrl-C is seen between them
constexpr std::int64_t kPiecesOfThread = 4;
constexpr double kLeastOfThread = 2e5;  // multiplications: some 40 microseconds
constexpr std::int64_t kReducedAtOnce = std::int64_t{1} << 14;  // elements of a piece of work
constexpr std::int64_t kMostGramRows = 32;                      // of a tile

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

// No more threads than `multiplications` keep busy for longer than it takes to start them.
Execution with_threads_for(double multiplications, Execution execution) {
  const double most = multiplications / kLeastOfThread;
  if (most < execution.threads) execution.threads = std::max(1, static_cast<int>(most));
  return execution;
}

template <class T>
void add(const T* from, std::int64_t count, T* into) {
  for (std::int64_t k = 0; k < count; ++k) into[k] = into[k] + from[k];
}

// Selected columns in blocks of `most` at most, parted where a dot may be.
class Blocks {
 public:
  struct Block {
    std::int64_t first, count;  // of segments()
    std::int64_t offset, size;  // of the selected columns
  };

  Blocks(const Segment* segments, std::int64_t count, std::int64_t most, std::int64_t lanes) {
    Block block{0, 0, 0, 0};
    const auto close = [&] {
      if (block.size > 0) blocks_.push_back(block);
      block = {block.first + block.count, 0, block.offset + block.size, 0};
    };
    for (std::int64_t s = 0; s < count; ++s) {
      Segment left = segments[s];
      while (left.length > 0) {
        std::int64_t length = std::min(left.length, most - block.size);
        if (length < left.length) length = length / lanes * lanes;
        if (length == 0) {
          close();
          continue;
        }
        segments_.push_back({left.start, length});
        left = {left.start + length, left.length - length};
        ++block.count;
        block.size += length;
      }
    }
    close();
  }

  auto begin() const { return blocks_.begin(); }
  auto end() const { return blocks_.end(); }

  // kRowsAtOnce rows of a tile from `first` on, with a block's columns.
  template <class S>
  SelectedColumns<S> of(const SelectedColumns<S>& tile, std::int64_t first,
                        const Block& block) const {
    return {tile.data + first * tile.stride,
            std::min(kRowsAtOnce, tile.rows - first),
            tile.stride,
            segments_.data() + block.first,
            block.count,
            block.size};
  }

 private:
  std::vector<Segment> segments_;
  std::vector<Block> blocks_;
};

// dot[j][r] = x_r . v_j for the rows x_r of a tile. Blocks of columns: some rows are read from the
// first-level cache for all vectors but the first.
template <class S, class T>
void tile_dots(const CurvatureKernels<S, T>& kernels, const SelectedColumns<S>& tile,
               const Blocks& blocks, const Arrays<const T>& v, T* lane, T* dot) {
  constexpr std::int64_t L = kLanes<T>;
  std::fill_n(lane, v.m * tile.rows * L, T{0});
  for (const auto& block : blocks) {
    for (std::int64_t r = 0; r < tile.rows; r += kRowsAtOnce)
      kernels.dots(blocks.of(tile, r, block), {v.data + block.offset, v.m, v.stride},
                   {lane + r * L, v.m, tile.rows * L});
  }
  kernels.fold(lane, v.m * tile.rows, dot);
}

// out_j += sum_r factor[j][r] x_r for the rows x_r of a tile.
template <class S, class T>
void tile_accumulate(const CurvatureKernels<S, T>& kernels, const SelectedColumns<S>& tile,
                     const Blocks& blocks, const T* factor, const Arrays<T>& out) {
  for (const auto& block : blocks) {
    for (std::int64_t r = 0; r < tile.rows; r += kRowsAtOnce)
      kernels.accumulate(blocks.of(tile, r, block), {factor + r, out.m, tile.rows},
                         {out.data + block.offset, out.m, out.stride});
  }
}

// out_j = (1/n) sum_i c_ij x_i + damping v_j, where factors(i, u) replaces u_j = x_i . v_j by c_ij.
template <class S, class T, class Factors>
Status rows_product(const SelectedColumns<S>& x, const T* v, std::int64_t m, T damping, T* out,
                    const Execution& given, const Factors& factors) {
  const std::int64_t n = x.rows;
  const std::int64_t size = x.size * m;
  const Execution execution =
      with_threads_for(static_cast<double>(n) * static_cast<double>(size), given);
  const auto kernels = pick<S, T>(execution.level);
  if (size == 0) return Status::ok;
  const std::int64_t chunk_rows = std::max(kLeastRows, quotient_up(n, kMostChunks));
  const std::int64_t chunks = quotient_up(n, chunk_rows);
  const std::int64_t itemsize = static_cast<std::int64_t>(sizeof(S));
  const bool many = m >= kManyVectors;
  const std::int64_t tile_rows =
      many ? kMostTileRows
           : std::clamp(kTileBytes / (x.size * itemsize), kLeastTileRows, kMostTileRows);
  const Blocks blocks(x.segments, x.count, many ? kBlockBytes / itemsize : x.size, kLanes<T>);

  // A piece of work is a subtree of chunks, whose sums stay in the cache but for the last.
  const std::int64_t wanted =
      std::max(kLeastPieces, kPiecesOfThread * std::int64_t{execution.threads});
  std::int64_t piece_chunks = 1;
  std::int64_t levels = 0;
  for (; quotient_up(chunks, 2 * piece_chunks) >= wanted; ++levels) piece_chunks *= 2;
  const std::int64_t pieces = quotient_up(chunks, piece_chunks);
  const Pages<T> partial(static_cast<std::size_t>(pieces * size));

  const Status status = parallel_for(pieces, execution, [&] {
    return [&, scratch = Pages<T>(static_cast<std::size_t>(levels * size)),
            lane = std::vector<T>(static_cast<std::size_t>(m * tile_rows * kLanes<T>)),
            dot = std::vector<T>(static_cast<std::size_t>(m * tile_rows)),
            row = std::vector<T>(static_cast<std::size_t>(m))](std::int64_t piece) mutable {
      const auto add_rows = [&](std::int64_t begin, std::int64_t end, T* sum) {
        for (std::int64_t i = begin; i < end; i += tile_rows) {
          SelectedColumns<S> tile = x;
          tile.data = x.data + i * x.stride;
          tile.rows = std::min(tile_rows, end - i);
          tile_dots<S, T>(kernels, tile, blocks, {v, m, x.size}, lane.data(), dot.data());
          const auto at = [&](std::int64_t j, std::int64_t r) -> T& {
            return dot[static_cast<std::size_t>(j * tile.rows + r)];
          };
          for (std::int64_t r = 0; r < tile.rows; ++r) {
            for (std::int64_t j = 0; j < m; ++j) row[static_cast<std::size_t>(j)] = at(j, r);
            factors(i + r, row.data());
            for (std::int64_t j = 0; j < m; ++j) at(j, r) = row[static_cast<std::size_t>(j)];
          }
          tile_accumulate<S, T>(kernels, tile, blocks, dot.data(), {sum, m, x.size});
        }
      };
      // sums[0], ..., sums[depth - 1]: subtrees that are complete, from left to right
      const auto sums = [&](std::int64_t depth) {
        return depth == 0 ? partial.data() + piece * size : scratch.data() + (depth - 1) * size;
      };
      std::int64_t depth = 0;
      const auto join = [&] {
        --depth;
        add(sums(depth), size, sums(depth - 1));
      };
      const std::int64_t first = piece * piece_chunks;
      for (std::int64_t c = 0; c < piece_chunks && first + c < chunks; ++c) {
        const std::int64_t begin = (first + c) * chunk_rows;
        std::fill_n(sums(depth), size, T{0});
        add_rows(begin, std::min(n, begin + chunk_rows), sums(depth));
        ++depth;
        for (std::int64_t k = c + 1; k % 2 == 0; k /= 2) join();
      }
      while (depth > 1) join();
    };
  });
  if (status != Status::ok) return status;

  return parallel_for(quotient_up(size, kReducedAtOnce), execution, [&] {
    return [&](std::int64_t part) {
      const std::int64_t begin = part * kReducedAtOnce;
      const std::int64_t end = std::min(size, begin + kReducedAtOnce);
      T* const sum = partial.data();
      for (std::int64_t step = 1; step < pieces; step *= 2) {
        for (std::int64_t p = 0; p + step < pieces; p += 2 * step)
          add(sum + (p + step) * size + begin, end - begin, sum + p * size + begin);
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

// Tiles of rows i against tiles of rows j <= i.
template <class T>
Status factored_gram(const T* delta, std::int64_t delta_stride, std::int64_t r, const T* a,
                     std::int64_t a_stride, std::int64_t d, std::int64_t n, T* k,
                     const Execution& given) {
  const double pairs = static_cast<double>(n) * static_cast<double>(n) / 2;
  const Execution execution = with_threads_for(pairs * static_cast<double>(r + d), given);
  const auto kernels = pick<T, T>(execution.level);
  const Segment all_delta{0, r};
  const Segment all_a{0, d};
  constexpr std::int64_t kBlock = kBlockBytes / static_cast<std::int64_t>(sizeof(T));
  const Blocks delta_blocks(&all_delta, 1, kBlock, kLanes<T>);
  const Blocks a_blocks(&all_a, 1, kBlock, kLanes<T>);
  // Few enough for pieces of work to go round.
  const std::int64_t tile_rows =
      std::clamp(quotient_up(n, kMostChunks), kLeastTileRows, kMostGramRows);
  const std::int64_t pieces = quotient_up(n, tile_rows);
  return parallel_for(pieces, execution, [&] {
    const std::size_t dots = static_cast<std::size_t>(tile_rows * kMostGramRows);
    return [&, lane = std::vector<T>(dots * static_cast<std::size_t>(kLanes<T>)),
            left = std::vector<T>(dots), right = std::vector<T>(dots)](std::int64_t piece) mutable {
      // the longest first
      const std::int64_t i = (pieces - 1 - piece) * tile_rows;
      const std::int64_t rows = std::min(tile_rows, n - i);
      const SelectedColumns<T> own_delta{
          delta + i * delta_stride, rows, delta_stride, &all_delta, 1, r};
      const SelectedColumns<T> own_a{a + i * a_stride, rows, a_stride, &all_a, 1, d};
      for (std::int64_t j = 0; j < i + rows; j += kMostGramRows) {
        const std::int64_t others = std::min(kMostGramRows, i + rows - j);
        tile_dots<T, T>(kernels, own_delta, delta_blocks,
                        {delta + j * delta_stride, others, delta_stride}, lane.data(), left.data());
        tile_dots<T, T>(kernels, own_a, a_blocks, {a + j * a_stride, others, a_stride}, lane.data(),
                        right.data());
        for (std::int64_t s = 0; s < others; ++s) {
          for (std::int64_t t = 0; t < rows; ++t) {
            if (j + s > i + t) continue;  // its mirror image is written elsewhere
            const std::size_t at = static_cast<std::size_t>(s * rows + t);
            k[(i + t) * n + j + s] = k[(j + s) * n + i + t] = left[at] * right[at];
          }
        }
      }
    };
  });
}

#define LCODEC_INSTANTIATE(S, T)                                                            \
  template Status masked_gram_product<S, T>(const SelectedColumns<S>&, const T*, const T*,  \
                                            std::int64_t, T, T*, const Execution&);         \
  template Status softmax_rows_product<S, T>(const SelectedColumns<S>&, const T*, const T*, \
                                             const T*, std::int64_t, T, T*, const Execution&);
LCODEC_INSTANTIATE(float, float)
LCODEC_INSTANTIATE(double, double)
LCODEC_INSTANTIATE(Bfloat16, float)

#define LCODEC_INSTANTIATE_GRAM(T)                                                               \
  template Status factored_gram<T>(const T*, std::int64_t, std::int64_t, const T*, std::int64_t, \
                                   std::int64_t, std::int64_t, T*, const Execution&);
LCODEC_INSTANTIATE_GRAM(float)
LCODEC_INSTANTIATE_GRAM(double)

}  // namespace lcodec
