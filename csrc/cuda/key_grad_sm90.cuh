// Coefficients of the key gradient: dkey_j = scale * sum_i c_ij query_i, dbias_j = sum_i c_ij with
//   c_ij = g_neg_i exp(z_ij - neg_lse_i)               for the negatives of query i,
//   c_ij = g_pos_i exp(z_ij - pos_lse_i) + g_sum_i     for its positives, 0 for its excluded key.
// Rows are keys, columns queries; everything a query brings lies in shared memory, so no maximum and no rescaling.
#pragma once
#include "pairs_sm90.cuh"

namespace fastcompat::cuda::sm90 {

template <class T>
struct KeyCoefficients {
  static constexpr bool kHalf = std::is_same_v<T, fp16>;

  Pairs pairs;
  SoftmaxGrads grads;
  int64_t dim;
  const float* power;  // fp16: what coefficients are multiplied by, a power of two that brings the largest to 2^14
  T* dkeys;            // [N, D], or null with several splits
  float* parts;        // [splits, N, D] then
  float* dbias;        // [N] or null; [parts, N] with several parts

  struct Column {
    float neg_lse, g_neg, pos_lse, g_pos, g_sum;
    int positive, exclude;
    uint32_t label[2];
  };
  struct Seen {
    float sum[2];  // of the coefficients of the thread's rows
    __device__ void clear() { sum[0] = sum[1] = 0.0f; }
  };
  struct Rows {
    int row;
    uint32_t label[2];  // the lower half
    float scale;
  };

  __device__ bool columns_wanted() const { return true; }
  __device__ bool fill(Column& c, int query, int row0, int rows) const {
    bool in = query < pairs.queries;
    c.positive = pairs.index(pairs.positive, query, in);
    c.exclude = pairs.index(pairs.exclude, query, in);
    const bool here = static_cast<unsigned>(c.positive - row0) < static_cast<unsigned>(rows) ||
                      static_cast<unsigned>(c.exclude - row0) < static_cast<unsigned>(rows);
    const float power = kHalf ? *this->power : 1.0f;
    // An empty set, or a query that names no key, has gradient 0 whatever arrives.
    float lse = in && grads.g_neg ? grads.neg_lse[query] : -CUDART_INF_F;
    bool empty = lse == -CUDART_INF_F;
    c.neg_lse = empty ? CUDART_INF_F : lse * kLog2E;
    c.g_neg = empty ? 0.0f : grads.g_neg[query] * power;
    lse = in && (grads.g_pos || grads.g_sum) ? grads.pos_lse[query] : -CUDART_INF_F;
    empty = lse == -CUDART_INF_F;
    c.pos_lse = empty || !grads.g_pos ? CUDART_INF_F : lse * kLog2E;
    c.g_pos = empty || !grads.g_pos ? 0.0f : grads.g_pos[query] * power;
    c.g_sum = empty || !grads.g_sum ? 0.0f : grads.g_sum[query] * power;
    const int64_t label = in && pairs.query_labels ? pairs.query_labels[query] : -1;
    c.label[0] = static_cast<uint32_t>(label);
    c.label[1] = static_cast<uint32_t>(label >> 32);
    return here;
  }

  __device__ Rows begin(int row) const {
    Rows r;
    r.row = row;
    r.scale = pairs.full_scale() * kLog2E;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      r.label[h] =
          pairs.key_labels && row + 8 * h < pairs.keys ? static_cast<uint32_t>(pairs.key_labels[row + 8 * h]) : 0;
    return r;
  }

  // s: products in, coefficients out. flags: whether a positive or excluded key of the columns lies in this block.
  template <int R>
  __device__ __forceinline__ void tile(float (&s)[R], Rows& r, Seen& seen, int /*first*/, const Column* columns,
                                       const int* flags) const {
    exponentials(s, r, 1.0f, seen, columns, flags);
  }
  // Exponents are cut off at 0: log-sum-exps were rounded on their way here, which huge logits would notice.
  template <int R>
  __device__ __forceinline__ void exponentials(float (&s)[R], const Rows& r, float, Seen& seen, const Column* columns,
                                               const int* flags) const {
    const int t2 = threadIdx.x % 4 * 2;
    bool slow = pairs.bias || (flags[0] | flags[1] | flags[2]);
    if (pairs.query_labels) {
#pragma unroll
      for (int i = 0; i < R; ++i) slow |= columns[i / 4 * 8 + t2 + (i & 1)].label[0] == r.label[i / 2 & 1];
    }
    if (__any_sync(kAllLanes, slow)) {
      select(s, r, columns + t2);
    } else {
#pragma unroll
      for (int j = 0; j < R / 4; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Column& c = columns[j * 8 + t2 + e];
          const float lse = c.neg_lse, g = c.g_neg;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& x = s[4 * j + 2 * h + e];
            x = g * exp2_unit(at_most_0(fmaf(x, r.scale, -lse)));
          }
        }
    }
    if (dbias) {
      float sum[2] = {};
#pragma unroll
      for (int i = 0; i < R; ++i) sum[i / 2 & 1] += s[i];
      seen.sum[0] += sum[0];
      seen.sum[1] += sum[1];
    }
  }

  template <int R>
  __device__ __forceinline__ void select(float (&s)[R], const Rows& r, const Column* columns) const {
    uint32_t label[2][2] = {};
    bool labelled[2] = {};
    float bias[2] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = r.row + 8 * h;
      if (row >= pairs.keys) continue;
      if (pairs.bias) bias[h] = pairs.bias[row] * kLog2E;
      const int64_t own = pairs.key_label(row);
      labelled[h] = own >= 0;
      label[h][0] = static_cast<uint32_t>(own);
      label[h][1] = static_cast<uint32_t>(own >> 32);
    }
    auto same = [&](int i) {
      const int h = i / 2 & 1;
      const Column& c = columns[i / 4 * 8 + (i & 1)];
      return labelled[h] && c.label[0] == label[h][0] && c.label[1] == label[h][1];
    };
    auto positive = [&](int i) {
      return columns[i / 4 * 8 + (i & 1)].positive == r.row + (i & 2) * 4 || (!pairs.positive && same(i));
    };
    // Columns are read again in every pass: what was compared would not fit into registers.
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const Column& c = columns[i / 4 * 8 + (i & 1)];
      s[i] = fmaf(s[i], r.scale, bias[i / 2 & 1]) - (positive(i) ? c.pos_lse : c.neg_lse);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const Column& c = columns[i / 4 * 8 + (i & 1)];
      const bool p = positive(i);
      s[i] = fmaf(p ? c.g_pos : c.g_neg, exp2_unit(at_most_0(s[i])), p ? c.g_sum : 0.0f);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < R; ++i)
      if (columns[i / 4 * 8 + (i & 1)].exclude == r.row + (i & 2) * 4 || (same(i) && !positive(i))) s[i] = 0.0f;
  }

  // In three steps, as LogSumExp has them; there is no maximum to agree on.
  template <int R>
  __device__ __forceinline__ float logits(float (&)[R], const Rows&, Seen&, int, const Column*,
                                          float (&reached)[2]) const {
    reached[0] = reached[1] = 0.0f;
    return 1.0f;
  }
  __device__ __forceinline__ void raise(Rows&, const float (&)[2]) const {}

  template <int R>
  __device__ __forceinline__ void correct(float (&)[R], const Rows&) const {}

  __device__ void finish(const Rows& r, const Seen& seen, int part) const {
    if (!dbias) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = quad_sum(seen.sum[h]);
      const int64_t row = r.row + 8 * h;
      if (threadIdx.x % 4 == 0 && row < pairs.keys) dbias[part * pairs.keys + row] = kHalf ? sum / *power : sum;
    }
  }
  template <int R>
  __device__ __forceinline__ void store(const float (&o)[R], const Rows& r, int split, int column0 = 0) const {
    const float scale = kHalf ? pairs.full_scale() / *power : pairs.full_scale();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (r.row + 8 * h >= pairs.keys) continue;
      const int64_t at = static_cast<int64_t>(r.row + 8 * h) * dim + column0 + threadIdx.x % 4 * 2;
#pragma unroll
      for (int j = 0; j < R / 4; ++j) {
        if (column0 + j * 8 >= dim) continue;
        const float a = o[4 * j + 2 * h] * scale, b = o[4 * j + 2 * h + 1] * scale;
        if (dkeys)
          *reinterpret_cast<uint32_t*>(dkeys + at + j * 8) = pack<T>(a, b);
        else
          *reinterpret_cast<float2*>(parts + split * pairs.keys * dim + at + j * 8) = make_float2(a, b);
      }
    }
  }
};

}  // namespace fastcompat::cuda::sm90
