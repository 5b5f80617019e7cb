// One warp a row, or one thread a row where nothing is added over columns. Memory-bound: B D or N D numbers each.
#include <algorithm>

#include "numbers.cuh"
#include "softmax_rows.h"

namespace fastcompat::cuda {

constexpr int kRowThreads = 256, kBlockRows = kRowThreads / 32;

static dim3 blocks_of(int64_t units, int64_t a_block) {
  return dim3(static_cast<unsigned>((units + a_block - 1) / a_block));
}

// Row of this warp; a block's last warps may have none.
__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kBlockRows + threadIdx.x / 32;
}

// The sum over the warp's lanes, the same in each.
__device__ __forceinline__ double over_warp(double v) {
  for (int lanes = 16; lanes; lanes /= 2) v += __shfl_xor_sync(kAllLanes, v, lanes);
  return v;
}

// report: pack_rows_kernel 40 registers
__global__ void __launch_bounds__(kRowThreads)
    pack_rows_kernel(Matrix from, int terms, uint16_t* to, int64_t stride, int64_t plane) {
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

struct Combine {
  Matrix query, keys;
  float scale;
  const float *scale_factor, *bias;
  const int64_t *positive, *exclude;
  const RowPart* parts;
  const float *first_sums, *further_sums;
  int splits, parts_a_split;
  double unit;
  SoftmaxStats out;
};

// e^(top - shift), both in units of `unit`; 0 for an empty part.
__device__ __forceinline__ double exp_shift(float top, double shift, double unit) {
  return top == -CUDART_INF_F ? 0.0 : exp((static_cast<double>(shift_of(top)) - shift) * unit);
}

// report: combine_kernel 40 registers
__global__ void __launch_bounds__(kRowThreads) combine_kernel(const __grid_constant__ Combine a) {
  const int64_t B = a.query.rows, N = a.keys.rows, D = a.query.dim, row = row_of_warp();
  const int lane = threadIdx.x % 32, parts = a.splits * a.parts_a_split;
  if (row >= B) return;
  const bool bad = bad_index(a.positive, a.exclude, row, N);
  float top = -CUDART_INF_F, pos_top = -CUDART_INF_F;
  for (int s = 0; s < parts; ++s) {
    top = fmaxf(top, a.parts[s * B + row].top);
    pos_top = fmaxf(pos_top, a.parts[s * B + row].pos_top);
  }
  const double shift = shift_of(top), pos_shift = shift_of(pos_top);
  double total = 0, pos_total = 0, pos_sum = 0;
  int64_t pos_count = 0;
  for (int s = 0; s < parts; ++s) {
    const RowPart& part = a.parts[s * B + row];
    total += part.sum_exp * exp_shift(part.top, shift, a.unit);
    pos_total += part.pos_sum_exp * exp_shift(part.pos_top, pos_shift, a.unit);
    pos_sum += part.pos_sum;
    pos_count += part.pos_count;
  }
  double neg_lse = shift * a.unit + log(total), pos_lse = pos_shift * a.unit + log(pos_total);
  pos_sum *= a.unit;
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
      const float weight =
          static_cast<float>(exp_shift(a.parts[s * a.parts_a_split * B + row].top, shift, a.unit) / total);
      const float* sums = s ? a.further_sums + (s - 1) * B * D : a.first_sums;
      mean = fmaf(weight, sums[row * D + d], mean);
    }
    a.out.mean[row * D + d] = mean;
  }
}

struct QueryGradients {
  SoftmaxGrads in;
  int64_t queries, keys;
  const int64_t *query_labels, *positive, *exclude;
  float* coefficient_scale;  // or null: 1
  QueryInfo* out;
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

// One block.
// report: coefficient_scale_kernel 18 registers
__global__ void __launch_bounds__(1024) coefficient_scale_kernel(const __grid_constant__ QueryGradients a) {
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
    *a.coefficient_scale = *largest ? ldexpf(1.0f, min(14 - exponent, 120)) : 1.0f;
  }
}

// report: query_info_kernel 30 registers
__global__ void __launch_bounds__(kRowThreads) query_info_kernel(const __grid_constant__ QueryGradients a) {
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

struct QueryGrad {
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

// report: query_grad_kernel 36 registers
__global__ void __launch_bounds__(kRowThreads) query_grad_kernel(const __grid_constant__ QueryGrad a) {
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

// QUAD numbers a thread, read at once.
// report: sum_kernel 40 registers
template <int QUAD>
__global__ void __launch_bounds__(kRowThreads) sum_kernel(const float* parts, int64_t count, int splits, float scale,
                                                          const float* factor, void* out, DType dtype) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) * QUAD;
  if (i >= count) return;
  float sum[4] = {};
  for (int s = 0; s < splits; ++s) {
    if constexpr (QUAD == 4) {
      const float4 part = *reinterpret_cast<const float4*>(parts + s * count + i);
      sum[0] += part.x;
      sum[1] += part.y;
      sum[2] += part.z;
      sum[3] += part.w;
    } else {
      sum[0] += parts[s * count + i];
    }
  }
  const float times = scale_of(scale, factor);
#pragma unroll
  for (int e = 0; e < QUAD; ++e) store(out, dtype, i + e, times * sum[e]);
}

void combine_stats(const CombineArgs& a, void* stream) {
  const SoftmaxProblem& p = a.problem;
  const Combine c{p.query, p.keys,       p.scale,        a.scale_factor, p.bias,          p.positive, p.exclude,
                  a.parts, a.first_sums, a.further_sums, a.splits,       a.parts_a_split, a.unit,     a.out};
  launch(combine_kernel, blocks_of(p.query.rows, kBlockRows), dim3(kRowThreads), 0, stream, c);
}

void make_query_info(const SoftmaxProblem& p, const SoftmaxGrads& grads, const float* coefficient_scale, QueryInfo* out,
                     void* stream) {
  const QueryGradients a{
      grads, p.query.rows, p.keys.rows, p.query_labels, p.positive, p.exclude, const_cast<float*>(coefficient_scale),
      out};
  launch(query_info_kernel, blocks_of(p.query.rows, kRowThreads), dim3(kRowThreads), 0, stream, a);
}

void find_coefficient_scale(const SoftmaxProblem& p, const SoftmaxGrads& grads, float* out, void* stream) {
  const QueryGradients a{grads, p.query.rows, p.keys.rows, nullptr, p.positive, p.exclude, out, nullptr};
  launch(coefficient_scale_kernel, dim3(1), dim3(1024), sizeof(int), stream, a);
}

void finish_query_grad(const QueryGradArgs& a, void* stream) {
  const SoftmaxProblem& p = a.problem;
  const QueryGrad g{p.query, p.keys, p.scale, a.scale_factor, p.positive, p.exclude, a.grads,
                    a.mean,  a.sums, a.dots,  a.splits,       a.dquery,   a.dscale};
  launch(query_grad_kernel, blocks_of(p.query.rows, kBlockRows), dim3(kRowThreads), 0, stream, g);
}

void sum_splits(const float* parts, int64_t count, int64_t splits, float scale, const float* scale_factor, void* out,
                DType dtype, void* stream) {
  const bool quads = count % 4 == 0;  // then every split's part is as aligned as the first
  launch(quads ? sum_kernel<4> : sum_kernel<1>, blocks_of(count, (quads ? 4 : 1) * kRowThreads), dim3(kRowThreads), 0,
         stream, parts, count, static_cast<int>(splits), scale, scale_factor, out, dtype);
}

void pack_rows(const Matrix& from, int terms, uint16_t* to, int64_t stride, int64_t plane, void* stream) {
  const int64_t cells = plane / 8;
  if (cells)
    launch(pack_rows_kernel,
           dim3(static_cast<unsigned>(std::min<int64_t>((cells + kRowThreads - 1) / kRowThreads, 1 << 20))),
           dim3(kRowThreads), 0, stream, from, terms, to, stride, plane);
}

}  // namespace fastcompat::cuda
