// What the softmax kernels share: sums of exponentials under a shift, labels and biases of streamed keys.
#pragma once
#include "numbers.cuh"
#include "softmax_rows.h"
#include "tiles_sm80.cuh"

namespace fastcompat::cuda::sm80 {

// Sums of exponentials under different shifts become one.
__device__ __forceinline__ void merge(float& top, float& sum, float other_top, float other_sum) {
  const float both = fmaxf(top, other_top), shift = shift_of(both);
  sum = sum * __expf(top - shift) + other_sum * __expf(other_top - shift);
  top = both;
}

// e^(z - lse), which is at most 1: two kernels may round huge logits differently. NaN stays NaN.
__device__ __forceinline__ float probability(float z, float lse) {
  const float x = z - lse;
  return __expf(x > 0.0f ? 0.0f : x);
}

template <class V, class Op>
__device__ __forceinline__ V over_quad(V v, Op op) {
  v = op(v, __shfl_xor_sync(kAllLanes, v, 1));
  return op(v, __shfl_xor_sync(kAllLanes, v, 2));
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

}  // namespace fastcompat::cuda::sm80
