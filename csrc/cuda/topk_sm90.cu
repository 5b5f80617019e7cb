// Host side of top-k on Hopper: which problems it takes, how a screen is launched.
#include "tiers.h"
#include "topk_sm90.cuh"

namespace fastcompat::cuda::sm90 {
namespace {

constexpr int64_t kWidest = 512, kMostKeys = int64_t(1) << 27;  // Survivor::where numbers them

int fragments(int64_t dim, int64_t queries) { return dim > kWidest / 2 || queries <= 128 ? 1 : 2; }

template <class T, int FRAGMENTS>
void screen_with(const sm80::Screen& screen, const TopkProblem& problem, const Launch& launch) {
  auto map_of = [&](const sm80::Operand& m, int64_t end, int box_rows) {
    return make_tensor_map(reinterpret_cast<const T*>(m.data), end - m.first, m.columns, box_rows, kPanel, m.stride);
  };
  const int64_t queries = screen.end_query - screen.first_query, keys = screen.end - screen.begin;
  Walk walk = make_walk(queries, keys, 128 * FRAGMENTS, TILE);
  walk.tiles_per_split = (walk.tiles + problem.splits - 1) / problem.splits;
  const int splits = (walk.tiles + walk.tiles_per_split - 1) / walk.tiles_per_split;
  const int panels = static_cast<int>((screen.query.columns + kPanel - 1) / kPanel);
  launch_cluster(walk.cluster, screen_topk<T, FRAGMENTS>, dim3(static_cast<unsigned>(walk.blocks) * splits),
                 dim3(kThreads), TopkMemory::kBytes, launch.stream, map_of(screen.query, screen.end_query, 128),
                 map_of(screen.keys, screen.end, TILE / 2), screen, problem, walk, panels);
}

void screen_keys(const sm80::Screen& screen, const TopkProblem& problem, const Launch& launch) {
  if (screen.first_query >= screen.end_query || screen.begin >= screen.end) return;
  const Segment& s = screen.space.segment;
  const bool half = s.keys.dtype == DType::f16;
  if (fragments(s.keys.dim, screen.end_query - screen.first_query) == 1)
    half ? screen_with<fp16, 1>(screen, problem, launch) : screen_with<bf16, 1>(screen, problem, launch);
  else
    half ? screen_with<fp16, 2>(screen, problem, launch) : screen_with<bf16, 2>(screen, problem, launch);
}

// By the widest segment; the others take what is fewer blocks.
int rows_a_block(const std::vector<Segment>& segments) {
  int64_t dim = 0;
  for (const Segment& s : segments) dim = std::max(dim, s.keys.dim);
  return 128 * fragments(dim, segments[0].query.rows);
}

const TopkTier tier = {false, 1, rows_a_block, screen_keys};

}  // namespace

bool covers_topk(const std::vector<Segment>& segments) {
  return std::all_of(segments.begin(), segments.end(),
                     [](const Segment& s) { return s.keys.dim <= kWidest && s.count <= kMostKeys; });
}

size_t topk_scratch(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter,
                    const Launch& launch) {
  return run_topk(tier, segments, k, metric, filter, nullptr, nullptr, launch, false);
}

void topk(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter, float* scores,
          int64_t* ids, const Launch& launch) {
  run_topk(tier, segments, k, metric, filter, scores, ids, launch, true);
}

}  // namespace fastcompat::cuda::sm90
