// Exact search at bf16 speed: products of rounded rows, with a bound on what rounding can hide; only pairs that may be
// among the best k get their exact score, at the end. With residuals dq = q - bf16(q), dk = k - bf16(k):
//   |<q, k> - <bf16(q), bf16(k)>| <= |dq||k| + |bf16(q)||dk| + (2D + 32) 2^-24 |q||k|,
// the last term for the rounding of both sums and of the bound itself. The steps from a product to a score only grow,
// rounding included: the bounds of the product, taken through them, are bounds of the float that is returned.
#ifdef FASTCOMPAT_BF16

namespace {

#ifdef FASTCOMPAT_AMX
using Screen = Amx;
#else
using Screen = Bf16;
#endif

constexpr int kSoon = 12;                       // rows ahead that filling a block fetches
constexpr double kLeast = 1e-12, kMost = 1e12;  // norms between these can neither overflow nor vanish in a product

// Writes dimensions from .. to of a row in bf16, zeros up to whole vectors; adds to `rest` what rounding took away,
// squared.
inline F round_row(const float* x, int64_t from, int64_t to, uint16_t* out, F rest) {
  for (int64_t d = from; d < to; d += W, out += W) {
    const F a = d + W <= to ? Simd::load(x + d) : _mm512_maskz_loadu_ps((1u << (to - d)) - 1, x + d);
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded);
    const F lost = Simd::sub(a, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
    rest = Simd::fma(lost, lost, rest);
  }
  return rest;
}

// Norms are sums of D rounded squares: made a little larger, they are bounds.
inline float larger(double norm, int64_t dim) {
  return static_cast<float>(norm * (1 + static_cast<double>(dim + 64) * 0x1p-23));
}

// A block of keys as the screen wants it.
struct ScreenBlock {
  float* rows;                                  // bf16, packed
  float *multiply, *norm, *slack, *high, *low;  // [NB]: dot * multiply + high (low) +- (norm, slack) times the query's

  // As rows of equal length, so that Ahead can fetch it.
  static int64_t row_floats(int64_t words) { return chunks_of(words) * CHUNK + 5; }
  static int64_t floats(int64_t words) { return NB * row_floats(words); }

  ScreenBlock(float* memory, int64_t words) : rows(memory) {
    multiply = memory + chunks_of(words) * NB * CHUNK;
    norm = multiply + NB;
    slack = norm + NB;
    high = slack + NB;
    low = high + NB;
  }

  void fill(const RowRange& keys, Metric metric, int64_t first, int n, int64_t* bad, Workspace& ws) {
    const int64_t dim = keys.matrix.dim, steps = words_of<Screen>(dim);
    float* line = ws.floats(kLine, dim);
    float rest[NB + W] = {}, squared[NB + W] = {};
    for (int i = 0; i < n; ++i) {
      if (first + i + kSoon < keys.count) prefetch_row(keys.matrix, keys.row(first + i + kSoon));
      const int64_t row = keys.row(first + i);
      const float* x = floats_of(keys.matrix, row, line);
      F lost = Simd::set1(0.0f);
      for (int64_t c = 0; c * CHUNK < steps; ++c) {
        uint16_t* out = reinterpret_cast<uint16_t*>(rows + (c * NB + i) * CHUNK);
        lost = round_row(x, c * 2 * CHUNK, smaller<int64_t>(dim, (c + 1) * 2 * CHUNK), out, lost);
        const int64_t done = (smaller<int64_t>(dim - c * 2 * CHUNK, 2 * CHUNK) + W - 1) / W * W;
        const int64_t all = smaller<int64_t>(2 * (steps - c * CHUNK), 2 * CHUNK);
        if (done < all) std::memset(out + done, 0, static_cast<size_t>(all - done) * sizeof *out);
      }
      rest[i] = Simd::sum(lost);
      const double exact = squared_norm(x, dim);
      if (!(exact < __builtin_inf())) note_bad(bad, row);
      squared[i] = static_cast<float>(exact);
      const Terms k = key_terms(metric, metric == Metric::cosine ? inverse_norm(exact) : squared[i]);
      const float blur = static_cast<float>(dim + 64) * 0x1p-23f * -k.add;  // of the squared norm
      multiply[i] = k.multiply;
      high[i] = k.add + blur;
      low[i] = k.add - blur;
      if (exact != 0 && !(exact > kLeast * kLeast && exact < kMost * kMost)) {  // such a key always passes
        multiply[i] = 0;
        high[i] = kInf;
        low[i] = -kInf;
      }
    }
    const F more = Simd::set1(larger(1, dim));
    for (int i = 0; i < n; i += W) {
      const F factor = Simd::mul(more, Simd::load(multiply + i));
      Simd::store(norm + i, Simd::mul(factor, _mm512_sqrt_ps(Simd::load(squared + i))));
      Simd::store(slack + i, Simd::mul(factor, _mm512_sqrt_ps(Simd::load(rest + i))));
    }
  }
};

// A strip of queries as the screen wants it.
struct ScreenStrip {
  float norm[L], slack[L];
  LaneTerms terms;
};

// A block of queries, rounded, for one segment.
struct ScreenedQueries {
  int strips;
  int64_t words;
  float* panels;  // bf16
  ScreenStrip* strip;

  ScreenedQueries(const SearchSegment& s, Metric metric, int64_t first, int64_t count, Workspace& ws)
      : strips(static_cast<int>((count + L - 1) / L)), words(words_of<Screen>(s.query.dim)) {
    const int64_t dim = s.query.dim;
    panels = ws.floats(kLanes, strips * words * L);
    strip = reinterpret_cast<ScreenStrip*>(ws.floats(kScreen, strips * int64_t{sizeof(ScreenStrip) / sizeof(float)}));
    std::memset(panels, 0, static_cast<size_t>(strips * words * L) * sizeof(float));
    std::memset(strip, 0, static_cast<size_t>(strips) * sizeof(ScreenStrip));
    float* line = ws.floats(kLine, dim);
    float* rounded = ws.floats(kConvert, words + W);
    std::memset(rounded, 0, static_cast<size_t>(words) * sizeof(float));
    const double sums = (2.0 * static_cast<double>(dim) + 32) * 0x1p-24;
    for (int64_t q = 0; q < count; ++q) {
      const float* x = floats_of(s.query, first + q, line);
      const double length = __builtin_sqrt(squared_norm(x, dim));
      const F lost = round_row(x, 0, dim, reinterpret_cast<uint16_t*>(rounded), Simd::set1(0.0f));
      const float rest = __builtin_sqrtf(Simd::sum(lost));
      ScreenStrip& to = strip[q / L];
      const int lane = static_cast<int>(q % L);
      for (int64_t w = 0; w < words; ++w)
        std::memcpy(panels + (q / L * words + w) * L + lane, rounded + w, sizeof(float));
      const Terms terms = query_terms(metric, s.query_factor[first + q]);
      to.terms.multiply[lane] = terms.multiply;
      to.terms.add[lane] = terms.add;
      to.norm[lane] = larger(length + rest, dim);
      to.slack[lane] = larger(rest + sums * length, dim);
      if (length != 0 && !(length > kLeast && length < kMost)) to.slack[lane] = kInf;  // all of its keys pass
    }
  }
  const float* panel(int t) const { return panels + t * words * L; }
};

// Pairs whose score may be above their threshold, with bounds of it.
struct Passed {
  static constexpr int kRows = 16;  // rows that are screened at a time
  int count;
  int32_t lane[kRows * L + W], row[kRows * L + W];
  float low[kRows * L + W], high[kRows * L + W];
};

// Rows from .. to of a block against a strip.
inline void screen_rows(const ScreenBlock& block, const float* dots, int from, int to, const ScreenStrip& strip,
                        const SegmentTerms& segment, const float* threshold, Passed& out) {
  F norm[NV], slack[NV], bar[NV], multiply[NV], add[NV];
  for (int v = 0; v < NV; ++v) {
    norm[v] = Simd::load(strip.norm + v * W);
    slack[v] = Simd::load(strip.slack + v * W);
    multiply[v] = Simd::load(strip.terms.multiply + v * W);
    add[v] = Simd::load(strip.terms.add + v * W);
    bar[v] = Simd::load(threshold + v * W);
  }
  out.count = 0;
  for (int i = from; i < to; ++i) {
    const F a = Simd::set1(block.multiply[i]), b = Simd::set1(block.norm[i]), c = Simd::set1(block.slack[i]);
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      const F dot = Simd::load(dots + i * L + v * W), blur = Simd::fma(slack[v], b, Simd::mul(norm[v], c));
      const F inner = Simd::fma(dot, a, Simd::add(blur, Simd::set1(block.high[i])));
      const F high = last_steps(inner, multiply[v], add[v], segment);
      const __mmask16 passes = _mm512_cmp_ps_mask(high, bar[v], _CMP_NLE_UQ);  // NaN passes
      if (__builtin_expect(passes == 0, 1)) continue;
      const F least = Simd::fma(dot, a, Simd::sub(Simd::set1(block.low[i]), blur));
      const F low = Simd::max(last_steps(least, multiply[v], add[v], segment), Simd::set1(-kInf));  // of NaN: -inf
      Simd::store(out.low + out.count, _mm512_maskz_compress_ps(passes, low));
      Simd::store(out.row + out.count, Simd::set1(i));
      out.count += Simd::append(passes, high, v * W, out.high + out.count, out.lane + out.count);
    }
  }
}

// Columns d .. d + 16 (at most `width` of them, the others zero) of 16 rows.
inline __attribute__((always_inline)) void load_columns(const float* const (&rows)[W], int64_t d, int width,
                                                        F (&out)[W]) {
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    const int left = width - 4 * g;
    const __mmask8 there = left >= 4 ? 0xf : left > 0 ? (1u << left) - 1 : 0;
    F quarter[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // rows i, i + 4, i + 8, i + 12, a quarter of a vector each
      const auto part = [&](int row) { return _mm_maskz_loadu_ps(there, rows[row] + d + 4 * g); };
      F q = _mm512_castps128_ps512(part(i));
      q = _mm512_insertf32x4(q, part(i + 4), 1);
      q = _mm512_insertf32x4(q, part(i + 8), 2);
      quarter[i] = _mm512_insertf32x4(q, part(i + 12), 3);
    }
    const F even = _mm512_unpacklo_ps(quarter[0], quarter[1]), odd = _mm512_unpackhi_ps(quarter[0], quarter[1]);
    const F even2 = _mm512_unpacklo_ps(quarter[2], quarter[3]), odd2 = _mm512_unpackhi_ps(quarter[2], quarter[3]);
    const auto pairs = [](F a, F b, bool high) {
      const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
      return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
    };
    out[4 * g] = pairs(even, even2, false);
    out[4 * g + 1] = pairs(even, even2, true);
    out[4 * g + 2] = pairs(odd, odd2, false);
    out[4 * g + 3] = pairs(odd, odd2, true);
  }
}

// Exact scores of a query (as floats, with its terms) and `n` <= 16 keys: the additions of score_tile, in its order.
inline void exact_scores(const SearchSegment& s, Metric metric, const float* query, Terms terms, const int32_t* ids,
                         int n, float* out, Workspace& ws) {
  const int64_t dim = s.keys.dim;
  float* lines = ws.floats(kFetched, s.keys.dtype == DType::f32 ? 0 : W * padded(dim));
  const float* rows[W];
  float factor[W] = {};
  for (int i = 0; i < W; ++i) rows[i] = i < n ? floats_of(s.keys, ids[i], lines + i * padded(dim)) : rows[0];
  F dot = Simd::set1(0.0f), squared = Simd::set1(0.0f);
  for (int64_t d = 0; d < dim; d += W) {
    const int width = static_cast<int>(smaller<int64_t>(W, dim - d));
    F key[W];
    const auto add = [&](int j) {
      dot = Simd::fma(key[j], Simd::set1(query[d + j]), dot);
      squared = Simd::fma(key[j], key[j], squared);
    };
    if (width == W) {
      load_columns(rows, d, W, key);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) add(j);
    } else {
      load_columns(rows, d, width, key);
      for (int j = 0; j < width; ++j) add(j);
    }
  }
  if (metric == Metric::cosine)
    for (int i = 0; i < n; ++i) factor[i] = inverse_norm(squared_norm(rows[i], dim));
  else if (metric == Metric::l2)
    Simd::store(factor, squared);
  float multiply[W], plus[W];
  for (int i = 0; i < W; ++i) {
    const Terms k = key_terms(metric, factor[i]);
    multiply[i] = k.multiply;
    plus[i] = k.add;
  }
  Simd::store(out, finish_score(dot, Simd::load(multiply), Simd::load(plus), Simd::set1(terms.multiply),
                                Simd::set1(terms.add), SegmentTerms(s, metric)));
}

}  // namespace

#endif
