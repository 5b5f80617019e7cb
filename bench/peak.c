// Peak multiply-add rates of one core: independent accumulators held in registers, nothing loaded in the loop.
// `sink` holds 32 floats, all different, so that no accumulator can stand in for another. Each function returns
// the operations it did; the caller takes the time. bf16_peak returns 0 without AVX512_BF16.
#ifdef __AVX512F__
enum { LANES = 16, CHAINS = 16 };
#else
enum { LANES = 8, CHAINS = 12 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));

double fp32_peak(long rounds, float *sink) {
    vec a[CHAINS], zero = {0}, x = zero + sink[30], y = zero + sink[31];
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; ++c) a[c] = zero + sink[c];
    for (long r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < CHAINS; ++c) a[c] = a[c] * x + y;
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; ++c) sink[c] = a[c][0];
    return 2.0 * LANES * CHAINS * rounds;
}

#ifdef __AVX512BF16__
#include <immintrin.h>
double bf16_peak(long rounds, float *sink) {
    __m512 a[CHAINS];
    __m512bh x = (__m512bh)_mm512_set1_ps(sink[30]);
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; ++c) a[c] = _mm512_set1_ps(sink[c]);
    for (long r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < CHAINS; ++c) a[c] = _mm512_dpbf16_ps(a[c], x, x);
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; ++c) sink[c] = _mm512_cvtss_f32(a[c]);
    return 4.0 * LANES * CHAINS * rounds;
}
#else
double bf16_peak(long rounds, float *sink) { return 0.0 * rounds * sink[0]; }
#endif
