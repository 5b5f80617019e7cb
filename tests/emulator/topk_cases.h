// A top-k against a full sort: ids, ties and bits.
#pragma once
#include "search_cases.h"

namespace search_cases {

using namespace device_test;
using cuda::bf16;
using cuda::fp16;

// The functions under test, which a test program names.
struct TopkFunctions {
  decltype(&cuda::topk_scratch) scratch;
  decltype(&cuda::topk) topk;
};
extern const TopkFunctions tier;

struct Filter {
  std::vector<int64_t> query_labels, key_labels, exclude;  // empty: none
};

inline uint64_t check_topk(std::vector<Part>& parts, int64_t k, Metric metric, const Filter& filter = {}) {
  const int64_t queries = parts[0].query.rows;
  std::vector<Segment> segments;
  for (Part& part : parts) segments.push_back(part.segment());
  Buffer<float> scores(queries * k);
  Buffer<int64_t> ids(queries * k);
  Buffer<int64_t> query_labels(filter.query_labels), key_labels(filter.key_labels), exclude(filter.exclude);
  const TopkFilter on_device = {filter.query_labels.empty() ? nullptr : query_labels.data(),
                                filter.key_labels.empty() ? nullptr : key_labels.data(),
                                filter.exclude.empty() ? nullptr : exclude.data()};
  cuda::Launch launch = {};
  Buffer<unsigned char> scratch(tier.scratch(segments, k, metric, on_device, launch));
  launch.scratch = scratch.data();
  tier.topk(segments, k, metric, on_device, scores.data(), ids.data(), launch);
  cuda::check(cudaDeviceSynchronize(), "topk");
  const auto got_scores = same_bits(scores);
  const auto got_ids = same_bits(ids);
  for (int64_t i = 0; i < queries; ++i) {
    Ranked truth;
    for (const Part& part : parts)
      for (int64_t n = 0; n < part.count(); ++n) {
        const int64_t row = part.row(n), id = part.items.empty() ? row : part.items[row];
        if (id < 0) continue;
        if (!filter.exclude.empty() && filter.exclude[i] == id) continue;
        if (!filter.query_labels.empty() && filter.query_labels[i] >= 0 &&
            filter.query_labels[i] == filter.key_labels[id])
          continue;
        const float score =
            score32(part.query.row(i), part.keys.row(row), part.keys.dim, metric, part.scale, part.offset);
        if (score > -INF) truth.push_back({score, id});
      }
    sort_ranked(truth);
    truth.resize(k, {static_cast<float>(-INF), -1});
    long wrong = 0;
    for (int64_t r = 0; r < k; ++r)
      wrong += got_ids[i * k + r] != truth[r].second || got_scores[i * k + r] != truth[r].first;
    expect(!wrong, "%ld of row %ld's best %ld differ from the sort", wrong, long(i), long(k));
  }
  uint64_t flag;
  cuda::check(cudaMemcpy(&flag, scratch.data(), sizeof flag, cudaMemcpyDeviceToHost), "cudaMemcpy");
  return flag;
}

template <class T>
Part part_of(std::vector<float> query, int64_t queries, std::vector<float> keys, int64_t n, int64_t dim,
             int64_t padding = 0, int64_t shift = 0) {
  Part part;
  part.query = Rows::of<T>(std::move(query), queries, dim, padding, shift);
  part.keys = Rows::of<T>(std::move(keys), n, dim, padding, shift);
  return part;
}

template <class T>
void check_plain(int64_t queries, int64_t n, int64_t dim, int64_t k, Metric metric, int64_t padding = 0,
                 int64_t shift = 0) {
  std::vector<Part> parts = {part_of<T>(gauss(queries, dim, 1), queries, gauss(n, dim, 2), n, dim, padding, shift)};
  expect(check_topk(parts, k, metric) == cuda::all_finite, "a finite row was flagged");
}

// Numbers of items that fall and are spread over the segments; every fourth row is of none.
template <class T>
void check_items(int64_t dim) {
  const int64_t n = 700;
  std::vector<Part> parts;
  for (int part = 0; part < 2; ++part) {
    parts.push_back(part_of<T>(gauss(3, dim, 31), 3, duplicates(n, dim, 32, 40), n, dim));
    for (int64_t j = 0; j < n; ++j) parts[part].items.push_back(j % 4 ? static_cast<int32_t>(2 * (n - j) + part) : -1);
  }
  parts[1].all = false;
  for (int64_t j = 0; j < n; j += 3) parts[1].listed.push_back(j);
  for (const Metric metric : {Metric::cosine, Metric::ip, Metric::l2}) {
    check_topk(parts, 60, metric);
    check_topk(parts, 60, metric, {{}, {}, {2 * n - 2, -1, 5}});
  }
}

}  // namespace search_cases
