// The portable tier of search: the functions of engine.h on sm_80 and newer.
#pragma once
#include "engine.h"

namespace fastcompat::cuda::sm80 {

// What a call's scratch holds at most, besides a few words per row. Tests make it small.
struct Limits {
  int64_t packed_bytes;     // of keys
  int64_t candidate_bytes;  // more queries are searched in batches
};
inline Limits limits = {64ll << 20, 1ll << 30};

size_t topk_scratch(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter,
                    const Launch& launch);
void topk(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter, float* scores,
          int64_t* ids, const Launch& launch);

size_t pair_scores_scratch(const Segment& segment, Metric metric, int64_t targets, const Launch& launch);
void pair_scores(const Segment& segment, Metric metric, const int64_t* ids, int64_t targets, float* out,
                 const Launch& launch);

size_t count_beats_scratch(const Segment& segment, Metric metric, int64_t blocks, int64_t targets,
                           const Launch& launch);
void count_beats(const Segment& segment, Metric metric, const int64_t* bounds, int64_t blocks, const float* thresholds,
                 const int64_t* threshold_ids, int64_t targets, const int64_t* exclude, int64_t* out,
                 const Launch& launch);

}  // namespace fastcompat::cuda::sm80
