// The screen of a few queries, for which the keys' way from memory is the limit: fp32 products of rows where they lie,
// nothing packed. The additions of a pair come in another order than in the score, so here too a bound decides.

namespace {

constexpr int kFew = 8;      // queries
constexpr int kAbreast = 4;  // rows that are multiplied at once

// products [kAbreast][L] of some rows and Q queries, which lie `stride` apart and end in zeros up to a whole vector.
template <int Q>
inline void multiply_rows(const float* const (&rows)[kAbreast], int64_t dim, const float* queries, int64_t stride,
                          float* products) {
  F acc[kAbreast][Q];
  for (auto& row : acc)
    for (F& a : row) a = Simd::set1(0.0f);
  const auto add = [&](int64_t d, const F(&key)[kAbreast]) {
    for (int q = 0; q < Q; ++q) {
      const F query = Simd::load(queries + q * stride + d);
#pragma GCC unroll 4
      for (int r = 0; r < kAbreast; ++r) acc[r][q] = Simd::fma(key[r], query, acc[r][q]);
    }
  };
  int64_t d = 0;
  for (; d + W <= dim; d += W)
    add(d, {Simd::load(rows[0] + d), Simd::load(rows[1] + d), Simd::load(rows[2] + d), Simd::load(rows[3] + d)});
  if (const int left = static_cast<int>(dim - d))
    add(d, {Simd::load_first(rows[0] + d, left), Simd::load_first(rows[1] + d, left),
            Simd::load_first(rows[2] + d, left), Simd::load_first(rows[3] + d, left)});
  for (int r = 0; r < kAbreast; ++r)
    for (int q = 0; q < Q; ++q) products[r * L + q] = Simd::sum(acc[r][q]);
}

void screen_few(const TopkItem& item, const SearchSegment& s, int64_t begin, int64_t end, TopkState& state,
                int64_t* bad, Workspace& ws) {
  const int64_t dim = s.query.dim, stride = padded(dim);
  const int n_queries = static_cast<int>(item.n_queries);
  float* queries = ws.floats(kLanes, n_queries * stride);
  float* lines = ws.floats(kConvert, kAbreast * stride);
  float* products = ws.floats(kScores, NB * L);
  KeyBounds bounds(ws.floats(kRows, KeyBounds::kNumbers * NB));
  QueryBounds strips[(kFew + L - 1) / L] = {};
  std::memset(products, 0, NB * L * sizeof(float));
  std::memset(queries, 0, static_cast<size_t>(n_queries * stride) * sizeof(float));
  for (int q = 0; q < n_queries; ++q) {
    const int64_t row = item.first_query + q;
    load_row(queries + q * stride, s.query, row);
    const double length = __builtin_sqrt(squared_norm(queries + q * stride, dim));
    strips[q / L].set(q % L, dim, length, 0, 1, query_terms(item.metric, s.query_factor[row]));
  }
  Screening screening(state, s, ws);
  const RowRange keys{s.keys, s.rows, 0, s.count};
  for (int64_t first = begin; first < end; first += NB) {
    const int n = static_cast<int>(smaller<int64_t>(end - first, NB));
    for (int t = 0; t * L < n_queries; ++t) {
      const int lanes = smaller(n_queries - t * L, L);
      for (int from = 0; from < n; from += kAbreast) {
        const float* rows[kAbreast];
        for (int r = 0; r < kAbreast; ++r) {
          const int64_t at = first + smaller(from + r, n - 1);
          if (at + kSoon < keys.count) prefetch_row(keys.matrix, keys.row(at + kSoon));
          rows[r] = floats_of(keys.matrix, keys.row(at), lines + r * stride);
        }
        for (int q = 0; q < lanes; q += 2) {
          const float* at = queries + (t * L + q) * stride;
          if (q + 1 < lanes)
            multiply_rows<2>(rows, dim, at, stride, products + from * L + q);
          else
            multiply_rows<1>(rows, dim, at, stride, products + from * L + q);
        }
        for (int r = 0; t == 0 && r < smaller(kAbreast, n - from); ++r) {
          const double squared = squared_norm(rows[r], dim);
          if (!(squared < __builtin_inf())) note_bad(bad, keys.row(first + from + r));
          bounds.set(from + r, item.metric, dim, squared, 0);
        }
      }
      if (t == 0) bounds.finish(n, dim, nullptr);
      screening.block<false>(bounds, products, first, n, strips[t], t);
    }
  }
  screening.finish();
}

}  // namespace
