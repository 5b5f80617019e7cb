// Labels as small group numbers, and each group's rows: positives by label are found without looking at pairs.
#pragma once
#include <cstdint>
#include <vector>

namespace fastcompat {

struct LabelGroups {
  std::vector<int32_t> query_group;              // [B]; -1: a negative label, equal to nothing
  std::vector<int32_t> key_group;                // [N]; -2: no query has this label
  std::vector<int64_t> query_rows, query_start;  // rows of group g: rows[start[g] .. start[g + 1]), ascending
  std::vector<int64_t> key_rows, key_start;
  int64_t count = 0;

  LabelGroups(const int64_t* query_labels, int64_t queries, const int64_t* key_labels, int64_t keys);
};

}  // namespace fastcompat
