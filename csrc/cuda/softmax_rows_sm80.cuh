// What happens to rows before and after the tiles: rounding to 16-bit planes, the gradients that arrive, the ordered
// combine of splits, and a positive given by its index. Memory-bound, B D or N D numbers each; a warp takes a row.
#pragma once
#include "softmax_grad_sm80.cuh"
#include "softmax_stats_sm80.cuh"

namespace fastcompat::cuda::sm80 {

constexpr int kRowThreads = 256, kBlockRows = kRowThreads / 32;

// Row of this warp; a block's last warps may have none.
__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kBlockRows + threadIdx.x / 32;
}

// The sum over the warp's lanes, the same in each.
__device__ __forceinline__ double over_warp(double v) {
  for (int n = 16; n; n /= 2) v += __shfl_xor_sync(~0u, v, n);
  return v;
}

// Rows of any stride become planes of 16-byte aligned rows: a float is split into `terms` bf16 numbers.
// report: pack_rows 40 registers
__global__ void __launch_bounds__(kRowThreads)
    pack_rows(Matrix from, int terms, uint16_t* to, int64_t stride, int64_t plane) {
  const int64_t cells = stride / 8, all = from.rows * cells;
  for (int64_t n = blockIdx.x * int64_t{kRowThreads} + threadIdx.x; n < all; n += gridDim.x * int64_t{kRowThreads}) {
    const int64_t row = n / cells, d0 = n % cells * 8;
    for (int e = 0; e < 8; ++e) {
      uint16_t* out = to + row * stride + d0 + e;
      const int64_t at = row * from.stride + d0 + e;
      if (from.dtype != DType::f32) {
        *out = d0 + e < from.dim ? static_cast<const uint16_t*>(from.data)[at] : 0;
        continue;
      }
      float rest = d0 + e < from.dim ? static_cast<const float*>(from.data)[at] : 0.0f;
      for (int term = 0; term < terms; ++term) {
        const bf16 rounded = __float2bfloat16_rn(rest);
        memcpy(out + term * plane, &rounded, 2);
        rest -= __bfloat162float(rounded);
      }
    }
  }
}

struct CombineArgs {
  Matrix query, keys;
  float scale;
  const float* scale_factor;
  const float* bias;
  const int64_t *positive, *exclude;
  const RowPart* parts;
  const float* sums;
  int splits;
  SoftmaxStats out;
};

__device__ __forceinline__ double exp_shift(float top, double shift) {
  return top == -CUDART_INF_F ? 0.0 : exp(static_cast<double>(shift_of(top)) - shift);
}

// neg_lse = max + log of the sum, mean = the splits' sums under one maximum; likewise positives.
// report: combine_stats 40 registers
__global__ void __launch_bounds__(kRowThreads) combine_stats(const __grid_constant__ CombineArgs a) {
  const int64_t B = a.query.rows, N = a.keys.rows, D = a.query.dim, row = row_of_warp();
  const int lane = threadIdx.x % 32;
  if (row >= B) return;
  const bool bad = bad_index(a.positive, a.exclude, row, N);
  float top = -CUDART_INF_F, pos_top = -CUDART_INF_F;
  for (int s = 0; s < a.splits; ++s) {
    top = fmaxf(top, a.parts[s * B + row].top);
    pos_top = fmaxf(pos_top, a.parts[s * B + row].pos_top);
  }
  const double shift = shift_of(top), pos_shift = shift_of(pos_top);
  double total = 0, pos_total = 0, pos_sum = 0;
  int64_t pos_count = 0;
  for (int s = 0; s < a.splits; ++s) {
    const RowPart& part = a.parts[s * B + row];
    total += part.sum_exp * exp_shift(part.top, shift);
    pos_total += part.pos_sum_exp * exp_shift(part.pos_top, pos_shift);
    pos_sum += part.pos_sum;
    pos_count += part.pos_count;
  }
  double neg_lse = shift + log(total), pos_lse = pos_shift + log(pos_total);
  if (a.positive) {
    const int64_t j = N ? key_of(a.positive, row, N, 0) : -1;
    pos_count = j >= 0 && j != key_of(a.exclude, row, N, -1) && !(a.bias && a.bias[j] == -CUDART_INF_F);
    pos_lse = -CUDART_INF_F;
    if (pos_count) {  // one key: its logit is all there is
      double dot = 0;
      for (int64_t d = lane; d < D; d += 32) dot += static_cast<double>(load(a.query, row, d)) * load(a.keys, j, d);
      pos_lse = scale_of(a.scale, a.scale_factor) * over_warp(dot) + (a.bias ? a.bias[j] : 0.0f);
      pos_sum = pos_lse;
    }
  }
  if (lane == 0) {
    a.out.neg_lse[row] = bad && total != 0 ? CUDART_NAN_F : static_cast<float>(neg_lse);
    a.out.pos_lse[row] = bad && pos_count ? CUDART_NAN_F : static_cast<float>(pos_lse);
    a.out.pos_sum[row] = bad && pos_count ? CUDART_NAN_F : static_cast<float>(pos_sum);
    a.out.pos_count[row] = pos_count;
  }
  if (!a.out.mean) return;
  for (int64_t d = lane; d < D; d += 32) {
    float mean = bad && total != 0 ? CUDART_NAN_F : 0.0f;
    for (int s = 0; s < a.splits && total != 0; ++s) {
      const float weight = static_cast<float>(exp_shift(a.parts[s * B + row].top, shift) / total);
      mean = fmaf(weight, a.sums[(s * B + row) * D + d], mean);
    }
    a.out.mean[row * D + d] = mean;
  }
}

struct TermsArgs {
  SoftmaxGrads in;
  int64_t queries, keys;
  const int64_t *query_labels, *positive, *exclude;
  float* coefficient_scale;  // or null: 1
  QueryTerms* out;
};

struct CleanGradients {
  float neg_lse, g_neg, pos_lse, g_pos, g_sum;
};
// A row whose set is empty, or that names a key that does not exist, gets lse +inf and gradient 0, whatever arrives.
__device__ __forceinline__ CleanGradients clean(const SoftmaxGrads& in, int64_t row, bool bad) {
  const bool no_neg = bad || in.neg_lse[row] == -CUDART_INF_F, no_pos = bad || in.pos_lse[row] == -CUDART_INF_F;
  return {no_neg ? CUDART_INF_F : in.neg_lse[row], no_neg || !in.g_neg ? 0.0f : in.g_neg[row],
          no_pos ? CUDART_INF_F : in.pos_lse[row], no_pos || !in.g_pos ? 0.0f : in.g_pos[row],
          no_pos || !in.g_sum ? 0.0f : in.g_sum[row]};
}

// The power of two that takes the largest possible coefficient to 2^14 .. 2^15: fp16 coefficients keep their bits. One
// block.
// report: find_coefficient_scale 18 registers
__global__ void __launch_bounds__(1024) find_coefficient_scale(const __grid_constant__ TermsArgs a) {
  DYN_SMEM(smem);
  int* largest = reinterpret_cast<int*>(smem);
  if (threadIdx.x == 0) *largest = 0;
  __syncthreads();
  float most = 0.0f;
  for (int64_t i = threadIdx.x; i < a.queries; i += blockDim.x) {
    const CleanGradients g = clean(a.in, i, bad_index(a.positive, a.exclude, i, a.keys));
    const float c = fmaxf(fabsf(g.g_neg), fabsf(g.g_pos) + fabsf(g.g_sum));
    if (is_finite(c)) most = fmaxf(most, c);
  }
  atomicMax(largest, __float_as_int(most));  // as integers, non-negative floats keep their order
  __syncthreads();
  if (threadIdx.x == 0) {
    const int exponent = (*largest >> 23) - 127;  // largest < 2^(exponent + 1)
    *a.coefficient_scale = *largest ? ldexpf(1.0f, max(-100, min(100, 14 - exponent))) : 1.0f;
  }
}

// report: make_terms 30 registers
__global__ void __launch_bounds__(kRowThreads) make_terms(const __grid_constant__ TermsArgs a) {
  const int64_t i = blockIdx.x * int64_t{kRowThreads} + threadIdx.x;
  if (i >= a.queries) return;
  const float scale = a.coefficient_scale ? *a.coefficient_scale : 1.0f;
  const CleanGradients g = clean(a.in, i, bad_index(a.positive, a.exclude, i, a.keys));
  const int64_t positive = key_of(a.positive, i, a.keys, -1), exclude = key_of(a.exclude, i, a.keys, -1);
  const int64_t label = a.query_labels && a.query_labels[i] >= 0 ? a.query_labels[i] : kNoQueryLabel;
  a.out[i] = {g.neg_lse,       g.g_neg * scale,
              g.pos_lse,       g.g_pos * scale,
              g.g_sum * scale, 0.0f,
              label,           positive == exclude ? -1 : positive,
              exclude};
}

struct QueryGradArgs {
  Matrix query, keys;
  float scale;
  const float* scale_factor;
  const int64_t *positive, *exclude;
  SoftmaxGrads grads;
  const float* mean;
  const float* sums;  // [splits, B, D] positives' share, or null
  const float* dots;  // [splits, B] of its products with the query, from coefficients that are not rounded
  int splits;
  void* dquery;
  float* dscale;
};

// u = g_neg mean + sum over positives; dquery = scale u, dscale = <query, u>.
// report: finish_query_grad 36 registers
__global__ void __launch_bounds__(kRowThreads) finish_query_grad(const __grid_constant__ QueryGradArgs a) {
  const int64_t B = a.query.rows, N = a.keys.rows, D = a.query.dim, row = row_of_warp();
  if (row >= B) return;
  const CleanGradients g = clean(a.grads, row, bad_index(a.positive, a.exclude, row, N));
  const int64_t j = key_of(a.positive, row, N, -1);
  const bool chosen = j >= 0 && j != key_of(a.exclude, row, N, -1) && g.pos_lse != CUDART_INF_F;
  const bool negatives = a.grads.g_neg && g.neg_lse != CUDART_INF_F;
  const float scale = scale_of(a.scale, a.scale_factor);
  double dot = 0;
  for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
    float u = 0.0f;
    if (negatives) u += g.g_neg * a.mean[row * D + d];
    if (chosen) u = fmaf(g.g_pos + g.g_sum, load(a.keys, j, d), u);
    dot += static_cast<double>(load(a.query, row, d)) * u;
    for (int s = 0; a.sums && s < a.splits; ++s) u += a.sums[(s * B + row) * D + d];
    if (a.dquery) store(a.dquery, a.query.dtype, row * D + d, scale * u);
  }
  dot = over_warp(dot);
  for (int s = 0; a.dots && s < a.splits; ++s) dot += a.dots[s * B + row];
  if (threadIdx.x % 32 == 0) a.dscale[row] = static_cast<float>(dot);
}

struct KeyGradArgs {
  const float *sums, *bias_sums;  // [splits, N, D], [splits, N], or null
  int64_t keys, dim;
  int splits;
  float scale;
  const float* scale_factor;
  void* dkeys;
  DType dtype;
  float* dbias;
};

// report: add_key_grads 40 registers
__global__ void __launch_bounds__(kRowThreads) add_key_grads(const __grid_constant__ KeyGradArgs a) {
  const int64_t row = row_of_warp();
  if (row >= a.keys) return;
  const float scale = scale_of(a.scale, a.scale_factor);
  for (int64_t d = threadIdx.x % 32; a.dkeys && d < a.dim; d += 32) {
    const float* part = a.sums + row * a.dim + d;
    float sum = 0.0f;
    for (int s = 0; s < a.splits; ++s, part += a.keys * a.dim) sum += *part;
    store(a.dkeys, a.dtype, row * a.dim + d, scale * sum);
  }
  if (a.dbias && threadIdx.x % 32 == 0) {
    float sum = 0.0f;
    for (int s = 0; s < a.splits; ++s) sum += a.bias_sums[s * a.keys + row];
    a.dbias[row] = sum;
  }
}

}  // namespace fastcompat::cuda::sm80
