// Host side of the Hopper tier: which problems it takes, where the work is cut, what is launched.
#include "one_product_sm90.cuh"
#include "scratch.h"
#include "softmax_rows.h"
#include "softmax_sm90.cuh"
#include "splits.h"
#include "tiers.h"

namespace fastcompat::cuda::sm90 {
namespace {

constexpr int kLargest = 512;
constexpr int64_t kMostRows = (int64_t(1) << 31) - 1024;  // coordinates are 32 bits wide

bool suits(const Matrix& m) {
  return m.rows > 0 && m.rows < kMostRows && m.dim % 8 == 0 && m.stride % 8 == 0 && m.stride >= m.dim &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

bool suits(const SoftmaxProblem& p) {
  return p.query.dtype != DType::f32 && p.query.dim <= kLargest && suits(p.query) && suits(p.keys);
}

// How rows stay and columns stream: clusters, tiles, splits.
struct Tiling {
  Walk walk;
  int splits;

  Tiling(int64_t rows, int64_t columns, int rows_a_block, int columns_a_tile, int64_t result_bytes, int device)
      : walk(make_walk(rows, columns, rows_a_block, columns_a_tile)) {
    SplitCosts costs;
    costs.overhead = 3;  // a wgmma pipeline fills and empties
    costs.result_bytes = result_bytes;
    const Splits cuts = choose_splits(walk.blocks, walk.tiles, device, costs);
    splits = static_cast<int>(cuts.count);
    walk.tiles_per_split = static_cast<int>(cuts.tiles);
  }
  dim3 grid() const { return dim3(static_cast<unsigned>(walk.blocks) * splits); }
};

// f(T{}, number of columns the kernels are built for)
template <class F>
void dispatch(const SoftmaxProblem& p, F f) {
  auto by_dim = [&](auto t) {
    if (p.query.dim <= 64)
      f(t, std::integral_constant<int, 64>());
    else if (p.query.dim <= 128)
      f(t, std::integral_constant<int, 128>());
    else if (p.query.dim <= 256)
      f(t, std::integral_constant<int, 256>());
    else
      f(t, std::integral_constant<int, 512>());
  };
  if (p.query.dtype == DType::bf16)
    by_dim(bf16());
  else
    by_dim(fp16());
}

template <class T>
TensorMap map_of(const Matrix& m, int box_rows) {
  return make_tensor_map(static_cast<const T*>(m.data), m.rows, m.dim, box_rows, kPanel, m.stride);
}

// How the walk with two products is tiled, and into how many sums a split's columns are divided.
template <int D>
using TwoProductTiles = std::conditional_t<(D <= 256), TwoProducts<D>, TwoProductsInHalves>;
template <int D>
constexpr int kSums = D <= 256 ? 1 : kConsumers;

template <int D>
Tiling stats_tiling(const SoftmaxProblem& p, bool want_mean, int device) {
  const int64_t bytes = p.query.rows * (want_mean ? p.query.dim * 4 : 8);
  return want_mean
             ? Tiling(p.query.rows, p.keys.rows, TwoProductTiles<D>::kRows, TwoProductTiles<D>::kColumns, bytes, device)
             : Tiling(p.query.rows, p.keys.rows, OneProduct<D>::kRows, OneProduct<D>::kColumns, bytes, device);
}

// What the walk leaves behind, for combine_stats.
struct StatsParts {
  RowPart* parts;      // [splits * sums, B]
  float* other_means;  // [splits - 1, B, D]
  size_t bytes;

  StatsParts(void* memory, const SoftmaxProblem& p, bool want_mean, int splits, int sums) {
    Scratch scratch(memory);
    parts = scratch.take<RowPart>(splits * sums * p.query.rows);
    other_means = want_mean ? scratch.take<float>((splits - 1) * p.query.rows * p.query.dim) : nullptr;
    bytes = scratch.bytes();
  }
};

struct KeyGradParts {
  float *coefficient_scale, *keys, *bias;
  size_t bytes;

  KeyGradParts(void* memory, const SoftmaxProblem& p, bool want_bias, int splits, int sums) {
    Scratch scratch(memory);
    coefficient_scale = scratch.take<float>(1);
    keys = splits > 1 ? scratch.take<float>(splits * p.keys.rows * p.keys.dim) : nullptr;
    bias = splits * sums > 1 && want_bias ? scratch.take<float>(splits * sums * p.keys.rows) : nullptr;
    bytes = scratch.bytes();
  }
};

template <int D>
Tiling key_grad_tiling(const SoftmaxProblem& p, int device) {
  return Tiling(p.keys.rows, p.query.rows, TwoProductTiles<D>::kRows, TwoProductTiles<D>::kColumns,
                p.keys.rows * p.keys.dim * 4, device);
}

template <class T, int D, class Reduction>
void launch_two_products(const Matrix& rows, const Matrix& columns, const Reduction& reduction, const Tiling& tiling,
                         void* stream) {
  using Tiles = TwoProductTiles<D>;
  auto run = [&](auto kernel, int columns_at_once) {
    launch_cluster(tiling.walk.cluster, kernel, tiling.grid(), dim3(kThreads),
                   Tiles::template Memory<Reduction>::kBytes, stream, map_of<T>(rows, Tiles::kRows),
                   map_of<T>(columns, columns_at_once / 2), reduction, tiling.walk);
  };
  if constexpr (D <= 256)
    run(two_products<T, D, Reduction>, Tiles::kColumns);
  else
    run(two_products_in_halves<T, Reduction>, Tiles::kOwn);
}

}  // namespace

bool covers_stats(const SoftmaxProblem& p) { return suits(p); }

size_t softmax_stats_scratch(const SoftmaxProblem& p, bool want_mean, const Launch& launch) {
  size_t bytes = 0;
  dispatch(p, [&](auto, auto d) {
    const int splits = stats_tiling<d>(p, want_mean, launch.device).splits;
    bytes = StatsParts(nullptr, p, want_mean, splits, want_mean ? kSums<d> : 1).bytes;
  });
  return bytes;
}

void softmax_stats(const SoftmaxProblem& p, const SoftmaxStats& out, const Launch& launch) {
  dispatch(p, [&](auto t, auto d) {
    using T = decltype(t);
    constexpr int D = d;
    const Tiling tiling = stats_tiling<D>(p, out.mean, launch.device);
    const ProblemView problem(p, launch.scale_factor);
    const int sums = out.mean ? kSums<D> : 1;
    const StatsParts parts(launch.scratch, p, out.mean, tiling.splits, sums);
    auto prepared = [&](auto reduction) {
      reduction.dim = p.query.dim;
      reduction.by_label = p.query_labels && !p.positive;
      reduction.parts = parts.parts;
      reduction.mean = out.mean;
      reduction.other_means = parts.other_means;
      return reduction;
    };
    if (!out.mean) {
      using Reduction = LogSumExp<T, D <= 128 ? 4 : 0>;
      using Tiles = OneProduct<D>;
      launch_cluster(tiling.walk.cluster, one_product<T, D, Reduction>, tiling.grid(), dim3(kThreads),
                     Tiles::template Memory<Reduction>::kBytes, launch.stream, map_of<T>(p.query, 128),
                     map_of<T>(p.keys, Tiles::kColumns / 2), prepared(Reduction{problem}), tiling.walk);
    } else {
      using Reduction = LogSumExp<T, D <= 64 ? 4 : 0>;
      launch_two_products<T, D>(p.query, p.keys, prepared(Reduction{problem}), tiling, launch.stream);
    }
    combine_stats({p, launch.scale_factor, parts.parts, out.mean, parts.other_means, tiling.splits, sums, kLn2, out},
                  launch.stream);
  });
}

bool covers_key_grad(const SoftmaxProblem& p, bool want_keys) { return want_keys && suits(p); }

size_t softmax_key_grad_scratch(const SoftmaxProblem& p, const SoftmaxGrads&, bool, bool want_bias,
                                const Launch& launch) {
  size_t bytes = 0;
  dispatch(p, [&](auto, auto d) {
    bytes = KeyGradParts(nullptr, p, want_bias, key_grad_tiling<d>(p, launch.device).splits, kSums<d>).bytes;
  });
  return bytes;
}

void softmax_key_grad(const SoftmaxProblem& p, const SoftmaxGrads& grads, void* dkeys, float* dbias,
                      const Launch& launch) {
  dispatch(p, [&](auto t, auto d) {
    using T = decltype(t);
    constexpr int D = d;
    const Tiling tiling = key_grad_tiling<D>(p, launch.device);
    const KeyGradParts parts(launch.scratch, p, dbias, tiling.splits, kSums<D>);
    T* const out = static_cast<T*>(dkeys);
    const int64_t N = p.keys.rows;
    if (std::is_same_v<T, fp16>) find_coefficient_scale(p, grads, parts.coefficient_scale, launch.stream);
    const KeyCoefficients<T> reduction{ProblemView(p, launch.scale_factor),
                                       grads,
                                       p.keys.dim,
                                       parts.coefficient_scale,
                                       parts.keys ? nullptr : out,
                                       parts.keys,
                                       parts.bias ? parts.bias : dbias};
    launch_two_products<T, D>(p.keys, p.query, reduction, tiling, launch.stream);
    if (parts.keys)
      sum_splits(parts.keys, N * p.keys.dim, tiling.splits, 1.0f, nullptr, out, p.keys.dtype, launch.stream);
    if (parts.bias)
      sum_splits(parts.bias, N, tiling.splits * kSums<D>, 1.0f, nullptr, dbias, DType::f32, launch.stream);
  });
}

}  // namespace fastcompat::cuda::sm90
