// The run of a top-k on any tier: lays out the scratch, screens segment after segment, merges. And the portable tier.
#include "merge.cuh"
#include "segments_sm80.cuh"
#include "topk_sm80.cuh"

namespace fastcompat::cuda {

// Both the layout and the search, so that they cannot differ.
size_t run_topk(const TopkTier& tier, const std::vector<Segment>& segments, int64_t k, Metric metric,
                const TopkFilter& filter, float* scores, int64_t* ids, const Launch& launch, bool runs) {
  using namespace sm80;
  if (segments.size() > MAX_SEGMENTS)
    throw std::invalid_argument("more than " + std::to_string(MAX_SEGMENTS) +
                                " segments: search in parts and merge the results");
  const int64_t queries = segments[0].query.rows;
  int64_t total = 0, longest = 0;
  for (const Segment& s : segments) {
    total += s.count;
    longest = std::max(longest, s.count);
  }
  if (total > 0xffffffffll)
    throw std::invalid_argument("more than 2**32 - 1 keys: search in parts and merge the results");
  const int64_t wanted = std::min(k, total), capacity = capacity_for(wanted);
  if (capacity > 0x7fffffff) throw std::invalid_argument("`k` is too large: at most 2**30");

  const int64_t list_bytes = capacity * (2 * sizeof(float) + sizeof(uint32_t)),
                rows_a_block = tier.rows_a_block(segments);
  auto cut = [&](int64_t rows) {
    const int64_t blocks = (rows + rows_a_block - 1) / rows_a_block;
    const int splits = splits_for(blocks, tiles_in(longest), launch.device, tier.blocks_a_processor);
    // Each split keeps a list of its own, which is worth it where it sees several times as many keys as it keeps.
    return static_cast<int>(std::min<int64_t>(splits, std::max<int64_t>(1, longest / (4 * capacity))));
  };
  int64_t batch = std::max<int64_t>(tiles_in(queries), 1) * TILE;
  batch = std::clamp<int64_t>(limits.candidate_bytes / (list_bytes * cut(batch)) / TILE * TILE, TILE, batch);
  const int splits = cut(batch);

  Scratch scratch(runs ? launch.scratch : nullptr);
  code_t* flag = scratch.take<code_t>(1);
  TopkProblem problem = {};
  problem.lists = {scratch.take<float>(batch * splits * capacity), scratch.take<float>(batch * splits * capacity),
                   scratch.take<uint32_t>(batch * splits * capacity)};
  problem.counts = scratch.take<int>(batch * splits);
  problem.thresholds = scratch.take<uint32_t>(batch);
  problem.splits = splits;
  problem.capacity = static_cast<int>(capacity);
  problem.k = static_cast<int>(wanted);
  problem.filter = filter;
  std::vector<SegmentScreen> screens;
  int64_t start = 0;
  for (const Segment& s : segments) {
    const int n = static_cast<int>(screens.size());
    screens.emplace_back(s, metric, n, 1, start, batch, flag, scratch, tier.gathers);
    problem.gallery.spaces[n] = screens.back().space();
    start += s.count;
  }
  problem.gallery.n = static_cast<int>(screens.size());
  if (!runs) return scratch.bytes();

  const auto stream = static_cast<cudaStream_t>(launch.stream);
  check(cudaMemsetAsync(flag, 0xff, sizeof *flag, stream), "memset");
  int64_t first = 0;
  do {
    const int64_t end = std::min(first + batch, queries);
    check(cudaMemsetAsync(problem.counts, 0, static_cast<size_t>(batch * splits) * sizeof(int), stream), "memset");
    check(cudaMemsetAsync(problem.thresholds, 0, static_cast<size_t>(batch) * sizeof(uint32_t), stream), "memset");
    for (const SegmentScreen& s : screens) {
      s.read_queries(first, end, stream);
      for (int64_t from = 0; from < s.space().segment.count; from += s.block()) {
        const int64_t to = std::min(from + s.block(), s.space().segment.count);
        if (first == 0 || s.packs_keys()) s.read_keys(from, to, nullptr, nullptr, stream);
        if (wanted) tier.screen(s.screen(first, end, from, to), problem, launch);
      }
    }
    if (first < end)
      merge({problem.lists, problem.counts, splits, problem.capacity, problem.k, k, first, scores, ids},
            problem.gallery, end - first, stream);
    first = end;
  } while (first < queries);
  return 0;
}

namespace sm80 {
namespace {

const TopkTier tier = {true, 2, [](const std::vector<Segment>&) { return TILE; },
                       [](const Screen& screen, const TopkProblem& problem, const Launch& launch) {
                         run_screen<Topk>(screen, problem, problem.splits, launch.stream);
                       }};

}  // namespace

size_t topk_scratch(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter,
                    const Launch& launch) {
  return run_topk(tier, segments, k, metric, filter, nullptr, nullptr, launch, false);
}

void topk(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter, float* scores,
          int64_t* ids, const Launch& launch) {
  run_topk(tier, segments, k, metric, filter, scores, ids, launch, true);
}

}  // namespace sm80
}  // namespace fastcompat::cuda
