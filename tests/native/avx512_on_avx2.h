// AVX-512 and AMX on a processor that has AVX2 alone: the intrinsics that csrc/cpu uses, and no others, with the
// results that the instructions are documented to have, bit by bit. With -DFASTCOMPAT_EMULATE=ON the files
// isa_avx512.cpp, isa_avx512bf16.cpp and isa_amx.cpp are compiled with `-include` of this header, so that every test
// can run their kernels. For tests only: it is many times slower than the instructions, and than the AVX2 kernels.
//
// Not kept: which payload a NaN has, and that a sum of bf16 products which reaches 2^-126 by rounding alone is flushed.
#pragma once

// Stands in for gcc's <immintrin.h>: its parts up to AVX2, so that the names beyond are free.
#define _IMMINTRIN_H_INCLUDED
#include <smmintrin.h>
// order matters
#include <avxintrin.h>
// order matters
#include <avx2intrin.h>
#include <f16cintrin.h>
#include <fmaintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define EMULATED static inline __attribute__((always_inline))
#define EMULATED_CALL static __attribute__((noinline, unused))  // the long ones, or compiling takes minutes

using __mmask8 = uint8_t;
using __mmask16 = uint16_t;

struct __m512 {
  __m256 half[2];
};
struct __m512i {
  __m256i half[2];
};
using __m256bh = __m256i;
struct __m512bh {
  __m256i half[2];
  explicit __m512bh(const __m512& a) : half{_mm256_castps_si256(a.half[0]), _mm256_castps_si256(a.half[1])} {}
};

// ---- memory ----

EMULATED __m512 _mm512_loadu_ps(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }

EMULATED void _mm512_storeu_ps(float* p, const __m512& a) {
  _mm256_storeu_ps(p, a.half[0]);
  _mm256_storeu_ps(p + 8, a.half[1]);
}
EMULATED void _mm512_stream_ps(float* p, const __m512& a) {
  _mm256_stream_ps(p, a.half[0]);
  _mm256_stream_ps(p + 8, a.half[1]);
}

EMULATED __m512i _mm512_loadu_si512(const void* p) {
  const __m256i* halves = static_cast<const __m256i*>(p);
  return {{_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)}};
}

EMULATED void _mm512_storeu_si512(void* p, const __m512i& a) {
  __m256i* halves = static_cast<__m256i*>(p);
  _mm256_storeu_si256(halves, a.half[0]);
  _mm256_storeu_si256(halves + 1, a.half[1]);
}

// Element by element, so that AddressSanitizer sees what is read.
template <int N>
EMULATED void load_masked(unsigned mask, const float* p, float (&out)[N]) {
  for (int i = 0; i < N; ++i) out[i] = mask >> i & 1 ? p[i] : 0.0f;
}

EMULATED_CALL __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float* p) {
  float out[16];
  load_masked(mask, p, out);
  return _mm512_loadu_ps(out);
}

EMULATED_CALL __m128 _mm_maskz_loadu_ps(__mmask8 mask, const float* p) {
  float out[4];
  load_masked(mask, p, out);
  return _mm_loadu_ps(out);
}

// ---- constants and casts ----

EMULATED __m512 _mm512_set1_ps(float a) { return {{_mm256_set1_ps(a), _mm256_set1_ps(a)}}; }
EMULATED __m512i _mm512_set1_epi32(int a) { return {{_mm256_set1_epi32(a), _mm256_set1_epi32(a)}}; }
EMULATED __m512i _mm512_setzero_si512() { return _mm512_set1_epi32(0); }

template <class... Ints>
EMULATED __m512i _mm512_set_epi32(Ints... highest_first) {
  const int given[] = {highest_first...};
  static_assert(sizeof given == 64, "16 numbers");
  int32_t a[16];
  for (int i = 0; i < 16; ++i) a[i] = given[15 - i];
  return _mm512_loadu_si512(a);
}

EMULATED __m512 _mm512_castsi512_ps(const __m512i& a) {
  return {{_mm256_castsi256_ps(a.half[0]), _mm256_castsi256_ps(a.half[1])}};
}

EMULATED __m512 _mm512_castps128_ps512(__m128 a) {  // the rest is undefined: NaN, so that its use shows
  const __m256 undefined = _mm256_set1_ps(__builtin_nanf(""));
  return {{_mm256_insertf128_ps(undefined, a, 0), undefined}};
}

// ---- arithmetic ----

#define EMULATED_BINARY(type, name, of_half)                                 \
  EMULATED type _mm512_##name(const type& a, const type& b) {                \
    return {{of_half(a.half[0], b.half[0]), of_half(a.half[1], b.half[1])}}; \
  }
EMULATED_BINARY(__m512, add_ps, _mm256_add_ps)
EMULATED_BINARY(__m512, sub_ps, _mm256_sub_ps)
EMULATED_BINARY(__m512, mul_ps, _mm256_mul_ps)
EMULATED_BINARY(__m512, max_ps, _mm256_max_ps)
EMULATED_BINARY(__m512, min_ps, _mm256_min_ps)
EMULATED_BINARY(__m512, unpacklo_ps, _mm256_unpacklo_ps)
EMULATED_BINARY(__m512, unpackhi_ps, _mm256_unpackhi_ps)
EMULATED_BINARY(__m512i, add_epi32, _mm256_add_epi32)
EMULATED_BINARY(__m512i, or_si512, _mm256_or_si256)
EMULATED_BINARY(__m512i, unpacklo_epi32, _mm256_unpacklo_epi32)
EMULATED_BINARY(__m512i, unpackhi_epi32, _mm256_unpackhi_epi32)
EMULATED_BINARY(__m512i, unpacklo_epi64, _mm256_unpacklo_epi64)
EMULATED_BINARY(__m512i, unpackhi_epi64, _mm256_unpackhi_epi64)

#undef EMULATED_BINARY

EMULATED __m512 _mm512_fmadd_ps(const __m512& a, const __m512& b, const __m512& c) {
  return {{_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]), _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1])}};
}

EMULATED __m512 _mm512_sqrt_ps(const __m512& a) { return {{_mm256_sqrt_ps(a.half[0]), _mm256_sqrt_ps(a.half[1])}}; }

EMULATED __m512i _mm512_cvttps_epi32(const __m512& a) {
  return {{_mm256_cvttps_epi32(a.half[0]), _mm256_cvttps_epi32(a.half[1])}};
}

EMULATED __m512i _mm512_slli_epi32(const __m512i& a, unsigned bits) {
  return {{_mm256_slli_epi32(a.half[0], bits), _mm256_slli_epi32(a.half[1], bits)}};
}

// In the order of gcc: halves, quarters, lanes i and i + 2, the two that are left.
EMULATED_CALL float _mm512_reduce_add_ps(const __m512& a) {
  const __m256 eight = _mm256_add_ps(a.half[1], a.half[0]);
  const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  return (four[0] + four[2]) + (four[1] + four[3]);
}

template <int HOW>
EMULATED_CALL __m512 emulated_roundscale(const __m512& a) {
  static_assert(HOW == (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), "no other rounding is emulated");
  return {{_mm256_floor_ps(a.half[0]), _mm256_floor_ps(a.half[1])}};
}
#define _mm512_roundscale_ps(a, how) emulated_roundscale<how>(a)

// a * 2^floor(b), rounded once: 400 binades either way leave the range of float, not that of double.
EMULATED float scaled(float a, float b) {
  const bool infinite = __builtin_fabsf(b) == __builtin_inff();
  if (a != a) return !infinite ? a : b > 0 ? b : 0.0f;
  double power = b < 0 ? 0 : b;  // of an infinity or NaN
  if (b - b == 0) {
    const double n = __builtin_floorf(b);
    const int64_t exponent = static_cast<int64_t>(n < -400 ? -400 : n > 400 ? 400 : n), bits = (exponent + 1023) << 52;
    std::memcpy(&power, &bits, sizeof power);
  }
  return static_cast<float>(a * power);
}

EMULATED_CALL __m512 _mm512_maskz_scalef_ps(__mmask16 mask, const __m512& a, const __m512& b) {
  float x[16], y[16];
  _mm512_storeu_ps(x, a);
  _mm512_storeu_ps(y, b);
  for (int i = 0; i < 16; ++i) x[i] = mask >> i & 1 ? scaled(x[i], y[i]) : 0.0f;
  return _mm512_loadu_ps(x);
}

// ---- masks ----

template <int HOW>
EMULATED __mmask16 emulated_compare(const __m512& a, const __m512& b) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.half[0], b.half[0], HOW));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(a.half[1], b.half[1], HOW));
  return static_cast<__mmask16>(low | high << 8);
}
#define _mm512_cmp_ps_mask(a, b, how) emulated_compare<how>(a, b)

EMULATED __mmask16 _mm512_cmpeq_epi32_mask(const __m512i& a, const __m512i& b) {
  const int low = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.half[0], b.half[0])));
  const int high = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.half[1], b.half[1])));
  return static_cast<__mmask16>(low | high << 8);
}

// All bits of the elements that are chosen.
EMULATED __m256i chosen(__mmask16 mask, int half) {
  const __m256i bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask >> 8 * half), bit), bit);
}

EMULATED __m512 _mm512_mask_blend_ps(__mmask16 mask, const __m512& no, const __m512& yes) {
  return {{_mm256_blendv_ps(no.half[0], yes.half[0], _mm256_castsi256_ps(chosen(mask, 0))),
           _mm256_blendv_ps(no.half[1], yes.half[1], _mm256_castsi256_ps(chosen(mask, 1)))}};
}

EMULATED __m512i _mm512_mask_add_epi32(const __m512i& no, __mmask16 mask, const __m512i& a, const __m512i& b) {
  const __m512i sum = _mm512_add_epi32(a, b);
  return {{_mm256_blendv_epi8(no.half[0], sum.half[0], chosen(mask, 0)),
           _mm256_blendv_epi8(no.half[1], sum.half[1], chosen(mask, 1))}};
}

EMULATED_CALL __m512i _mm512_maskz_compress_epi32(__mmask16 mask, const __m512i& a) {
  int32_t from[16], to[16] = {};
  _mm512_storeu_si512(from, a);
  for (int i = 0, n = 0; i < 16; ++i)
    if (mask >> i & 1) to[n++] = from[i];
  return _mm512_loadu_si512(to);
}

EMULATED __m512 _mm512_maskz_compress_ps(__mmask16 mask, const __m512& a) {
  const __m512i bits = {{_mm256_castps_si256(a.half[0]), _mm256_castps_si256(a.half[1])}};
  return _mm512_castsi512_ps(_mm512_maskz_compress_epi32(mask, bits));
}

// ---- moving about ----

template <int HOW>
EMULATED __m512 emulated_shuffle(const __m512& a, const __m512& b) {
  return {{_mm256_shuffle_ps(a.half[0], b.half[0], HOW), _mm256_shuffle_ps(a.half[1], b.half[1], HOW)}};
}
#define _mm512_shuffle_ps(a, b, how) emulated_shuffle<how>(a, b)

template <int HOW>
EMULATED_CALL __m512i emulated_shuffle_quarters(const __m512i& a, const __m512i& b) {
  const auto pair = [](const __m512i& from, int low, int high) {
    __m128i quarters[4];
    std::memcpy(quarters, &from, sizeof quarters);
    return _mm256_set_m128i(quarters[high], quarters[low]);
  };
  return {{pair(a, HOW & 3, HOW >> 2 & 3), pair(b, HOW >> 4 & 3, HOW >> 6 & 3)}};
}
#define _mm512_shuffle_i32x4(a, b, how) emulated_shuffle_quarters<how>(a, b)

template <int AT>
EMULATED __m512 emulated_insert_quarter(__m512 a, __m128 b) {
  a.half[AT / 2] = _mm256_insertf128_ps(a.half[AT / 2], b, AT % 2);
  return a;
}
#define _mm512_insertf32x4(a, b, at) emulated_insert_quarter<at>(a, b)

// ---- 16-bit numbers ----

EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return {{_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))}};
}

EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
  return {{_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))}};
}

template <int HOW>
EMULATED __m256i emulated_to_half(const __m512& a) {
  return _mm256_set_m128i(_mm256_cvtps_ph(a.half[1], HOW), _mm256_cvtps_ph(a.half[0], HOW));
}
#define _mm512_cvtps_ph(a, how) emulated_to_half<how>(a)

// To nearest even in the low halves of the elements; zero for a denormal, and a quiet NaN for a NaN.
EMULATED __m256i rounded_to_bf16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a), top = _mm256_srli_epi32(bits, 16);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
  const __m256i zero = _mm256_and_si256(top, _mm256_set1_epi32(0x8000));
  const __m256i tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x00800000), magnitude);
  const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f800000));
  return _mm256_blendv_epi8(_mm256_blendv_epi8(nearest, zero, tiny), quiet, nan);
}

EMULATED_CALL __m256bh _mm512_cvtneps_pbh(const __m512& a) {
  const __m256i crossed = _mm256_packus_epi32(rounded_to_bf16(a.half[0]), rounded_to_bf16(a.half[1]));
  return _mm256_permute4x64_epi64(crossed, 0xd8);
}

EMULATED __m256 flushed(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a), magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i normal = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x007fffff));
  return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_or_si256(normal, _mm256_set1_epi32(1 << 31))));
}

// The even or the odd bf16 of every word.
EMULATED __m256 even_of(__m256i words) { return flushed(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))); }
EMULATED __m256 odd_of(__m256i words) {
  return flushed(_mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-0x10000))));
}

EMULATED_CALL __m512 _mm512_dpbf16_ps(__m512 sum, const __m512bh& a, const __m512bh& b) {
  for (int h = 0; h < 2; ++h) {
    sum.half[h] = flushed(_mm256_fmadd_ps(odd_of(a.half[h]), odd_of(b.half[h]), flushed(sum.half[h])));
    sum.half[h] = flushed(_mm256_fmadd_ps(even_of(a.half[h]), even_of(b.half[h]), sum.half[h]));
  }
  return sum;
}

// ---- tiles ----

namespace {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;

// The tile registers of a thread; a processor would raise an exception where this ends the program.
struct TileRegisters {
  bool configured = false;
  int rows[kTiles], bytes[kTiles];  // of a row
  alignas(64) uint8_t data[kTiles][kTileRows][kTileBytes];

  static void require(bool fine, const char* what) {
    if (fine) return;
    std::fprintf(stderr, "emulated AMX: %s\n", what);
    std::abort();
  }
  void configure(const uint8_t* config) {
    require(config[0] == 1 && config[1] == 0, "palette 1, from row 0 on");
    for (int i = 2; i < 64; ++i)
      require(config[i] == 0 || (i >= 16 && i < 32) || (i >= 48 && i < 56), "a reserved byte of the configuration");
    for (int t = 0; t < kTiles; ++t) {
      rows[t] = config[48 + t];
      bytes[t] = config[16 + 2 * t] | config[17 + 2 * t] << 8;
      require(rows[t] <= kTileRows && bytes[t] <= kTileBytes && !rows[t] == !bytes[t], "the shape of a tile");
    }
    std::memset(data, 0, sizeof data);
    configured = true;
  }
  void use(int t) const {
    require(configured, "no configuration");
    require(t >= 0 && t < kTiles && rows[t] > 0, "a tile that is not configured");
  }
};

thread_local TileRegisters tiles;

// sums [rows][words] += pairs a [rows][inner] x pairs b [inner][words]: the products of even places and those of odd
// places are added up on their own, then together, then to the sum.
inline void multiply_tiles(int sums, int a, int b) {
  tiles.use(sums);
  tiles.use(a);
  tiles.use(b);
  const int inner = tiles.bytes[a] / 4;
  TileRegisters::require(sums != a && sums != b && a != b, "a tile used twice in a product");
  TileRegisters::require(tiles.rows[a] == tiles.rows[sums] && tiles.bytes[b] == tiles.bytes[sums] &&
                             tiles.rows[b] == inner && tiles.bytes[a] % 4 == 0 && tiles.bytes[b] % 4 == 0,
                         "the shapes of a product");
  for (int m = 0; m < tiles.rows[sums]; ++m)
    for (int h = 0; h < 2; ++h) {
      __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps(), sum;
      for (int k = 0; k < inner; ++k) {
        int32_t word;
        std::memcpy(&word, tiles.data[a][m] + 4 * k, sizeof word);
        const __m256i left = _mm256_set1_epi32(word);
        const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tiles.data[b][k] + 32 * h));
        even = flushed(_mm256_fmadd_ps(even_of(left), even_of(right), even));
        odd = flushed(_mm256_fmadd_ps(odd_of(left), odd_of(right), odd));
      }
      uint8_t* row = tiles.data[sums][m];
      std::memcpy(&sum, row + 32 * h, sizeof sum);
      sum = flushed(_mm256_add_ps(flushed(sum), flushed(_mm256_add_ps(even, odd))));
      std::memcpy(row + 32 * h, &sum, sizeof sum);
    }
  for (int m = 0; m < tiles.rows[sums]; ++m)
    std::memset(tiles.data[sums][m] + tiles.bytes[sums], 0, kTileBytes - tiles.bytes[sums]);
}

}  // namespace

EMULATED void _tile_loadconfig(const void* config) { tiles.configure(static_cast<const uint8_t*>(config)); }
EMULATED void _tile_release() { tiles.configured = false; }

EMULATED void _tile_zero(int t) {
  tiles.use(t);
  std::memset(tiles.data[t], 0, sizeof tiles.data[t]);
}

EMULATED void _tile_loadd(int t, const void* from, int64_t stride) {
  _tile_zero(t);
  for (int i = 0; i < tiles.rows[t]; ++i)
    std::memcpy(tiles.data[t][i], static_cast<const char*>(from) + i * stride, tiles.bytes[t]);
}

EMULATED void _tile_stored(int t, void* to, int64_t stride) {
  tiles.use(t);
  for (int i = 0; i < tiles.rows[t]; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, tiles.data[t][i], tiles.bytes[t]);
}

EMULATED void _tile_dpbf16ps(int sums, int a, int b) { multiply_tiles(sums, a, b); }

#undef EMULATED_CALL
#undef EMULATED
