// Cuts a softmax call into blocks and launches its kernels. The cuts, and with them the bits of the results, follow
// from shapes, dtype and device alone.
#include <algorithm>

#include "softmax_rows_sm80.cuh"
#include "softmax_sm80.h"

namespace fastcompat::cuda::sm80 {
namespace {

constexpr int64_t kFewRows = 64;    // so few rows of X fill the narrow tile only
constexpr int64_t kLeastTiles = 4;  // of a split
constexpr int64_t kMostWaves = 4;   // blocks per multiprocessor that splitting may make

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
  return value;
}

// Places of arrays in scratch, in the order they are asked for.
struct Scratch {
  size_t bytes = 0;
  size_t take(size_t count) {
    const size_t at = bytes;
    bytes += (count + 255) / 256 * 256;
    return at;
  }
};
template <class T>
T* at(const Launch& launch, size_t place) {
  return reinterpret_cast<T*>(static_cast<char*>(launch.scratch) + place);
}

// A matrix as the tiles read it: in place, or rounded into scratch.
struct Operand {
  const Matrix& matrix;
  int terms;
  bool packed;
  int64_t stride;
  size_t place = 0;

  Operand(const Matrix& m, int terms, Scratch& scratch) : matrix(m), terms(terms) {
    const bool aligned = reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && (m.stride % 8 == 0 || m.rows <= 1);
    packed = m.dtype == DType::f32 || !aligned;
    stride = packed ? round_up(m.dim, 8) : m.stride;
    if (packed) place = scratch.take(terms * plane() * 2);
  }
  int64_t plane() const { return matrix.rows * stride; }

  Planes planes(const Launch& launch) const {
    if (!packed) return {static_cast<const uint16_t*>(matrix.data), matrix.rows, stride, 0};
    uint16_t* to = at<uint16_t>(launch, place);
    const int64_t cells = plane() / 8;
    if (cells)
      cuda::launch(pack_rows, dim3(static_cast<unsigned>(std::min<int64_t>(ceil_div(cells, kRowThreads), 1 << 20))),
                   dim3(kRowThreads), 0, launch.stream, matrix, terms, to, stride, plane());
    return {to, matrix.rows, stride, plane()};
  }
};

int terms_of(DType dtype, Precision precision) {
  if (dtype != DType::f32) return 1;
  return precision == Precision::exact ? 3 : precision == Precision::high ? 2 : 1;
}

// Wide tiles with O need rows to fill them, few columns, and the registers of unsplit operands.
bool wide_sums(int64_t x_rows, int64_t dim, int terms) {
  return terms == 1 && x_rows > kFewRows && dim <= Bf16::groups * (kScores / 128);
}

// How X stays and Y streams: tile, splits, shared memory.
struct Plan {
  bool wide;
  int64_t x_tiles, splits, slices;
  Walk walk{};
  size_t smem;

  // Tiles of 128 rows of X by 64 of Y where wide, else 64 by 128.
  Plan(int64_t x_rows, int64_t y_rows, int64_t dim, int terms, bool sums, bool wide, int info_row, int own[2],
       int device, int64_t most_tiles = int64_t{1} << 30)
      : wide(wide) {
    const int64_t groups = terms > 1 ? SplitFloat::groups : Bf16::groups;
    const int64_t tm = wide ? 128 : 64, tn = kScores / tm;
    const int64_t processors = attribute(cudaDevAttrMultiProcessorCount, device);
    const int64_t y_tiles = ceil_div(y_rows, tn);
    x_tiles = ceil_div(x_rows, tm);
    slices = sums ? ceil_div(dim, groups * tn) : 1;
    cut(y_tiles, processors, most_tiles);

    walk.dim = static_cast<int>(dim);
    walk.terms = terms;
    walk.sums = sums;
    const int pieces = static_cast<int>(ceil_div(dim, kPiece));
    const int x_bytes = terms * pieces * static_cast<int>(tm) * kPiece * 2;
    const size_t limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    for (const bool resident : {true, false})
      for (const int stages : {3, 2}) {
        walk.resident = resident;
        walk.stages = stages;
        const int rows = static_cast<int>(std::max(resident ? tn : tm + tn, sums ? tn : 0));
        walk.stage_bytes = rows * kPiece * 2;
        walk.info_bytes = info_row * static_cast<int>(tn);
        walk.cursor_at = stages * walk.stage_bytes;
        walk.weights_at = walk.cursor_at + kCursorBytes;
        walk.info_at = walk.weights_at + (sums ? kScores * 2 : 0);
        walk.x_at = walk.info_at + kInfos * walk.info_bytes;
        walk.own_at = walk.x_at + (resident ? x_bytes : 0);
        smem = walk.own_at + own[wide];
        if (smem <= limit) return;
      }
  }

  dim3 grid() const {
    return dim3(static_cast<unsigned>(x_tiles), static_cast<unsigned>(splits), static_cast<unsigned>(slices));
  }

 private:
  // The number of splits that ends first when every multiprocessor takes one block after the other.
  void cut(int64_t y_tiles, int64_t processors, int64_t most_tiles) {
    const int64_t blocks = std::max<int64_t>(1, x_tiles * slices);
    const int64_t least = std::max<int64_t>(1, ceil_div(y_tiles, most_tiles));
    const int64_t most = std::min(y_tiles / kLeastTiles, kMostWaves * processors / blocks);
    int64_t best = least, best_time = INT64_MAX;
    for (int64_t s = least; s <= std::max(least, most); ++s) {
      const int64_t time = ceil_div(blocks * s, processors) * (ceil_div(y_tiles, s) + 1);
      if (time < best_time) best = s, best_time = time;
    }
    walk.split_tiles = static_cast<int>(std::max<int64_t>(1, ceil_div(y_tiles, best)));
    splits = std::max<int64_t>(1, ceil_div(y_tiles, walk.split_tiles));
  }
};

dim3 row_blocks(int64_t rows) { return dim3(static_cast<unsigned>(ceil_div(rows, kBlockRows))); }

// ---- statistics

struct StatsPlan {
  Scratch scratch;
  int terms;
  Operand query, keys;
  Plan plan;
  size_t parts, sums = 0;

  StatsPlan(const SoftmaxProblem& p, bool want_mean, const Launch& launch)
      : terms(terms_of(p.query.dtype, launch.precision)),
        query(p.query, terms, scratch),
        keys(p.keys, terms, scratch),
        plan(make(p, want_mean, terms, launch.device)) {
    parts = scratch.take(plan.splits * p.query.rows * sizeof(RowPart));
    if (want_mean) sums = scratch.take(plan.splits * p.query.rows * p.query.dim * sizeof(float));
  }

 private:
  static Plan make(const SoftmaxProblem& p, bool want_mean, int terms, int device) {
    int own[2] = {sizeof(StatsMemory<64>), sizeof(StatsMemory<128>)};
    return Plan(p.query.rows, p.keys.rows, p.query.dim, terms, want_mean,
                !want_mean || wide_sums(p.query.rows, p.query.dim, terms), sizeof(KeyInfo<1>), own, device);
  }
};

using StatsKernel = void (*)(StatsArgs);
template <class F>
StatsKernel stats_kernel(const Plan& plan, bool sums) {
  if (!sums) return softmax_tiles<F, 128, false>;
  if constexpr (!F::split)
    if (plan.wide) return softmax_tiles<F, 128, true>;
  return softmax_tiles<F, 64, true>;
}

// ---- gradients

// Coefficients of all pairs (keys stay) or of positives (queries stay).
struct GradientPlan {
  Scratch scratch;
  int terms;
  bool keys_stay;
  Operand query, keys;
  Plan plan;
  size_t query_terms, coefficient_scale, sums = 0, row_sums = 0;

  GradientPlan(const SoftmaxProblem& p, bool keys_stay, bool positives_only, bool want_sums, bool want_row_sums,
               const Launch& launch)
      : terms(terms_of(p.query.dtype, launch.precision)),
        keys_stay(keys_stay),
        query(p.query, terms, scratch),
        keys(p.keys, terms, scratch),
        plan(make(p, keys_stay, positives_only, want_sums, terms, launch.device)) {
    query_terms = scratch.take(p.query.rows * sizeof(QueryTerms));
    coefficient_scale = scratch.take(sizeof(float));
    const int64_t rows = plan.splits * (keys_stay ? p.keys.rows : p.query.rows);
    if (want_sums && partial()) sums = scratch.take(rows * p.query.dim * sizeof(float));
    if (want_row_sums && partial()) row_sums = scratch.take(rows * sizeof(float));
  }
  bool partial() const { return !keys_stay || plan.splits > 1; }

 private:
  static Plan make(const SoftmaxProblem& p, bool keys_stay, bool positives_only, bool want_sums, int terms,
                   int device) {
    int own[2] = {sizeof(GradientMemory<64>), sizeof(GradientMemory<128>)};
    const int64_t B = p.query.rows, N = p.keys.rows;
    return Plan(keys_stay ? N : B, keys_stay ? B : N, p.query.dim, terms, want_sums,
                keys_stay && wide_sums(N, p.query.dim, terms), keys_stay ? sizeof(QueryTerms) : sizeof(KeyInfo<1>), own,
                device, positives_only ? kMostSkippable : int64_t{1} << 30);
  }
};

using GradientKernel = void (*)(GradientArgs);
template <class F>
GradientKernel gradient_kernel(const GradientPlan& g) {
  if (!g.keys_stay) return gradient_tiles<F, 64, false>;
  if constexpr (!F::split)
    if (g.plan.wide) return gradient_tiles<F, 128, true>;
  return gradient_tiles<F, 64, true>;
}

void run_gradient(const SoftmaxProblem& p, const GradientPlan& g, const SoftmaxGrads& grads, void* out, float* row_sums,
                  const Launch& launch) {
  const bool half = p.query.dtype == DType::f16;
  TermsArgs terms{grads,      p.query.rows, p.keys.rows, p.query_labels,
                  p.positive, p.exclude,    nullptr,     at<QueryTerms>(launch, g.query_terms)};
  if (half) {
    terms.coefficient_scale = at<float>(launch, g.coefficient_scale);
    cuda::launch(find_coefficient_scale, dim3(1), dim3(1024), sizeof(int), launch.stream, terms);
  }
  if (p.query.rows)
    cuda::launch(make_terms, dim3(static_cast<unsigned>(ceil_div(p.query.rows, kRowThreads))), dim3(kRowThreads), 0,
                 launch.stream, terms);
  GradientArgs a{};
  a.walk = g.plan.walk;
  const Planes query = g.query.planes(launch), keys = g.keys.planes(launch);
  a.walk.x = g.keys_stay ? keys : query;
  a.walk.y = g.keys_stay ? query : keys;
  a.positives_only = !g.keys_stay || !grads.g_neg;
  a.by_index = p.positive;
  a.scale = p.scale;
  a.scale_factor = launch.scale_factor;
  a.bias = p.bias;
  a.key_labels = p.query_labels ? p.key_labels : nullptr;
  a.terms = terms.out;
  a.coefficient_scale = terms.coefficient_scale;
  a.out = out;
  a.out_dtype = g.partial() ? DType::f32 : p.keys.dtype;
  a.scale_out = !g.partial();
  a.out_row_sums = row_sums;
  const GradientKernel kernel = g.terms > 1 ? gradient_kernel<SplitFloat>(g)
                                : half      ? gradient_kernel<Fp16>(g)
                                            : gradient_kernel<Bf16>(g);
  cuda::launch(kernel, g.plan.grid(), dim3(kThreads), g.plan.smem, launch.stream, a);
}

// The positives' share of the query gradient takes a pass over tiles where positives are found by label.
bool wants_positives(const SoftmaxProblem& p, const SoftmaxGrads& grads) {
  return !p.positive && p.query_labels && (grads.g_pos || grads.g_sum);
}
GradientPlan query_plan(const SoftmaxProblem& p, const Launch& launch) {
  return GradientPlan(p, false, true, true, true, launch);
}
GradientPlan key_plan(const SoftmaxProblem& p, const SoftmaxGrads& grads, bool want_keys, bool want_bias,
                      const Launch& launch) {
  return GradientPlan(p, true, !grads.g_neg, want_keys, want_bias, launch);
}

}  // namespace

size_t softmax_stats_scratch(const SoftmaxProblem& p, bool want_mean, const Launch& launch) {
  return StatsPlan(p, want_mean, launch).scratch.bytes;
}

void softmax_stats(const SoftmaxProblem& p, const SoftmaxStats& out, const Launch& launch) {
  if (p.query.rows == 0) return;
  const StatsPlan s(p, out.mean, launch);
  StatsArgs a{};
  a.walk = s.plan.walk;
  a.walk.x = s.query.planes(launch);
  a.walk.y = s.keys.planes(launch);
  a.scale = p.scale;
  a.scale_factor = launch.scale_factor;
  a.bias = p.bias;
  a.query_labels = p.query_labels;
  a.key_labels = p.query_labels ? p.key_labels : nullptr;
  a.positive = p.positive;
  a.exclude = p.exclude;
  a.parts = at<RowPart>(launch, s.parts);
  a.sums = out.mean ? at<float>(launch, s.sums) : nullptr;
  const StatsKernel kernel = s.terms > 1                   ? stats_kernel<SplitFloat>(s.plan, out.mean)
                             : p.query.dtype == DType::f16 ? stats_kernel<Fp16>(s.plan, out.mean)
                                                           : stats_kernel<Bf16>(s.plan, out.mean);
  cuda::launch(kernel, s.plan.grid(), dim3(kThreads), s.plan.smem, launch.stream, a);
  const CombineArgs c{p.query,   p.keys,
                      p.scale,   launch.scale_factor,
                      p.bias,    p.positive,
                      p.exclude, a.parts,
                      a.sums,    static_cast<int>(s.plan.splits),
                      out};
  cuda::launch(combine_stats, row_blocks(p.query.rows), dim3(kRowThreads), 0, launch.stream, c);
}

size_t softmax_query_grad_scratch(const SoftmaxProblem& p, const SoftmaxGrads& grads, const Launch& launch) {
  return wants_positives(p, grads) ? query_plan(p, launch).scratch.bytes : 0;
}

void softmax_query_grad(const SoftmaxProblem& p, const SoftmaxGrads& grads, const float* mean, void* dquery,
                        float* dscale, const Launch& launch) {
  if (p.query.rows == 0) return;
  QueryGradArgs f{p.query, p.keys, p.scale, launch.scale_factor, p.positive, p.exclude, grads, mean, nullptr, nullptr,
                  0,       dquery, dscale};
  if (wants_positives(p, grads)) {
    const GradientPlan g = query_plan(p, launch);
    float* sums = at<float>(launch, g.sums);
    SoftmaxGrads positives = grads;
    positives.g_neg = nullptr;
    float* dots = at<float>(launch, g.row_sums);
    run_gradient(p, g, positives, sums, dots, launch);
    f.sums = sums;
    f.dots = dots;
    f.splits = static_cast<int>(g.plan.splits);
  }
  cuda::launch(finish_query_grad, row_blocks(p.query.rows), dim3(kRowThreads), 0, launch.stream, f);
}

size_t softmax_key_grad_scratch(const SoftmaxProblem& p, const SoftmaxGrads& grads, bool want_keys, bool want_bias,
                                const Launch& launch) {
  return key_plan(p, grads, want_keys, want_bias, launch).scratch.bytes;
}

void softmax_key_grad(const SoftmaxProblem& p, const SoftmaxGrads& grads, void* dkeys, float* dbias,
                      const Launch& launch) {
  if (p.keys.rows == 0 || (!dkeys && !dbias)) return;
  const GradientPlan g = key_plan(p, grads, dkeys, dbias, launch);
  if (!g.partial()) return run_gradient(p, g, grads, dkeys, dbias, launch);
  float* sums = dkeys ? at<float>(launch, g.sums) : nullptr;
  float* bias_sums = dbias ? at<float>(launch, g.row_sums) : nullptr;
  run_gradient(p, g, grads, sums, bias_sums, launch);
  const KeyGradArgs k{sums,    bias_sums,           p.keys.rows, p.query.dim,  static_cast<int>(g.plan.splits),
                      p.scale, launch.scale_factor, dkeys,       p.keys.dtype, dbias};
  cuda::launch(add_key_grads, row_blocks(p.keys.rows), dim3(kRowThreads), 0, launch.stream, k);
}

}  // namespace fastcompat::cuda::sm80
