// Gather and scatter of the trainable elements of a flat shard: the CPU core, free of torch and of Python.
//
// A shard is a flat range of a row-major matrix. Its trainable elements are described either by "pieces" (rows that
// share one column bit mask, see Piece) or, for element masks, by one bit an element and a running count every kBlock
// elements. Bits are little-endian (element i is bit i % 8 of byte i / 8), 1 = trainable, and every bit array is
// followed by at least 8 readable bytes. Each output is computed by one thread from one place, so results do not depend
// on the thread count.
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

// One stretch of the shard. All fields int64 so that a row of an int64 [P, 11] array is one Piece.
struct Piece {
  int64_t dense;  // 1: every element is trainable (rows = 1, width = the length)
  int64_t src;    // offset of its first element in the shard
  int64_t rows;   // rows, `width` elements apart
  int64_t out;    // offset of its first element among the trainable ones
  int64_t bit;    // bit index of its first column in the bit array
  int64_t width;  // elements of one row
  int64_t count;  // trainable elements of one row, > 0
  int64_t col;    // offset of its first trainable column in the column list (GPU only)
  int64_t first;  // number of its first column (GPU only: list entry - first = offset in the row)
  int64_t cost;   // elements of all pieces before this one (splits work among threads)
  int64_t tile;   // GPU tiles of all pieces before this one
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

// Where one thread's gathered elements go: straight to memory, or, for outputs far larger than a cache, through a small
// buffer and stores that do not first read the line they overwrite (a third of all traffic otherwise).
class Writer {
 public:
  Writer(int level, bool stream) : level_(level), stream_(stream && level >= kAvx2) {}
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;
  ~Writer() {
    if (!stream_) return;
    flush(true);
#if SSU_X86
    _mm_sfence();
#endif
  }

  template <typename T>
  void masked(const T* src, float* out, const uint8_t* bits, int64_t bit, int64_t width, int64_t count) {
    if (!stream_) {
      gather_row(level_, src, out, bits, bit, width, count);
      return;
    }
    start(out);
    for (int64_t i = 0; i < width; i += kStep) {
      fill_ += gather_row(level_, src + i, buffer_ + fill_, bits, bit + i, std::min(kStep, width - i), kSize - fill_);
      flush(false);
    }
  }

  template <typename T>
  void dense(const T* src, float* out, int64_t n) {
    if (!stream_) {
      for (int64_t i = 0; i < n; ++i) out[i] = widen(src[i]);
      return;
    }
    start(out);
    for (int64_t i = 0; i < n; i += kStep) {
      const int64_t m = std::min(kStep, n - i);
      for (int64_t j = 0; j < m; ++j) buffer_[fill_ + j] = widen(src[i + j]);
      fill_ += m;
      flush(false);
    }
  }

 private:
  static constexpr int64_t kStep = 2048;
  static constexpr int64_t kSize = 2 * kStep + 64;  // a step always fits behind what was kept, with room to overrun

  // A thread's elements follow one another, so only its first call sets the address.
  void start(float* out) {
    if (!out_) out_ = out;
  }

  void flush(bool last) {
    if (!last && fill_ < kStep) return;
    int64_t done = 0;
#if SSU_X86
    const int64_t skew = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out_) / 4 % 16);
    if (skew) done = std::min<int64_t>(16 - skew, fill_);
    std::memcpy(out_, buffer_, static_cast<size_t>(done) * 4);
    done += store(out_ + done, buffer_ + done, (fill_ - done) / 16);
#endif
    if (last) {
      std::memcpy(out_ + done, buffer_ + done, static_cast<size_t>(fill_ - done) * 4);
      done = fill_;
    }
    std::memmove(buffer_, buffer_ + done, static_cast<size_t>(fill_ - done) * 4);
    out_ += done;
    fill_ -= done;
  }

#if SSU_X86
  SSU_AVX2 static int64_t store(float* to, const float* from, int64_t lines) {
    for (int64_t k = 0; k < lines; ++k) {
      _mm256_stream_ps(to + 16 * k, _mm256_loadu_ps(from + 16 * k));
      _mm256_stream_ps(to + 16 * k + 8, _mm256_loadu_ps(from + 16 * k + 8));
    }
    return 16 * lines;
  }
#endif

  alignas(64) float buffer_[kSize];
  float* out_ = nullptr;
  int64_t fill_ = 0;
  const int level_;
  const bool stream_;
};

#if !defined(SSU_STREAM_FROM)
#define SSU_STREAM_FROM (1 << 20)  // trainable elements from which on the output outgrows the caches (4 MiB)
#endif
constexpr int64_t kStream = SSU_STREAM_FROM;

template <typename T>
inline void gather_pieces(const T* src, float* out, const Piece* pieces, int64_t n, const uint8_t* bits, int level,
                          int threads) {
  const bool stream = n && pieces[n - 1].out + pieces[n - 1].rows * pieces[n - 1].count >= kStream;
  split(total_cost(pieces, n), threads, [=](int64_t begin, int64_t end) {
    Writer writer(level, stream);
    walk(
        pieces, n, begin, end,
        [&](const Piece& p, int64_t r) {
          writer.masked(src + p.src + r * p.width, out + p.out + r * p.count, bits, p.bit, p.width, p.count);
        },
        [&](const Piece& p, int64_t from, int64_t to) {
          writer.dense(src + p.src + from, out + p.out + from, to - from);
        });
  });
}

template <typename T>
inline void scatter_pieces(const float* values, T* dst, const Piece* pieces, int64_t n, const uint8_t* bits,
                           uint16_t nan, int level, int threads) {
  split(total_cost(pieces, n), threads, [=](int64_t begin, int64_t end) {
    walk(
        pieces, n, begin, end,
        [=](const Piece& p, int64_t r) {
          scatter_row(level, values + p.out + r * p.count, dst + p.src + r * p.width, bits, p.bit, p.width, p.count,
                      nan);
        },
        [=](const Piece& p, int64_t from, int64_t to) {
          for (int64_t i = from; i < to; ++i) narrow(values[p.out + i], nan, dst + p.src + i);
        });
  });
}

// Element masks: counts[b] = trainable elements before block b, ceil(numel / kBlock) + 1 entries.
template <typename T>
inline void gather_elements(const T* src, float* out, int64_t numel, const uint8_t* bits, const int64_t* counts,
                            int level, int threads) {
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  split(numel, threads, [=](int64_t begin, int64_t end) {
    Writer writer(level, counts[blocks] >= kStream);
    for (int64_t b = (begin + kBlock - 1) / kBlock; b < blocks && b * kBlock < end; ++b) {
      const int64_t at = b * kBlock;
      writer.masked(src + at, out + counts[b], bits, at, std::min(kBlock, numel - at), counts[b + 1] - counts[b]);
    }
  });
}

template <typename T>
inline void scatter_elements(const float* values, T* dst, int64_t numel, const uint8_t* bits, const int64_t* counts,
                             uint16_t nan, int level, int threads) {
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  split(numel, threads, [=](int64_t begin, int64_t end) {
    for (int64_t b = (begin + kBlock - 1) / kBlock; b < blocks && b * kBlock < end; ++b) {
      const int64_t at = b * kBlock, n = counts[b + 1] - counts[b];
      scatter_row(level, values + counts[b], dst + at, bits, at, std::min(kBlock, numel - at), n, nan);
    }
  });
}

}  // namespace ssu
