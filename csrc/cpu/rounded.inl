// The screen of many queries: rows rounded to bf16, or to 16-bit integers where there are no bf16 products. A gallery
// may keep its rounded form.
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
struct Rounding {
  static constexpr bool kUnits = false;
  static constexpr float unit = 1;
  Rounding(double, int64_t) {}

  // Writes W numbers; returns what they lost.
  F operator()(F a, uint16_t* out) const {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded);
    return Simd::sub(a, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
  }
};
#else
struct Rounding {
  static constexpr bool kUnits = true;
  float unit, inverse;  // no number is larger than its row's norm, so all fit into 16 bits
  Rounding(double norm, int64_t dim) : unit(larger(norm, dim) / 32766), inverse(unit > 0 ? 1 / unit : 0) {}

  // Writes W numbers; returns what they lost.
  F operator()(F a, uint16_t* out) const {
    const __m256i whole = _mm256_cvtps_epi32(Simd::mul(a, Simd::set1(inverse)));
    const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
    return _mm256_fnmadd_ps(_mm256_cvtepi32_ps(whole), Simd::set1(unit), a);
  }
};
#endif

// Writes dimensions from .. to of a row, zeros up to whole vectors; adds to `lost` what rounding took away, squared.
inline F round_row(const Rounding& round, const float* x, int64_t from, int64_t to, uint16_t* out, F lost) {
  for (int64_t d = from; d < to; d += W, out += W) {
    const F a = d + W <= to ? Simd::load(x + d) : Simd::load_first(x + d, static_cast<int>(to - d));
    const F rest = round(a, out);
    lost = Simd::fma(rest, rest, lost);
  }
  return lost;
}

// A block of rounded keys with their bounds, as they lie in memory.
struct RoundedBlock {
  float* rows;
  KeyBounds bounds;

  // As rows of equal length, so that Ahead can fetch it.
  static int64_t row_floats(int64_t words) { return chunks_of(words) * CHUNK + KeyBounds::kNumbers; }
  static int64_t floats(int64_t words) { return NB * row_floats(words); }

  RoundedBlock(float* memory, int64_t words) : rows(memory), bounds(memory + chunks_of(words) * NB * CHUNK) {}

  void fill(const RowRange& keys, Metric metric, int64_t first, int n, int64_t* bad, Workspace& ws) {
    const int64_t dim = keys.matrix.dim, steps = words_of<Screen>(dim);
    float* line = ws.floats(kLine, dim);
    float unit[NB];
    for (int i = 0; i < n; ++i) {
      if (first + i + kSoon < keys.count) prefetch_row(keys.matrix, keys.row(first + i + kSoon));
      const int64_t row = keys.row(first + i);
      const float* x = floats_of(keys.matrix, row, line);
      const double squared = squared_norm(x, dim);
      if (!(squared < __builtin_inf())) note_bad(bad, row);
      const Rounding round(__builtin_sqrt(squared), dim);
      F lost = Simd::set1(0.0f);
      for (int64_t c = 0; c * CHUNK < steps; ++c) {
        uint16_t* out = reinterpret_cast<uint16_t*>(rows + (c * NB + i) * CHUNK);
        lost = round_row(round, x, c * 2 * CHUNK, smaller<int64_t>(dim, (c + 1) * 2 * CHUNK), out, lost);
        const int64_t done = (smaller<int64_t>(dim - c * 2 * CHUNK, 2 * CHUNK) + W - 1) / W * W;
        const int64_t all = smaller<int64_t>(2 * (steps - c * CHUNK), 2 * CHUNK);
        if (done < all) std::memset(out + done, 0, static_cast<size_t>(all - done) * sizeof *out);
      }
      bounds.set(i, metric, dim, squared, Simd::sum(lost));
      unit[i] = round.unit;
    }
    bounds.finish(n, dim, Rounding::kUnits ? unit : nullptr);
  }
};

// A block of queries, rounded, for one segment.
struct RoundedQueries {
  int strips;
  int64_t words;
  float* panels;
  QueryBounds* bounds;  // of each strip

  RoundedQueries(const SearchSegment& s, Metric metric, int64_t first, int64_t count, Workspace& ws)
      : strips(static_cast<int>((count + L - 1) / L)), words(words_of<Screen>(s.query.dim)) {
    const int64_t dim = s.query.dim;
    panels = ws.floats(kLanes, strips * words * L);
    bounds = reinterpret_cast<QueryBounds*>(ws.floats(kScreen, strips * int64_t{sizeof(QueryBounds) / sizeof(float)}));
    std::memset(panels, 0, static_cast<size_t>(strips * words * L) * sizeof(float));
    std::memset(bounds, 0, static_cast<size_t>(strips) * sizeof(QueryBounds));
    float* line = ws.floats(kLine, dim);
    float* rounded = ws.floats(kConvert, words + W);
    std::memset(rounded, 0, static_cast<size_t>(words) * sizeof(float));
    for (int64_t q = 0; q < count; ++q) {
      const float* x = floats_of(s.query, first + q, line);
      const double length = __builtin_sqrt(squared_norm(x, dim));
      const Rounding round(length, dim);
      const F lost = round_row(round, x, 0, dim, reinterpret_cast<uint16_t*>(rounded), Simd::set1(0.0f));
      const int lane = static_cast<int>(q % L);
      for (int64_t w = 0; w < words; ++w)
        std::memcpy(panels + (q / L * words + w) * L + lane, rounded + w, sizeof(float));
      bounds[q / L].set(lane, dim, length, __builtin_sqrtf(Simd::sum(lost)), round.unit,
                        query_terms(metric, s.query_factor[first + q]));
    }
  }
  const float* panel(int t) const { return panels + t * words * L; }
};

void screen_rounded(const TopkItem& item, const SearchSegment& s, int64_t begin, int64_t end, Bounded& candidates,
                    int64_t* bad, Workspace& ws) {
  [[maybe_unused]] const Screen::Scope scope;
  const RoundedQueries queries(s, item.metric, item.first_query, item.n_queries, ws);
  const int64_t block_floats = RoundedBlock::floats(queries.words);
  float* packed = s.packed ? s.packed + begin / NB * block_floats : ws.floats(kRows, block_floats);
  float* products = ws.floats(kScores, NB * L);
  Screening screening(candidates, s);
  const RowRange keys{s.keys, s.rows, 0, s.count};
  const int64_t row_floats = RoundedBlock::row_floats(queries.words);
  const RowRange kept{{s.packed, DType::f32, s.count, row_floats, row_floats}, nullptr, 0, s.count};
  for (int64_t first = begin; first < end; first += NB, packed += s.packed ? block_floats : 0) {
    const int n = static_cast<int>(smaller<int64_t>(end - first, NB));
    RoundedBlock block(packed, queries.words);
    if (!s.packed) block.fill(keys, item.metric, first, n, bad, ws);
    const Blur most = block.bounds.most(n);
    for (int t = 0; t < queries.strips; ++t) {
      const Ahead ahead{s.packed ? kept : keys, first + NB, t, queries.strips};
      score_block<Screen>(block.rows, n, queries.panel(t), queries.words, products, ahead);
      screening.block<Rounding::kUnits>(block.bounds, most, products, first, n, queries.bounds[t], t);
    }
  }
}

}  // namespace

#endif
