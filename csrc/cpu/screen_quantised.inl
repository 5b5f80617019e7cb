// The screen of many queries: rows quantised to bf16, or to 16-bit integers where there are no bf16 products. A gallery
// may bring its quantised form: packed.
#pragma once
#include "amx.inl"
#include "candidates.inl"
#include "int16.inl"

#ifdef FASTCOMPAT_SCREEN

namespace {

#if defined(FASTCOMPAT_AMX)
using Screen = Amx;
#elif defined(FASTCOMPAT_BF16)
using Screen = Bf16;
#else
using Screen = Int16;
#endif

#ifdef FASTCOMPAT_BF16
struct Quantiser {
  static constexpr bool kUnits = false;
  static constexpr float unit = 1;
  Quantiser(double, int64_t) {}

  // Writes W numbers; returns what quantisation took away.
  F operator()(F a, uint16_t* out) const {
    const __m256i quantised = (__m256i)_mm512_cvtneps_pbh(a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), quantised);
    return Simd::sub(a, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(quantised), 16)));
  }
};
#else
struct Quantiser {
  static constexpr bool kUnits = true;
  static constexpr float kSteps = 32766;  // of 32767: rounding may add one
  float unit, inverse;                    // no number is larger than its row's norm, so all fit into 16 bits
  Quantiser(double norm, int64_t dim) : unit(larger(norm, dim) / kSteps), inverse(unit > 0 ? 1 / unit : 0) {}

  // Writes W numbers; returns what quantisation took away.
  F operator()(F a, uint16_t* out) const {
    const __m256i whole = _mm256_cvtps_epi32(Simd::mul(a, Simd::set1(inverse)));
    const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
    return _mm256_fnmadd_ps(_mm256_cvtepi32_ps(whole), Simd::set1(unit), a);
  }
};
#endif

// Writes dimensions from .. to of a row, zeros up to whole vectors; adds to `residual_squares` what rounding took away,
// squared.
inline F quantise_row(const Quantiser& quantise, const float* x, int64_t from, int64_t to, uint16_t* out,
                      F residual_squares) {
  for (int64_t d = from; d < to; d += W, out += W) {
    const F a = d + W <= to ? Simd::load(x + d) : Simd::load_first(x + d, static_cast<int>(to - d));
    const F residual = quantise(a, out);
    residual_squares = Simd::fma(residual, residual, residual_squares);
  }
  return residual_squares;
}

// A row as it is screened: less the centre (l2), or lifted.
struct ScreenedRow {
  const float* x;
  double squared;
  float multiply = 1;  // its products, as a key's
  bool finite;         // before

  ScreenedRow(const Matrix& m, int64_t row, Metric metric, const float* centre, float* line)
      : x(floats_of(m, row, line)) {
    if (form_of(metric).differences) {
      int64_t d = 0;
      for (; d + W <= m.dim; d += W) Simd::store(line + d, Simd::sub(Simd::load(x + d), Simd::load(centre + d)));
      for (; d < m.dim; ++d) line[d] = x[d] - centre[d];
      x = line;
      squared = squared_norm(x, m.dim);
      finite = is_finite(squared) || all_finite(m, row);
      return;
    }
    squared = squared_norm(x, m.dim);
    finite = is_finite(squared);
    const RowFactor factor(metric, squared, true);
    multiply = factor.multiply;
    if (factor.lift == 1) return;
    for (int64_t d = 0; d < m.dim; ++d) line[d] = x[d] * factor.lift;
    x = line;
    squared *= static_cast<double>(factor.lift) * factor.lift;
  }
};

// A block of quantised keys with their bounds.
struct QuantisedBlock {
  int64_t words;
  float* rows;
  KeyBounds bounds;

  static int64_t floats(int64_t words) { return NB * (chunks_of(words) * CHUNK + KeyBounds::kNumbers); }

  QuantisedBlock(float* memory, int64_t words)
      : words(words), rows(memory), bounds(memory + chunks_of(words) * NB * CHUNK) {}

  // As a gallery keeps it: nothing between the rows. Of equal length, so that Prefetch can fetch it.
  static int64_t packed_row_floats(int64_t words) { return words + KeyBounds::kNumbers; }  // of a row
  static bool packed_in_place(int64_t words) { return words % CHUNK == 0; }

  void load(const float* packed) const {
    for (int64_t c = 0; c * CHUNK < words; ++c) {
      const int64_t width = smaller<int64_t>(words - c * CHUNK, CHUNK);
      for (int i = 0; i < NB; ++i, packed += width)
        std::memcpy(rows + (c * NB + i) * CHUNK, packed, static_cast<size_t>(width) * sizeof(float));
    }
    std::memcpy(bounds.multiply, packed, NB * KeyBounds::kNumbers * sizeof(float));
  }
  void store(float* packed) const {
    for (int64_t c = 0; c * CHUNK < words; ++c) {
      const int64_t width = smaller<int64_t>(words - c * CHUNK, CHUNK);
      for (int i = 0; i < NB; ++i, packed += width)
        std::memcpy(packed, rows + (c * NB + i) * CHUNK, static_cast<size_t>(width) * sizeof(float));
    }
    std::memcpy(packed, bounds.multiply, NB * KeyBounds::kNumbers * sizeof(float));
  }

  void fill(const RowRange& keys, Metric metric, const float* centre, int64_t first, int n, int64_t* bad,
            Workspace& ws) {
    const int64_t dim = keys.matrix.dim;
    float* line = ws.floats(kRow, dim);
    float unit[NB];
    for (int i = 0; i < n; ++i) {
      if (first + i + kPrefetchRows < keys.count) prefetch_row(keys.matrix, keys.row(first + i + kPrefetchRows));
      const int64_t row = keys.row(first + i);
      const ScreenedRow key(keys.matrix, row, metric, centre, line);
      if (!key.finite) note_bad(bad, row);
      const Quantiser quantise(__builtin_sqrt(key.squared), dim);
      F residual_squares = Simd::set1(0.0f);
      for (int64_t c = 0; c * CHUNK < words; ++c) {
        uint16_t* out = reinterpret_cast<uint16_t*>(rows + (c * NB + i) * CHUNK);
        residual_squares = quantise_row(quantise, key.x, c * 2 * CHUNK, smaller<int64_t>(dim, (c + 1) * 2 * CHUNK), out,
                                        residual_squares);
        const int64_t done = (smaller<int64_t>(dim - c * 2 * CHUNK, 2 * CHUNK) + W - 1) / W * W;
        const int64_t all = smaller<int64_t>(2 * (words - c * CHUNK), 2 * CHUNK);
        if (done < all) std::memset(out + done, 0, static_cast<size_t>(all - done) * sizeof *out);
      }
      bounds.set(i, metric, dim, key.squared, Simd::sum(residual_squares), key.multiply);
      unit[i] = quantise.unit;
    }
    bounds.finish(n, dim, Quantiser::kUnits ? unit : nullptr);
  }
};

// A block of queries, quantised, for one segment.
struct QuantisedQueries {
  int strips;
  int64_t words;
  float* panels;
  QueryBounds* bounds;  // of each strip

  QuantisedQueries(const SearchSegment& s, Metric metric, int64_t first, int64_t count, Workspace& ws)
      : strips(static_cast<int>((count + L - 1) / L)), words(words_of<Screen>(s.query.dim)) {
    const int64_t dim = s.query.dim;
    panels = ws.floats(kPanels, strips * words * L);
    bounds =
        reinterpret_cast<QueryBounds*>(ws.floats(kQueryBounds, strips * int64_t{sizeof(QueryBounds) / sizeof(float)}));
    std::memset(panels, 0, static_cast<size_t>(strips * words * L) * sizeof(float));
    std::memset(bounds, 0, static_cast<size_t>(strips) * sizeof(QueryBounds));
    float* line = ws.floats(kRow, dim);
    float* quantised = ws.floats(kQuantisedRow, words + W);
    std::memset(quantised, 0, static_cast<size_t>(words) * sizeof(float));
    for (int64_t q = 0; q < count; ++q) {
      const ScreenedRow query(s.query, first + q, metric, s.centre, line);
      const double length = __builtin_sqrt(query.squared);
      const Quantiser quantise(length, dim);
      const F residual_squares =
          quantise_row(quantise, query.x, 0, dim, reinterpret_cast<uint16_t*>(quantised), Simd::set1(0.0f));
      const int lane = static_cast<int>(q % L);
      for (int64_t w = 0; w < words; ++w)
        std::memcpy(panels + (q / L * words + w) * L + lane, quantised + w, sizeof(float));
      bounds[q / L].set(lane, metric, dim, length, __builtin_sqrtf(Simd::sum(residual_squares)), quantise.unit,
                        s.query_factor[first + q]);
    }
  }
  const float* panel(int t) const { return panels + t * words * L; }
};

void screen_quantised(const TopkItem& item, const SearchSegment& s, int64_t begin, int64_t end,
                      BoundedCandidates& candidates, int64_t* bad, Workspace& ws) {
  [[maybe_unused]] const Screen::Scope scope;
  const QuantisedQueries queries(s, item.metric, item.first_query, item.n_queries, ws);
  const int64_t words = queries.words, row_floats = QuantisedBlock::packed_row_floats(words);
  const bool in_place = s.packed && QuantisedBlock::packed_in_place(words);
  float* memory = in_place ? nullptr : ws.floats(kBlock, QuantisedBlock::floats(words));
  float* products = ws.floats(kScores, NB * L);
  SegmentScreen screen(candidates, s);
  const RowRange keys{s.keys, s.rows, 0, s.count};
  const RowRange packed_rows{{s.packed, DType::f32, s.count, row_floats, row_floats}, nullptr, 0, s.count};
  for (int64_t first = begin; first < end; first += NB) {
    const int n = static_cast<int>(smaller<int64_t>(end - first, NB));
    float* packed = s.packed ? s.packed + first * row_floats : nullptr;
    QuantisedBlock block(in_place ? packed : memory, words);
    if (!packed)
      block.fill(keys, item.metric, s.centre, first, n, bad, ws);
    else if (!in_place)
      block.load(packed);
    const ErrorFactors most = block.bounds.most(n);
    for (int t = 0; t < queries.strips; ++t) {
      const Prefetch prefetch{packed ? packed_rows : keys, first + NB, t, queries.strips};
      score_block<Screen>(block.rows, n, queries.panel(t), words, products, prefetch);
      screen.block<Quantiser::kUnits>(block.bounds, most, products, first, n, queries.bounds[t], t);
    }
  }
}

}  // namespace

#endif
