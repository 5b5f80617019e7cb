// Cuts a softmax call into blocks and launches its kernels. The cuts, and with them the bits of the results, follow
// from shapes, dtype and device alone.
#include <algorithm>

#include "scratch.h"
#include "softmax_grad_sm80.cuh"
#include "softmax_stats_sm80.cuh"
#include "splits.h"
#include "tiers.h"

namespace fastcompat::cuda::sm80 {
namespace {

constexpr int64_t kFewRows = 64;  // so few rows of X fill the narrow tile only
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A matrix as the tiles read it: in place, or rounded into scratch.
struct TileMatrix {
  const Matrix& matrix;
  int terms;
  bool packed;
  int64_t stride;
  uint16_t* rounded = nullptr;  // where it is rounded to

  TileMatrix(const Matrix& m, int terms, Scratch& scratch) : matrix(m), terms(terms) {
    const bool aligned = reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && (m.stride % 8 == 0 || m.rows <= 1);
    packed = m.dtype == DType::f32 || !aligned;
    stride = packed ? round_up(m.dim, 8) : m.stride;
    if (packed) rounded = scratch.take<uint16_t>(terms * plane());
  }
  int64_t plane() const { return matrix.rows * stride; }

  Planes planes(void* stream) const {
    if (!packed) return {static_cast<const uint16_t*>(matrix.data), matrix.rows, stride, 0};
    pack_rows(matrix, terms, rounded, stride, plane(), stream);
    return {rounded, matrix.rows, stride, plane()};
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
struct Tiling {
  bool wide;
  int64_t x_tiles, splits, slices;
  Walk walk{};
  size_t smem;

  // Tiles of 128 rows of X by 64 of Y where wide, else 64 by 128.
  Tiling(int64_t x_rows, int64_t y_rows, int64_t dim, int terms, bool sums, bool wide, int info_row, int own[2],
         int device, int64_t most_tiles = int64_t{1} << 30)
      : wide(wide) {
    const int64_t groups = terms > 1 ? SplitFloat::groups : Bf16::groups;
    const int64_t tm = wide ? 128 : 64, tn = kScores / tm;
    x_tiles = ceil_div(x_rows, tm);
    slices = sums ? ceil_div(dim, groups * tn) : 1;
    SplitCosts costs;
    costs.least_tiles = 4;
    costs.most_tiles = most_tiles;
    const Splits cuts = choose_splits(x_tiles * slices, ceil_div(y_rows, tn), device, costs);
    splits = cuts.count;
    walk.split_tiles = static_cast<int>(cuts.tiles);

    walk.dim = static_cast<int>(dim);
    walk.terms = terms;
    walk.sums = sums;
    const int pieces = static_cast<int>(ceil_div(dim, kPiece));
    const int x_bytes = terms * pieces * static_cast<int>(tm) * kPiece * 2;
    const size_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
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
};

// ---- statistics

struct StatsCall {
  Scratch scratch;
  int terms;
  TileMatrix query, keys;
  Tiling tiling;
  RowPart* parts;
  float* sums = nullptr;

  // memory: the call's scratch, or null where only its size is asked for
  StatsCall(const SoftmaxProblem& p, bool want_mean, const Launch& launch, void* memory)
      : scratch(memory),
        terms(terms_of(p.query.dtype, launch.precision)),
        query(p.query, terms, scratch),
        keys(p.keys, terms, scratch),
        tiling(make(p, want_mean, terms, launch.device)) {
    parts = scratch.take<RowPart>(tiling.splits * p.query.rows);
    if (want_mean) sums = scratch.take<float>(tiling.splits * p.query.rows * p.query.dim);
  }

 private:
  static Tiling make(const SoftmaxProblem& p, bool want_mean, int terms, int device) {
    int own[2] = {sizeof(StatsMemory<64>), sizeof(StatsMemory<128>)};
    return Tiling(p.query.rows, p.keys.rows, p.query.dim, terms, want_mean,
                  !want_mean || wide_sums(p.query.rows, p.query.dim, terms), sizeof(KeyInfo<1>), own, device);
  }
};

using StatsKernel = void (*)(StatsArgs);
template <class F>
StatsKernel stats_kernel(const Tiling& tiling, bool sums) {
  if (!sums) return softmax_tiles<F, 128, false>;
  if constexpr (!F::split)
    if (tiling.wide) return softmax_tiles<F, 128, true>;
  return softmax_tiles<F, 64, true>;
}

// ---- gradients

// Coefficients of all pairs (keys stay) or of positives (queries stay).
struct GradientCall {
  Scratch scratch;
  int terms;
  bool keys_stay;
  TileMatrix query, keys;
  Tiling tiling;
  QueryInfo* query_info;
  float *coefficient_scale = nullptr, *sums = nullptr, *row_sums = nullptr;

  GradientCall(const SoftmaxProblem& p, bool keys_stay, bool positives_only, bool want_sums, bool want_row_sums,
               const Launch& launch, void* memory)
      : scratch(memory),
        terms(terms_of(p.query.dtype, launch.precision)),
        keys_stay(keys_stay),
        query(p.query, terms, scratch),
        keys(p.keys, terms, scratch),
        tiling(make(p, keys_stay, positives_only, want_sums, terms, launch.device)) {
    query_info = scratch.take<QueryInfo>(p.query.rows);
    if (p.query.dtype == DType::f16) coefficient_scale = scratch.take<float>(1);
    const int64_t rows = tiling.splits * (keys_stay ? p.keys.rows : p.query.rows);
    if (want_sums && partial()) sums = scratch.take<float>(rows * p.query.dim);
    if (want_row_sums && partial()) row_sums = scratch.take<float>(rows);
  }
  bool partial() const { return !keys_stay || tiling.splits > 1; }

 private:
  static Tiling make(const SoftmaxProblem& p, bool keys_stay, bool positives_only, bool want_sums, int terms,
                     int device) {
    int own[2] = {sizeof(GradientMemory<64>), sizeof(GradientMemory<128>)};
    const int64_t B = p.query.rows, N = p.keys.rows;
    return Tiling(keys_stay ? N : B, keys_stay ? B : N, p.query.dim, terms, want_sums,
                  keys_stay && wide_sums(N, p.query.dim, terms), keys_stay ? sizeof(QueryInfo) : sizeof(KeyInfo<1>),
                  own, device, positives_only ? kMostSkippable : int64_t{1} << 30);
  }
};

using GradientKernel = void (*)(GradientArgs);
template <class F>
GradientKernel gradient_kernel(const GradientCall& g) {
  if (!g.keys_stay) return gradient_tiles<F, 64, false>;
  if constexpr (!F::split)
    if (g.tiling.wide) return gradient_tiles<F, 128, true>;
  return gradient_tiles<F, 64, true>;
}

void run_gradient(const SoftmaxProblem& p, const GradientCall& g, const SoftmaxGrads& grads, void* out, float* row_sums,
                  const Launch& launch) {
  const bool half = p.query.dtype == DType::f16;
  if (half) find_coefficient_scale(p, grads, g.coefficient_scale, launch.stream);
  if (p.query.rows) make_query_info(p, grads, g.coefficient_scale, g.query_info, launch.stream);
  GradientArgs a{};
  a.walk = g.tiling.walk;
  const Planes query = g.query.planes(launch.stream), keys = g.keys.planes(launch.stream);
  a.walk.x = g.keys_stay ? keys : query;
  a.walk.y = g.keys_stay ? query : keys;
  a.positives_only = !g.keys_stay || !grads.g_neg;
  a.by_index = p.positive;
  a.scale = p.scale;
  a.scale_factor = launch.scale_factor;
  a.bias = p.bias;
  a.key_labels = p.query_labels ? p.key_labels : nullptr;
  a.queries = g.query_info;
  a.coefficient_scale = g.coefficient_scale;
  a.out = out;
  a.out_dtype = g.partial() ? DType::f32 : p.keys.dtype;
  a.scale_out = !g.partial();
  a.out_row_sums = row_sums;
  const GradientKernel kernel = g.terms > 1 ? gradient_kernel<SplitFloat>(g)
                                : half      ? gradient_kernel<Fp16>(g)
                                            : gradient_kernel<Bf16>(g);
  cuda::launch(kernel, g.tiling.grid(), dim3(kThreads), g.tiling.smem, launch.stream, a);
}

// The positives' share of the query gradient takes a pass over tiles where positives are found by label.
bool wants_positives(const SoftmaxProblem& p, const SoftmaxGrads& grads) {
  return !p.positive && p.query_labels && (grads.g_pos || grads.g_sum);
}
GradientCall query_call(const SoftmaxProblem& p, const Launch& launch, void* memory) {
  return GradientCall(p, false, true, true, true, launch, memory);
}
GradientCall key_call(const SoftmaxProblem& p, const SoftmaxGrads& grads, bool want_keys, bool want_bias,
                      const Launch& launch, void* memory) {
  return GradientCall(p, true, !grads.g_neg, want_keys, want_bias, launch, memory);
}

}  // namespace

size_t softmax_stats_scratch(const SoftmaxProblem& p, bool want_mean, const Launch& launch) {
  return StatsCall(p, want_mean, launch, nullptr).scratch.bytes();
}

void softmax_stats(const SoftmaxProblem& p, const SoftmaxStats& out, const Launch& launch) {
  if (p.query.rows == 0) return;
  const StatsCall s(p, out.mean, launch, launch.scratch);
  StatsArgs a{};
  a.walk = s.tiling.walk;
  a.walk.x = s.query.planes(launch.stream);
  a.walk.y = s.keys.planes(launch.stream);
  a.scale = p.scale;
  a.scale_factor = launch.scale_factor;
  a.bias = p.bias;
  a.query_labels = p.query_labels;
  a.key_labels = p.query_labels ? p.key_labels : nullptr;
  a.positive = p.positive;
  a.exclude = p.exclude;
  a.parts = s.parts;
  a.sums = s.sums;
  const StatsKernel kernel = s.terms > 1                   ? stats_kernel<SplitFloat>(s.tiling, out.mean)
                             : p.query.dtype == DType::f16 ? stats_kernel<Fp16>(s.tiling, out.mean)
                                                           : stats_kernel<Bf16>(s.tiling, out.mean);
  cuda::launch(kernel, s.tiling.grid(), dim3(kThreads), s.tiling.smem, launch.stream, a);
  const float* further = s.sums ? s.sums + p.query.rows * p.query.dim : nullptr;
  combine_stats({p, launch.scale_factor, s.parts, s.sums, further, static_cast<int>(s.tiling.splits), 1, 1.0f, out},
                launch.stream);
}

size_t softmax_query_grad_scratch(const SoftmaxProblem& p, const SoftmaxGrads& grads, const Launch& launch) {
  return wants_positives(p, grads) ? query_call(p, launch, nullptr).scratch.bytes() : 0;
}

void softmax_query_grad(const SoftmaxProblem& p, const SoftmaxGrads& grads, const float* mean, void* dquery,
                        float* dscale, const Launch& launch) {
  if (p.query.rows == 0) return;
  QueryGradArgs f{p, launch.scale_factor, grads, mean, nullptr, nullptr, 0, dquery, dscale};
  if (wants_positives(p, grads)) {
    const GradientCall g = query_call(p, launch, launch.scratch);
    SoftmaxGrads positives = grads;
    positives.g_neg = nullptr;
    run_gradient(p, g, positives, g.sums, g.row_sums, launch);
    f.sums = g.sums;
    f.dots = g.row_sums;
    f.splits = static_cast<int>(g.tiling.splits);
  }
  finish_query_grad(f, launch.stream);
}

size_t softmax_key_grad_scratch(const SoftmaxProblem& p, const SoftmaxGrads& grads, bool want_keys, bool want_bias,
                                const Launch& launch) {
  return key_call(p, grads, want_keys, want_bias, launch, nullptr).scratch.bytes();
}

void softmax_key_grad(const SoftmaxProblem& p, const SoftmaxGrads& grads, void* dkeys, float* dbias,
                      const Launch& launch) {
  if (p.keys.rows == 0 || (!dkeys && !dbias)) return;
  const GradientCall g = key_call(p, grads, dkeys, dbias, launch, launch.scratch);
  if (!g.partial()) return run_gradient(p, g, grads, dkeys, dbias, launch);
  run_gradient(p, g, grads, g.sums, g.row_sums, launch);
  const int64_t N = p.keys.rows, splits = g.tiling.splits;
  if (dkeys)
    sum_splits(g.sums, N * p.query.dim, splits, p.scale, launch.scale_factor, dkeys, p.keys.dtype, launch.stream);
  if (dbias) sum_splits(g.row_sums, N, splits, 1.0f, nullptr, dbias, DType::f32, launch.stream);
}

}  // namespace fastcompat::cuda::sm80
