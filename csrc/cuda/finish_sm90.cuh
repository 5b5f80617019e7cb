// What is left after the walk over tiles: the results of the splits, combined in their order, and the positives that
// are given by index. Memory-bound, a few per cent of the walk.
#pragma once
#include "key_grad_sm90.cuh"

namespace fastcompat::cuda::sm90 {

constexpr int kFinishWarps = 8;

// One warp per query. Every split has so many sums, relative to the same ref.
// report: finish_stats 40 registers; LDG.*128*
template <class T>
__global__ void __launch_bounds__(32 * kFinishWarps)
    finish_stats(SoftmaxProblem p, Pairs pairs, LogSumExp<T, 0> parts, SoftmaxStats out, int splits, int sums) {
  const int64_t B = pairs.queries, D = p.query.dim;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= B) return;
  const bool bad = pairs.bad(row);

  float top = kLowest, sum = 0.0f;
  for (int s = 0; s < splits * sums; ++s) top = fmaxf(top, parts.ref[s * B + row]);
  for (int s = 0; s < splits * sums; ++s) sum += parts.sum[s * B + row] * exp2f(parts.ref[s * B + row] - top);
  if (bad && sum != 0.0f) sum = CUDART_NAN_F;
  if (lane == 0) out.neg_lse[row] = (top + log2f(sum)) * kLn2;
  if (out.mean)
    for (int64_t d = lane * 4; d < D; d += 128) {
      float4 mean = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int s = 0; s < splits; ++s) {
        const float weight = sum == 0.0f ? 0.0f : __fdividef(exp2f(parts.ref[s * sums * B + row] - top), sum);
        const float* from = s ? parts.other_means + (s - 1) * B * D : parts.mean;
        const float4 part = *reinterpret_cast<const float4*>(from + row * D + d);
        mean.x += weight * part.x;
        mean.y += weight * part.y;
        mean.z += weight * part.z;
        mean.w += weight * part.w;
      }
      *reinterpret_cast<float4*>(out.mean + row * D + d) = mean;
    }

  float lse = -CUDART_INF_F, total = 0.0f;
  int64_t count = 0;
  if (pairs.positive) {
    const int j = pairs.bad_index(pairs.positive, row) ? 0 : pairs.index(pairs.positive, row);
    const bool counts =
        j >= 0 && j != pairs.index(pairs.exclude, row) && !(pairs.bias && pairs.bias[j] == -CUDART_INF_F);
    if (counts) {
      const T* query = static_cast<const T*>(p.query.data) + row * p.query.stride;
      const T* key = static_cast<const T*>(p.keys.data) + j * p.keys.stride;
      float dot = 0.0f;
      for (int64_t d = lane; d < D; d += 32) dot = fmaf(static_cast<float>(query[d]), static_cast<float>(key[d]), dot);
      for (int bit = 16; bit; bit /= 2) dot += __shfl_xor_sync(kAllLanes, dot, bit);
      lse = total = fmaf(pairs.full_scale(), dot, pairs.bias ? pairs.bias[j] : 0.0f);
      count = 1;
    }
  } else if (parts.pos_count) {
    float best = kLowest, exps = 0.0f;
    for (int s = 0; s < splits * sums; ++s) best = fmaxf(best, parts.pos_ref[s * B + row]);
    for (int s = 0; s < splits * sums; ++s) {
      exps += parts.pos_sum[s * B + row] * exp2f(parts.pos_ref[s * B + row] - best);
      total += parts.pos_total[s * B + row];
      count += parts.pos_count[s * B + row];
    }
    lse = (best + log2f(exps)) * kLn2;
    total *= kLn2;
  }
  if (bad && count) lse = total = CUDART_NAN_F;
  if (lane) return;
  out.pos_lse[row] = lse;
  out.pos_sum[row] = total;
  out.pos_count[row] = count;
}

// Sums of the splits' parts, four elements a thread.
// report: finish_key_grad 32 registers; LDG.*128*
template <class T>
__global__ void __launch_bounds__(256) finish_key_grad(const float* parts, T* dkeys, int64_t quads, int splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= quads) return;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int s = 0; s < splits; ++s) {
    const float4 part = reinterpret_cast<const float4*>(parts)[s * quads + i];
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  uint32_t* out = reinterpret_cast<uint32_t*>(dkeys) + 2 * i;
  out[0] = pack<T>(sum.x, sum.y);
  out[1] = pack<T>(sum.z, sum.w);
}
// report: finish_bias_grad 32 registers
__global__ void __launch_bounds__(256) finish_bias_grad(const float* parts, float* dbias, int64_t keys, int splits) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (j >= keys) return;
  float sum = 0.0f;
  for (int s = 0; s < splits; ++s) sum += parts[s * keys + j];
  dbias[j] = sum;
}

// power: 2^(14 - e) for the largest coefficient bound in [2^e, 2^(e+1)): every fp16 coefficient stays below 2^15.
// report: coefficient_power 27 registers
__global__ void __launch_bounds__(1024) coefficient_power(Pairs pairs, SoftmaxGrads grads, float* power) {
  DYN_SMEM(smem);
  float* of_warp = reinterpret_cast<float*>(smem);
  float top = 0.0f;
  for (int64_t i = threadIdx.x; i < pairs.queries; i += 1024) {
    if (pairs.bad(i)) continue;
    if (grads.g_neg && grads.neg_lse[i] != -CUDART_INF_F) top = fmaxf(top, fabsf(grads.g_neg[i]));
    if (grads.pos_lse[i] == -CUDART_INF_F) continue;
    const float pos = grads.g_pos ? fabsf(grads.g_pos[i]) : 0.0f, sum = grads.g_sum ? fabsf(grads.g_sum[i]) : 0.0f;
    top = fmaxf(top, pos + sum);
  }
  for (int bit = 16; bit; bit /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, bit));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = top;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < 32; ++w) top = fmaxf(top, of_warp[w]);
  const bool usable = top > 0.0f && top < kHighest;
  *power = usable ? exp2f(static_cast<float>(min(14 - ilogbf(top), 120))) : 1.0f;
}

}  // namespace fastcompat::cuda::sm90
