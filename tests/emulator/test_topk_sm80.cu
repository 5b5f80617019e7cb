// Top-k of the portable tier against a full sort: ids, ties and bits.
#include "tiers.h"
#include "topk_cases.h"

using namespace fastcompat;
using namespace device_test;
using namespace search_cases;
using cuda::bf16;
using cuda::fp16;

const TopkFunctions search_cases::tier = {cuda::sm80::topk_scratch, cuda::sm80::topk};

// Packing, splits, lists that fill, candidates rescored in place, labels, the merge.
DEVICE_TEST(topk_every_way_through_the_kernels) {
  std::vector<Part> parts = {part_of<float>(gauss(2, 24, 1), 2, near_ties(1100, 24, 2, 1e-5f), 1100, 24)};
  Filter filter = {{1, 2}, {}, {7, -1}};
  for (int64_t j = 0; j < 1100; ++j) filter.key_labels.push_back(j % 4);
  check_topk(parts, 10, Metric::cosine, filter);
}

DEVICE_TEST_OF_VALUES(topk_every_dtype_and_metric) {
  for (Metric metric : {Metric::cosine, Metric::ip, Metric::l2}) {
    check_plain<float>(3, 700, 40, 5, metric);
    check_plain<bf16>(3, 700, 40, 5, metric);
    check_plain<fp16>(3, 700, 40, 5, metric);
  }
}

DEVICE_TEST_OF_SIZES(topk_sizes) {
  check_plain<float>(1, 1, 1, 1, Metric::ip);
  check_plain<bf16>(129, 300, 33, 3, Metric::cosine);
  check_plain<bf16>(2, 257, 7, 10, Metric::l2);
  check_plain<fp16>(1, 128, 264, 128, Metric::ip);
  check_plain<float>(2, 130, 520, 4, Metric::cosine);
  check_plain<bf16>(0, 50, 8, 2, Metric::ip);
  check_plain<bf16>(2, 0, 8, 2, Metric::ip);
}

DEVICE_TEST_OF_SIZES(topk_any_stride) {
  check_plain<bf16>(4, 300, 20, 6, Metric::l2, 4);     // read in place, with a tail
  check_plain<bf16>(4, 300, 20, 6, Metric::l2, 3);     // packed
  check_plain<bf16>(4, 300, 24, 6, Metric::l2, 0, 1);  // packed: the first row is not aligned
  check_plain<fp16>(4, 300, 19, 6, Metric::cosine, 2, 3);
  check_plain<float>(4, 300, 19, 6, Metric::cosine, 1, 1);
}

DEVICE_TEST_OF_VALUES(topk_splits_batches_and_blocks_of_keys) {
  cuda::sm80::limits = {1, 1};  // 128 keys and 128 queries at a time
  check_plain<float>(130, 300, 16, 4, Metric::cosine);
  check_plain<bf16>(130, 1100, 8, 2, Metric::ip);
  cuda::sm80::limits = {64ll << 20, 1ll << 30};
  check_plain<bf16>(2, 5000, 8, 3, Metric::l2);
}

DEVICE_TEST_OF_VALUES(topk_near_ties) {
  for (float relative : {1e-7f, 1e-5f, 3e-3f}) {
    std::vector<Part> parts = {part_of<float>(gauss(2, 32, 3), 2, near_ties(1300, 32, 4, relative), 1300, 32)};
    check_topk(parts, 20, Metric::cosine);
    check_topk(parts, 20, Metric::l2);
  }
  std::vector<Part> halves = {part_of<bf16>(near_ties(3, 64, 8, 0.1f), 3, near_ties(900, 64, 8, 4e-3f), 900, 64)};
  check_topk(halves, 100, Metric::ip);
}

DEVICE_TEST_OF_VALUES(topk_duplicates_tie_by_id) {
  std::vector<Part> parts = {part_of<float>(gauss(3, 24, 5), 3, duplicates(1400, 24, 6, 3), 1400, 24)};
  for (Metric metric : {Metric::cosine, Metric::ip, Metric::l2}) check_topk(parts, 30, metric);
  std::vector<Part> halves = {part_of<fp16>(gauss(3, 24, 5), 3, duplicates(1400, 24, 6, 2), 1400, 24)};
  check_topk(halves, 500, Metric::cosine);
}

DEVICE_TEST_OF_VALUES(topk_l2_far_from_the_origin) {
  for (float mean : {30.0f, 3e4f}) {
    std::vector<Part> parts = {part_of<float>(far_away(6, 16, 5, mean), 6, far_away(400, 16, 6, mean), 400, 16)};
    check_topk(parts, 7, Metric::l2);
  }
  std::vector<Part> halves = {part_of<bf16>(far_away(6, 48, 5, 30), 6, far_away(400, 48, 6, 30), 400, 48)};
  check_topk(halves, 7, Metric::l2);
}

DEVICE_TEST_OF_VALUES(topk_norms_of_every_size) {
  for (Metric metric : {Metric::cosine, Metric::ip, Metric::l2}) {
    std::vector<Part> parts = {part_of<float>(mixed_norms(7, 16, 7, 3), 7, mixed_norms(800, 16, 8, 5), 800, 16)};
    check_topk(parts, 12, metric);
    std::vector<Part> extreme = {part_of<float>(mixed_norms(6, 16, 9, 21), 6, mixed_norms(300, 16, 10, 30), 300, 16)};
    check_topk(extreme, 12, metric);
    std::vector<Part> halves = {part_of<fp16>(mixed_norms(6, 16, 9, 2), 6, mixed_norms(300, 16, 10, 3), 300, 16)};
    check_topk(halves, 12, metric);
  }
}

DEVICE_TEST_OF_SIZES(topk_labels_and_exclude) {
  const int64_t queries = 9, n = 500;
  std::vector<Part> parts = {part_of<bf16>(gauss(queries, 16, 11), queries, gauss(n, 16, 12), n, 16)};
  Filter filter;
  for (int64_t i = 0; i < queries; ++i) filter.query_labels.push_back(i % 4 - 1);
  for (int64_t j = 0; j < n; ++j) filter.key_labels.push_back(j % 3 ? j % 5 - 1 : 0);
  for (int64_t i = 0; i < queries; ++i) filter.exclude.push_back(i * 50 - 50 < 0 ? -1 : i * 50);
  check_topk(parts, 40, Metric::cosine, filter);
  filter.key_labels.assign(n, 2);  // nothing left for some
  filter.exclude.clear();
  check_topk(parts, 10, Metric::cosine, filter);
}

DEVICE_TEST_OF_SIZES(topk_segments) {
  const int64_t queries = 5, n = 500;
  Part old_part = part_of<bf16>(gauss(queries, 48, 13), queries, gauss(n, 48, 14), n, 48);
  Part new_part = part_of<float>(gauss(queries, 20, 15), queries, gauss(n, 20, 16), n, 20);
  old_part.all = new_part.all = false;
  for (int64_t j = 0; j < n; ++j) (j % 3 ? old_part : new_part).listed.push_back(j);
  for (auto [scale, offset] :
       {std::pair(1.0f, 0.0f), std::pair(0.5f, 0.25f), std::pair(-1.0f, 3.0f), std::pair(0.0f, 1.0f)}) {
    new_part.scale = scale;
    new_part.offset = offset;
    std::vector<Part> parts = {old_part, new_part};
    check_topk(parts, 25, Metric::cosine, {{}, {}, {0, 1, 2, -1, 300}});
    if (new_part.scale != 1) check_topk(parts, 3, Metric::l2);
  }
}

DEVICE_TEST_OF_VALUES(topk_all_keys_tie_over_segments) {
  const int64_t n = 900;
  Part odd = part_of<bf16>(gauss(2, 8, 13), 2, gauss(n, 8, 14), n, 8);
  odd.query = Rows::of<bf16>(std::vector<float>(2 * 8), 2, 8);  // zero: cosine 0 with every key
  odd.all = false;
  Part even = odd;
  for (int64_t j = 0; j < n; ++j) (j % 2 ? odd : even).listed.push_back(j);
  std::reverse(even.listed.begin(), even.listed.end());
  std::vector<Part> parts = {odd, even};
  check_topk(parts, 5, Metric::cosine);
}

DEVICE_TEST_OF_VALUES(topk_items_beside_rows) { check_items<bf16>(24); }

// Partial sums that leave the range of float on tensor cores, but not in the order of score_of.
DEVICE_TEST_OF_VALUES(topk_sums_that_overflow_on_the_way) {
  const int64_t n = 300, dim = 32;
  auto keys = gauss(n, dim, 21);
  for (int64_t d = 0; d < dim; ++d) keys[260 * dim + d] = d % 8 ? 0 : d < 16 ? -2e38f : 2e38f;
  std::vector<Part> parts = {part_of<float>(std::vector<float>(dim, 1), 1, keys, n, dim),
                             part_of<bf16>(std::vector<float>(dim, 1), 1, keys, n, dim)};
  for (const Part& part : parts) {
    std::vector<Part> one = {part};
    check_topk(one, 150, Metric::ip);
  }
}

DEVICE_TEST_OF_SIZES(topk_more_than_there_are) {
  check_plain<bf16>(3, 10, 8, 40, Metric::cosine);
  check_plain<float>(2, 300, 8, 700, Metric::ip);
}

DEVICE_TEST_OF_SIZES(topk_large_k) {
  check_plain<bf16>(2, 2500, 8, 2048, Metric::ip);
  check_plain<bf16>(1, 4200, 8, 3001, Metric::cosine);
}

DEVICE_TEST_OF_VALUES(topk_flags_the_first_row_that_is_not_finite) {
  auto keys = gauss(300, 16, 17);
  keys[200 * 16 + 3] = NAN;
  keys[140 * 16] = INFINITY;
  Part part = part_of<float>(gauss(2, 16, 18), 2, keys, 300, 16);
  auto flag_of = [](Part p) {
    Segment s = p.segment();
    Buffer<float> scores(2 * 3);
    Buffer<int64_t> ids(2 * 3);
    cuda::Launch launch = {};
    Buffer<unsigned char> scratch(cuda::sm80::topk_scratch({s, s}, 3, Metric::cosine, {}, launch));
    launch.scratch = scratch.data();
    cuda::sm80::topk({s, s}, 3, Metric::cosine, {}, scores.data(), ids.data(), launch);
    cuda::check(cudaDeviceSynchronize(), "topk");
    uint64_t flag;
    cuda::check(cudaMemcpy(&flag, scratch.data(), sizeof flag, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return flag;
  };
  expect(flag_of(part) == cuda::nonfinite_code(0, true, 140), "keys: another row than 140");
  part.all = false;
  for (int64_t j = 299; j >= 0; --j)
    if (j != 140) part.listed.push_back(j);
  expect(flag_of(part) == cuda::nonfinite_code(0, true, 200), "a row that is not listed counts");
  auto query = gauss(2, 16, 18);
  query[16 + 2] = -INFINITY;
  part.query = Rows::of<float>(query, 2, 16);
  expect(flag_of(part) == cuda::nonfinite_code(0, false, 1), "query: another row than 1");
}
