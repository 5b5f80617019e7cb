// AVX-512: 16 lanes, 32 registers, mask registers.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
  static constexpr int W = 16, MR = 14;
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  // Past the caches, to an address aligned to a vector; other threads may read after end_of_stream().
  static void stream(float* p, F a) { _mm512_stream_ps(p, a); }
  static void end_of_stream() { _mm_sfence(); }
  // The first n < W numbers, then zeros.
  static F load_first(const float* p, int n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
  static F set1(float a) { return _mm512_set1_ps(a); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b when either is NaN
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  // x within what exponentials tell apart, NaN kept; the lower end is seen to by times_pow2.
  static F exponent_range(F x) { return min(set1(88.8f), x); }
  static F floor(F t) { return _mm512_roundscale_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  // p * 2^n for whole n: infinite from 128 on, 0 below -126 (no subnormals: they are slow), whatever p is.
  static F times_pow2(F p, F n) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, set1(-126.0f), _CMP_NLT_UQ), p, n);
  }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static M gt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static M not_le(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }  // true for NaN
  static M eq(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static M eq(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
  static uint32_t bits(M m) { return m; }
  // Appends the chosen lanes and their numbers (from `first`) to two lists that have room for W more; returns how many.
  static int append(M m, F a, int32_t first, float* values, int32_t* numbers) {
    const I lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(m, a));
    _mm512_storeu_si512(numbers, _mm512_maskz_compress_epi32(m, _mm512_add_epi32(lane, set1(first))));
    return __builtin_popcount(m);
  }
  // Columns d .. d + W (at most `width` of them, the others zero) of W rows.
  static inline __attribute__((always_inline)) void columns(const float* const (&rows)[W], int64_t d, int width,
                                                            F (&out)[W]) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const int left = width - 4 * g;
      const __mmask8 there = left >= 4 ? 0xf : left > 0 ? (1u << left) - 1 : 0;
      F quarter[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {  // rows i, i + 4, i + 8, i + 12, a quarter of a vector each
        const auto part = [&](int row) { return _mm_maskz_loadu_ps(there, rows[row] + d + 4 * g); };
        F q = _mm512_castps128_ps512(part(i));
        q = _mm512_insertf32x4(q, part(i + 4), 1);
        q = _mm512_insertf32x4(q, part(i + 8), 2);
        quarter[i] = _mm512_insertf32x4(q, part(i + 12), 3);
      }
      const F even = _mm512_unpacklo_ps(quarter[0], quarter[1]), odd = _mm512_unpackhi_ps(quarter[0], quarter[1]);
      const F even2 = _mm512_unpacklo_ps(quarter[2], quarter[3]), odd2 = _mm512_unpackhi_ps(quarter[2], quarter[3]);
      out[4 * g] = _mm512_shuffle_ps(even, even2, 0x44);
      out[4 * g + 1] = _mm512_shuffle_ps(even, even2, 0xee);
      out[4 * g + 2] = _mm512_shuffle_ps(odd, odd2, 0x44);
      out[4 * g + 3] = _mm512_shuffle_ps(odd, odd2, 0xee);
    }
  }
  static I truncate(F a) { return _mm512_cvttps_epi32(a); }
  static I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
  static I set1(int32_t a) { return _mm512_set1_epi32(a); }
  static I count(I n, M m) { return _mm512_mask_add_epi32(n, m, n, _mm512_set1_epi32(1)); }

  static F load_bf16(const uint16_t* p) {
    I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_f16(uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace
