// Bits of floats: their order, and 16-bit floats, one at a time, rounding to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

inline float float_from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

inline uint32_t bits_of_float(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

// Floats in their order as integers; both zeros are one. The bits of positive floats ascend with them; those of
// negative floats are the sign bit and a magnitude, which is subtracted from 0.
inline int32_t order_of(float x) {
  const int32_t u = static_cast<int32_t>(bits_of_float(x));
  return u < 0 ? static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(u)) : u;
}

// Undoes order_of.
inline float value_of(int32_t order) {
  return float_from_bits(order < 0 ? 0x80000000u - static_cast<uint32_t>(order) : static_cast<uint32_t>(order));
}

// A score (no NaN) and its id as one number that is larger for the better of two: the order of the score above, and
// below it the id counted down, so that ties go to the smaller id.
inline int64_t rank_code(float score, int32_t id) {
  return static_cast<int64_t>(order_of(score)) * (int64_t{1} << 32) + (0x7fffffff - id);
}

inline float bf16_to_float(uint16_t h) { return float_from_bits(static_cast<uint32_t>(h) << 16); }

inline uint16_t float_to_bf16(float f) {
  uint32_t u = bits_of_float(f);
  // A NaN whose payload is in the lower half would become infinity: the quiet bit keeps it a NaN.
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  // Half of the last bit that stays, less one where that bit is even: ties go to even.
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float f16_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3ffu;
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | (fraction << 13));
  if (exponent) return float_from_bits(sign | ((exponent + 112u) << 23) | (fraction << 13));  // biases 127 and 15
  float tiny = static_cast<float>(fraction) * 5.9604644775390625e-8f;                         // 2^-24
  return float_from_bits(sign | bits_of_float(tiny));
}

inline uint16_t float_to_f16(float f) {
  uint32_t u = bits_of_float(f), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 2^16 and more: infinity
  if (magnitude < 0x38800000u) {  // below 2^-14, subnormal: adding 0.5 lines its last bit up with the float's
    float shifted = float_from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of_float(shifted) - 0x3f000000u));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);      // to nearest, ties to even
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));  // 112 << 23: from bias 127 to bias 15
}

}  // namespace
