// Top-k of the Hopper tier against a full sort: ids, ties and bits. What it shares with the portable tier
// (test_topk_sm80.cu) is tested there.
#include "tiers.h"
#include "topk_cases.h"

using namespace fastcompat;
using namespace search_cases;

const TopkFunctions search_cases::tier = {cuda::sm90::topk_scratch, cuda::sm90::topk};

// Packed rows, more survivors than a warp keeps, lists that fill, candidates rescored in place, labels.
DEVICE_TEST(hopper_topk_every_way_through_the_kernel) {
  allow_hopper();
  std::vector<Part> parts = {part_of<float>(gauss(2, 72, 1), 2, near_ties(400, 72, 2, 1e-5f), 400, 72)};
  Filter filter = {{1, 2}, {}, {7, -1}};
  for (int64_t j = 0; j < 400; ++j) filter.key_labels.push_back(j % 4);
  check_topk(parts, 10, Metric::cosine, filter);
}

DEVICE_TEST_OF_VALUES(hopper_topk_items_beside_rows) {
  allow_hopper();
  check_items<bf16>(64);
  check_items<float>(24);
}

DEVICE_TEST_OF_VALUES(hopper_topk_columns) {
  allow_hopper();
  for (int64_t dim : {1, 31, 64, 100, 128, 256, 500, 512}) {
    const Metric metric = dim % 4 ? Metric::l2 : dim % 100 ? Metric::cosine : Metric::ip;
    check_plain<bf16>(3, 260, dim, 10, metric, -dim & 7);
    if (dim == 100 || dim == 512) check_plain<fp16>(3, 260, dim, 10, metric, -dim & 7);
  }
  check_plain<float>(2, 140, 500, 4, Metric::cosine);
  check_plain<bf16>(2, 140, 20, 6, Metric::l2, 3);  // packed: no stride that the copy engine takes
}

// More than a block of queries, tiles of keys in part, blocks and keys that are not there.
DEVICE_TEST_OF_VALUES(hopper_topk_rows) {
  allow_hopper();
  check_plain<bf16>(1, 1, 8, 1, Metric::ip);
  check_plain<bf16>(129, 130, 200, 2, Metric::cosine);
  check_plain<fp16>(300, 129, 16, 1, Metric::l2);
  check_plain<bf16>(130, 130, 260, 3, Metric::ip, 4);
  check_plain<bf16>(0, 50, 8, 2, Metric::ip);
  check_plain<bf16>(2, 0, 8, 2, Metric::ip);
  check_plain<bf16>(3, 10, 8, 40, Metric::cosine);
}

DEVICE_TEST_OF_VALUES(hopper_topk_splits_batches_and_blocks_of_keys) {
  allow_hopper();
  cuda::sm80::limits = {1, 1};  // 128 keys and 128 queries at a time
  check_plain<float>(140, 260, 16, 4, Metric::cosine);
  cuda::sm80::limits = {64ll << 20, 1ll << 30};
  check_plain<bf16>(2, 2200, 8, 3, Metric::l2);
}

DEVICE_TEST_OF_VALUES(hopper_topk_near_ties_and_duplicates) {
  allow_hopper();
  for (float relative : {1e-7f, 3e-3f}) {
    std::vector<Part> parts = {part_of<float>(gauss(2, 32, 3), 2, near_ties(600, 32, 4, relative), 600, 32)};
    check_topk(parts, 20, Metric::l2);
  }
  std::vector<Part> same = {part_of<fp16>(gauss(3, 24, 5), 3, duplicates(600, 24, 6, 3), 600, 24)};
  check_topk(same, 30, Metric::cosine);
  std::vector<Part> zero = {part_of<bf16>(std::vector<float>(2 * 8), 2, gauss(400, 8, 14), 400, 8)};
  check_topk(zero, 5, Metric::cosine);
}

DEVICE_TEST_OF_VALUES(hopper_topk_l2_far_from_the_origin) {
  allow_hopper();
  for (float mean : {30.0f, 3e4f}) {
    std::vector<Part> parts = {part_of<float>(far_away(6, 16, 5, mean), 6, far_away(400, 16, 6, mean), 400, 16)};
    check_topk(parts, 7, Metric::l2);
  }
  std::vector<Part> halves = {part_of<bf16>(far_away(6, 48, 5, 30), 6, far_away(400, 48, 6, 30), 400, 48)};
  check_topk(halves, 7, Metric::l2);
}

DEVICE_TEST_OF_VALUES(hopper_topk_norms_of_every_size) {
  allow_hopper();
  for (Metric metric : {Metric::cosine, Metric::ip, Metric::l2}) {
    std::vector<Part> parts = {part_of<float>(mixed_norms(6, 16, 7, 3), 6, mixed_norms(300, 16, 8, 5), 300, 16)};
    check_topk(parts, 12, metric);
    std::vector<Part> extreme = {part_of<bf16>(mixed_norms(6, 16, 9, 21), 6, mixed_norms(130, 16, 10, 30), 130, 16)};
    check_topk(extreme, 12, metric);
  }
}

DEVICE_TEST_OF_VALUES(hopper_topk_segments_labels_and_exclude) {
  allow_hopper();
  const int64_t queries = 130, n = 400;
  Part old_part = part_of<bf16>(gauss(queries, 300, 13), queries, gauss(n, 300, 14), n, 300, 4);
  Part new_part = part_of<float>(gauss(queries, 20, 15), queries, gauss(n, 20, 16), n, 20);
  old_part.all = new_part.all = false;
  for (int64_t j = 0; j < n; ++j) (j % 3 ? old_part : new_part).listed.push_back(j);
  std::reverse(old_part.listed.begin(), old_part.listed.end());
  new_part.scale = 0.5f;
  new_part.offset = 0.25f;
  Filter filter;
  for (int64_t i = 0; i < queries; ++i) {
    filter.query_labels.push_back(i % 4 - 1);
    filter.exclude.push_back(i % 3 ? i : -1);
  }
  for (int64_t j = 0; j < n; ++j) filter.key_labels.push_back(j % 5 - 1);
  std::vector<Part> parts = {old_part, new_part};
  check_topk(parts, 5, Metric::cosine, filter);
  for (auto [scale, offset] : {std::pair(-1.0f, 3.0f), std::pair(0.0f, 1.0f)}) {
    Part small = part_of<bf16>(gauss(2, 8, 13), 2, gauss(300, 8, 14), 300, 8);
    small.scale = scale;
    small.offset = offset;
    std::vector<Part> one = {small};
    check_topk(one, 3, Metric::l2);
  }
}

DEVICE_TEST_OF_VALUES(hopper_topk_every_k) {
  allow_hopper();
  check_plain<bf16>(2, 700, 16, 100, Metric::cosine);
  check_plain<fp16>(2, 700, 8, 300, Metric::ip);
  check_plain<bf16>(2, 2300, 8, 2048, Metric::ip);
}

// Rows that overlap, as those of an expanded tensor and of sliding windows do: the copy engine takes no such matrix.
DEVICE_TEST_OF_VALUES(hopper_topk_rows_that_overlap) {
  allow_hopper();
  constexpr int64_t dim = 24, n = 300;
  for (const int64_t stride : {0, 8}) {
    auto overlapping = [&](int64_t rows, unsigned seed) {
      const auto line = gauss(1, (rows - 1) * stride + dim, seed);
      std::vector<bf16> laid(line.begin(), line.end());
      Rows out = {rows, dim, {}, nullptr, {}};
      for (int64_t i = 0; i < rows * dim; ++i)
        out.values.push_back(static_cast<float>(laid[static_cast<size_t>(i / dim * stride + i % dim)]));
      auto buffer = std::make_shared<Buffer<bf16>>(laid);
      out.memory = buffer;
      out.matrix = {buffer->data(), DType::bf16, rows, dim, stride};
      return out;
    };
    Part windows = part_of<bf16>(gauss(3, dim, 5), 3, gauss(n, dim, 6), n, dim), expanded = windows;
    windows.keys = overlapping(n, 7);
    expanded.query = overlapping(3, 8);
    for (Part part : {windows, expanded}) {
      std::vector<Part> parts = {part};
      check_topk(parts, 5, Metric::cosine);
    }
  }
}

DEVICE_TEST_OF_VALUES(hopper_topk_takes_what_it_covers) {
  auto covers = [](int64_t dim, int64_t count) {
    const Matrix m = {nullptr, DType::bf16, count, dim, dim};
    return cuda::sm90::covers_topk({{m, m, nullptr, count, 1, 0}});
  };
  expect(covers(512, 1 << 27) && !covers(513, 10) && !covers(8, (1 << 27) + 1), "another border than 512 and 2^27");
}
