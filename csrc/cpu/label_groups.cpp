#include "label_groups.h"

#include <cstddef>

using std::size_t;

namespace fastcompat {
namespace {

// Open addressing; the table is at most half full.
class LabelTable {
 public:
  explicit LabelTable(int64_t labels) {
    while ((int64_t{1} << bits_) < 2 * labels) ++bits_;
    labels_.assign(size_t{1} << bits_, -1);
    groups_.resize(labels_.size());
  }

  int32_t insert(int64_t label, int64_t& count) {
    const size_t at = slot(label);
    if (labels_[at] != label) {
      labels_[at] = label;
      groups_[at] = static_cast<int32_t>(count++);
    }
    return groups_[at];
  }

  int32_t find(int64_t label) const {
    const size_t at = slot(label);
    return labels_[at] == label ? groups_[at] : -2;
  }

 private:
  // Fibonacci hashing: the top bits of a multiple of 2^64 / the golden ratio. Labels are not negative, so -1 is free.
  size_t slot(int64_t label) const {
    size_t at = (static_cast<uint64_t>(label) * 0x9e3779b97f4a7c15ull) >> (64 - bits_);
    while (labels_[at] != label && labels_[at] >= 0) at = (at + 1) & (labels_.size() - 1);
    return at;
  }

  int bits_ = 1;
  std::vector<int64_t> labels_;
  std::vector<int32_t> groups_;
};

void list_rows(const std::vector<int32_t>& group, int64_t count, std::vector<int64_t>& rows,
               std::vector<int64_t>& start) {
  start.assign(static_cast<size_t>(count) + 1, 0);
  for (int32_t g : group)
    if (g >= 0) ++start[g + 1];
  for (int64_t g = 0; g < count; ++g) start[g + 1] += start[g];
  rows.resize(static_cast<size_t>(start[count]));
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (size_t i = 0; i < group.size(); ++i)
    if (group[i] >= 0) rows[next[group[i]]++] = static_cast<int64_t>(i);
}

}  // namespace

LabelGroups::LabelGroups(const int64_t* query_labels, int64_t queries, const int64_t* key_labels, int64_t keys) {
  LabelTable table(queries);
  query_group.resize(static_cast<size_t>(queries));
  key_group.resize(static_cast<size_t>(keys));
  for (int64_t i = 0; i < queries; ++i)
    query_group[i] = query_labels[i] < 0 ? -1 : table.insert(query_labels[i], count);
  for (int64_t j = 0; j < keys; ++j) key_group[j] = key_labels[j] < 0 ? -2 : table.find(key_labels[j]);
  list_rows(query_group, count, query_rows, query_start);
  list_rows(key_group, count, key_rows, key_start);
}

}  // namespace fastcompat
