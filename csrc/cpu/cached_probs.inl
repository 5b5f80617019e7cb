// The key gradient from cached exponentials: dkey_j = sum_i c_ij query_i, c_ij = scale * g_i * exp(z_ij - lse_i).
// Floor: 2*B*N*D operations at the FMA peak. A block's exponentials become coefficients in a buffer that the caches
// hold; packed rows as they are, these are one operand of the product, and the queries' columns, packed as lanes, the
// other. Read twice: the sums, once per pass over the queries; fetched ahead.
#pragma once
#include "softmax.inl"

namespace {

// [strip of columns][query][L], columns past the last are zero.
inline void pack_columns(const RowRange& r, float* panels) {
  const int64_t dim = r.matrix.dim;
  for (int64_t d = 0; d < dim; d += L) {
    const int64_t n = smaller<int64_t>(dim - d, L);
    if (n < L) std::memset(panels, 0, static_cast<size_t>(r.count * L) * sizeof(float));
    for (int64_t i = 0; i < r.count; ++i, panels += L) {
      const float* row = static_cast<const float*>(row_pointer(r.matrix, r.row(i))) + d;
      if (n == L)
        for (int v = 0; v < NV; ++v) Simd::store(panels + v * W, Simd::load(row + v * W));
      else
        std::memcpy(panels, row, static_cast<size_t>(n) * sizeof(float));
    }
  }
}

// Cached exponentials of a block -> coefficients, in the same order. lse and scale * g of the queries, up to a
// multiple of CHUNK.
inline void coefficients_from_cache(const CachedGradientItem& item, int64_t block, int n, const float* lse,
                                    const float* g, float* coefficients) {
  const float* exps = item.cached.exps + block * NB * item.cached.queries;
  for (int64_t q = 0; q < item.query.count; q += CHUNK) {
    F weight[CHUNK / W];
    for (int v = 0; v < CHUNK / W; ++v) {
      const F shift = Simd::load(item.cached.shifts + block * item.cached.queries + q + v * W);
      weight[v] = Simd::mul(Simd::load(g + q + v * W), exp(Simd::sub(shift, Simd::load(lse + q + v * W))));
    }
    for (int64_t at = q * NB; at < q * NB + n * CHUNK; at += CHUNK)
#pragma GCC unroll 8
      for (int v = 0; v < CHUNK / W; ++v)
        Simd::store(coefficients + at + v * W, Simd::mul(Simd::load(exps + at + v * W), weight[v]));
  }
  const auto set = [&](const int64_t* key, int64_t q, float value) {
    const int64_t i = position_of(item.keys, key[q]) - block * NB;
    if (i >= 0 && i < n) coefficients[(q / CHUNK * NB + i) * CHUNK + q % CHUNK] = value;
  };
  for (int64_t q = 0; q < item.query.count; ++q) {
    set(item.positive, q, item.scale * item.g_pos[q]);
    if (item.exclude) set(item.exclude, q, 0.0f);
  }
}

// Adds R rows of sums to their keys' gradients, or puts them there; columns in one strip. `next` is fetched, which will
// be wanted when the other rows of the block have been added.
template <int R>
inline __attribute__((always_inline)) void add_tile(const F (&acc)[R][NV], float* out, int64_t dim, int64_t width,
                                                    bool add, int64_t next) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, out += dim) {
    __builtin_prefetch(out + next, 1);
    if (width < L) {
      float line[L];
      for (int v = 0; v < NV; ++v) Simd::store(line + v * W, acc[r][v]);
      for (int64_t d = 0; d < width; ++d) out[d] = add ? out[d] + line[d] : line[d];
      continue;
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      Simd::store(out + v * W, add ? Simd::add(Simd::load(out + v * W), acc[r][v]) : acc[r][v]);
  }
}

void cached_gradient_item(const CachedGradientItem& item, Workspace& ws) {
  const int64_t queries = item.query.count, dim = item.keys.matrix.dim, strips = (dim + L - 1) / L;
  float* panels = ws.floats(kPanels, strips * queries * L);
  float* coefficients = ws.floats(kBlock, NB * item.cached.queries);
  float* lse = ws.floats(kQueryTerms, 2 * item.cached.queries);
  float* g = lse + item.cached.queries;
  pack_columns(item.query, panels);
  for (int64_t q = 0; q < item.cached.queries; ++q) {
    lse[q] = q < queries ? item.neg_lse[q] : 0.0f;
    g[q] = q < queries ? item.scale * item.g_neg[q] : 0.0f;
  }
  for (int64_t first = 0; first < item.keys.count; first += NB) {
    const int n = static_cast<int>(smaller<int64_t>(item.keys.count - first, NB));
    coefficients_from_cache(item, first / NB, n, lse, g, coefficients);
    for (int64_t t = 0; t < strips; ++t)
      for (int row = 0; row < n; row += MR)
        with_count<MR>(smaller(n - row, MR), [&](auto rows) {
          constexpr int R = decltype(rows)::value;
          F acc[R][NV];
          score_tile<Fp32, R>(coefficients, row, panels + t * queries * L, queries, acc);
          add_tile<R>(acc, item.dkeys + item.keys.row(first + row) * dim + t * L, dim, dim - t * L, item.add,
                      t + 1 < strips ? L : NB * dim - t * L);
        });
  }
}

}  // namespace
