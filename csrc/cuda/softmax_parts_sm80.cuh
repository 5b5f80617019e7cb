// What the softmax kernels share: sums of exponentials under a shift, members of a row, numbers of any type.
#pragma once
#include "../fastcompat.h"
#include "tiles_sm80.cuh"

namespace fastcompat::cuda::sm80 {

constexpr int64_t kNoQueryLabel = -2, kNoKeyLabel = -1;

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < CUDART_INF_F; }
__device__ __forceinline__ float shift_of(float top) { return is_finite(top) ? top : 0.0f; }

// Sums of exponentials under different shifts become one.
__device__ __forceinline__ void merge(float& top, float& sum, float other_top, float other_sum) {
  const float both = fmaxf(top, other_top), shift = shift_of(both);
  sum = sum * __expf(top - shift) + other_sum * __expf(other_top - shift);
  top = both;
}

// e^(z - lse), which is at most 1: two kernels may round huge logits differently. NaN stays NaN.
__device__ __forceinline__ float share(float z, float lse) {
  const float x = z - lse;
  return __expf(x > 0.0f ? 0.0f : x);
}

template <class V, class Op>
__device__ __forceinline__ V over_quad(V v, Op op) {
  v = op(v, __shfl_xor_sync(~0u, v, 1));
  return op(v, __shfl_xor_sync(~0u, v, 2));
}
struct Add {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Numbers of a row in their own dtype.
__device__ __forceinline__ void store(void* to, DType dtype, int64_t at, float value) {
  if (dtype == DType::f32)
    static_cast<float*>(to)[at] = value;
  else if (dtype == DType::bf16)
    static_cast<bf16*>(to)[at] = __float2bfloat16_rn(value);
  else
    static_cast<fp16*>(to)[at] = __float2half_rn(value);
}
__device__ __forceinline__ float load(const Matrix& m, int64_t row, int64_t d) {
  const int64_t at = row * m.stride + d;
  if (m.dtype == DType::f32) return static_cast<const float*>(m.data)[at];
  if (m.dtype == DType::bf16) return __bfloat162float(static_cast<const bf16*>(m.data)[at]);
  return __half2float(static_cast<const fp16*>(m.data)[at]);
}

// The key that index[row] names, or -1; one that does not exist is replaced by `instead`, and the row becomes NaN
// later.
__device__ __forceinline__ bool exists(int64_t index, int64_t keys) { return index >= -1 && index < keys; }
__device__ __forceinline__ int64_t key_of(const int64_t* index, int64_t row, int64_t keys, int64_t instead) {
  if (!index) return -1;
  return exists(index[row], keys) ? index[row] : instead;
}
// Whether a row names a key that does not exist.
__device__ __forceinline__ bool bad_index(const int64_t* positive, const int64_t* exclude, int64_t row, int64_t keys) {
  return (positive && !exists(positive[row], keys)) || (exclude && !exists(exclude[row], keys));
}
// Place of a key among the `count` that start at `first`, or -1.
__device__ __forceinline__ int place_of(int64_t key, int64_t first, int64_t count) {
  const int64_t at = key - first;
  return at >= 0 && at < count ? static_cast<int>(at) : -1;
}

// Labels and biases of streamed keys in shared memory.
template <int TN>
struct KeyInfo {
  int64_t label[TN];
  float bias[TN];
};

template <int TN>
__device__ __forceinline__ void load_keys(unsigned char* info, const int64_t* labels, const float* bias, int64_t first,
                                          int64_t keys) {
  KeyInfo<TN>& to = *reinterpret_cast<KeyInfo<TN>*>(info);
  const int n = threadIdx.x;
  if (labels && n < 2 * TN) {
    const bool inside = first + n / 2 < keys;
    cp_async4(reinterpret_cast<int*>(to.label) + n, inside ? reinterpret_cast<const int*>(labels + first) + n : nullptr,
              inside ? 4 : 0);
  }
  if (bias && n < TN) cp_async4(to.bias + n, first + n < keys ? bias + first + n : nullptr, first + n < keys ? 4 : 0);
}

__device__ __forceinline__ float scale_of(float scale, const float* factor) { return factor ? scale * *factor : scale; }

}  // namespace fastcompat::cuda::sm80
