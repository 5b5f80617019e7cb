// Any target: 4 lanes of the compiler's own vectors. Products are rounded before they are added (no contraction), so
// that every instance of a kernel gives the same bits.
#pragma once
#include <cstdint>
#include <cstring>

#include "half.h"

namespace {

struct Simd {
  static constexpr int W = 4, MR = 6;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  using M = I;

  static F load(const float* p) {
    F a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static void stream(float* p, F a) { store(p, a); }
  static void end_of_stream() {}
  // The first n < W numbers, then zeros.
  static F load_first(const float* p, int n) {
    F a = {};
    for (int i = 0; i < n; ++i) a[i] = p[i];
    return a;
  }
  static F set1(float a) { return F{a, a, a, a}; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F max(F a, F b) { return a > b ? a : b; }  // b when either is NaN
  static F min(F a, F b) { return a < b ? a : b; }
  static F sqrt(F a) {
    for (int i = 0; i < W; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
  }
  // x within what exponentials tell apart, NaN kept: e^-87.5 < 2^-126 < 2^128 < e^88.8.
  static F exponent_range(F x) { return max(set1(-87.5f), min(set1(88.8f), x)); }
  static F floor(F t) {  // of |t| < 2^22, which is all that exponentials ask
    const F magic = set1(12582912.0f), rounded = (t + magic) - magic;
    return rounded > t ? rounded - 1.0f : rounded;
  }
  // p * 2^n for whole n from -127 to 128: infinite at 128, 0 at -127 (no subnormals: they are slow).
  static F times_pow2(F p, F n) {
    I e = (__builtin_convertvector(n, I) + 127) << 23;
    F scale;
    std::memcpy(&scale, &e, sizeof scale);
    return p * scale;
  }
  static float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  static M gt(F a, F b) { return a > b; }
  static M not_le(F a, F b) { return ~(a <= b); }  // true for NaN
  static M eq(F a, F b) { return a == b; }
  static M eq(I a, I b) { return a == b; }
  static F select(M m, F yes, F no) { return m ? yes : no; }
  static uint32_t bits(M m) { return (m[0] & 1u) | (m[1] & 2u) | (m[2] & 4u) | (m[3] & 8u); }
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
  static void columns(const float* const (&rows)[W], int64_t d, int width, F (&out)[W]) {
    for (int j = 0; j < W; ++j)
      for (int i = 0; i < W; ++i) out[j][i] = j < width ? rows[i][d + j] : 0.0f;
  }
  static I truncate(F a) { return __builtin_convertvector(a, I); }
  static I load(const int32_t* p) {
    I a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static void store(int32_t* p, I a) { std::memcpy(p, &a, sizeof a); }
  static I set1(int32_t a) { return I{a, a, a, a}; }
  static I count(I n, M m) { return n - m; }

  static F load_bf16(const uint16_t* p) {
    return F{bf16_to_float(p[0]), bf16_to_float(p[1]), bf16_to_float(p[2]), bf16_to_float(p[3])};
  }
  static F load_f16(const uint16_t* p) {
    return F{f16_to_float(p[0]), f16_to_float(p[1]), f16_to_float(p[2]), f16_to_float(p[3])};
  }
  static void store_f16(uint16_t* p, F a) {
    for (int i = 0; i < W; ++i) p[i] = float_to_f16(a[i]);
  }
};

}  // namespace
