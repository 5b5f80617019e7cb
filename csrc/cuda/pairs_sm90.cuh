// What the Hopper kernels do with a fragment of logits in registers: which pairs count, how a row's log-sum-exp is
// kept, what coefficient a pair has in the key gradient.
//
// A warpgroup holds 64 rows: thread (warp, g, t) = (warp, lane / 4, lane % 4) has rows 16 * warp + g + 8h for h = 0, 1
// and of every 8 columns numbers 2t and 2t + 1: s[4j + 2h + e] is (row h, column 8j + 2t + e).
#pragma once
#include "../fastcompat.h"
#include "ops90.h"

namespace fastcompat::cuda::sm90 {

constexpr unsigned kAllLanes = ~0u;
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kLowest = -1.7e38f, kHighest = 3.4e38f;  // finite, for -inf and +inf as a reference: no inf - inf

__device__ __forceinline__ float exp2_unit(float x) {
#if CUDA_ON_CPU
  return exp2f(x);
#else
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// NaN stays NaN.
__device__ __forceinline__ float clamp(float x, float low, float high) {
#if CUDA_ON_CPU
  return x < low ? low : x > high ? high : x;
#else
  asm("max.NaN.f32 %0, %0, %1;\n\tmin.NaN.f32 %0, %0, %2;" : "+f"(x) : "f"(low), "f"(high));
  return x;
#endif
}

// NaN stays NaN.
__device__ __forceinline__ float at_most_0(float x) {
#if CUDA_ON_CPU
  return x > 0.0f ? 0.0f : x;
#else
  asm("min.NaN.f32 %0, %0, 0f00000000;" : "+f"(x));
  return x;
#endif
}

// 2^x by multiply-adds alone, relative error 3e-7; 0 for -inf, infinity from 128 on. The unit for exponentials gives 16
// results a cycle, which is all that the matrix unit leaves time for when D is small: some are computed here instead.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kMagic = 12582912.0f + 127.0f;  // x + kMagic has round(x) + 127 in its lowest bits
  x = clamp(x, -127.0f, 128.0f);
  const float shifted = x + kMagic;
  const float f = x - (shifted - kMagic);  // in [-1/2, 1/2]
  float y = 1.3333558e-3f;
  y = fmaf(y, f, 9.6181291e-3f);
  y = fmaf(y, f, 5.5504109e-2f);
  y = fmaf(y, f, 2.4022651e-1f);
  y = fmaf(y, f, 6.9314718e-1f);
  y = fmaf(y, f, 1.0f);
  return y * __uint_as_float(__float_as_uint(shifted) << 23);
}

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

// SoftmaxProblem as a kernel sees it.
struct Pairs {
  int64_t queries, keys;
  float scale;
  const float *scale_factor, *bias;
  const int64_t *query_labels, *key_labels, *positive, *exclude;

  Pairs(const SoftmaxProblem& p, const float* factor)
      : queries(p.query.rows),
        keys(p.keys.rows),
        scale(p.scale),
        scale_factor(factor),
        bias(p.bias),
        query_labels(p.query_labels),
        key_labels(p.key_labels),
        positive(p.positive),
        exclude(p.exclude) {}
  __device__ float full_scale() const { return scale_factor ? scale * *scale_factor : scale; }
  // list[query], or -1 where that is no key's number.
  __device__ int index(const int64_t* list, int64_t query) const {
    if (!list || query >= queries) return -1;
    const int64_t j = list[query];
    return j < 0 || j >= keys ? -1 : static_cast<int>(j);
  }
  // The same; clears `valid` where the number is no key's and not -1.
  __device__ int index(const int64_t* list, int64_t query, bool& valid) const {
    if (!list || query >= queries) return -1;
    const int64_t j = list[query];
    valid &= j >= -1 && j < keys;
    return j < 0 || j >= keys ? -1 : static_cast<int>(j);
  }
  // A key that never counts has no label: it is a negative of probability 0.
  __device__ int64_t key_label(int64_t key) const {
    return key_labels && !(bias && bias[key] == -CUDART_INF_F) ? key_labels[key] : -1;
  }
  __device__ bool bad_index(const int64_t* list, int64_t query) const {
    return list && (list[query] < -1 || list[query] >= keys);
  }
  // Whether a query names a key that does not exist.
  __device__ bool bad(int64_t query) const { return bad_index(positive, query) || bad_index(exclude, query); }
};

// What a thread has seen of the positives (given by label) of its two rows; log2 units.
struct Positives {
  float ref[2], sum[2], total[2];
  int count[2];

  __device__ void clear() {
#pragma unroll
    for (int h = 0; h < 2; ++h) ref[h] = kLowest, sum[h] = total[h] = 0.0f, count[h] = 0;
  }
  __device__ void add(const float (&top)[2], const float (&sums)[2], const float (&totals)[2], const int (&found)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] = sum[h] * exp2_unit(ref[h] - top[h]) + sums[h];
      ref[h] = top[h];
      total[h] += totals[h];
      count[h] += found[h];
    }
  }
};

// Rows are queries, columns keys. A row's log-sum-exp over its negatives is kept as ref and sum, log2(sum) + ref, with
// the quad's four threads adding up their own columns; ref follows the maximum lazily, when a logit exceeds it by a
// factor 2^kSlack, so that o, which carries the same factor, is rarely rescaled. fp16 exponentials are multiplied by
// 2^kHead to use its range.
template <class T, int POLYNOMIAL_OF>  // every how many-th column's exponential is a polynomial; 0: none
struct LogSumExp {
  static constexpr bool kHalf = std::is_same_v<T, fp16>;
  static constexpr float kHead = kHalf ? 10.0f : 0.0f, kSlack = kHalf ? 5.0f : 8.0f;

  Pairs pairs;
  int64_t dim = 0;
  float *ref = nullptr, *sum = nullptr;           // [parts, B]
  float *mean = nullptr, *other_means = nullptr;  // [B, D] of split 0, [splits - 1, B, D] of the others, times sum
  float *pos_ref = nullptr, *pos_sum = nullptr, *pos_total = nullptr;  // [parts, B] when positives are given by label
  int* pos_count = nullptr;                                            // [parts, B], null otherwise

  struct Column {
    uint32_t label[2];
    float bias;
  };
  using Seen = Positives;
  struct Rows {
    float ref[2], sum[2], rescale[2];
    int positive[2], exclude[2];
    float scale;
    int row;
    bool rescaled;
  };

  __device__ bool columns_wanted() const { return pairs.query_labels || pairs.bias; }
  // Returns whether the column needs the slow path in this block's rows.
  __device__ bool fill(Column& column, int key, int /*row0*/, int /*rows*/) const {
    const bool in = key < pairs.keys;
    const int64_t label = in ? pairs.key_label(key) : -1;
    column.label[0] = static_cast<uint32_t>(label);
    column.label[1] = static_cast<uint32_t>(label >> 32);
    column.bias = in && pairs.bias ? pairs.bias[key] * kLog2E : 0.0f;
    return false;
  }

  // row: the thread's first.
  __device__ Rows begin(int row) const {
    Rows r;
    r.row = row;
    r.scale = pairs.full_scale() * kLog2E;
    r.rescaled = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      r.ref[h] = kLowest;
      r.sum[h] = 0.0f;
      r.rescale[h] = 1.0f;
      r.positive[h] = pairs.index(pairs.positive, row + 8 * h);
      r.exclude[h] = pairs.index(pairs.exclude, row + 8 * h);
    }
    return r;
  }

  // s: products in, exponentials relative to ref out; 0 for pairs that are no negatives.
  template <int R>
  __device__ __forceinline__ void tile(float (&s)[R], Rows& r, Positives& positives, int first, const Column* columns,
                                       const int*) const {
    float reached[2];
    const float scale = logits(s, r, positives, first, columns, reached);
    raise(r, reached);
    exponentials(s, r, scale, positives, columns, nullptr);
  }

  // The three steps of a tile. logits times the scale that it returns, and where each row's largest wants ref to be.
  template <int R>
  __device__ __forceinline__ float logits(float (&s)[R], const Rows& r, Positives& positives, int first,
                                          const Column* columns, float (&reached)[2]) const {
    bool slow = first + 2 * R > pairs.keys || pairs.bias || r.scale < 0.0f;
    if (pairs.query_labels) {  // the lower halves tell most tiles without a match
      uint32_t label[2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        label[h] = static_cast<uint32_t>(r.row + 8 * h < pairs.queries ? pairs.query_labels[r.row + 8 * h] : 0);
#pragma unroll
      for (int i = 0; i < R; ++i)
        slow |= columns[i / 4 * 8 + (i & 1) + threadIdx.x % 4 * 2].label[0] == label[i / 2 & 1];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      slow |=
          static_cast<unsigned>(r.positive[h] - first) < 2u * R || static_cast<unsigned>(r.exclude[h] - first) < 2u * R;
    slow = __any_sync(kAllLanes, slow);
    if (slow) select(s, r, positives, first, columns);
    const float scale = slow ? 1.0f : r.scale;
    float top[2][2] = {{s[0], s[2]}, {s[0], s[2]}};
#pragma unroll
    for (int i = 0; i < R; ++i) top[i / 4 & 1][i / 2 & 1] = fmaxf(top[i / 4 & 1][i / 2 & 1], s[i]);
#pragma unroll
    for (int h = 0; h < 2; ++h) reached[h] = quad_max(fmaxf(top[0][h], top[1][h])) * scale - kHead;
    return scale;
  }
  __device__ __forceinline__ void raise(Rows& r, const float (&reached)[2]) const {
    r.rescaled = __any_sync(kAllLanes, reached[0] > r.ref[0] + kSlack || reached[1] > r.ref[1] + kSlack);
    if (!r.rescaled) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float ref = fminf(fmaxf(r.ref[h], reached[h]), kHighest);
      r.rescale[h] = exp2_unit(r.ref[h] - ref);
      r.sum[h] *= r.rescale[h];
      r.ref[h] = ref;
    }
  }
  template <int R>
  __device__ __forceinline__ void exponentials(float (&s)[R], Rows& r, float scale, Positives&, const Column*,
                                               const int*) const {
    float sum[2][2] = {};
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const float x = fmaf(s[i], scale, -r.ref[i / 2 & 1]);
      constexpr int kEvery = POLYNOMIAL_OF ? POLYNOMIAL_OF : 1;
      s[i] = POLYNOMIAL_OF && i / 4 % kEvery == 0 ? exp2_polynomial(x) : exp2_unit(x);
      sum[i / 4 & 1][i / 2 & 1] += s[i];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) r.sum[h] += sum[0][h] + sum[1][h];
  }

  template <int R>
  __device__ __forceinline__ void correct(float (&o)[R], const Rows& r) const {
    if (!r.rescaled) return;
#pragma unroll
    for (int i = 0; i < R; ++i) o[i] *= r.rescale[i / 2 & 1];
  }

  // s: products in; logits in units of log 2 out, -inf for pairs that are no negatives.
  template <int R>
  __device__ __forceinline__ void select(float (&s)[R], const Rows& r, Positives& positives, int first,
                                         const Column* columns) const {
    const int t2 = threadIdx.x % 4 * 2;
    const int count = static_cast<int>(pairs.keys - first < 2 * R ? pairs.keys - first : 2 * R) - t2;
    const bool by_label = pairs.query_labels;
    int positive[2], exclude[2];
    uint32_t label[2][2] = {};
    bool labelled[2] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      positive[h] = r.positive[h] - first - t2;
      exclude[h] = r.exclude[h] - first - t2;
      if (!by_label || r.row + 8 * h >= pairs.queries) continue;
      const int64_t own = pairs.query_labels[r.row + 8 * h];
      labelled[h] = own >= 0;
      label[h][0] = static_cast<uint32_t>(own);
      label[h][1] = static_cast<uint32_t>(own >> 32);
    }
    auto same = [&](int h, const Column& c) {
      return labelled[h] && c.label[0] == label[h][0] && c.label[1] == label[h][1];
    };
    // Columns are read again in every pass: what was compared would not fit into registers.
    if (columns_wanted()) {
      float top[2] = {positives.ref[0], positives.ref[1]};
      bool some = false;
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const int h = i / 2 & 1, column = i / 4 * 8 + (i & 1);
        const Column& c = columns[column + t2];
        s[i] = fmaf(s[i], r.scale, c.bias);
        const bool hit = same(h, c) && column != exclude[h];
        top[h] = hit ? fmaxf(top[h], s[i]) : top[h];
        some |= hit;
      }
      __syncwarp();
      if (pos_count && some) {
        float sum[2] = {}, total[2] = {};
        int found[2] = {};
#pragma unroll
        for (int i = 0; i < R; ++i) {
          const int h = i / 2 & 1, column = i / 4 * 8 + (i & 1);
          const bool hit = same(h, columns[column + t2]) && column != exclude[h];
          sum[h] += hit ? exp2_unit(s[i] - top[h]) : 0.0f;
          total[h] += hit ? s[i] : 0.0f;
          found[h] += hit;
        }
        positives.add(top, sum, total, found);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < R; ++i)
        if (same(i / 2 & 1, columns[i / 4 * 8 + (i & 1) + t2])) s[i] = -CUDART_INF_F;
    } else {
#pragma unroll
      for (int i = 0; i < R; ++i) s[i] *= r.scale;
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int h = i / 2 & 1, column = i / 4 * 8 + (i & 1);
      if (column >= count || column == positive[h] || column == exclude[h]) s[i] = -CUDART_INF_F;
    }
  }

  // A row's results of one part of the columns.
  __device__ void finish(const Rows& r, const Positives& positives, int part) const {
    const bool writes = threadIdx.x % 4 == 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = r.row + 8 * h, at = part * pairs.queries + row;
      const float sum = quad_sum(r.sum[h]);
      if (writes && row < pairs.queries) {
        ref[at] = r.ref[h];
        this->sum[at] = sum;
      }
      if (!pos_count) continue;
      const float top = quad_max(positives.ref[h]), total = quad_sum(positives.total[h]);
      const float pos = quad_sum(positives.sum[h] * exp2_unit(positives.ref[h] - top));
      int count = positives.count[h];
      count += __shfl_xor_sync(kAllLanes, count, 1);
      count += __shfl_xor_sync(kAllLanes, count, 2);
      if (!writes || row >= pairs.queries) continue;
      pos_ref[at] = top;
      pos_sum[at] = pos;
      pos_total[at] = total;
      pos_count[at] = count;
    }
  }
  template <int R>
  __device__ __forceinline__ void store(const float (&o)[R], const Rows& r, int split, int column0 = 0) const {
    float* out = split ? other_means + (split - 1) * pairs.queries * dim : mean;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (r.row + 8 * h >= pairs.queries) continue;
      float* at = out + static_cast<int64_t>(r.row + 8 * h) * dim + column0 + threadIdx.x % 4 * 2;
#pragma unroll
      for (int j = 0; j < R / 4; ++j)
        if (column0 + j * 8 < dim)
          *reinterpret_cast<float2*>(at + j * 8) = make_float2(o[4 * j + 2 * h], o[4 * j + 2 * h + 1]);
    }
  }
};

}  // namespace fastcompat::cuda::sm90
