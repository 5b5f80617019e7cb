// Products of 16-bit integers, for screening only: vpmaddwd multiplies twice as many numbers as an fp32 instruction,
// and the sums are exact. A word is two dimensions; |a||b| < 2^31 keeps every sum within 32 bits.
#pragma once
#include "tile.inl"

#ifdef FASTCOMPAT_INT16

namespace {

struct Int16 {
  static constexpr int PACK = 2, STEP = 1;
  struct Scope {};
};

// sums += word * lanes. Assembly: gcc would move all broadcasts to the front and spill the sums.
inline __attribute__((always_inline)) void add_products(F (&sums)[NV], const float* word, const F (&lanes)[NV]) {
  F a, b;
  asm("vpbroadcastd %[word], %[a]\n\t"
      "vpmaddwd %[lanes0], %[a], %[b]\n\t"
      "vpaddd %[b], %[sum0], %[sum0]\n\t"
      "vpmaddwd %[lanes1], %[a], %[a]\n\t"
      "vpaddd %[a], %[sum1], %[sum1]"
      : [sum0] "+x"(sums[0]), [sum1] "+x"(sums[1]), [a] "=&x"(a), [b] "=&x"(b)
      : [lanes0] "x"(lanes[0]), [lanes1] "x"(lanes[1]), [word] "m"(*word));
}

template <>
void score_block<Int16>(const float* block, int n, const float* panel, int64_t words, float* scores,
                        const Prefetch& prefetch) {
  static_assert(NV == 2, "two vectors of lanes");
  for (int first = 0; first < n; first += MR) {
    prefetch.fetch(first / MR);
    with_count<MR>(smaller(n - first, MR), [&](auto rows) {
      constexpr int R = decltype(rows)::value;
      F acc[R][NV];
      clear(acc);
      for (int64_t c = 0; c * CHUNK < words; ++c) {
        const float *a = block + (c * NB + first) * CHUNK, *b = panel + c * CHUNK * L;
        const int64_t count = smaller<int64_t>(words - c * CHUNK, CHUNK);
        for (int64_t k = 0; k < count; ++k) {
          const F lanes[NV] = {Simd::load(b + k * L), Simd::load(b + k * L + W)};
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) add_products(acc[r], a + r * CHUNK + k, lanes);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
          Simd::store(scores + (first + r) * L + v * W, _mm256_cvtepi32_ps(_mm256_castps_si256(acc[r][v])));
    });
  }
}

}  // namespace

#endif
