// Pair scores and beat-counts of the portable tier: the float of every pair, and counts against comparing them all.
#include "search_cases.h"
#include "tiers.h"

using namespace fastcompat;
using namespace device_test;
using namespace search_cases;
using cuda::bf16;
using cuda::fp16;

namespace {

template <class T>
Part part_of(std::vector<float> query, int64_t queries, std::vector<float> keys, int64_t n, int64_t dim,
             int64_t padding = 0, int64_t shift = 0) {
  Part part;
  part.query = Rows::of<T>(std::move(query), queries, dim, padding, shift);
  part.keys = Rows::of<T>(std::move(keys), n, dim, padding, shift);
  return part;
}

std::vector<float> pair_scores(const Segment& s, Metric metric, const std::vector<int64_t>& ids, uint64_t* flag) {
  Buffer<int64_t> on_device(ids);
  Buffer<float> out(ids.size());
  cuda::Launch launch = {};
  const int64_t targets = s.query.rows ? static_cast<int64_t>(ids.size()) / s.query.rows : 0;
  Buffer<unsigned char> scratch(cuda::sm80::pair_scores_scratch(s, metric, targets, launch));
  launch.scratch = scratch.data();
  cuda::sm80::pair_scores(s, metric, on_device.data(), targets, out.data(), launch);
  cuda::check(cudaDeviceSynchronize(), "pair_scores");
  cuda::check(cudaMemcpy(flag, scratch.data(), sizeof *flag, cudaMemcpyDeviceToHost), "cudaMemcpy");
  return same_bits(out);
}

// Every id from -1 to one past the end.
void check_pairs(Part part, Metric metric) {
  const int64_t queries = part.query.rows, n = part.keys.rows, columns = n + 2;
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < queries * columns; ++i) ids.push_back(i % columns - 1);
  uint64_t flag;
  const auto got = pair_scores(part.segment(), metric, ids, &flag);
  expect(flag == cuda::all_finite, "a finite row was flagged");
  for (int64_t i = 0; i < queries; ++i) {
    const float* q = part.query.row(i);
    const int64_t first = i * columns;
    expect(got[first] == -INF && std::isnan(got[first + n + 1]), "ids outside the keys");
    for (int64_t j = 0; j < n; ++j) {
      const float* k = part.keys.row(j);
      const float score = got[first + 1 + j];
      expect(score == score32(q, k, part.keys.dim, metric), "pair (%ld, %ld) has other bits", long(i), long(j));
      expect_close(score, score64(q, k, part.keys.dim, metric), allowed_error(q, k, part.keys.dim, metric), "score", i,
                   j);
    }
  }
}

// Targets of every row: some keys, a missing one, and, with `foreign`, thresholds of other rows.
void check_beats(Part part, Metric metric, std::vector<int64_t> bounds, int64_t targets, bool foreign = false,
                 bool excludes = false) {
  const int64_t queries = part.query.rows, n = part.keys.rows, blocks = static_cast<int64_t>(bounds.size()) - 1;
  std::vector<float> thresholds;
  std::vector<int64_t> ids, exclude;
  auto score = [&](int64_t i, int64_t j) {
    return score32(part.query.row(i), part.keys.row(j), part.keys.dim, metric);
  };
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t p = 0; p < targets; ++p) {
      const int64_t id = p == 1 ? -1 : (i * 31 + p * p * 17) % n;
      ids.push_back(id);
      thresholds.push_back(id < 0 ? static_cast<float>(-INF) : score((i + foreign) % queries, id));
    }
    exclude.push_back(i % 3 == 2 ? -1 : (i * 31) % n);
  }
  Buffer<int64_t> d_bounds(bounds), d_ids(ids), d_exclude(exclude), out(queries * targets * blocks);
  Buffer<float> d_thresholds(thresholds);
  cuda::Launch launch = {};
  const Segment segment = part.segment();
  Buffer<unsigned char> scratch(cuda::sm80::count_beats_scratch(segment, metric, blocks, targets, launch));
  launch.scratch = scratch.data();
  cuda::sm80::count_beats(segment, metric, d_bounds.data(), blocks, d_thresholds.data(), d_ids.data(), targets,
                          excludes ? d_exclude.data() : nullptr, out.data(), launch);
  cuda::check(cudaDeviceSynchronize(), "count_beats");
  const auto got = same_bits(out);
  for (int64_t i = 0; i < queries; ++i) {
    std::vector<int64_t> truth(targets * blocks);
    for (int64_t t = 0; t < blocks; ++t)
      for (int64_t m = bounds[t]; m < bounds[t + 1]; ++m) {
        const int64_t id = part.row(m);
        if (excludes && exclude[i] == id) continue;
        const float s = score(i, id);
        for (int64_t p = 0; p < targets; ++p) {
          const int64_t own = ids[i * targets + p];
          const float bar = thresholds[i * targets + p];
          truth[p * blocks + t] += own >= 0 && (s > bar || (s == bar && id < own));
        }
      }
    long wrong = 0;
    for (int64_t at = 0; at < targets * blocks; ++at) wrong += got[i * targets * blocks + at] != truth[at];
    expect(!wrong, "%ld counts of row %ld differ from comparing all", wrong, long(i));
  }
  uint64_t flag;
  cuda::check(cudaMemcpy(&flag, scratch.data(), sizeof flag, cudaMemcpyDeviceToHost), "cudaMemcpy");
  expect(flag == cuda::all_finite, "a finite row was flagged");
}

}  // namespace

DEVICE_TEST_OF_SIZES(pairs_have_the_documented_bits) {
  for (Metric metric : {Metric::cosine, Metric::ip, Metric::l2}) {
    check_pairs(part_of<float>(gauss(3, 300, 1), 3, gauss(20, 300, 2), 20, 300), metric);
    check_pairs(part_of<bf16>(gauss(3, 77, 1), 3, gauss(20, 77, 2), 20, 77, 3, 1), metric);
    check_pairs(part_of<fp16>(gauss(3, 16, 1), 3, gauss(20, 16, 2), 20, 16), metric);
    check_pairs(part_of<float>(mixed_norms(5, 12, 3, 8), 5, mixed_norms(20, 12, 4, 8), 20, 12), metric);
  }
  check_pairs(part_of<float>(mixed_norms(5, 12, 3, 14), 5, mixed_norms(20, 12, 4, 14), 20, 12), Metric::cosine);
}

DEVICE_TEST_OF_VALUES(pairs_without_queries_or_keys) {
  check_pairs(part_of<bf16>({}, 0, gauss(4, 8, 1), 4, 8), Metric::ip);
  check_pairs(part_of<bf16>(gauss(3, 8, 1), 3, {}, 0, 8), Metric::ip);
}

DEVICE_TEST(pairs_flag_only_rows_that_are_read) {
  auto keys = gauss(6, 8, 1), query = gauss(3, 8, 2);
  keys[2 * 8 + 1] = NAN;
  keys[5 * 8] = INFINITY;
  Part part = part_of<float>(query, 3, keys, 6, 8);
  uint64_t flag;
  pair_scores(part.segment(), Metric::ip, {0, 1, 3, 4, 0, 1}, &flag);
  expect(flag == cuda::all_finite, "a key that no pair names was read");
  pair_scores(part.segment(), Metric::ip, {0, 5, 3, 4, 2, 1}, &flag);
  expect(flag == cuda::nonfinite_code(0, true, 2), "another row than key 2");
  query[8] = NAN;
  part.query = Rows::of<float>(query, 3, 8);
  pair_scores(part.segment(), Metric::ip, {5, -1, 2}, &flag);
  expect(flag == cuda::nonfinite_code(0, false, 1), "another row than query 1");
}

DEVICE_TEST(beats_every_way_through_the_kernels) {
  check_beats(part_of<float>(gauss(2, 24, 1), 2, near_ties(300, 24, 2, 1e-4f), 300, 24), Metric::cosine, {0, 140, 300},
              6, false, true);
}

DEVICE_TEST_OF_VALUES(beats_every_dtype_and_metric) {
  for (Metric metric : {Metric::cosine, Metric::ip, Metric::l2}) {
    check_beats(part_of<float>(gauss(4, 40, 1), 4, gauss(500, 40, 2), 500, 40), metric, {0, 500}, 5);
    check_beats(part_of<bf16>(gauss(4, 40, 1), 4, gauss(500, 40, 2), 500, 40), metric, {0, 500}, 5);
    check_beats(part_of<fp16>(gauss(4, 33, 1), 4, gauss(500, 33, 2), 500, 33), metric, {0, 500}, 5);
  }
}

DEVICE_TEST_OF_SIZES(beats_in_blocks_of_a_walk) {
  Part part = part_of<float>(gauss(130, 16, 3), 130, gauss(700, 16, 4), 700, 16);
  check_beats(part, Metric::cosine, {0, 0, 1, 100, 100, 333, 700, 700}, 4, false, true);
  part.all = false;
  for (int64_t m = 0; m < 600; ++m) part.listed.push_back((m * 271 + 5) % 700);
  check_beats(part, Metric::l2, {13, 200, 201, 590}, 6, true, true);
}

DEVICE_TEST_OF_VALUES(beats_near_ties_and_duplicates) {
  check_beats(part_of<float>(gauss(3, 32, 5), 3, near_ties(600, 32, 6, 1e-7f), 600, 32), Metric::cosine, {0, 300, 600},
              20);
  check_beats(part_of<float>(gauss(3, 32, 5), 3, near_ties(600, 32, 6, 1e-4f), 600, 32), Metric::l2, {0, 300, 600}, 20);
  check_beats(part_of<float>(gauss(3, 24, 7), 3, duplicates(600, 24, 8, 5), 600, 24), Metric::ip, {0, 600}, 9, false,
              true);
  check_beats(part_of<bf16>(gauss(3, 24, 7), 3, duplicates(600, 24, 8, 5), 600, 24), Metric::cosine, {0, 600}, 9);
}

DEVICE_TEST_OF_VALUES(beats_l2_far_from_the_origin) {
  for (float mean : {30.0f, 3e4f})
    check_beats(part_of<float>(far_away(6, 16, 5, mean), 6, far_away(400, 16, 6, mean), 400, 16), Metric::l2,
                {0, 170, 400}, 12, true);
  check_beats(part_of<bf16>(far_away(6, 48, 5, 30), 6, far_away(400, 48, 6, 30), 400, 48), Metric::l2, {0, 400}, 12);
}

DEVICE_TEST_OF_VALUES(beats_norms_of_every_size) {
  for (Metric metric : {Metric::cosine, Metric::ip, Metric::l2}) {
    check_beats(part_of<float>(mixed_norms(6, 16, 9, 3), 6, mixed_norms(400, 16, 10, 5), 400, 16), metric,
                {0, 170, 400}, 12, true);
    check_beats(part_of<fp16>(mixed_norms(6, 16, 9, 2), 6, mixed_norms(400, 16, 10, 3), 400, 16), metric, {0, 170, 400},
                12);
  }
  check_beats(part_of<float>(mixed_norms(6, 16, 9, 25), 6, mixed_norms(400, 16, 10, 30), 400, 16), Metric::cosine,
              {0, 400}, 12);
}

DEVICE_TEST_OF_SIZES(beats_blocks_of_keys_and_many_targets) {
  cuda::sm80::limits.packed_bytes = 1;
  check_beats(part_of<float>(gauss(2, 24, 11), 2, gauss(500, 24, 12), 500, 24), Metric::ip, {0, 200, 500}, 3);
  cuda::sm80::limits.packed_bytes = 64ll << 20;
  check_beats(part_of<bf16>(gauss(2, 8, 11), 2, gauss(400, 8, 12), 400, 8), Metric::ip, {0, 200, 400}, 300);
}

DEVICE_TEST_OF_SIZES(beats_without_queries_keys_targets_or_blocks) {
  check_beats(part_of<bf16>({}, 0, gauss(4, 8, 1), 4, 8), Metric::ip, {0, 4}, 2);
  check_beats(part_of<bf16>(gauss(2, 8, 1), 2, gauss(4, 8, 1), 4, 8), Metric::ip, {0, 4}, 0);
  check_beats(part_of<bf16>(gauss(2, 8, 1), 2, gauss(4, 8, 1), 4, 8), Metric::ip, {2}, 2);
  check_beats(part_of<bf16>(gauss(2, 8, 1), 2, gauss(4, 8, 1), 4, 8), Metric::ip, {2, 2}, 2);
}

DEVICE_TEST_OF_VALUES(rank_of_the_rth_best_is_r) {
  const int64_t queries = 5, n = 600, k = 40;
  for (Metric metric : {Metric::cosine, Metric::l2}) {
    Part part = part_of<float>(gauss(queries, 20, 13), queries, near_ties(n, 20, 14, 1e-3f), n, 20);
    const Segment segment = part.segment();
    Buffer<float> scores(queries * k);
    Buffer<int64_t> ids(queries * k), ranks(queries * k), bounds(std::vector<int64_t>{0, n});
    cuda::Launch launch = {};
    Buffer<unsigned char> scratch(std::max(cuda::sm80::topk_scratch({segment}, k, metric, {}, launch),
                                           cuda::sm80::count_beats_scratch(segment, metric, 1, k, launch)));
    launch.scratch = scratch.data();
    cuda::sm80::topk({segment}, k, metric, {}, scores.data(), ids.data(), launch);
    cuda::sm80::count_beats(segment, metric, bounds.data(), 1, scores.data(), ids.data(), k, nullptr, ranks.data(),
                            launch);
    cuda::check(cudaDeviceSynchronize(), "ranks");
    const auto got = same_bits(ranks);
    for (int64_t i = 0; i < queries * k; ++i)
      expect(got[i] == i % k, "best %ld has rank %ld", long(i % k), long(got[i]));
  }
}
