// What kernels of both tiers read and write of a row: numbers of any dtype, the key that an index names, the scale.
#pragma once
#include "../fastcompat.h"
#include "device.h"

namespace fastcompat::cuda {

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < CUDART_INF_F; }
// What is subtracted from logits whose largest is `top`: 0 for an infinite one, so that nothing becomes inf - inf.
__device__ __forceinline__ float shift_of(float top) { return is_finite(top) ? top : 0.0f; }

__device__ __forceinline__ float scale_of(float scale, const float* factor) { return factor ? scale * *factor : scale; }

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

}  // namespace fastcompat::cuda
