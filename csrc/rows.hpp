// One row of a mask: types, bits, and gather / scatter of a row in portable C++, AVX2 and AVX-512. See shield_core.hpp.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define SSU_X86 1
#include <immintrin.h>
#else
#define SSU_X86 0
#endif

#define SSU_INLINE inline __attribute__((always_inline))

namespace ssu {

constexpr int64_t kMinParallel = 65536;  // below this many elements a second thread costs more than it saves

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

// ---- one row (or block): `count` trainable of `width` elements; nothing outside [0, count) and [0, width) is touched
// ---- gather_row returns how many it wrote. Its `count` may be larger than that where `out` has room for it.

template <typename T>
inline int64_t gather_row_portable(const T* src, float* out, const uint8_t* bits, int64_t bit, int64_t width, int64_t) {
  const float* begin = out;
  for (int64_t i = 0; i < width; i += 32) {
    for (uint32_t m = mask32(bits, bit + i, width - i); m; m &= m - 1) *out++ = widen(src[i + __builtin_ctz(m)]);
  }
  return out - begin;
}

template <typename T>
inline void scatter_row_portable(const float* values, T* dst, const uint8_t* bits, int64_t bit, int64_t width, int64_t,
                                 uint16_t nan) {
  for (int64_t i = 0; i < width; i += 32) {
    for (uint32_t m = mask32(bits, bit + i, width - i); m; m &= m - 1)
      narrow(*values++, nan, dst + i + __builtin_ctz(m));
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
SSU_AVX2 inline int64_t gather_row_avx2(const T* src, float* out, const uint8_t* bits, int64_t bit, int64_t width,
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
  return o + gather_row_portable(src + i, out + o, bits, bit + i, width - i, count - o);
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
SSU_AVX512 inline int64_t gather_row_avx512(const T* src, float* out, const uint8_t* bits, int64_t bit, int64_t width,
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
    const __m512 packed =
        _mm512_maskz_compress_ps(static_cast<__mmask16>(m), load16(src + i, static_cast<__mmask16>(m)));
    _mm512_mask_storeu_ps(out + o, static_cast<__mmask16>((1u << n) - 1u), packed);
    o += n;
  }
  return o;
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
inline int64_t gather_row(int level, const T* src, float* out, const uint8_t* bits, int64_t bit, int64_t width,
                          int64_t count) {
#if SSU_X86
  if (level == kAvx512) return gather_row_avx512(src, out, bits, bit, width, count);
  if (level == kAvx2) return gather_row_avx2(src, out, bits, bit, width, count);
#endif
  return gather_row_portable(src, out, bits, bit, width, count);
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

}  // namespace ssu
