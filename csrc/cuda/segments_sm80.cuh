// Launches a screen over a segment: reads its rows, packs what tensor cores cannot read as it lies, cuts the work.
// Keys are packed block by block into one buffer, never all at once.
#pragma once
#include <algorithm>

#include "row_terms.cuh"
#include "screen_sm80.cuh"
#include "search_sm80.h"

namespace fastcompat::cuda::sm80 {

// Parts of a call's scratch one after the other. With no memory it only counts.
class Scratch {
 public:
  explicit Scratch(void* memory) : at_(reinterpret_cast<uintptr_t>(memory)), begin_(at_) {}
  template <class T>
  T* take(int64_t n) {
    T* part = reinterpret_cast<T*>(at_);
    at_ += (static_cast<size_t>(n) * sizeof(T) + 255) / 256 * 256;
    return part;
  }
  size_t bytes() const { return at_ - begin_; }

 private:
  uintptr_t at_, begin_;
};

// Into how many parts `tiles` tiles of keys are cut so that the blocks fill whole waves of the GPU.
inline int splits_for(int64_t query_blocks, int64_t tiles, int device, int blocks_a_processor = 2) {
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device attribute");
  const int64_t slots = blocks_a_processor * processors;
  int64_t best = 1;
  double best_fill = 0;
  for (int64_t s = 1; s <= tiles / 4; ++s) {
    const int64_t blocks = query_blocks * s, waves = (blocks + slots - 1) / slots;
    const double fill = static_cast<double>(blocks) / static_cast<double>(waves * slots);
    if (fill > best_fill + 0.02) {
      best = s;
      best_fill = fill;
    }
    if (fill > 0.9 || blocks >= 4 * slots) break;
  }
  return static_cast<int>(best);
}

inline int64_t tiles_in(int64_t rows) { return (rows + TILE - 1) / TILE; }

inline void check_sizes(const Segment& s) {
  if (std::max(s.keys.rows, s.query.rows) > 0x7fffffff)
    throw std::invalid_argument("more than 2**31 - 1 rows: search in parts and merge the results");
}

template <class Reduction>
void run_screen(Screen screen, const typename Reduction::Problem& problem, int splits, void* stream) {
  const int64_t query_blocks = tiles_in(screen.end_query - screen.first_query);
  if (!query_blocks || screen.begin >= screen.end) return;
  screen.per_split = (tiles_in(screen.end - screen.begin) + splits - 1) / splits * TILE;
  screen.query_blocks = static_cast<int>(query_blocks);
  auto kernel =
      screen.space.segment.keys.dtype == DType::f16 ? screen_kernel<fp16, Reduction> : screen_kernel<bf16, Reduction>;
  launch(kernel, dim3(static_cast<unsigned>(query_blocks * splits)), dim3(THREADS),
         Shared::bytes + Reduction::shared_bytes, stream, screen, problem);
}

// A segment's rows as the kernels want them.
class SegmentScreen {
 public:
  // `terms` of a float32 are kept. `queries` of the segment's queries are screened at a time. Where the tier cannot
  // gather, listed rows are packed.
  SegmentScreen(const Segment& s, Metric metric, int number, int terms, int64_t start, int64_t queries, code_t* flag,
                Scratch& scratch, bool gathers = true)
      : number_(number), terms_(s.keys.dtype == DType::f32 ? terms : 1), flag_(flag) {
    check_sizes(s);
    auto* query_terms = scratch.take<RowTerms>(s.query.rows);
    auto* key_terms = scratch.take<RowTerms>(s.count);
    tiles_ = scratch.take<KeyBounds>(tiles_in(s.count));
    space_ = {s, metric, start, query_terms, key_terms, tiles_};
    query_terms_ = query_terms;
    key_terms_ = key_terms;
    block_ = std::max<int64_t>(s.count, 1);
    if (!readable(s.query)) query_packed_ = scratch.take<uint16_t>(queries * packed_columns());
    if (!readable(s.keys) || (s.rows && !gathers)) {
      const int64_t fit = limits.packed_bytes / 2 / std::max<int64_t>(packed_columns(), 1) / TILE * TILE;
      block_ = std::min(block_, std::max<int64_t>(fit, TILE));
      keys_packed_ = scratch.take<uint16_t>(block_ * packed_columns());
    }
  }

  const Space& space() const { return space_; }
  int64_t block() const { return block_; }  // keys of one screen
  bool packs_keys() const { return keys_packed_; }

  void read_queries(int64_t first, int64_t end, void* stream) const {
    read_rows({space_.segment.query, nullptr, first, end, space_.metric, false, flag_,
               nonfinite_code(number_, false, 0), nullptr, nullptr, query_terms_, nullptr, query_packed_, terms_},
              stream);
  }

  // Only keys at positions [*checked_first, *checked_end) are checked for NaN and infinity; null: all.
  void read_keys(int64_t first, int64_t end, const int64_t* checked_first, const int64_t* checked_end,
                 void* stream) const {
    read_rows({space_.segment.keys, space_.segment.rows, first, end, space_.metric, true, flag_,
               nonfinite_code(number_, true, 0), checked_first, checked_end, key_terms_, tiles_, keys_packed_, terms_},
              stream);
  }

  // These queries against these keys, not yet cut into blocks.
  Screen screen(int64_t first_query, int64_t end_query, int64_t first, int64_t end) const {
    const Segment& s = space_.segment;
    Screen screen = {};
    screen.query = operand(s.query, nullptr, query_packed_, first_query);
    screen.keys = operand(s.keys, s.rows, keys_packed_, first);
    screen.pieces = static_cast<int>(padded_columns(s.keys.dim) / PIECE);
    screen.two_terms = terms_ > 1;
    screen.space = space_;
    screen.first_query = first_query;
    screen.end_query = end_query;
    screen.begin = first;
    screen.end = end;
    return screen;
  }

 private:
  static bool readable(const Matrix& m) {
    return m.dtype != DType::f32 && m.stride % 8 == 0 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
  }
  int64_t packed_columns() const { return terms_ * padded_columns(space_.segment.keys.dim); }
  Operand operand(const Matrix& m, const int64_t* rows, const uint16_t* packed, int64_t first) const {
    const int columns = static_cast<int>(packed ? packed_columns() : m.dim);
    if (packed) return {packed, columns, columns, nullptr, first};
    return {static_cast<const uint16_t*>(m.data), m.stride, columns, rows, 0};
  }

  Space space_ = {};
  int number_, terms_;
  code_t* flag_;
  RowTerms *query_terms_, *key_terms_;
  KeyBounds* tiles_;
  uint16_t *query_packed_ = nullptr, *keys_packed_ = nullptr;
  int64_t block_;
};

}  // namespace fastcompat::cuda::sm80
