// The whole native interface: plain structs, raw pointers, sizes. Nothing here knows Python or torch.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastcompat {

// Numbered as fastcompat/_native.py lists them.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Metric : int { cosine = 0, ip = 1, l2 = 2 };

// Rows of an embedding matrix; unit stride inside a row, any stride (in elements) between rows.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t rows, dim, stride;
};

// z_ij = scale * <query_i, keys_j> + bias_j, and which pairs are positives, negatives or neither.
struct SoftmaxProblem {
  Matrix query, keys;  // [B, D], [N, D]
  float scale;
  const float* bias;            // [N] or null
  const int64_t* query_labels;  // [B] or null, together with key_labels [N]
  const int64_t* key_labels;
  const int64_t* positive;  // [B] or null: the positive's key, -1 for none; replaces positives by label
  const int64_t* exclude;   // [B] or null: a key that is neither, -1 for none; beats positive
};

struct SoftmaxStats {
  float* neg_lse;      // [B]
  float* pos_lse;      // [B]
  float* pos_sum;      // [B]
  int64_t* pos_count;  // [B]
  float* mean;         // [B, D] or null: sum_j softmax_j(negatives) key_j
};

// What arrives at the backward pass; a null gradient is an output nobody used.
struct SoftmaxGrads {
  const float* neg_lse;  // [B]
  const float* pos_lse;  // [B]
  const float* g_neg;    // [B] or null
  const float* g_pos;    // [B] or null
  const float* g_sum;    // [B] or null
};

void softmax_stats(const SoftmaxProblem& problem, const SoftmaxStats& out, int threads);

// dquery [B, D] in the query's dtype (null: not needed), dscale [B] = <query_i, d loss / d (scale * query_i)> (null:
// not needed). A float dquery may be the memory of mean.
void softmax_query_grad(const SoftmaxProblem& problem, const SoftmaxGrads& grads, const float* mean, void* dquery,
                        float* dscale, int threads);

// dkeys [N, D] in the keys' dtype (null: not needed), dbias [N] (null: not needed).
void softmax_key_grad(const SoftmaxProblem& problem, const SoftmaxGrads& grads, void* dkeys, float* dbias, int threads);

// The mean or the sum, over the rows that have positives, of log(1 + exp(neg_lse - pos_lse)), with its gradients:
// dquery [B, D] and dkeys [N, D] in the dtype of query and keys (null: not needed).
void softmax_loss(const SoftmaxProblem& problem, bool mean, float* loss, void* dquery, void* dkeys, int threads);

// One embedding space of a gallery: the listed rows of keys are scored with this query as scale * score + offset.
struct Segment {
  Matrix query, keys;
  const int64_t* rows;  // [count] row numbers; null: every row in order
  int64_t count;
  float scale, offset;
  float* packed = nullptr;         // what pack() wrote for these rows, this metric and the instruction set in use
  const int32_t* items = nullptr;  // [keys.rows] each row's id, -1: topk passes it over; null: the row number
};

struct TopkFilter {
  const int64_t* query_labels;  // [B] or null: keys with the query's label are skipped
  const int64_t* key_labels;    // indexed by id
  const int64_t* exclude;       // [B] or null
};

// Numbers that pack() writes; 0 where a packed form of such keys would be of no use.
int64_t packed_size(const Matrix& keys, int64_t count, Metric metric);

// A copy of a segment's keys as topk reads them: searches that are given it need not convert the keys again.
void pack(const Segment& segment, Metric metric, float* out, int threads);

void topk(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter, float* scores,
          int64_t* ids, int threads);

// out [B, P]: score of (i, ids[i, p]), bit for bit the score that topk and count_beats see; id -1 gives -inf.
void pair_scores(const Segment& segment, Metric metric, const int64_t* ids, int64_t targets, float* out, int threads);

// out [B, P, T]: how many keys, the threshold's own included, at positions [bounds[t], bounds[t+1]) beat (thresholds[i,
// p], threshold_ids[i, p]).
void count_beats(const Segment& segment, Metric metric, const int64_t* bounds, int64_t blocks, const float* thresholds,
                 const int64_t* threshold_ids, int64_t targets, const int64_t* exclude, int64_t* out, int threads);

// A search input holds NaN or infinity.
struct NonFinite : std::runtime_error {
  NonFinite(const char* side, int segment, int64_t row)
      : std::runtime_error("non-finite value"), side(side), segment(segment), row(row) {}
  const char* side;
  int segment;
  int64_t row;
};

// A score among the best k is beyond float32, so their order is not known.
struct Overflow : std::runtime_error {
  explicit Overflow(int64_t query) : std::runtime_error("score beyond float32"), query(query) {}
  int64_t query;
};

std::vector<std::string> simd_built();
std::vector<std::string> simd_levels();  // those of simd_built that this machine can run
std::string simd();
void set_simd(const std::string& name);

}  // namespace fastcompat
