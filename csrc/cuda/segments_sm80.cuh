// Launches a screen over a segment: reads its rows, packs what tensor cores cannot read as it lies, cuts the work.
// Keys are packed block by block into one buffer, never all at once.
#pragma once
#include <algorithm>

#include "row_factors.cuh"
#include "scratch.h"
#include "screen_sm80.cuh"
#include "splits.h"
#include "tiers.h"

namespace fastcompat::cuda::sm80 {

// Into how many splits `tiles` tiles of keys are cut.
inline int splits_for(int64_t query_blocks, int64_t tiles, int device, int blocks_a_processor = 2) {
  SplitCosts costs;
  costs.blocks_a_processor = blocks_a_processor;
  costs.least_tiles = 4;
  return static_cast<int>(choose_splits(query_blocks, tiles, device, costs).count);
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
  // `terms` of a float32 are kept. `queries` of the segment's queries are screened at a time. `gathers`: the tier reads
  // rows wherever they lie; where it does not, listed rows and rows that overlap are packed too.
  SegmentScreen(const Segment& s, Metric metric, int number, int terms, int64_t start, int64_t queries, code_t* flag,
                Scratch& scratch, bool gathers = true)
      : number_(number), terms_(s.keys.dtype == DType::f32 ? terms : 1), flag_(flag) {
    check_sizes(s);
    auto* query_factors = scratch.take<RowFactors>(s.query.rows);
    auto* key_factors = scratch.take<RowFactors>(s.count);
    tiles_ = scratch.take<KeyBounds>(tiles_in(s.count));
    space_ = {s, metric, start, query_factors, key_factors, tiles_};
    query_factors_ = query_factors;
    key_factors_ = key_factors;
    block_ = std::max<int64_t>(s.count, 1);
    if (!readable(s.query, gathers)) query_packed_ = scratch.take<uint16_t>(queries * packed_columns());
    if (!readable(s.keys, gathers) || (s.rows && !gathers)) {
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
               nonfinite_code(number_, false, 0), nullptr, nullptr, query_factors_, nullptr, query_packed_, terms_},
              stream);
  }

  // Only keys at positions [*checked_first, *checked_end) are checked for NaN and infinity; null: all.
  void read_keys(int64_t first, int64_t end, const int64_t* checked_first, const int64_t* checked_end,
                 void* stream) const {
    read_rows(
        {space_.segment.keys, space_.segment.rows, first, end, space_.metric, true, flag_,
         nonfinite_code(number_, true, 0), checked_first, checked_end, key_factors_, tiles_, keys_packed_, terms_},
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
  static bool readable(const Matrix& m, bool gathers) {
    return (gathers || m.stride >= m.dim) && m.dtype != DType::f32 && m.stride % 8 == 0 &&
           reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
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
  RowFactors *query_factors_, *key_factors_;
  KeyBounds* tiles_;
  uint16_t *query_packed_ = nullptr, *keys_packed_ = nullptr;
  int64_t block_;
};

}  // namespace fastcompat::cuda::sm80
