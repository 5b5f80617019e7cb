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
  static F set1(float a) { return _mm512_set1_ps(a); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b when either is NaN
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  // t - floor(t) and p * 2^floor(t); infinite above 128, 0 below -126 (no subnormals: they are slow), NaN kept.
  static F fraction(F t) { return _mm512_reduce_ps(min(set1(128.0f), t), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static F times_pow2(F p, F t) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, set1(-126.0f), _CMP_NLT_UQ), p, min(set1(128.0f), t));
  }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static M gt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
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
