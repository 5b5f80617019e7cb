// The screen of a few queries, for which the keys' way from memory is the limit: fp32 products of rows where they lie,
// nothing packed. The additions of a pair come in another order than in the score, so here too a bound decides.

namespace {

constexpr int kFew = 8;  // queries

// products [Q] of a row and Q queries, which lie `stride` apart and end in zeros up to a cache line.
template <int Q>
inline void multiply_row(const float* row, int64_t dim, const float* queries, int64_t stride, float* products) {
  constexpr int kSums = Q > 2 ? 2 : 4;  // of a query, so that the additions do not wait for each other
  F acc[kSums][Q];
  for (auto& sums : acc)
    for (F& a : sums) a = Simd::set1(0.0f);
  const auto add = [&](int u, F key, int64_t d) {
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) acc[u][q] = Simd::fma(key, Simd::load(queries + q * stride + d), acc[u][q]);
  };
  int64_t d = 0;
  for (; d + kSums * W <= dim; d += kSums * W)
#pragma GCC unroll 4
    for (int u = 0; u < kSums; ++u) add(u, Simd::load(row + d + u * W), d + u * W);
  for (; d < dim; d += W) add(0, Simd::load_first(row + d, static_cast<int>(smaller<int64_t>(W, dim - d))), d);
  for (int q = 0; q < Q; ++q) {
    F sum = acc[0][q];
    for (int u = 1; u < kSums; ++u) sum = Simd::add(sum, acc[u][q]);
    products[q] = Simd::sum(sum);
  }
}

void screen_few(const TopkItem& item, const SearchSegment& s, int64_t begin, int64_t end, Bounded& candidates,
                int64_t* bad, Workspace& ws) {
  const int64_t dim = s.query.dim, stride = padded(dim);
  const int n_queries = static_cast<int>(item.n_queries);
  float* queries = ws.floats(kLanes, n_queries * stride);
  float* line = ws.floats(kLine, dim);
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
  Screening screening(candidates, s);
  const RowRange keys{s.keys, s.rows, 0, s.count};
  for (int64_t first = begin; first < end; first += NB) {
    const int n = static_cast<int>(smaller<int64_t>(end - first, NB));
    Blur most{};
    for (int t = 0; t * L < n_queries; ++t) {
      const int lanes = smaller(n_queries - t * L, L);
      for (int i = 0; i < n; ++i) {
        if (first + i + kSoon < keys.count) prefetch_row(keys.matrix, keys.row(first + i + kSoon));
        const int64_t row = keys.row(first + i);
        const float* x = floats_of(keys.matrix, row, line);
        for (int q = 0; q < lanes; q += 4)
          with_count<4>(smaller(lanes - q, 4), [&](auto some) {
            multiply_row<decltype(some)::value>(x, dim, queries + (t * L + q) * stride, stride, products + i * L + q);
          });
        if (t) continue;
        const double squared = squared_norm(x, dim);
        if (!(squared < __builtin_inf())) note_bad(bad, row);
        bounds.set(i, item.metric, dim, squared, 0);
      }
      if (t == 0) {
        bounds.finish(n, dim, nullptr);
        most = bounds.most(n);
      }
      screening.block<false>(bounds, most, products, first, n, strips[t], t);
    }
  }
}

}  // namespace
