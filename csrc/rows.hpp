// One row of a mask: its bits, and gather / scatter of a row in portable C++, AVX2, AVX-512 and AVX-512 with VBMI2.
// Elements are words of 2 or 4 bytes (T is uint16_t or uint32_t): bits are moved, never converted. See shield_core.hpp.
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

enum Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kVbmi2 = 3 };

inline int best_level() {
#if SSU_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("popcnt"))
    return __builtin_cpu_supports("avx512vbmi2") ? kVbmi2 : kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt")) return kAvx2;
#endif
  return kPortable;
}

// The next 32 mask bits from bit index `at`, cut to `left` elements.
SSU_INLINE uint32_t mask32(const uint8_t* bits, int64_t at, int64_t left) {
  uint64_t word;
  std::memcpy(&word, bits + (at >> 3), 8);
  uint32_t m = static_cast<uint32_t>(word >> (at & 7));
  return left >= 32 ? m : m & ((1u << left) - 1u);
}

// ---- one row (or block): `count` trainable of `width` elements; nothing outside [0, count) and [0, width) is touched

template <typename T>
inline void gather_row_portable(const T* src, T* out, const uint8_t* bits, int64_t bit, int64_t width, int64_t) {
  for (int64_t i = 0; i < width; i += 32) {
    for (uint32_t m = mask32(bits, bit + i, width - i); m; m &= m - 1) *out++ = src[i + __builtin_ctz(m)];
  }
}

template <typename T>
inline void scatter_row_portable(const T* values, T* dst, const uint8_t* bits, int64_t bit, int64_t width, int64_t) {
  for (int64_t i = 0; i < width; i += 32) {
    for (uint32_t m = mask32(bits, bit + i, width - i); m; m &= m - 1) dst[i + __builtin_ctz(m)] = *values++;
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
#define SSU_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,popcnt")))

// Eight elements, one in each 32-bit lane.
SSU_AVX2 inline __m256i load8(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
SSU_AVX2 inline __m256i load8(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SSU_AVX2 inline void store8(uint32_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
SSU_AVX2 inline __m128i halves(__m256i v) {
  return _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
SSU_AVX2 inline void store8(uint16_t* p, __m256i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves(v)); }
SSU_AVX2 inline void store8(uint32_t* p, __m256i v, __m256i keep) {
  _mm256_maskstore_epi32(reinterpret_cast<int*>(p), keep, v);
}
SSU_AVX2 inline void store8(uint16_t* p, __m256i v, __m256i keep) {
  const __m128i keep16 = _mm_packs_epi32(_mm256_castsi256_si128(keep), _mm256_extracti128_si256(keep, 1));
  __m128i* at = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(at, _mm_blendv_epi8(_mm_loadu_si128(at), halves(v), keep16));
}

template <typename T>
SSU_AVX2 inline void gather_row_avx2(const T* src, T* out, const uint8_t* bits, int64_t bit, int64_t width,
                                     int64_t count) {
  const Lanes& table = lanes();
  int64_t i = 0, o = 0;
  // A store of 8 lanes may run past the packed ones, never past the row: what it overruns is written again after.
  for (; i + 32 <= width && o + 32 <= count; i += 32) {
    const uint32_t m = mask32(bits, bit + i, 32);
    for (int k = 0; k < 4; ++k) {
      const uint32_t m8 = m >> (8 * k) & 0xffu;
      const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(table.pack[m8]));
      store8(out + o, _mm256_permutevar8x32_epi32(load8(src + i + 8 * k), order));
      o += __builtin_popcount(m8);
    }
  }
  gather_row_portable(src + i, out + o, bits, bit + i, width - i, count - o);
}

template <typename T>
SSU_AVX2 inline void scatter_row_avx2(const T* values, T* dst, const uint8_t* bits, int64_t bit, int64_t width,
                                      int64_t count) {
  const Lanes& table = lanes();
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  int64_t i = 0, o = 0;
  for (; i + 32 <= width && o + 32 <= count; i += 32) {
    const uint32_t m = mask32(bits, bit + i, 32);
    for (int k = 0; k < 4; ++k) {
      const uint32_t m8 = m >> (8 * k) & 0xffu;
      const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(table.unpack[m8]));
      const __m256i v = _mm256_permutevar8x32_epi32(load8(values + o), order);
      const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(m8)), lane_bit);
      store8(dst + i + 8 * k, v, _mm256_cmpeq_epi32(set, lane_bit));
      o += __builtin_popcount(m8);
    }
  }
  scatter_row_portable(values + o, dst + i, bits, bit + i, width - i, count - o);
}

// Sixteen elements, one in each 32-bit lane.
SSU_AVX512 inline __m512i load16(const uint32_t* p) { return _mm512_loadu_si512(p); }
SSU_AVX512 inline __m512i load16(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SSU_AVX512 inline __m512i load16(const uint32_t* p, __mmask16 m) { return _mm512_maskz_loadu_epi32(m, p); }
SSU_AVX512 inline __m512i load16(const uint16_t* p, __mmask16 m) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p));
}
SSU_AVX512 inline void store16(uint32_t* p, __m512i v) { _mm512_storeu_si512(p, v); }
SSU_AVX512 inline void store16(uint16_t* p, __m512i v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
}
SSU_AVX512 inline void store16(uint32_t* p, __m512i v, __mmask16 m) { _mm512_mask_storeu_epi32(p, m, v); }
SSU_AVX512 inline void store16(uint16_t* p, __m512i v, __mmask16 m) {
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(v));
}

template <typename T>
SSU_AVX512 inline void gather_row_avx512(const T* src, T* out, const uint8_t* bits, int64_t bit, int64_t width,
                                         int64_t count) {
  int64_t i = 0, o = 0;
  for (; i + 32 <= width && o + 32 <= count; i += 32) {  // may overrun the packed lanes within the row, as above
    const uint32_t m = mask32(bits, bit + i, 32);
    store16(out + o, _mm512_maskz_compress_epi32(static_cast<__mmask16>(m), load16(src + i)));
    o += __builtin_popcount(m & 0xffffu);
    store16(out + o, _mm512_maskz_compress_epi32(static_cast<__mmask16>(m >> 16), load16(src + i + 16)));
    o += __builtin_popcount(m >> 16);
  }
  for (; i < width; i += 16) {
    const auto m = static_cast<__mmask16>(mask32(bits, bit + i, width - i));
    const int n = __builtin_popcount(m);
    store16(out + o, _mm512_maskz_compress_epi32(m, load16(src + i, m)), static_cast<__mmask16>((1u << n) - 1u));
    o += n;
  }
}

template <typename T>
SSU_AVX512 inline void scatter_row_avx512(const T* values, T* dst, const uint8_t* bits, int64_t bit, int64_t width,
                                          int64_t count) {
  int64_t i = 0, o = 0;
  for (; i + 32 <= width && o + 32 <= count; i += 32) {
    const uint32_t m = mask32(bits, bit + i, 32);
    const auto low = static_cast<__mmask16>(m), high = static_cast<__mmask16>(m >> 16);
    store16(dst + i, _mm512_maskz_expand_epi32(low, load16(values + o)), low);
    o += __builtin_popcount(m & 0xffffu);
    store16(dst + i + 16, _mm512_maskz_expand_epi32(high, load16(values + o)), high);
    o += __builtin_popcount(m >> 16);
  }
  for (; i < width; i += 16) {
    const auto m = static_cast<__mmask16>(mask32(bits, bit + i, width - i));
    const int n = __builtin_popcount(m);
    const __m512i packed = load16(values + o, static_cast<__mmask16>((1u << n) - 1u));
    store16(dst + i, _mm512_maskz_expand_epi32(m, packed), m);
    o += n;
  }
}

// VBMI2 compresses 16-bit lanes themselves.
SSU_VBMI2 inline void gather_row_vbmi2(const uint16_t* src, uint16_t* out, const uint8_t* bits, int64_t bit,
                                       int64_t width, int64_t count) {
  int64_t i = 0, o = 0;
  for (; i + 32 <= width && o + 32 <= count; i += 32) {
    const uint32_t m = mask32(bits, bit + i, 32);
    _mm512_storeu_si512(out + o, _mm512_maskz_compress_epi16(m, _mm512_loadu_si512(src + i)));
    o += __builtin_popcount(m);
  }
  gather_row_avx512(src + i, out + o, bits, bit + i, width - i, count - o);
}

SSU_VBMI2 inline void scatter_row_vbmi2(const uint16_t* values, uint16_t* dst, const uint8_t* bits, int64_t bit,
                                        int64_t width, int64_t count) {
  int64_t i = 0, o = 0;
  for (; i + 32 <= width && o + 32 <= count; i += 32) {
    const uint32_t m = mask32(bits, bit + i, 32);
    _mm512_mask_storeu_epi16(dst + i, m, _mm512_maskz_expand_epi16(m, _mm512_loadu_si512(values + o)));
    o += __builtin_popcount(m);
  }
  scatter_row_avx512(values + o, dst + i, bits, bit + i, width - i, count - o);
}

#endif  // SSU_X86

// Both functions below take one of four code paths by `level`; all write the same bits.
template <typename T>
inline void gather_row(int level, const T* src, T* out, const uint8_t* bits, int64_t bit, int64_t width,
                       int64_t count) {
#if SSU_X86
  if constexpr (sizeof(T) == 2) {
    if (level == kVbmi2) return gather_row_vbmi2(src, out, bits, bit, width, count);
  }
  if (level >= kAvx512) return gather_row_avx512(src, out, bits, bit, width, count);
  if (level == kAvx2) return gather_row_avx2(src, out, bits, bit, width, count);
#endif
  return gather_row_portable(src, out, bits, bit, width, count);
}

template <typename T>
inline void scatter_row(int level, const T* values, T* dst, const uint8_t* bits, int64_t bit, int64_t width,
                        int64_t count) {
#if SSU_X86
  if constexpr (sizeof(T) == 2) {
    if (level == kVbmi2) return scatter_row_vbmi2(values, dst, bits, bit, width, count);
  }
  if (level >= kAvx512) return scatter_row_avx512(values, dst, bits, bit, width, count);
  if (level == kAvx2) return scatter_row_avx2(values, dst, bits, bit, width, count);
#endif
  scatter_row_portable(values, dst, bits, bit, width, count);
}

}  // namespace ssu
