// The emulated instructions of avx512_on_avx2.h against scalar formulas of their own.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLeast = 0x1p-126f;  // normal
int checks = 0, failures = 0;

void expect(bool ok, const char* what, double a = 0, double b = 0) {
  ++checks;
  if (ok) return;
  if (++failures < 20) std::printf("FAILED %s: %a %a\n", what, a, b);
}

uint32_t bits_of(float a) {
  uint32_t u;
  std::memcpy(&u, &a, 4);
  return u;
}

float float_of(uint32_t u) {
  float a;
  std::memcpy(&a, &u, 4);
  return a;
}

// The same bits, or both NaN.
bool same(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }

std::mt19937 random_bits(11);

struct Sixteen {
  float at[16];
  Sixteen() {
    for (float& a : at) a = float_of(random_bits());
  }
  explicit Sixteen(const __m512& a) { _mm512_storeu_ps(at, a); }
  operator __m512() const { return _mm512_loadu_ps(at); }
};

__m512i as_integers(const Sixteen& a) { return _mm512_loadu_si512(a.at); }
Sixteen as_floats(const __m512i& a) { return Sixteen(_mm512_castsi512_ps(a)); }

// ---- bf16 ----

// The nearest of the two neighbours by distance, the even one of two as near.
uint16_t nearest_bf16(float a) {
  const uint32_t u = bits_of(a), sign = u >> 16 & 0x8000;
  if (a != a) return static_cast<uint16_t>(u >> 16 | 0x40);
  if (std::abs(a) < kLeast) return static_cast<uint16_t>(sign);
  if (std::isinf(a)) return static_cast<uint16_t>(u >> 16);
  const uint32_t below = u >> 16 & 0x7fff;
  const double low = float_of(below << 16), high = below == 0x7f7f ? 0x1p128 : float_of((below + 1) << 16);
  const double to_low = std::abs(a) - low, to_high = high - std::abs(a);
  const bool up = to_low == to_high ? below & 1 : to_high < to_low;
  return static_cast<uint16_t>(sign | (below + up));
}

void rounding_to_bf16() {
  const uint32_t ends[16] = {0,      1,      2,      0x7ffe, 0x7fff, 0x8000, 0x8001, 0x8002,
                             0xfffe, 0xffff, 0x4000, 0xc000, 0x1234, 0x9876, 0x7000, 0x8fff};
  for (uint32_t top = 0; top < 0x10000; ++top) {
    Sixteen a;
    for (int i = 0; i < 16; ++i) a.at[i] = float_of(top << 16 | ends[i]);
    uint16_t out[16];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtneps_pbh(a));
    for (int i = 0; i < 16; ++i) expect(out[i] == nearest_bf16(a.at[i]), "cvtneps_pbh", a.at[i]);
  }
}

// The processor's own multiply-add, with denormals off.
__attribute__((noinline)) float fma_without_denormals(float a, float b, float c) {
  const unsigned before = _mm_getcsr();
  float out;
  _mm_setcsr(0x9fc0);
  asm volatile("vmovaps %[c], %[out]\n\tvfmadd231ss %[b], %[a], %[out]"
               : [out] "=&x"(out)
               : [a] "x"(a), [b] "x"(b), [c] "x"(c));
  _mm_setcsr(before);
  return out;
}

float half_of(float word, int odd) { return float_of(odd ? bits_of(word) & 0xffff0000u : bits_of(word) << 16); }

// A sum that rounds up to the least normal number may be flushed or not.
bool same_but_at_the_edge(float got, float want) { return same(got, want) || (std::abs(got) == kLeast && want == 0); }

// Words of two bf16 with exponents about `middle`, some of them denormal, infinite or NaN.
float bf16_pair(int middle) {
  uint32_t u = 0;
  for (int odd = 0; odd < 2; ++odd) {
    const uint32_t r = random_bits(), special = r >> 16 & 0xff;
    const uint32_t exponent = special == 0 ? 0 : special == 1 ? 255 : middle + static_cast<int>(r >> 24 & 7);
    u |= ((r & 0x807f) | exponent << 7) << 16 * odd;
  }
  return float_of(u);
}

void bf16_products() {
  for (int round = 0; round < 20000; ++round) {
    const int middle = round % 2 ? 60 : 120;  // products that vanish, and such that do not
    Sixteen a, b, c;
    for (int i = 0; i < 16; ++i) {
      a.at[i] = bf16_pair(middle);
      b.at[i] = bf16_pair(middle);
      c.at[i] = float_of((random_bits() & 0x807fffffu) | static_cast<uint32_t>(2 * middle - 120 + round % 9) << 23);
    }
    const Sixteen got(_mm512_dpbf16_ps(c, (__m512bh)__m512(a), (__m512bh)__m512(b)));
    for (int i = 0; i < 16; ++i) {
      float want = c.at[i];
      for (int odd = 1; odd >= 0; --odd)
        want = fma_without_denormals(half_of(a.at[i], odd), half_of(b.at[i], odd), want);
      expect(same_but_at_the_edge(got.at[i], want), "dpbf16", got.at[i], want);
    }
  }
}

// ---- tiles ----

struct TileConfig {
  alignas(64) uint8_t bytes[64] = {1};
  TileConfig& shape(int tile, int rows, int row_bytes) {
    bytes[16 + 2 * tile] = static_cast<uint8_t>(row_bytes);
    bytes[48 + tile] = static_cast<uint8_t>(rows);
    return *this;
  }
};

void tile_products(int rows, int inner, int columns, int middle) {
  _tile_loadconfig(
      TileConfig().shape(0, rows, 4 * columns).shape(1, rows, 4 * inner).shape(2, inner, 4 * columns).bytes);
  const int stride = 19;
  std::vector<float> a((rows - 1) * stride + inner), b((inner - 1) * stride + columns);
  std::vector<float> c((rows - 1) * stride + columns, kNan), out(c.size(), 7.0f);
  for (float& x : a) x = bf16_pair(middle);
  for (float& x : b) x = bf16_pair(middle);
  for (float& x : c) x = half_of(bf16_pair(middle), 1);
  _tile_loadd(1, a.data(), stride * 4);
  _tile_loadd(2, b.data(), stride * 4);
  _tile_loadd(0, c.data(), stride * 4);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, out.data(), stride * 4);
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      float sums[2] = {0, 0};
      for (int k = 0; k < inner; ++k)
        for (int odd = 0; odd < 2; ++odd)
          sums[odd] =
              fma_without_denormals(half_of(a[m * stride + k], odd), half_of(b[k * stride + n], odd), sums[odd]);
      const float both = fma_without_denormals(sums[0], 1, sums[1]);
      const float want = fma_without_denormals(both, 1, c[m * stride + n]);
      expect(same_but_at_the_edge(out[m * stride + n], want), "tdpbf16ps", out[m * stride + n], want);
    }
  for (size_t i = 0; i < out.size(); ++i)
    expect(static_cast<int>(i % stride) < columns || out[i] == 7, "tilestored keeps to its columns");
  _tile_zero(0);
  _tile_stored(0, out.data(), stride * 4);
  expect(out[0] == 0 && out[(rows - 1) * stride + columns - 1] == 0, "tilezero");
  _tile_release();
}

template <class Fn>
void expect_abort(const char* what, Fn&& fn) {
  const pid_t child = fork();
  if (child == 0) {
    std::fclose(stderr);
    fn();
    std::_Exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, what);
}

void tile_faults() {
  const TileConfig fine = TileConfig().shape(0, 16, 64).shape(1, 16, 64).shape(2, 16, 64);
  expect_abort("no configuration", [] { _tile_zero(0); });
  expect_abort("released", [&] {
    _tile_loadconfig(fine.bytes);
    _tile_release();
    _tile_zero(0);
  });
  expect_abort("no such tile", [&] {
    _tile_loadconfig(fine.bytes);
    _tile_zero(3);
  });
  expect_abort("palette", [&] {
    TileConfig other = fine;
    other.bytes[0] = 2;
    _tile_loadconfig(other.bytes);
  });
  expect_abort("reserved byte", [&] {
    TileConfig other = fine;
    other.bytes[33] = 1;
    _tile_loadconfig(other.bytes);
  });
  expect_abort("17 rows", [] { _tile_loadconfig(TileConfig().shape(0, 17, 64).bytes); });
  expect_abort("68 bytes", [] { _tile_loadconfig(TileConfig().shape(0, 16, 68).bytes); });
  expect_abort("rows without bytes", [] { _tile_loadconfig(TileConfig().shape(0, 16, 0).bytes); });
  expect_abort("unequal shapes", [] {
    _tile_loadconfig(TileConfig().shape(0, 16, 64).shape(1, 16, 60).shape(2, 16, 64).bytes);
    _tile_dpbf16ps(0, 1, 2);
  });
  expect_abort("a tile twice", [&] {
    _tile_loadconfig(fine.bytes);
    _tile_dpbf16ps(0, 1, 1);
  });
}

// ---- the rest ----

float scaled_by(float a, float b) {
  if (a != a) return b == kInf ? kInf : b == -kInf ? 0 : a;
  if (b != b || (std::isinf(a) && b == -kInf) || (a == 0 && b == kInf)) return kNan;
  if (b == kInf || b == -kInf) return std::copysign(b > 0 ? kInf : 0.0f, a);
  if (std::isinf(a) || a == 0) return a;
  const int n = static_cast<int>(std::fmax(-1000.0f, std::fmin(1000.0f, std::floor(b))));
  return static_cast<float>(std::ldexp(static_cast<double>(a), n));  // exact in double
}

void scaling() {
  const float edges[] = {
      0.0f,     -0.0f,   1.0f,    -1.0f,   0x1.fffffep-1f,  -0x1p-149f,       0x1p-140f, kLeast,       126.99f, 127.0f,
      128.0f,   -126.0f, -126.5f, -149.0f, -150.0f,         -151.0f,          277.0f,    -277.0f,      1e30f,   -1e30f,
      0x1.8p1f, kInf,    -kInf,   kNan,    0x1.fffffep127f, 0x1.000002p-126f, 1.75f,     0x1.555556p0f};
  for (float a : edges)
    for (float b : edges)
      for (__mmask16 mask : {0, 0xffff, 0x8001}) {
        const Sixteen got(_mm512_maskz_scalef_ps(mask, _mm512_set1_ps(a), _mm512_set1_ps(b)));
        for (int i = 0; i < 16; ++i) expect(same(got.at[i], mask >> i & 1 ? scaled_by(a, b) : 0), "scalef", a, b);
      }
  for (float a : edges) {
    const Sixteen got(_mm512_roundscale_ps(_mm512_set1_ps(a), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    expect(same(got.at[5], std::floor(a)), "roundscale", a, got.at[5]);
  }
}

void choosing() {
  for (uint32_t mask = 0; mask < 0x10000; mask += 1 + random_bits() % 7) {
    const Sixteen a, b;
    const auto chosen = static_cast<__mmask16>(mask);
    const Sixteen packed(_mm512_maskz_compress_ps(chosen, a)), blend(_mm512_mask_blend_ps(chosen, a, b));
    const Sixteen integers = as_floats(_mm512_maskz_compress_epi32(chosen, as_integers(a)));
    const Sixteen sums = as_floats(_mm512_mask_add_epi32(as_integers(a), chosen, as_integers(a), _mm512_set1_epi32(3)));
    int n = 0;
    for (int i = 0; i < 16; ++i) {
      const bool on = mask >> i & 1;
      if (on) {
        expect(same(packed.at[n], a.at[i]), "compress_ps");
        expect(bits_of(integers.at[n++]) == bits_of(a.at[i]), "compress_epi32");
      }
      expect(same(blend.at[i], on ? b.at[i] : a.at[i]), "mask_blend");
      expect(bits_of(sums.at[i]) == bits_of(a.at[i]) + (on ? 3 : 0), "mask_add");
    }
    for (; n < 16; ++n) expect(bits_of(packed.at[n]) == 0 && bits_of(integers.at[n]) == 0, "compress zeroes");
  }
  for (int n = 0; n <= 16; ++n) {
    const std::vector<float> exactly(n, 2.5f);  // AddressSanitizer sees a read past the end
    const Sixteen got(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), exactly.data()));
    for (int i = 0; i < 16; ++i) expect(got.at[i] == (i < n ? 2.5f : 0), "maskz_loadu");
  }
}

void comparing() {
  Sixteen a, b;
  const float values[] = {0.0f, -0.0f, 1.0f, kNan, kInf};
  for (int i = 0; i < 16; ++i) {
    a.at[i] = values[i % 5];
    b.at[i] = values[i / 3 % 5];
  }
  const __mmask16 gt = _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), eq = _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
  const __mmask16 nle = _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ), nlt = _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ);
  const __mmask16 bitwise = _mm512_cmpeq_epi32_mask(as_integers(a), as_integers(b));
  const Sixteen most(_mm512_max_ps(a, b)), least(_mm512_min_ps(a, b));
  for (int i = 0; i < 16; ++i) {
    const float x = a.at[i], y = b.at[i];
    expect((gt >> i & 1) == (x > y) && (eq >> i & 1) == (x == y), "cmp", x, y);
    expect((nle >> i & 1) == !(x <= y) && (nlt >> i & 1) == !(x < y), "cmp of NaN", x, y);
    expect((bitwise >> i & 1) == (bits_of(x) == bits_of(y)), "cmpeq_epi32", x, y);
    expect(same(most.at[i], x > y ? x : y) && same(least.at[i], x < y ? x : y), "max and min", x, y);
  }
}

void moving() {
  const Sixteen a, b;
  const Sixteen low(_mm512_unpacklo_ps(a, b)), high(_mm512_unpackhi_ps(a, b)), shuffled(_mm512_shuffle_ps(a, b, 0xb1));
  const Sixteen low64 = as_floats(_mm512_unpacklo_epi64(as_integers(a), as_integers(b)));
  const Sixteen high32 = as_floats(_mm512_unpackhi_epi32(as_integers(a), as_integers(b)));
  const Sixteen quarters = as_floats(_mm512_shuffle_i32x4(as_integers(a), as_integers(b), 0x9c));
  const Sixteen inserted(_mm512_insertf32x4(a, _mm_loadu_ps(b.at), 2));
  const int from[4] = {0, 3, 1, 2};  // 0x9c
  for (int i = 0; i < 16; ++i) {
    const int q = i / 4 * 4, j = i % 4;
    const Sixteen& turn = j % 2 ? b : a;
    expect(same(low.at[i], turn.at[q + j / 2]) && same(high.at[i], turn.at[q + 2 + j / 2]), "unpack_ps");
    expect(same(high32.at[i], turn.at[q + 2 + j / 2]), "unpackhi_epi32");
    expect(same(low64.at[i], (j < 2 ? a : b).at[q + j % 2]), "unpacklo_epi64");
    expect(same(shuffled.at[i], (j < 2 ? a : b).at[q + (0xb1 >> 2 * j & 3)]), "shuffle_ps");
    expect(same(quarters.at[i], (i < 8 ? a : b).at[4 * from[i / 4] + j]), "shuffle_i32x4");
    expect(same(inserted.at[i], i / 4 == 2 ? b.at[j] : a.at[i]), "insertf32x4");
  }
  const Sixteen lanes = as_floats(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  Sixteen whole;
  double total = 0;
  for (int i = 0; i < 16; ++i) {
    expect(bits_of(lanes.at[i]) == static_cast<uint32_t>(i), "set_epi32");
    total += whole.at[i] = static_cast<float>(random_bits() % 1000);
  }
  expect(_mm512_reduce_add_ps(whole) == total, "reduce_add");
}

}  // namespace

int main() {
  rounding_to_bf16();
  bf16_products();
  for (int rows : {1, 5, 16})
    for (int inner : {1, 7, 16})
      for (int columns : {1, 9, 16})
        for (int middle : {60, 120}) tile_products(rows, inner, columns, middle);
  tile_faults();
  scaling();
  choosing();
  comparing();
  moving();
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}
