// What a compiled instruction set offers: one table of functions, each doing one work item on one thread.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../fastcompat.h"

namespace fastcompat {

constexpr int64_t kCacheLineFloats = 16;  // 64 bytes: also the longest vector of any instruction set
constexpr int64_t kProbsChunk = 64;       // queries whose cached probabilities lie together, key by key

// Fewer keys than this for each of the k results, and most keys are candidates: neither error bounds nor a floor pay.
constexpr int64_t kKeysPerResult = 32;

// Fresh memory of many megabytes costs a fault for every page, as much as several percent of a loss. Advice only.
void prefer_large_pages(void* memory, int64_t bytes);

// What a workspace holds memory for, each for one use: no two buffers in use at once share a slot.
enum Slot {
  kPanels,        // packed lanes
  kBlock,         // packed rows
  kInterleaved,   // the same, two rows in a word
  kScores,        // a block's scores, logits or coefficients with one strip
  kSums,          // weighted sums of rows, per lane
  kPackLines,     // rows on their way into a panel
  kRow,           // one row as floats, or as words
  kUnpacked,      // a strip's sums, row by row
  kStripStates,   // softmax: what each strip has summed so far
  kProducts,      // softmax: a block's products, when coefficients take their place
  kQueryTerms,    // cached probabilities: terms of each query
  kQueryFactors,  // search: of each lane
  kKeyBounds,     // screen: of a block that is not packed
  kQueryBounds,   // screen: of each strip
  kQuantisedRow,  // screen: a row on its way into a panel
  kThresholds,    // top-k: of each lane
  kStarts,        // top-k: where each segment's candidates start
  kGathered,      // exact scores: rows from anywhere
  kBinMaps,       // beat-counts: of each strip
  kBinTables,     // beat-counts: of each strip
  kCounts,        // beat-counts: of each strip
  kCandidates,    // top-k: of an item, outside the kernels
  kCachedExps,    // loss: cached probabilities, outside the kernels
  kCachedShifts,  // loss: their shifts, outside the kernels
  kSlots
};

// Memory of one thread; a slot keeps its buffer for the next item. Throws std::bad_alloc.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace();
  float* floats(Slot slot, int64_t count);  // 64-byte aligned, contents undefined
  void trim();                              // gives large buffers back

 private:
  void* data_[kSlots] = {};
  int64_t capacity_[kSlots] = {};
};

// Rows first .. first + count of a matrix, or those rows of its index list.
struct RowRange {
  Matrix matrix;
  const int64_t* index;  // null: rows in order
  int64_t first, count;

  int64_t row(int64_t i) const { return index ? index[first + i] : first + i; }
};

// Exponentials that a forward pass caches for the key gradient, so that no score is computed twice.
struct CachedProbs {
  float* exps;      // [block of keys][chunk of queries][key][kProbsChunk]: exp(z - shift), 0 for ignored pairs
  float* shifts;    // [block of keys][queries]; -inf where all exps are 0
  int64_t queries;  // room for them: a multiple of kProbsChunk
  bool streamed;    // more than caches hold: written past them
};

// Statistics (and mean key) of some queries against some keys. Outputs are indexed by the query's row.
struct ForwardItem {
  RowRange query, keys;
  float scale;
  const float* bias;           // [N] or null
  const int32_t* query_group;  // [B] or null: pairs of one group are ignored
  const int32_t* key_group;    // [N]
  const int64_t* ignored[2];   // [B] or null: one key of each query that is ignored, -1 for none
  float* max;                  // [B] shift of the partial sums
  float* sum_exp;              // [B]
  float* sum;                  // [B] or null: sum of the logits
  float* mean;                 // [B, D] or null: sum of exp(z - max) * key, not normalised
  CachedProbs cached;          // of these keys; null: nothing is cached
};

// sum over rows of c * row for every lane, where c is the gradient of the loss with respect to a logit.
struct GradientItem {
  RowRange lanes, rows;
  bool lanes_are_queries;  // then every pair is a positive
  float scale;
  const float* bias;             // [N] or null
  const float *neg_lse, *g_neg;  // [B]; an empty set has lse = +inf and gradient 0
  const float *pos_lse, *g_pos, *g_sum;
  const int32_t* query_group;  // [B] or null: pairs of one group are no negatives
  const int32_t* key_group;
  bool group_is_positive;   // they are positives
  const int64_t* positive;  // [B] or null
  const int64_t* exclude;   // [B] or null
  float* out;               // [lanes, D] or null: float sums, indexed by the lane's row, added to what is there
  void* out_scaled;         // [lanes, D] or null: scale * sums in the lanes' dtype, contiguous
  float* out_bias;          // [lanes] or null: sum of c, added to what is there
  float* out_dot;           // [lanes] or null: sum of c * <lane, row>, likewise
};

// The gradient of some float32 keys from the exponentials that a forward pass over all these queries cached.
struct CachedGradientItem {
  RowRange query, keys;
  CachedProbs cached;  // of these keys
  float scale;
  const float *neg_lse, *g_neg;  // [queries]; an empty set has lse = +inf and gradient 0
  const float* g_pos;
  const int64_t* positive;
  const int64_t* exclude;  // or null
  float* dkeys;            // [N, D]
  bool add;                // to what is there
};

struct SearchSegment {
  Matrix query, keys;
  const int64_t* rows;
  int64_t count;
  float scale, offset;
  const float* query_factor;  // [B]
  const float* centre;        // [D] what l2 is screened around; null for other metrics
  float* packed;              // or null
  const int32_t* items;       // [keys.rows] or null: each row's id; -1: the row is passed over

  int64_t row(int64_t position) const { return rows ? rows[position] : position; }
  int32_t item(int64_t row) const { return items ? items[row] : static_cast<int32_t>(row); }
};

struct TopkItem {
  const SearchSegment* segments;
  int n_segments;
  Metric metric;
  int64_t first_query, n_queries;
  int64_t begin, end;  // positions over all segments, one after the other
  int64_t k, capacity;
  int64_t room;  // places of a query: its capacity, and a vector to spare
  TopkFilter filter;
  int64_t* bad;   // [n_segments] the smallest row that is not finite
  float* scores;  // [n_queries, room]; the best min(k, found) first, in no order
  int32_t* ids;
  int64_t* found;  // [n_queries]
  float* shared;   // [n_queries] a score that k keys of some item reach, or are expected to: only such keys are wanted
};

struct BeatsItem {
  const SearchSegment* segment;
  Metric metric;
  int64_t first_query, n_queries;
  int64_t begin, end;  // positions
  const int64_t* bounds;
  int64_t blocks;
  const int64_t* thresholds;  // [B, P] ascending: rank_code(score, id), and INT64_MAX for what nothing beats
  const int32_t* columns;     // [B, P] where each threshold stood
  int64_t targets;
  const int64_t* exclude;
  int64_t* bad;  // the smallest row that is not finite
  int64_t* out;  // [B, P, blocks], added to atomically
};

struct PairItem {
  const SearchSegment* segment;
  Metric metric;
  int64_t first_query, n_queries;
  const int64_t* ids;  // [B, P]
  int64_t targets;
  float* out;  // [B, P]
};

struct PackItem {
  RowRange keys;
  Metric metric;
  const float* centre;  // as in SearchSegment
  int64_t begin, end;   // positions, begin at the start of a block
  int64_t* bad;         // the smallest row that is not finite
  float* out;           // of the block at `begin`
};

struct Kernels {
  const char* name;
  int pack_rows;  // rows of a packed block
  void (*forward)(const ForwardItem&, Workspace&);
  void (*gradient)(const GradientItem&, Workspace&);
  void (*cached_gradient)(const CachedGradientItem&, Workspace&);
  void (*topk)(const TopkItem&, Workspace&);
  int64_t (*packed_floats)(const Matrix& keys, Metric metric);  // of a packed block; 0: no such keys are packed
  void (*pack)(const PackItem&, Workspace&);
  void (*count_beats)(const BeatsItem&, Workspace&);
  void (*pair_scores)(const PairItem&, Workspace&);
  // Per query: what its sums are multiplied by, and the power of two that it is multiplied by first. Returns the
  // position of the first row that is not finite, or -1.
  int64_t (*factors)(const RowRange&, Metric, float* multiply, float* lift, Workspace&);
  // Row by row: float -> dtype with a factor.
  void (*store_row)(void* out, DType dtype, int64_t row, const float* in, int64_t dim, float factor);
  void (*load_row)(float* out, const Matrix& in, int64_t row);
};

const Kernels& kernels();  // of the instruction set in use

}  // namespace fastcompat
