// Column sums for scoring: out[j] = sum over rows of |w| (square = 0) or w * w (square = 1), in double, rows in order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "rows.hpp"

namespace ssu {

constexpr int64_t kSumColumns = 2048;  // at most: 16 KiB of running sums stay in L1

// bfloat16 as its bits.
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

// One row into the sums. Products of two floats are exact in double, so fusing them with the sum changes nothing.
template <typename T>
SSU_INLINE void add_row(const T* row, int64_t n, int square, double* sums) {
  for (int64_t j = 0; j < n; ++j) {
    const double x = widen(row[j]);
    sums[j] += square ? x * x : std::fabs(x);
  }
}

template <typename T>
inline void column_sums_portable(const T* w, int64_t rows, int64_t width, int64_t n, int square, double* sums) {
  for (int64_t r = 0; r < rows; ++r) add_row(w + r * width, n, square, sums);
}

#if SSU_X86
SSU_AVX512 inline __m512 widen16(const float* p) { return _mm512_loadu_ps(p); }
SSU_AVX512 inline __m512 widen16(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

SSU_AVX512 inline __m512d add_half(__m512d sum, __m256 half, int square) {
  const __m512d x = _mm512_cvtps_pd(half);
  return square ? _mm512_fmadd_pd(x, x, sum) : _mm512_add_pd(sum, x);
}

// Four rows at a time: the sums are loaded and stored once for them.
template <typename T>
SSU_AVX512 inline void column_sums_avx512(const T* w, int64_t rows, int64_t width, int64_t n, int square,
                                          double* sums) {
  const int64_t whole = n / 16 * 16;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const T* row = w + r * width;
    for (int64_t j = 0; j < whole; j += 16) {
      __m512d low = _mm512_loadu_pd(sums + j), high = _mm512_loadu_pd(sums + j + 8);
      for (int k = 0; k < 4; ++k) {
        __m512 v = widen16(row + k * width + j);
        if (!square) v = _mm512_andnot_ps(_mm512_set1_ps(-0.0f), v);
        low = add_half(low, _mm512_castps512_ps256(v), square);
        high = add_half(high, _mm512_extractf32x8_ps(v, 1), square);
      }
      _mm512_storeu_pd(sums + j, low);
      _mm512_storeu_pd(sums + j + 8, high);
    }
    for (int k = 0; k < 4; ++k) add_row(row + k * width + whole, n - whole, square, sums + whole);
  }
  for (; r < rows; ++r) add_row(w + r * width, n, square, sums);
}
#endif

template <typename T>
inline void column_sums(const T* w, int64_t rows, int64_t width, int square, double* out, int level, int threads) {
  const int used = rows * width < kMinParallel ? 1 : threads;
  const int64_t share = (width / used + 63) / 64 * 64;  // columns are independent: any grouping gives the same sums
  const int64_t group = std::min(kSumColumns, std::max<int64_t>(share, 256));
  const int64_t groups = (width + group - 1) / group;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(used) schedule(static)
#endif
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = g * group, n = std::min(width - at, group);
    double sums[kSumColumns] = {};
#if SSU_X86
    if (level >= kAvx512) {
      column_sums_avx512(w + at, rows, width, n, square, sums);
    } else {
      column_sums_portable(w + at, rows, width, n, square, sums);
    }
#else
    column_sums_portable(w + at, rows, width, n, square, sums);
#endif
    std::copy(sums, sums + n, out + at);
  }
  (void)used;
  (void)level;
}

}  // namespace ssu
