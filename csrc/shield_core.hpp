// Gather and scatter of the trainable elements of a flat shard: the CPU core, free of torch and of Python.
//
// A shard is a flat range of a row-major matrix. Its trainable elements are described either by "pieces" (rows that share
// one column bit mask, see Piece) or, for element masks, by one bit an element and a running count every kBlock elements.
// Bits are little-endian (element i is bit i % 8 of byte i / 8), 1 = trainable, and every bit array is followed by at least
// 8 readable bytes. Each output is computed by one thread from one place, so results do not depend on the thread count.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define SSU_X86 1
#include <immintrin.h>
#else
#define SSU_X86 0
#endif

#define SSU_INLINE inline __attribute__((always_inline))

namespace ssu {

constexpr int64_t kBlock = 8192;         // elements between two running counts of an element mask
constexpr int64_t kMinParallel = 65536;  // below this many elements a second thread costs more than it saves

// One stretch of the shard. All fields int64 so that a row of an int64 [P, 11] array is one Piece.
struct Piece {
  int64_t dense;   // 1: every element is trainable (rows = 1, width = the length)
  int64_t src;     // offset of its first element in the shard
  int64_t rows;    // rows, `width` elements apart
  int64_t out;     // offset of its first element among the trainable ones
  int64_t bit;     // bit index of its first column in the bit array
  int64_t width;   // elements of one row
  int64_t count;   // trainable elements of one row, > 0
  int64_t col;     // offset of its first trainable column in the column list (GPU only)
  int64_t first;   // number of its first column (GPU only: list entry - first = offset in the row)
  int64_t cost;    // elements of all pieces before this one (splits work among threads)
  int64_t tile;    // GPU tiles of all pieces before this one
};
static_assert(sizeof(Piece) == 11 * sizeof(int64_t), "a Piece is a row of an int64 array");

enum Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

inline int best_level() {
#if SSU_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("popcnt"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt")) return kAvx2;
#endif
  return kPortable;
}

// bfloat16 as its bits. `nan` is what the caller's torch build writes for any NaN (it differs between builds).
struct bf16 {
  uint16_t bits;
};

SSU_INLINE float widen(float x) { return x; }
SSU_INLINE float widen(bf16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
SSU_INLINE void narrow(float x, uint16_t, float* to) { *to = x; }
SSU_INLINE void narrow(float x, uint16_t nan, bf16* to) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  to->bits = (u & 0x7fffffffu) > 0x7f800000u ? nan : static_cast<uint16_t>(rounded);
}

// The next 32 mask bits from bit index `at`, cut to `left` elements.
SSU_INLINE uint32_t mask32(const uint8_t* bits, int64_t at, int64_t left) {
  uint64_t word;
  std::memcpy(&word, bits + (at >> 3), 8);
  uint32_t m = static_cast<uint32_t>(word >> (at & 7));
  return left >= 32 ? m : m & ((1u << left) - 1u);
}

// ---- one row (or block): `count` trainable of `width` elements; nothing outside [0, count) and [0, width) is touched ----

template <typename T>
inline void gather_row_portable(const T* src, float* out, const uint8_t* bits, int64_t bit, int64_t width, int64_t) {
  for (int64_t i = 0; i < width; i += 32) {
    for (uint32_t m = mask32(bits, bit + i, width - i); m; m &= m - 1) *out++ = widen(src[i + __builtin_ctz(m)]);
  }
}

template <typename T>
inline void scatter_row_portable(const float* values, T* dst, const uint8_t* bits, int64_t bit, int64_t width, int64_t,
                                 uint16_t nan) {
  for (int64_t i = 0; i < width; i += 32) {
    for (uint32_t m = mask32(bits, bit + i, width - i); m; m &= m - 1) narrow(*values++, nan, dst + i + __builtin_ctz(m));
  }
}

#if SSU_X86

// AVX2 has no compress: a table of lane permutations, one entry for each of 256 masks.
struct Lanes {
  alignas(32) int32_t pack[256][8];    // lane k of the result is the k-th set lane
  alignas(32) int32_t unpack[256][8];  // lane j of the result is the rank of lane j among the set lanes
  Lanes() {
    for (int m = 0; m < 256; ++m) {
      int n = 0;
      for (int j = 0; j < 8; ++j) {
        unpack[m][j] = n;
        if (m >> j & 1) pack[m][n++] = j;
      }
      while (n < 8) pack[m][n++] = 0;
    }
  }
};
inline const Lanes& lanes() {
  static const Lanes table;
  return table;
}

#define SSU_AVX2 __attribute__((target("avx2,popcnt")))
#define SSU_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,popcnt")))

SSU_AVX2 inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
SSU_AVX2 inline __m256 load8(const bf16* p) {
  __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

template <typename T>
SSU_AVX2 inline void gather_row_avx2(const T* src, float* out, const uint8_t* bits, int64_t bit, int64_t width,
                                     int64_t count) {
  const Lanes& table = lanes();
  int64_t i = 0, o = 0;
  // A store of 8 lanes may run past the packed ones, never past the row: what it overruns is written again after.
  for (; i + 32 <= width && o + 32 <= count; i += 32) {
    const uint32_t m = mask32(bits, bit + i, 32);
    for (int k = 0; k < 4; ++k) {
      const uint32_t m8 = m >> (8 * k) & 0xffu;
      const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(table.pack[m8]));
      _mm256_storeu_ps(out + o, _mm256_permutevar8x32_ps(load8(src + i + 8 * k), order));
      o += __builtin_popcount(m8);
    }
  }
  gather_row_portable(src + i, out + o, bits, bit + i, width - i, count - o);
}

SSU_AVX2 inline void store8(float* p, __m256 v, __m256i keep, uint16_t) { _mm256_maskstore_ps(p, keep, v); }
SSU_AVX2 inline void store8(bf16* p, __m256 v, __m256i keep, uint16_t nan) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i magnitude = _mm256_and_si256(u, _mm256_set1_epi32(0x7fffffff));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(nan), _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f800000)));
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  const __m128i keep16 = _mm_packs_epi32(_mm256_castsi256_si128(keep), _mm256_extracti128_si256(keep, 1));
  __m128i* at = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(at, _mm_blendv_epi8(_mm_loadu_si128(at), packed, keep16));
}

template <typename T>
SSU_AVX2 inline void scatter_row_avx2(const float* values, T* dst, const uint8_t* bits, int64_t bit, int64_t width,
                                      int64_t count, uint16_t nan) {
  const Lanes& table = lanes();
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  int64_t i = 0, o = 0;
  for (; i + 32 <= width && o + 32 <= count; i += 32) {
    const uint32_t m = mask32(bits, bit + i, 32);
    for (int k = 0; k < 4; ++k) {
      const uint32_t m8 = m >> (8 * k) & 0xffu;
      const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(table.unpack[m8]));
      const __m256 v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values + o), order);
      const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(m8)), lane_bit);
      store8(dst + i + 8 * k, v, _mm256_cmpeq_epi32(set, lane_bit), nan);
      o += __builtin_popcount(m8);
    }
  }
  scatter_row_portable(values + o, dst + i, bits, bit + i, width - i, count - o, nan);
}

SSU_AVX512 inline __m512 load16(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
SSU_AVX512 inline __m512 load16(const bf16* p, __mmask16 m) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}

template <typename T>
SSU_AVX512 inline void gather_row_avx512(const T* src, float* out, const uint8_t* bits, int64_t bit, int64_t width,
                                         int64_t count) {
  int64_t i = 0, o = 0;
  for (; i + 32 <= width && o + 32 <= count; i += 32) {  // may overrun the packed lanes within the row, as above
    const uint32_t m = mask32(bits, bit + i, 32);
    const __mmask16 low = static_cast<__mmask16>(m), high = static_cast<__mmask16>(m >> 16);
    _mm512_storeu_ps(out + o, _mm512_maskz_compress_ps(low, load16(src + i, 0xffff)));
    o += __builtin_popcount(m & 0xffffu);
    _mm512_storeu_ps(out + o, _mm512_maskz_compress_ps(high, load16(src + i + 16, 0xffff)));
    o += __builtin_popcount(m >> 16);
  }
  for (; i < width; i += 16) {
    const uint32_t m = mask32(bits, bit + i, width - i) & 0xffffu;
    const int n = __builtin_popcount(m);
    const __m512 packed = _mm512_maskz_compress_ps(static_cast<__mmask16>(m), load16(src + i, static_cast<__mmask16>(m)));
    _mm512_mask_storeu_ps(out + o, static_cast<__mmask16>((1u << n) - 1u), packed);
    o += n;
  }
}

SSU_AVX512 inline void store16(float* p, __m512 v, __mmask16 m, uint16_t) { _mm512_mask_storeu_ps(p, m, v); }
SSU_AVX512 inline void store16(bf16* p, __m512 v, __mmask16 m, uint16_t nan) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(nan));
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(r));
}

template <typename T>
SSU_AVX512 inline void scatter_row_avx512(const float* values, T* dst, const uint8_t* bits, int64_t bit, int64_t width,
                                          int64_t count, uint16_t nan) {
  int64_t i = 0, o = 0;
  for (; i + 32 <= width && o + 32 <= count; i += 32) {
    const uint32_t m = mask32(bits, bit + i, 32);
    const __mmask16 low = static_cast<__mmask16>(m), high = static_cast<__mmask16>(m >> 16);
    store16(dst + i, _mm512_maskz_expand_ps(low, _mm512_loadu_ps(values + o)), low, nan);
    o += __builtin_popcount(m & 0xffffu);
    store16(dst + i + 16, _mm512_maskz_expand_ps(high, _mm512_loadu_ps(values + o)), high, nan);
    o += __builtin_popcount(m >> 16);
  }
  for (; i < width; i += 16) {
    const uint32_t m = mask32(bits, bit + i, width - i) & 0xffffu;
    const int n = __builtin_popcount(m);
    const __m512 packed = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), values + o);
    store16(dst + i, _mm512_maskz_expand_ps(static_cast<__mmask16>(m), packed), static_cast<__mmask16>(m), nan);
    o += n;
  }
}

#endif  // SSU_X86

// Both functions below take one of three code paths by `level`; all write the same bits.
template <typename T>
inline void gather_row(int level, const T* src, float* out, const uint8_t* bits, int64_t bit, int64_t width,
                       int64_t count) {
#if SSU_X86
  if (level == kAvx512) return gather_row_avx512(src, out, bits, bit, width, count);
  if (level == kAvx2) return gather_row_avx2(src, out, bits, bit, width, count);
#endif
  gather_row_portable(src, out, bits, bit, width, count);
}

template <typename T>
inline void scatter_row(int level, const float* values, T* dst, const uint8_t* bits, int64_t bit, int64_t width,
                        int64_t count, uint16_t nan) {
#if SSU_X86
  if (level == kAvx512) return scatter_row_avx512(values, dst, bits, bit, width, count, nan);
  if (level == kAvx2) return scatter_row_avx2(values, dst, bits, bit, width, count, nan);
#endif
  scatter_row_portable(values, dst, bits, bit, width, count, nan);
}

// ---- whole shards ----

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
inline void gather_pieces(const T* src, float* out, const Piece* pieces, int64_t n, const uint8_t* bits, int level,
                          int threads) {
  split(total_cost(pieces, n), threads, [=](int64_t begin, int64_t end) {
    walk(
        pieces, n, begin, end,
        [=](const Piece& p, int64_t r) {
          gather_row(level, src + p.src + r * p.width, out + p.out + r * p.count, bits, p.bit, p.width, p.count);
        },
        [=](const Piece& p, int64_t from, int64_t to) {
          for (int64_t i = from; i < to; ++i) out[p.out + i] = widen(src[p.src + i]);
        });
  });
}

template <typename T>
inline void scatter_pieces(const float* values, T* dst, const Piece* pieces, int64_t n, const uint8_t* bits, uint16_t nan,
                           int level, int threads) {
  split(total_cost(pieces, n), threads, [=](int64_t begin, int64_t end) {
    walk(
        pieces, n, begin, end,
        [=](const Piece& p, int64_t r) {
          scatter_row(level, values + p.out + r * p.count, dst + p.src + r * p.width, bits, p.bit, p.width, p.count, nan);
        },
        [=](const Piece& p, int64_t from, int64_t to) {
          for (int64_t i = from; i < to; ++i) narrow(values[p.out + i], nan, dst + p.src + i);
        });
  });
}

// Element masks: counts[b] = trainable elements before block b, ceil(numel / kBlock) + 1 entries.
template <typename T>
inline void gather_elements(const T* src, float* out, int64_t numel, const uint8_t* bits, const int64_t* counts, int level,
                            int threads) {
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  split(numel, threads, [=](int64_t begin, int64_t end) {
    for (int64_t b = (begin + kBlock - 1) / kBlock; b < blocks && b * kBlock < end; ++b) {
      const int64_t at = b * kBlock;
      gather_row(level, src + at, out + counts[b], bits, at, std::min(kBlock, numel - at), counts[b + 1] - counts[b]);
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

// ---- column sums for scoring: out[j] = sum over rows of |w| (square = 0) or w * w (square = 1), in double, rows in order ----

constexpr int64_t kSumColumns = 512;  // 4 KiB of running sums stay in L1

template <typename T>
SSU_INLINE void column_sums_body(const T* w, int64_t rows, int64_t width, int64_t begin, int64_t end, int square,
                                 double* out) {
  for (int64_t c0 = begin; c0 < end; c0 += kSumColumns) {
    const int64_t n = std::min(kSumColumns, end - c0);
    double sums[kSumColumns] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = w + r * width + c0;
      if (square) {
        for (int64_t j = 0; j < n; ++j) {
          const double x = widen(row[j]);
          sums[j] += x * x;
        }
      } else {
        for (int64_t j = 0; j < n; ++j) sums[j] += std::fabs(static_cast<double>(widen(row[j])));
      }
    }
    std::copy(sums, sums + n, out + c0);
  }
}

#if SSU_X86
template <typename T>
SSU_AVX512 inline void column_sums_avx512(const T* w, int64_t rows, int64_t width, int64_t b, int64_t e, int square,
                                          double* out) {
  column_sums_body(w, rows, width, b, e, square, out);
}
template <typename T>
SSU_AVX2 inline void column_sums_avx2(const T* w, int64_t rows, int64_t width, int64_t b, int64_t e, int square,
                                      double* out) {
  column_sums_body(w, rows, width, b, e, square, out);
}
#endif

template <typename T>
inline void column_sums(const T* w, int64_t rows, int64_t width, int square, double* out, int level, int threads) {
  const int64_t groups = (width + kSumColumns - 1) / kSumColumns;
  const int used = rows * width < kMinParallel ? 1 : threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(used) schedule(static)
#endif
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t b = g * kSumColumns, e = std::min(width, b + kSumColumns);
#if SSU_X86
    if (level == kAvx512) {
      column_sums_avx512(w, rows, width, b, e, square, out);
      continue;
    }
    if (level == kAvx2) {
      column_sums_avx2(w, rows, width, b, e, square, out);
      continue;
    }
#endif
    column_sums_body(w, rows, width, b, e, square, out);
  }
  (void)used;
  (void)level;
}

}  // namespace ssu
