// Host side of the Hopper tier: which problems it takes, where the work is cut, what is launched.
#include "finish_sm90.cuh"
#include "one_product_sm90.cuh"
#include "softmax_sm90.cuh"
#include "softmax_sm90.h"

namespace fastcompat::cuda::sm90 {
namespace {

constexpr int kLargest = 512;
constexpr int64_t kMostRows = (int64_t(1) << 31) - 1024;  // coordinates are 32 bits wide
constexpr int64_t kTileBytes = 8 << 20;                   // what memory moves while a tile is computed

bool suits(const Matrix& m) {
  return m.rows > 0 && m.rows < kMostRows && m.dim % 8 == 0 && m.stride % 8 == 0 && m.stride >= m.dim &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

bool suits(const SoftmaxProblem& p) {
  return p.query.dtype != DType::f32 && p.query.dim <= kLargest && suits(p.query) && suits(p.keys);
}

// Splits cost waves of blocks (in tiles, with 3 for a block's start and end) and traffic of their [rows, dim] results.
// They depend on shapes and the device alone.
struct Tiling {
  Walk walk;
  int splits;

  Tiling(int64_t rows, int64_t columns, int rows_a_block, int columns_a_tile, int64_t result_bytes, int device) {
    int units = 0;
    check(cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
    const int64_t blocks = (rows + rows_a_block - 1) / rows_a_block;
    walk.cluster = blocks > 1 ? 2 : 1;
    walk.blocks = static_cast<int>((blocks + walk.cluster - 1) / walk.cluster * walk.cluster);
    walk.tiles = static_cast<int>((columns + columns_a_tile - 1) / columns_a_tile);
    int64_t best = INT64_MAX;
    for (int64_t s = 1; s <= walk.tiles && (s == 1 || walk.blocks * s <= 4 * units); ++s) {
      const int64_t tiles = (walk.tiles + s - 1) / s;
      const int64_t cuts = (walk.tiles + tiles - 1) / tiles, waves = (walk.blocks * cuts + units - 1) / units;
      const int64_t cost = waves * (tiles + 3) + (cuts > 1 ? 2 * cuts * result_bytes / kTileBytes : 0);
      if (cost >= best) continue;
      best = cost;
      walk.tiles_per_split = static_cast<int>(tiles);
      splits = static_cast<int>(cuts);
    }
  }
  dim3 grid() const { return dim3(static_cast<unsigned>(walk.blocks) * splits); }
};

// Consecutive arrays in scratch memory.
class Scratch {
 public:
  explicit Scratch(void* start) : start_(static_cast<char*>(start)) {}
  template <class T>
  T* take(int64_t count) {
    T* here = start_ ? reinterpret_cast<T*>(start_ + bytes_) : nullptr;
    bytes_ += (count * sizeof(T) + 255) / 256 * 256;
    return here;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* start_;
  size_t bytes_ = 0;
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

template <class Parts>
size_t place_stats(Parts& parts, void* memory, const SoftmaxProblem& p, bool want_mean, int splits, int sums) {
  Scratch scratch(memory);
  const int64_t B = p.query.rows, cells = splits * sums * B;
  const bool by_label = p.query_labels && !p.positive;
  parts.ref = scratch.take<float>(cells);
  parts.sum = scratch.take<float>(cells);
  parts.other_means = want_mean ? scratch.take<float>((splits - 1) * B * p.query.dim) : nullptr;
  parts.pos_ref = by_label ? scratch.take<float>(cells) : nullptr;
  parts.pos_sum = by_label ? scratch.take<float>(cells) : nullptr;
  parts.pos_total = by_label ? scratch.take<float>(cells) : nullptr;
  parts.pos_count = by_label ? scratch.take<int>(cells) : nullptr;
  return scratch.bytes();
}

template <class T>
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
  dispatch(p, [&](auto t, auto d) {
    LogSumExp<decltype(t), 0> parts{ProblemView(p, nullptr)};
    bytes = place_stats(parts, nullptr, p, want_mean, stats_tiling<d>(p, want_mean, launch.device).splits,
                        want_mean ? kSums<d> : 1);
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
    auto prepared = [&](auto reduction) {
      reduction.dim = p.query.dim;
      reduction.mean = out.mean;
      place_stats(reduction, launch.scratch, p, out.mean, tiling.splits, sums);
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
    const auto blocks = static_cast<unsigned>((p.query.rows + kFinishWarps - 1) / kFinishWarps);
    cuda::launch(finish_stats<T>, dim3(blocks), dim3(32 * kFinishWarps), 0, launch.stream, p, problem,
                 prepared(LogSumExp<T, 0>{problem}), out, tiling.splits, sums);
  });
}

bool covers_key_grad(const SoftmaxProblem& p, bool want_keys) { return want_keys && suits(p); }

size_t softmax_key_grad_scratch(const SoftmaxProblem& p, const SoftmaxGrads&, bool, bool want_bias,
                                const Launch& launch) {
  size_t bytes = 0;
  dispatch(p, [&](auto t, auto d) {
    bytes =
        KeyGradParts<decltype(t)>(nullptr, p, want_bias, key_grad_tiling<d>(p, launch.device).splits, kSums<d>).bytes;
  });
  return bytes;
}

void softmax_key_grad(const SoftmaxProblem& p, const SoftmaxGrads& grads, void* dkeys, float* dbias,
                      const Launch& launch) {
  dispatch(p, [&](auto t, auto d) {
    using T = decltype(t);
    constexpr int D = d;
    const Tiling tiling = key_grad_tiling<D>(p, launch.device);
    const KeyGradParts<T> parts(launch.scratch, p, dbias, tiling.splits, kSums<D>);
    T* const out = static_cast<T*>(dkeys);
    const int64_t N = p.keys.rows, quads = N * p.keys.dim / 4;
    auto blocks = [](int64_t threads) { return dim3(static_cast<unsigned>((threads + 255) / 256)); };
    if (std::is_same_v<T, fp16>)
      cuda::launch(find_coefficient_scale, dim3(1), dim3(1024), 32 * sizeof(float), launch.stream,
                   ProblemView(p, launch.scale_factor), grads, parts.coefficient_scale);
    const KeyCoefficients<T> reduction{ProblemView(p, launch.scale_factor),
                                       grads,
                                       p.keys.dim,
                                       parts.coefficient_scale,
                                       parts.keys ? nullptr : out,
                                       parts.keys,
                                       parts.bias ? parts.bias : dbias};
    launch_two_products<T, D>(p.keys, p.query, reduction, tiling, launch.stream);
    if (parts.keys)
      cuda::launch(finish_key_grad<T>, blocks(quads), dim3(256), 0, launch.stream, parts.keys, out, quads,
                   tiling.splits);
    if (parts.bias)
      cuda::launch(finish_bias_grad, blocks(N), dim3(256), 0, launch.stream, parts.bias, dbias, N,
                   tiling.splits * kSums<D>);
  });
}

}  // namespace fastcompat::cuda::sm90
