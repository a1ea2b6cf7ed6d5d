// Gather and scatter of the trainable elements of a shard: the CPU core, free of torch and of Python.
//
// A shard is a row-major matrix; its trainable elements are moved, bit by bit, to and from a compact vector. They are
// described either by "pieces" (rows that share one column bit mask, see Piece) or, for element masks, by one bit an
// element and a running count every kBlock elements. Bits are little-endian (element i is bit i % 8 of byte i / 8),
// 1 = trainable, and every bit array is followed by at least 8 readable bytes. Each output is computed by one thread
// from one place, so results do not depend on the thread count.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "rows.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace ssu {

constexpr int64_t kBlock = 8192;  // elements between two running counts of an element mask

// Rows that share their trainable columns. All fields int64 so that a row of an int64 [P, 11] array is one Piece.
struct Piece {
  int64_t dense;   // 1: every element is trainable (rows = 1; width, count and stride are the length)
  int64_t src;     // offset of its first element in the shard
  int64_t rows;    // rows, `width` elements apart in the shard
  int64_t out;     // offset of its first element in the compact vector
  int64_t bit;     // bit index of its first column in the bit array
  int64_t width;   // elements of one row
  int64_t count;   // trainable elements of one row, > 0
  int64_t stride;  // elements from one row to the next in the compact vector; those from `count` on are padding
  int64_t col;     // offset of its first trainable column in the column list (GPU only)
  int64_t cost;    // elements of all pieces before this one (splits work among threads)
  int64_t tile;    // GPU tiles of all pieces before this one
};
static_assert(sizeof(Piece) == 11 * sizeof(int64_t), "a Piece is a row of an int64 array");

// Runs work(begin, end) over [0, total) in one contiguous stretch a thread.
template <typename F>
inline void split(int64_t total, int threads, F work) {
#if defined(_OPENMP)
  if (threads > 1 && total >= kMinParallel) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
      const int64_t share = total / n, rest = total % n;
      work(share * t + std::min(t, rest), share * (t + 1) + std::min(t + 1, rest));
    }
    return;
  }
#endif
  (void)threads;
  work(int64_t{0}, total);
}

// Calls row(piece, r) or span(piece, from, to) for the part of the pieces that falls in [begin, end) of the cost axis.
// A row belongs to the stretch that holds its first element.
template <typename Row, typename Span>
inline void walk(const Piece* pieces, int64_t n, int64_t begin, int64_t end, Row row, Span span) {
  const Piece* p = std::upper_bound(pieces, pieces + n, begin, [](int64_t x, const Piece& q) { return x < q.cost; });
  if (p != pieces) --p;
  for (; p != pieces + n && p->cost < end; ++p) {
    const int64_t lo = std::max<int64_t>(begin - p->cost, 0);
    const int64_t hi = std::min(end - p->cost, p->rows * p->width);
    if (p->dense) {
      if (lo < hi) span(*p, lo, hi);
      continue;
    }
    const int64_t last = (hi + p->width - 1) / p->width;
    for (int64_t r = (lo + p->width - 1) / p->width; r < last; ++r) row(*p, r);
  }
}

inline int64_t total_cost(const Piece* pieces, int64_t n) {
  return n ? pieces[n - 1].cost + pieces[n - 1].rows * pieces[n - 1].width : 0;
}

template <typename T>
inline void copy(const T* from, T* to, int64_t n) {
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}

template <typename T>
inline void gather_pieces(const T* src, T* out, const Piece* pieces, int64_t n, const uint8_t* bits, int level,
                          int threads) {
  split(total_cost(pieces, n), threads, [=](int64_t begin, int64_t end) {
    walk(
        pieces, n, begin, end,
        [=](const Piece& p, int64_t r) {
          gather_row(level, src + p.src + r * p.width, out + p.out + r * p.stride, bits, p.bit, p.width, p.count);
        },
        [=](const Piece& p, int64_t from, int64_t to) { copy(src + p.src + from, out + p.out + from, to - from); });
  });
}

template <typename T>
inline void scatter_pieces(const T* values, T* dst, const Piece* pieces, int64_t n, const uint8_t* bits, int level,
                           int threads) {
  split(total_cost(pieces, n), threads, [=](int64_t begin, int64_t end) {
    walk(
        pieces, n, begin, end,
        [=](const Piece& p, int64_t r) {
          scatter_row(level, values + p.out + r * p.stride, dst + p.src + r * p.width, bits, p.bit, p.width, p.count);
        },
        [=](const Piece& p, int64_t from, int64_t to) { copy(values + p.out + from, dst + p.src + from, to - from); });
  });
}

// Calls block(first element, elements, trainable elements before it, trainable elements in it) for a mask's blocks.
template <typename F>
inline void blocks(int64_t numel, const int64_t* counts, int threads, F block) {
  split(numel, threads, [=](int64_t begin, int64_t end) {
    for (int64_t b = (begin + kBlock - 1) / kBlock; b * kBlock < end; ++b)
      block(b * kBlock, std::min(kBlock, numel - b * kBlock), counts[b], counts[b + 1] - counts[b]);
  });
}

// Element masks: counts[b] = trainable elements before block b, ceil(numel / kBlock) + 1 entries.
template <typename T>
inline void gather_elements(const T* src, T* out, int64_t numel, const uint8_t* bits, const int64_t* counts, int level,
                            int threads) {
  blocks(numel, counts, threads, [=](int64_t at, int64_t n, int64_t rank, int64_t count) {
    gather_row(level, src + at, out + rank, bits, at, n, count);
  });
}

template <typename T>
inline void scatter_elements(const T* values, T* dst, int64_t numel, const uint8_t* bits, const int64_t* counts,
                             int level, int threads) {
  blocks(numel, counts, threads, [=](int64_t at, int64_t n, int64_t rank, int64_t count) {
    scatter_row(level, values + rank, dst + at, bits, at, n, count);
  });
}

// out [rows, stride] takes the `count` columns whose bits are set, then zeros.
template <typename T>
struct ColumnSet {
  T* out;
  const uint8_t* bits;
  int64_t count, stride;
};

// Columns of any row-major matrix [rows, width], width > 0: all `n` sets of a row while it is in the cache.
template <typename T>
inline void gather_columns(const T* x, int64_t rows, int64_t width, const ColumnSet<T>* sets, int64_t n, int level,
                           int threads) {
  split(rows * width, threads, [=](int64_t begin, int64_t end) {
    for (int64_t r = (begin + width - 1) / width; r < (end + width - 1) / width; ++r) {
      for (const ColumnSet<T>* set = sets; set != sets + n; ++set) {
        T* to = set->out + r * set->stride;
        gather_row(level, x + r * width, to, set->bits, 0, width, set->count);
        std::fill(to + set->count, to + set->stride, T{0});
      }
    }
  });
}

}  // namespace ssu
