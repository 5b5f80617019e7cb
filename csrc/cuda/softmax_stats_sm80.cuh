// Of a split of the keys: max_j z_ij and sum_j e^(z_ij - max) over negatives and over positives, the sum and number of
// positives, and sum_j e^(z_ij - max) k_j over negatives (flash attention with V = K), z_ij = scale <q_i, k_j> +
// bias_j. Fused: scale, bias, labels, left-out keys, both sets' exponentials, rounding of weights to 16 bits. Keys are
// read once for the statistics alone, twice a tile with the mean (tiles_sm80.cuh). Floor: 2 B N D operations a product
// at the rate of mma.sync. 256 threads, at most 255 registers, 128 without the mean.
#pragma once
#include "softmax_parts_sm80.cuh"

namespace fastcompat::cuda::sm80 {

struct RowPart {
  float top, sum_exp;  // negatives
  float pos_top, pos_sum_exp, pos_sum;
  int pos_count;
};

struct StatsArgs {
  Walk walk;
  float scale;
  const float* scale_factor;
  const float* bias;
  const int64_t *query_labels, *key_labels, *positive, *exclude;
  RowPart* parts;  // [splits, B]
  float* sums;     // [splits, B, D]
};

struct PositiveState {
  float top, sum_exp, sum, rest;  // rest: what rounding left of sum
  int count;
};

template <int TM>
struct StatsMemory {
  static constexpr int WN = kScores / TM / 32;
  int64_t label[TM];
  int left_out[2][TM];  // counted from the first key of the split
  float tile_top[WN][TM];
  float top[WN][TM], sum_exp[WN][TM];  // of the keys so far that a column of warps saw
  PositiveState positives[WN][TM];
};

// fp16 weights reach down to 2^-39: they are stored times 2^15.
template <class F>
constexpr float kWeightScale = std::is_same_v<F, Fp16> ? 32768.0f : 1.0f;

template <class F, int TM, bool SUMS>
struct StatsPairs {
  static constexpr int TN = kScores / TM;
  const StatsArgs& a;
  StatsMemory<TM>& memory;
  float scale;

  __device__ __forceinline__ bool wanted(int) const { return true; }
  __device__ __forceinline__ void load(unsigned char* info, int64_t key) const {
    load_keys<TN>(info, a.key_labels, a.bias, key, a.walk.y.rows);
  }

  __device__ __forceinline__ void apply(float (&s)[2][4][4], float (&factor)[4], const unsigned char* info,
                                        int64_t tile) {
    const Place<TM> at(afresh(threadIdx.x));
    const KeyInfo<TN>& keys = *reinterpret_cast<const KeyInfo<TN>*>(info);
    const int64_t key0 = tile * TN;
    const int count = static_cast<int>(min(int64_t{TN}, a.walk.y.rows - key0)),
              offset = static_cast<int>(key0 - static_cast<int64_t>(blockIdx.y) * a.walk.split_tiles * TN);
    unsigned positive = 0, negative = 0;  // bit r * 8 + n
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t label = memory.label[at.row(r)];
      const int chosen = memory.left_out[0][at.row(r)] - offset, excluded = memory.left_out[1][at.row(r)] - offset;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int c = at.column(n);
        float& z = part(s, r, n);
        z = fmaf(z, scale, a.bias ? keys.bias[c] : 0.0f);
        const bool same = a.key_labels && label == max(keys.label[c], kNoKeyLabel);
        const unsigned bit = c < count && c != excluded ? 1u << (r * 8 + n) : 0;
        if (same && z != -CUDART_INF_F) positive |= bit;  // a bias of -inf: the key never counts
        if (!same && c != chosen) negative |= bit;
      }
    }
    if (!a.positive && __any_sync(~0u, positive != 0)) add_positives(s, positive, at);

    float top[4], sum[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      top[r] = -CUDART_INF_F;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        if (!(negative >> (r * 8 + n) & 1)) part(s, r, n) = -CUDART_INF_F;
        top[r] = fmaxf(top[r], part(s, r, n));
      }
      top[r] = over_quad(top[r], Max());
      if (SUMS && at.t == 0) memory.tile_top[at.wn][at.row(r)] = top[r];
    }
    if constexpr (SUMS) {  // O is shared by the whole row, and so is the shift
      __syncthreads();
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int n = 0; n < TN / 32; ++n) top[r] = fmaxf(top[r], memory.tile_top[n][at.row(r)]);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float before = memory.top[at.wn][at.row(r)];
      top[r] = fmaxf(before, top[r]);
      const float shift = shift_of(top[r]);
      factor[r] = __expf(before - shift);
      sum[r] = 0.0f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float& z = part(s, r, n);
        z = __expf(z - shift);
        sum[r] += z;
        if constexpr (SUMS) z *= kWeightScale<F>;
      }
      sum[r] = over_quad(sum[r], Add());
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (at.t) continue;
      memory.top[at.wn][at.row(r)] = top[r];
      float& total = memory.sum_exp[at.wn][at.row(r)];
      total = fmaf(total, factor[r], sum[r]);
    }
  }

  __device__ __forceinline__ void add_positives(float (&s)[2][4][4], unsigned positive, const Place<TM>& at) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const unsigned mine = positive >> r * 8 & 255;
      float top = -CUDART_INF_F, sum_exp = 0.0f, sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 8; ++n)
        if (mine >> n & 1) {
          top = fmaxf(top, part(s, r, n));
          sum += part(s, r, n);
        }
      top = over_quad(top, Max());
      const float shift = shift_of(top);
#pragma unroll
      for (int n = 0; n < 8; ++n)
        if (mine >> n & 1) sum_exp += __expf(part(s, r, n) - shift);
      sum_exp = over_quad(sum_exp, Add());
      sum = over_quad(sum, Add());
      const int count = over_quad(__popc(mine), Add());
      if (at.t || !count) continue;
      PositiveState& state = memory.positives[at.wn][at.row(r)];
      merge(state.top, state.sum_exp, top, sum_exp);
      const float y = sum - state.rest, total = state.sum + y;
      state.rest = is_finite(total) ? total - state.sum - y : 0.0f;
      state.sum = total;
      state.count += count;
    }
  }
};

// report: softmax_tiles 255 registers; HMMA.*, LDSM.*, LDGSTS.*128*
template <class F, int TM, bool SUMS>
__global__ void __launch_bounds__(kThreads, 1) softmax_tiles(const __grid_constant__ StatsArgs a) {
  DYN_SMEM(smem);
  using Memory = StatsMemory<TM>;
  Memory& memory = *reinterpret_cast<Memory*>(smem + a.walk.own_at);
  StatsPairs<F, TM, SUMS> pairs{a, memory, scale_of(a.scale, a.scale_factor)};
  TileWalk<F, TM, StatsPairs<F, TM, SUMS>> walk(a.walk, smem, pairs);
  const int64_t B = a.walk.x.rows, N = a.walk.y.rows;
  const int64_t first_key = walk.first() * (kScores / TM);
  for (int n = threadIdx.x; n < TM; n += kThreads) {
    const int64_t row = walk.x0() + n;
    const int64_t keys = static_cast<int64_t>(walk.tiles) * (kScores / TM);
    const bool inside = row < B;
    memory.label[n] = inside && a.query_labels && a.query_labels[row] >= 0 ? a.query_labels[row] : kNoQueryLabel;
    memory.left_out[0][n] = inside ? place_of(key_of(a.positive, row, N, 0), first_key, keys) : -1;
    memory.left_out[1][n] = inside ? place_of(key_of(a.exclude, row, N, -1), first_key, keys) : -1;
    for (int c = 0; c < Memory::WN; ++c) {
      memory.top[c][n] = -CUDART_INF_F;
      memory.sum_exp[c][n] = 0.0f;
      memory.positives[c][n] = {-CUDART_INF_F, 0.0f, 0.0f, 0.0f, 0};
    }
  }

  float o[SUMS ? F::groups : 1][2][4][4];
  if constexpr (SUMS)
    for (auto& group : o) clear(group);
  walk.run(o);

  if (threadIdx.x < TM && walk.x0() + threadIdx.x < B && blockIdx.z == 0) {
    const int n = threadIdx.x;
    float top = memory.top[0][n], sum_exp = memory.sum_exp[0][n];
    PositiveState all = memory.positives[0][n];
    for (int c = 1; c < Memory::WN; ++c) {
      merge(top, sum_exp, memory.top[c][n], memory.sum_exp[c][n]);
      const PositiveState& state = memory.positives[c][n];
      merge(all.top, all.sum_exp, state.top, state.sum_exp);
      all.sum += state.sum;
      all.count += state.count;
    }
    a.parts[blockIdx.y * B + walk.x0() + n] = {top, sum_exp, all.top, all.sum_exp, all.sum, all.count};
  }
  if constexpr (SUMS) {
    const Place<TM> at(threadIdx.x);
    float* sums = a.sums + blockIdx.y * B * a.walk.dim;
#pragma unroll
    for (int group = 0; group < F::groups; ++group)
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        const int64_t row = walk.x0() + at.row(n / 8), d = walk.out0() + group * (kScores / TM) + at.column(n % 8);
        if (row < B && d < a.walk.dim) sums[row * a.walk.dim + d] = part(o[group], n / 8, n % 8) / kWeightScale<F>;
      }
  }
}

}  // namespace fastcompat::cuda::sm80
