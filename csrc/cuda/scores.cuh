// One score, one arithmetic: every score that is returned or compared comes from score_of, whichever kernel asks.
//   cosine, ip: score = scale * <q, k> * key.multiply * query.multiply + offset, multiply = 1/|row| (cosine) or 1;
//   l2: score = scale * -sum (q - k)^2 + offset.
// A warp adds the terms of a pair in fp32, in an order that depends on the dimension alone. What tensor cores compute
// is never a result: it only tells, with inner_error, which pairs need score_of. For l2 they compute
// 2<q, k> - |k|^2 - |q|^2, of which the bound knows that it cancels:
//   inner = <q, k> * key.multiply + key.add;   screened = scale * min(most, inner * query.multiply + query.add) +
//   offset l2: key (2, -|k|^2), query (1, -|q|^2), most = 0.
// Rows of extreme norms, whose products no float holds, are never screened: score_of multiplies them by a power of two
// first (lift), exactly.
#pragma once
#include "device.h"
#include "engine.h"

namespace fastcompat::cuda {

constexpr int TILE = 128;           // positions of keys that share one KeyBounds
constexpr int PIECE = 32;           // packed rows are padded to a multiple of this many columns
using code_t = unsigned long long;  // what 64-bit atomics take

struct alignas(16) RowFactors {
  float multiply, add;  // `add` is the lift where the norm is infinite, but with l2
  float norm;           // at least that of the row, and of what tensor cores see of it; infinite where it is extreme
  float residual;       // at least the norm of what they do not see
};

// Of one key, or the largest of a tile.
struct alignas(16) KeyBounds {
  float residual, norm;  // times multiply
  float add, multiply;   // |add|
};

// A segment of the gallery on the device. A position counts the segment's listed rows.
struct Space {
  Segment segment;
  Metric metric;
  int64_t start;                    // positions of the segments before it
  const RowFactors* query_factors;  // [B]
  const RowFactors* key_factors;    // [count]
  const KeyBounds* tiles;           // [count / TILE]

  __host__ __device__ int64_t row(int64_t position) const { return segment.rows ? segment.rows[position] : position; }
  // What a result calls the key; -1: it is passed over.
  __device__ int64_t id(int64_t position) const { return segment.items ? segment.items[row(position)] : row(position); }
};

// ---- a pair's float

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x = __fadd_rn(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

__device__ __forceinline__ void two_floats(DType dtype, uint32_t u, float& low, float& high) {
  if (dtype == DType::bf16) {
    low = __uint_as_float(u << 16);
    high = __uint_as_float(u & 0xffff0000u);
  } else {
    __half2 h;
    memcpy(&h, &u, 4);
    const float2 f = __half22float2(h);
    low = f.x;
    high = f.y;
  }
}

// Elements d .. d + 7 of a row as floats, zeros past its end.
__device__ __forceinline__ void load8(const Matrix& m, int64_t row, int64_t d, float (&x)[8]) {
  const int64_t first = row * m.stride + d;
  const int valid = m.dim - d < 8 ? static_cast<int>(m.dim - d) : 8;
  if (m.dtype == DType::f32) {
    const float* p = static_cast<const float*>(m.data) + first;
    if (valid == 8 && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
      const float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
      x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
      x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = i < valid ? p[i] : 0.0f;
    }
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(m.data) + first;
    uint32_t u[4];
    if (valid == 8 && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
      const uint4 v = *reinterpret_cast<const uint4*>(p);
      u[0] = v.x, u[1] = v.y, u[2] = v.z, u[3] = v.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        u[i] = (2 * i < valid ? p[2 * i] : 0u) | (2 * i + 1 < valid ? p[2 * i + 1] : 0u) << 16;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) two_floats(m.dtype, u[i], x[2 * i], x[2 * i + 1]);
  }
}

// The sum of step(element of a, element of b, sum), by a whole warp: lane l adds elements 8l .. 8l + 7 of every 256.
template <class Step>
__device__ __forceinline__ float sum_of(const Matrix& a, int64_t i, const Matrix& b, int64_t j, Step step) {
  float sum = 0;
  for (int64_t d = threadIdx.x % 32 * 8; d < a.dim; d += 256) {
    float x[8], y[8];
    load8(a, i, d, x);
    load8(b, j, d, y);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum = step(x[e], y[e], sum);
  }
  return warp_sum(sum);
}

// From `inner` to the score; -0 becomes +0, so that equal scores have equal bits. A NaN stays one.
__device__ __forceinline__ float finish(float inner, float multiply, float add, const Space& s) {
  const float most = s.metric == Metric::l2 ? 0.0f : CUDART_INF_F;  // rounding must not make a distance negative
  const float score = __fmaf_rn(inner, multiply, add);
  return __fadd_rn(__fmaf_rn(score > most ? most : score, s.segment.scale, s.segment.offset), 0.0f);
}

__device__ __forceinline__ float lift_of(const RowFactors& t) { return t.norm < CUDART_INF_F ? 1.0f : t.add; }

__device__ __forceinline__ float score_of(const Space& s, int64_t query, const RowFactors& q, int64_t row,
                                          const RowFactors& k) {
  if (s.metric == Metric::l2) {
    const float square = sum_of(s.segment.query, query, s.segment.keys, row, [](float x, float y, float sum) {
      const float t = __fsub_rn(x, y);
      return __fmaf_rn(t, t, sum);
    });
    return finish(-square, 1, 0, s);
  }
  const float lift_q = lift_of(q), lift_k = lift_of(k);
  const float dot = sum_of(s.segment.query, query, s.segment.keys, row, [&](float x, float y, float sum) {
    return __fmaf_rn(__fmul_rn(x, lift_q), __fmul_rn(y, lift_k), sum);
  });
  return finish(__fmul_rn(dot, k.multiply), q.multiply, 0, s);
}

// The squared norm of a row, and in double where float could overflow or underflow: infinity or NaN when the row is not
// finite.
__device__ __forceinline__ float squared_norm(const Matrix& m, int64_t row, double& wide) {
  const float square = sum_of(m, row, m, row, [](float x, float y, float sum) { return __fmaf_rn(x, y, sum); });
  wide = square;
  // Within, no product has overflowed or lost bits to underflow that the sum would notice; NaN is not within.
  if (!(square > 1e-30f && square < 1e37f)) {
    wide = 0;
    for (int64_t d = threadIdx.x % 32 * 8; d < m.dim; d += 256) {
      float x[8];
      load8(m, row, d, x);
#pragma unroll
      for (int e = 0; e < 8; ++e) wide += static_cast<double>(x[e]) * x[e];
    }
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) wide += __shfl_xor_sync(kAllLanes, wide, lanes);
  }
  return square;
}

__device__ __forceinline__ bool is_finite(double wide) { return wide <= 1.7e308; }

// The power of two for a row of extreme norm: with cosine its norm comes near 1, with ip towards its square root, so
// that neither the sum nor what undoes this passes the range of floats where the score does not. 1 for other rows.
__device__ __forceinline__ float lift_for(Metric metric, double wide) {
  if (!(wide > 0 && is_finite(wide)) || (wide > 1e-24 && wide < 1e24)) return 1;
  const int norm = ilogb(wide) >> 1;  // of the norm, rounded down
  // ip: a row of norm 2^n is lifted to about 2^(n / 2), between 2^-38 and 2^38. cosine: to about 1; the factor itself
  // stays a normal number.
  const int up = metric == Metric::ip ? min(max(norm / 2, -38), 38) - norm : min(max(-norm, -120), 120);
  return __uint_as_float(static_cast<uint32_t>(up + 127) << 23);  // 2^up: its exponent field alone
}

// Sets all but the residual; norm: infinity, or 0 to be added to.
__device__ __forceinline__ void set_factors(Metric metric, bool key, float square, double wide, RowFactors& factors) {
  factors = {1, 0, 0, 0};
  if (metric == Metric::l2) {
    factors.multiply = key ? 2 : 1;
    factors.add = -square;
    return;
  }
  const float lift = lift_for(metric, wide);
  if (lift != 1) {
    factors.norm = CUDART_INF_F;
    factors.add = lift;
  }
  if (metric == Metric::cosine) {
    const double norm = sqrt(wide) * lift;
    factors.multiply = norm > 0 ? static_cast<float>(1 / norm) : 0.0f;
  } else {
    factors.multiply = 1 / lift;
  }
}

// ---- order

// Floats in their order as unsigned integers: a positive float's bits grow with it, so its sign bit is set to put it
// above the negative ones, whose bits fall as they grow and are inverted. -inf is the smallest that value_of gives
// back.
__device__ __forceinline__ uint32_t order_of(float x) {
  const uint32_t u = __float_as_uint(x);
  return u >> 31 ? ~u : u | 0x80000000u;
}
constexpr uint32_t ORDER_OF_MINUS_INF = 0x007fffffu;
__device__ __forceinline__ float value_of(uint32_t order) {
  if (order <= ORDER_OF_MINUS_INF) return -CUDART_INF_F;
  return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

// Greater is better: by score, then the smaller id. No two keys of a segment have the same.
__device__ __forceinline__ code_t rank_code(float score, int64_t id) {
  return static_cast<code_t>(order_of(score)) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(id));
}
__device__ __forceinline__ float score_of_code(code_t code) { return value_of(static_cast<uint32_t>(code >> 32)); }
__device__ __forceinline__ int64_t id_of_code(code_t code) {
  return static_cast<int64_t>(~static_cast<uint32_t>(code));
}

// ---- how far a tensor core's score can be off

// Of a dot product of `dim` products of 16-bit numbers, in units of |q||k|: tensor cores truncate (at most
// 1.25 dim 2^-23), score_of rounds (at most dim 2^-24), with something to spare.
__device__ __forceinline__ float accumulation_error(int64_t dim) { return (static_cast<float>(dim) + 64) * 0x1p-22f; }

// What l2 loses of a squared norm: its rounding, and that of the exact score, which is at most 2(|q|^2 + |k|^2).
__device__ __forceinline__ float square_error(int64_t dim) { return (static_cast<float>(dim) / 8 + 64) * 0x1p-23f; }

// Bound of |screened - exact| of `inner`, by Cauchy-Schwarz on what rounding left out, plus both accumulations' error,
// products that underflow (2^-120 each), and the rounding of inner itself (2^-19 of its parts).
__device__ __forceinline__ float inner_error(const RowFactors& q, const KeyBounds& k, int64_t dim) {
  const float product = q.norm * k.norm;
  return q.norm * k.residual + q.residual * k.norm + accumulation_error(dim) * product +
         static_cast<float>(dim) * 0x1p-120f * k.multiply + 0x1p-19f * (product + k.add) + square_error(dim) * k.add;
}

__device__ __forceinline__ KeyBounds bounds_of(const RowFactors& k) {
  return {k.multiply * k.residual, k.multiply * k.norm, fabsf(k.add), k.multiply};
}

// The interval that holds the exact score of a pair whose screened `inner` is given; everything where nothing is sure.
__device__ __forceinline__ void score_interval(float inner, const RowFactors& q, const RowFactors& k, const Space& s,
                                               float& low, float& high) {
  const float screened = finish(inner, q.multiply, q.add, s);
  const float error = inner_error(q, bounds_of(k), s.segment.keys.dim);
  const float error_bound =
      fabsf(s.segment.scale) * (q.multiply * error + (0x1p-19f + square_error(s.segment.keys.dim)) * fabsf(q.add)) +
      0x1p-20f * fabsf(s.segment.offset);
  low = screened - error_bound;
  high = screened + error_bound;
  if (!(low >= -3e38f && high <= 3e38f)) {
    low = -CUDART_INF_F;
    high = CUDART_INF_F;
  }
}

// No key whose `inner` is below this by its error has a score of `threshold` or more.
__device__ __forceinline__ float inner_level(float threshold, const RowFactors& q, const Space& s) {
  const float scale = s.segment.scale, offset = s.segment.offset;
  if (!(scale > 0 && q.multiply > 0)) return -CUDART_INF_F;
  const float level = ((threshold - offset) / scale - q.add) / q.multiply;
  const float size = (fabsf(threshold) + fabsf(offset)) / scale + fabsf(q.add);
  return level - (0x1p-18f * size + square_error(s.segment.keys.dim) * fabsf(q.add)) / q.multiply;
}

// The same for all keys of a tile as they are screened.
__device__ __forceinline__ float limit_at(float level, const RowFactors& q, const KeyBounds& tile, const Space& s) {
  const float limit = level - 1.001f * inner_error(q, tile, s.segment.keys.dim);
  return limit < 3e38f ? limit : -CUDART_INF_F;  // NaN: nothing is sure
}

}  // namespace fastcompat::cuda
