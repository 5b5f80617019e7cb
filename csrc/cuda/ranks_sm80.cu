// Pair scores and beat-counts on the portable tier.
#include "ranks_sm80.cuh"
#include "segments_sm80.cuh"

namespace fastcompat::cuda::sm80 {
namespace {

unsigned blocks_of(int64_t threads) { return static_cast<unsigned>((threads + THREADS - 1) / THREADS); }

size_t run_beats(const Segment& s, Metric metric, const int64_t* bounds, int64_t blocks, const float* thresholds,
                 const int64_t* threshold_ids, int64_t targets, const int64_t* exclude, int64_t* out, const Launch& run,
                 bool runs) {
  const int64_t queries = s.query.rows;
  Scratch scratch(run.scratch);
  code_t* flag = scratch.take<code_t>(1);
  code_t* codes = scratch.take<code_t>(queries * targets);
  int* places = scratch.take<int>(queries * targets);
  const SegmentScreen screen(s, metric, 0, 2, 0, queries, flag, scratch);
  if (!runs) return scratch.bytes();

  const auto stream = static_cast<cudaStream_t>(run.stream);
  auto* counts = reinterpret_cast<unsigned long long*>(out);
  check(cudaMemsetAsync(flag, 0xff, sizeof *flag, stream), "memset");
  check(cudaMemsetAsync(out, 0, static_cast<size_t>(queries * targets * blocks) * sizeof *out, stream), "memset");
  const int64_t chunks = (targets + THREADS - 1) / THREADS;
  const bool any = queries && targets && blocks;
  if (any)
    launch(sort_targets_kernel, dim3(static_cast<unsigned>(queries * chunks)), dim3(THREADS), 0, stream, thresholds,
           threshold_ids, targets, static_cast<int>(chunks), codes, places);
  screen.read_queries(0, queries, stream);
  const int splits = splits_for(tiles_in(queries), tiles_in(screen.block()), run.device);
  for (int64_t first = 0; first < s.count; first += screen.block()) {
    const int64_t end = std::min(first + screen.block(), s.count);
    screen.read_keys(first, end, bounds, bounds + blocks, stream);
    if (any)
      run_screen<Beats>(screen.screen(0, queries, first, end),
                        {bounds, blocks, codes, places, targets, exclude, counts}, splits, stream);
  }
  if (any)
    launch(sum_targets_kernel, dim3(blocks_of(queries * blocks)), dim3(THREADS), 0, stream, places, targets, blocks,
           queries * blocks, counts);
  return 0;
}

}  // namespace

size_t count_beats_scratch(const Segment& segment, Metric metric, int64_t blocks, int64_t targets,
                           const Launch& launch) {
  Launch sizes = launch;
  sizes.scratch = nullptr;
  return run_beats(segment, metric, nullptr, blocks, nullptr, nullptr, targets, nullptr, nullptr, sizes, false);
}

void count_beats(const Segment& segment, Metric metric, const int64_t* bounds, int64_t blocks, const float* thresholds,
                 const int64_t* threshold_ids, int64_t targets, const int64_t* exclude, int64_t* out,
                 const Launch& launch) {
  run_beats(segment, metric, bounds, blocks, thresholds, threshold_ids, targets, exclude, out, launch, true);
}

size_t pair_scores_scratch(const Segment&, Metric, int64_t, const Launch&) { return sizeof(code_t); }

void pair_scores(const Segment& segment, Metric metric, const int64_t* ids, int64_t targets, float* out,
                 const Launch& run) {
  check_sizes(segment);
  const auto stream = static_cast<cudaStream_t>(run.stream);
  auto* flag = static_cast<code_t*>(run.scratch);
  check(cudaMemsetAsync(flag, 0xff, sizeof *flag, stream), "memset");
  const int64_t pairs = segment.query.rows * std::max<int64_t>(targets, 1);
  if (pairs)
    launch(pair_kernel, dim3(blocks_of(32 * pairs)), dim3(THREADS), 0, stream,
           PairProblem{segment, metric, ids, targets, out, flag});
}

}  // namespace fastcompat::cuda::sm80
