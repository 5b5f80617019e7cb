// The Hopper tier of top-k: every dtype, metric and k, segments of up to 512 columns and 2^27 keys.
#pragma once
#include "engine.h"

namespace fastcompat::cuda::sm90 {

bool covers_topk(const std::vector<Segment>& segments);
size_t topk_scratch(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter,
                    const Launch& launch);
void topk(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter, float* scores,
          int64_t* ids, const Launch& launch);

}  // namespace fastcompat::cuda::sm90
