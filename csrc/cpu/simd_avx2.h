// AVX2 + FMA + F16C: 8 lanes, 16 registers.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
  static constexpr int W = 8, MR = 6;
  using F = __m256;
  using I = __m256i;
  using M = __m256;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  // Past the caches, to an address aligned to a vector; other threads may read after end_of_stream().
  static void stream(float* p, F a) { _mm256_stream_ps(p, a); }
  static void end_of_stream() { _mm_sfence(); }
  // The first n < W numbers, then zeros.
  static F load_first(const float* p, int n) {
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(set1(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0)));
  }
  static F set1(float a) { return _mm256_set1_ps(a); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b when either is NaN
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  // x within what exponentials tell apart, NaN kept: e^-87.5 < 2^-126 < 2^128 < e^88.8.
  static F exponent_range(F x) { return max(set1(-87.5f), min(set1(88.8f), x)); }
  static F floor(F t) { return _mm256_floor_ps(t); }
  // p * 2^n for whole n from -127 to 128: infinite at 128, 0 at -127 (no subnormals: they are slow).
  static F times_pow2(F p, F n) {
    return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), set1(127)), 23)));
  }
  static float sum(F a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static M gt(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static M not_le(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_NLE_UQ); }  // true for NaN
  static M eq(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static M eq(I a, I b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
  static F select(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
  static uint32_t bits(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
  // Appends the chosen lanes and their numbers (from `first`) to two lists that have room for W more; returns how many.
  static int append(M m, F a, int32_t first, float* values, int32_t* numbers) {
    float lanes[W];
    store(lanes, a);
    int n = 0;
    for (uint32_t chosen = bits(m); chosen; chosen &= chosen - 1, ++n) {
      values[n] = lanes[__builtin_ctz(chosen)];
      numbers[n] = first + __builtin_ctz(chosen);
    }
    return n;
  }
  // Columns d .. d + W (at most `width` of them, the others zero) of W rows.
  static inline __attribute__((always_inline)) void columns(const float* const (&rows)[W], int64_t d, int width,
                                                            F (&out)[W]) {
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
      const int left = width - 4 * g;
      const __m128i there = _mm_cmpgt_epi32(_mm_set1_epi32(left), _mm_set_epi32(3, 2, 1, 0));
      F half[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {  // rows i and i + 4, half a vector each
        const auto part = [&](int row) { return _mm_maskload_ps(rows[row] + d + 4 * g, there); };
        half[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(part(i)), part(i + 4), 1);
      }
      const F even = _mm256_unpacklo_ps(half[0], half[1]), odd = _mm256_unpackhi_ps(half[0], half[1]);
      const F even2 = _mm256_unpacklo_ps(half[2], half[3]), odd2 = _mm256_unpackhi_ps(half[2], half[3]);
      out[4 * g] = _mm256_shuffle_ps(even, even2, 0x44);
      out[4 * g + 1] = _mm256_shuffle_ps(even, even2, 0xee);
      out[4 * g + 2] = _mm256_shuffle_ps(odd, odd2, 0x44);
      out[4 * g + 3] = _mm256_shuffle_ps(odd, odd2, 0xee);
    }
  }
  static I truncate(F a) { return _mm256_cvttps_epi32(a); }
  static I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static I set1(int32_t a) { return _mm256_set1_epi32(a); }
  static I count(I n, M m) { return _mm256_sub_epi32(n, _mm256_castps_si256(m)); }

  static F load_bf16(const uint16_t* p) {
    I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store_f16(uint16_t* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace
