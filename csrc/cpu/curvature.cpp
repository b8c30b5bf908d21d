#include "lcodec/curvature.hpp"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/at.hpp"
#include "cpu/curvature_kernels.hpp"
#include "cpu/pages.hpp"
#include "cpu/parallel.hpp"

namespace lcodec {
namespace {

constexpr std::int64_t kLeastRows = 32;          // of a chunk
constexpr std::int64_t kMostChunks = 64;         // more would take much scratch
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
class RowsProduct {
 public:
  RowsProduct(const SelectedColumns<S>& x, const T* v, std::int64_t m, const Execution& given,
              const Factors& factors)
      : x_(x),
        v_(v),
        m_(m),
        size_(x.size * m),
        execution_(
            with_threads_for(static_cast<double>(x.rows) * static_cast<double>(size_), given)),
        kernels_(pick<S, T>(execution_.level)),
        factors_(factors),
        chunk_rows_(std::max(kLeastRows, quotient_up(x.rows, kMostChunks))),
        chunks_(quotient_up(x.rows, chunk_rows_)),
        tile_rows_(m >= kManyVectors ? kMostTileRows
                                     : std::clamp(kTileBytes / (x.size * kItemsize), kLeastTileRows,
                                                  kMostTileRows)),
        blocks_(x.segments, x.count, m >= kManyVectors ? kBlockBytes / kItemsize : x.size,
                kLanes<T>) {
    // A piece of work is a subtree of chunks. All its sums but the last stay in the cache.
    const std::int64_t wanted =
        std::max(kLeastPieces, kPiecesOfThread * std::int64_t{execution_.threads});
    for (; quotient_up(chunks_, 2 * piece_chunks_) >= wanted; ++levels_) piece_chunks_ *= 2;
    pieces_ = quotient_up(chunks_, piece_chunks_);
    partial_ = Pages<T>(at(pieces_ * size_));
  }

  Status run(T damping, T* out) {
    const Status status = parallel_for(pieces_, execution_, [&] {
      return [&, work = Scratch(*this)](std::int64_t piece) mutable { add_piece(piece, work); };
    });
    return status == Status::ok ? finish(damping, out) : status;
  }

 private:
  static constexpr auto kItemsize = static_cast<std::int64_t>(sizeof(S));

  // What a thread needs.
  struct Scratch {
    Pages<T> sums;  // of subtrees
    std::vector<T> lane, dot, row;

    explicit Scratch(const RowsProduct& a)
        : sums(at(a.levels_ * a.size_)),
          lane(at(a.m_ * a.tile_rows_ * kLanes<T>)),
          dot(at(a.m_ * a.tile_rows_)),
          row(at(a.m_)) {}
  };

  // The sum over the chunks of a piece, in its place in partial_.
  void add_piece(std::int64_t piece, Scratch& work) const {
    // sums[0], ..., sums[depth - 1]: subtrees that are complete, from left to right
    const auto sums = [&](std::int64_t depth) {
      return depth == 0 ? partial_.data() + piece * size_ : work.sums.data() + (depth - 1) * size_;
    };
    std::int64_t depth = 0;
    const auto join = [&] {
      --depth;
      add(sums(depth), size_, sums(depth - 1));
    };
    const std::int64_t first = piece * piece_chunks_;
    for (std::int64_t c = 0; c < piece_chunks_ && first + c < chunks_; ++c) {
      const std::int64_t begin = (first + c) * chunk_rows_;
      std::fill_n(sums(depth), size_, T{0});
      add_rows(begin, std::min(x_.rows, begin + chunk_rows_), sums(depth), work);
      ++depth;
      for (std::int64_t k = c + 1; k % 2 == 0; k /= 2) join();
    }
    while (depth > 1) join();
  }

  // sum_j += sum_i c_ij x_i over the rows [begin, end).
  void add_rows(std::int64_t begin, std::int64_t end, T* sum, Scratch& work) const {
    for (std::int64_t i = begin; i < end; i += tile_rows_) {
      SelectedColumns<S> tile = x_;
      tile.data = x_.data + i * x_.stride;
      tile.rows = std::min(tile_rows_, end - i);
      tile_dots<S, T>(kernels_, tile, blocks_, {v_, m_, x_.size}, work.lane.data(),
                      work.dot.data());
      const auto dot = [&](std::int64_t j, std::int64_t r) -> T& {
        return work.dot[at(j * tile.rows + r)];
      };
      for (std::int64_t r = 0; r < tile.rows; ++r) {
        for (std::int64_t j = 0; j < m_; ++j) work.row[at(j)] = dot(j, r);
        factors_(i + r, work.row.data());
        for (std::int64_t j = 0; j < m_; ++j) dot(j, r) = work.row[at(j)];
      }
      tile_accumulate<S, T>(kernels_, tile, blocks_, work.dot.data(), {sum, m_, x_.size});
    }
  }

  // Adds up the pieces, divides and damps.
  Status finish(T damping, T* out) const {
    return parallel_for(quotient_up(size_, kReducedAtOnce), execution_, [&] {
      return [&](std::int64_t part) {
        const std::int64_t begin = part * kReducedAtOnce;
        const std::int64_t end = std::min(size_, begin + kReducedAtOnce);
        T* const sum = partial_.data();
        for (std::int64_t step = 1; step < pieces_; step *= 2) {
          for (std::int64_t p = 0; p + step < pieces_; p += 2 * step)
            add(sum + (p + step) * size_ + begin, end - begin, sum + p * size_ + begin);
        }
        if (x_.rows == 0) {
          for (std::int64_t k = begin; k < end; ++k) out[k] = damping * v_[k];
        } else {
          const T rows = static_cast<T>(x_.rows);
          for (std::int64_t k = begin; k < end; ++k) out[k] = sum[k] / rows + damping * v_[k];
        }
      };
    });
  }

  const SelectedColumns<S>& x_;
  const T* v_;
  const std::int64_t m_, size_;
  const Execution execution_;
  const CurvatureKernels<S, T> kernels_;
  const Factors& factors_;
  const std::int64_t chunk_rows_, chunks_, tile_rows_;
  const Blocks blocks_;
  std::int64_t piece_chunks_ = 1;
  std::int64_t levels_ = 0;  // of subtrees in a piece
  std::int64_t pieces_ = 0;
  Pages<T> partial_;  // [piece][m][size]
};

template <class S, class T, class Factors>
Status rows_product(const SelectedColumns<S>& x, const T* v, std::int64_t m, T damping, T* out,
                    const Execution& execution, const Factors& factors) {
  if (x.size * m == 0) return Status::ok;
  return RowsProduct<S, T, Factors>(x, v, m, execution, factors).run(damping, out);
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
  // Few rows, so that every thread has pieces of work.
  const std::int64_t tile_rows =
      std::clamp(quotient_up(n, kMostChunks), kLeastTileRows, kMostGramRows);
  const std::int64_t pieces = quotient_up(n, tile_rows);
  return parallel_for(pieces, execution, [&] {
    const std::size_t dots = at(tile_rows * kMostGramRows);
    return [&, lane = std::vector<T>(dots * at(kLanes<T>)), left = std::vector<T>(dots),
            right = std::vector<T>(dots)](std::int64_t piece) mutable {
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
            const std::size_t pair = at(s * rows + t);
            k[(i + t) * n + j + s] = k[(j + s) * n + i + t] = left[pair] * right[pair];
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
