// c_ij = d loss / d z_ij with both log-sum-exps known, z recomputed. Keys stay and queries stream: sum_i c_ij q_i and
// sum_i c_ij. Queries stay and keys stream: the positives' share of sum_j c_ij k_j; tiles without a positive are
// skipped. Fused: scale, bias, labels, left-out keys, exponentials, rounding to 16 bits. The streamed rows are read
// twice a tile. Floor: 4 B N D operations at the rate of mma.sync. 256 threads, at most 255 registers.
#pragma once
#include "softmax_parts_sm80.cuh"

namespace fastcompat::cuda::sm80 {

struct GradientArgs {
  Walk walk;
  bool positives_only;  // no gradient of neg_lse arrives
  bool by_index;        // positives are given, and labels say only who is no negative
  float scale;
  const float* scale_factor;
  const float* bias;
  const int64_t* key_labels;
  const QueryInfo* queries;        // [B]
  const float* coefficient_scale;  // gradients in queries hold this power of two; null: 1
  void* out;                       // [splits, rows of X, D] or null
  DType out_dtype;
  bool scale_out;       // out is final: times scale
  float* out_row_sums;  // [splits, rows of X] or null: where keys stay sum_i c_ij, else sum_j c_ij <q_i, k_j>
};

template <int TM>
struct GradientMemory {
  static constexpr int TN = kScores / TM, WN = TN / 32;
  union {
    KeyInfo<TM> keys;
    QueryInfo queries[TM];
  };
  float row_sum[4][kThreads];  // of each thread's rows
  unsigned wanted[256];        // a bit for each tile
  __device__ GradientMemory() {}
};
constexpr int kMostSkippable = 256 * 32;  // tiles of a split

template <int TM, bool KEYS_STAY>  // else queries stay
struct GradientReduction {
  static constexpr int TN = kScores / TM;
  const GradientArgs& a;
  GradientMemory<TM>& memory;
  float scale;

  __device__ __forceinline__ static int64_t x0() { return static_cast<int64_t>(blockIdx.x) * TM; }

  __device__ __forceinline__ bool wanted(int tile) const {
    return !a.positives_only || (memory.wanted[tile / 32] >> tile % 32 & 1);
  }
  __device__ __forceinline__ void load(unsigned char* info, int64_t row) const {
    if constexpr (KEYS_STAY) {
      constexpr int cells = sizeof(QueryInfo) / 16;
      const char* queries = reinterpret_cast<const char*>(a.queries + row);
      for (int n = threadIdx.x; n < TN * cells; n += kThreads) {
        const bool inside = row + n / cells < a.walk.y.rows;
        cp_async16(info + n * 16, inside ? queries + n * 16 : nullptr, inside ? 16 : 0);
      }
    } else {
      load_keys<TN>(info, a.key_labels, a.bias, row, a.walk.y.rows);
    }
  }

  __device__ __forceinline__ float coefficient(float score, const QueryInfo& q, float bias, int64_t key_label,
                                               bool chosen, bool left_out) const {
    const float z = fmaf(score, scale, bias);
    const bool same = q.label == key_label;
    const float c = fmaf(same ? q.g_pos : q.g_neg, probability(z, same ? q.pos_lse : q.neg_lse), same ? q.g_sum : 0.0f);
    if (left_out || (same && ((a.by_index && !chosen) || z == -CUDART_INF_F))) return 0.0f;
    return chosen ? q.g_pos + q.g_sum : c;  // a positive given by its index is the whole set: its softmax is 1
  }

  __device__ __forceinline__ void apply(float (&s)[2][4][4], float (&factor)[4], const unsigned char* info,
                                        int64_t tile) {
    const Place<TM> at(opaque(threadIdx.x));
    const int64_t y0 = tile * TN, count = min(int64_t{TN}, a.walk.y.rows - y0);
    if constexpr (KEYS_STAY) {
      const QueryInfo* queries = reinterpret_cast<const QueryInfo*>(info);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int c = at.column(n);
        const QueryInfo q = queries[c];
        const int chosen = place_of(q.positive, x0(), TM), left_out = place_of(q.exclude, x0(), TM);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float& x = part(s, r, n);
          x = coefficient(x, q, memory.keys.bias[at.row(r)], memory.keys.label[at.row(r)], chosen == at.row(r),
                          c >= count || left_out == at.row(r));
        }
      }
      if (a.out_row_sums)
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int n = 0; n < 8; ++n) memory.row_sum[r][threadIdx.x] += part(s, r, n);
    } else {
      const KeyInfo<TN>& keys = *reinterpret_cast<const KeyInfo<TN>*>(info);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const QueryInfo& q = memory.queries[at.row(r)];
        const int64_t label = q.label;
        const int left_out = place_of(q.exclude, y0, count);
        const float pos_lse = q.pos_lse, g_pos = q.g_pos, g_sum = q.g_sum;
        float dot = 0.0f;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const int c = at.column(n);
          const bool positive = label == max(keys.label[c], kNoKeyLabel) && c < count && c != left_out;
          float& x = part(s, r, n);
          const float product = x, z = fmaf(product, scale, a.bias ? keys.bias[c] : 0.0f);
          x = positive && z != -CUDART_INF_F ? fmaf(g_pos, probability(z, pos_lse), g_sum) : 0.0f;
          if (x != 0.0f) dot = fmaf(x, product, dot);
        }
        if (a.out_row_sums) memory.row_sum[r][threadIdx.x] += dot;
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) factor[r] = 1.0f;
  }

  // Marks the tiles of the split that hold a positive.
  __device__ __forceinline__ void find_positives(int64_t first_tile, int tiles) {
    for (int n = threadIdx.x; n < 256; n += kThreads) memory.wanted[n] = 0;
    __syncthreads();
    const int64_t first = first_tile * TN, last = min(a.walk.y.rows, first + static_cast<int64_t>(tiles) * TN);
    for (int64_t y = first + threadIdx.x; y < last; y += kThreads) {
      bool found = false;
      if (KEYS_STAY && a.by_index) {
        found = place_of(a.queries[y].positive, x0(), TM) >= 0;
      } else {
        const int64_t label = KEYS_STAY ? a.queries[y].label : a.key_labels[y];
        if (label >= 0)
          for (int n = 0; n < TM && !found; ++n)
            found = label == (KEYS_STAY ? memory.keys.label[n] : memory.queries[n].label);
      }
      const int tile = static_cast<int>((y - first) / TN);
      if (found) atomicOr(memory.wanted + tile / 32, 1u << tile % 32);
    }
    __syncthreads();
  }
};

// report: gradient_tiles 246 registers; HMMA.*, LDSM.*, LDGSTS.*128*
template <class F, int TM, bool KEYS_STAY>
__global__ void __launch_bounds__(kThreads, 1) gradient_tiles(const __grid_constant__ GradientArgs a) {
  DYN_SMEM(smem);
  using Memory = GradientMemory<TM>;
  Memory& memory = *reinterpret_cast<Memory*>(smem + a.walk.own_at);
  GradientReduction<TM, KEYS_STAY> reduction{a, memory, scale_of(a.scale, a.scale_factor)};
  TileWalk<F, TM, GradientReduction<TM, KEYS_STAY>> walk(a.walk, smem, reduction);
  const int64_t rows = a.walk.x.rows;
  for (int n = threadIdx.x; n < TM; n += kThreads) {
    const int64_t row = walk.x0() + n;
    if constexpr (KEYS_STAY) {
      memory.keys.bias[n] = row < rows && a.bias ? a.bias[row] : 0.0f;
      memory.keys.label[n] = row < rows && a.key_labels && a.key_labels[row] >= 0 ? a.key_labels[row] : kNoKeyLabel;
    } else if (row < rows) {
      memory.queries[n] = a.queries[row];
    } else {
      memory.queries[n] = {0, 0, 0, 0, 0, 0, kNoQueryLabel, -1, -1};
    }
  }
  for (int r = 0; r < 4; ++r) memory.row_sum[r][threadIdx.x] = 0.0f;
  __syncthreads();
  if (a.positives_only) reduction.find_positives(walk.first(), walk.tiles);

  float o[F::groups][2][4][4];
  for (auto& group : o) clear(group);
  walk.run(o);

  const float back = a.coefficient_scale ? 1.0f / *a.coefficient_scale : 1.0f;
  const Place<TM> at(threadIdx.x);
  if (a.out) {
    const float factor = a.scale_out ? back * reduction.scale : back;
    const int64_t base = blockIdx.y * rows * a.walk.dim;
#pragma unroll
    for (int group = 0; group < F::groups; ++group)
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        const int64_t row = walk.x0() + at.row(n / 8), d = walk.out0() + group * (kScores / TM) + at.column(n % 8);
        if (row < rows && d < a.walk.dim)
          store(a.out, a.out_dtype, base + row * a.walk.dim + d, part(o[group], n / 8, n % 8) * factor);
      }
  }
  if (a.out_row_sums && blockIdx.z == 0) {
    if (threadIdx.x < TM && walk.x0() + threadIdx.x < rows) {
      // Row n lies in quad n % 8 of warps n / 32 * WN and on, as their row number n / 8 % 4.
      const int n = threadIdx.x;
      float sum = 0.0f;
      for (int c = 0; c < Memory::WN; ++c)
        for (int t = 0; t < 4; ++t) sum += memory.row_sum[n / 8 % 4][(n / 32 * Memory::WN + c) * 32 + n % 8 * 4 + t];
      a.out_row_sums[blockIdx.y * rows + walk.x0() + threadIdx.x] = sum * back;
    }
  }
}

}  // namespace fastcompat::cuda::sm80
