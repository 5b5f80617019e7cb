// Softmax statistics: out_i = log sum_j e^z_ij with the mean key in the same pass (flash attention with V = K), and the
// gradient pass sum_r c_rl row_r with the statistics known. Floor: 4*B*N*D operations a pass at the FMA peak.
// Fused: scores, bias, label masks, left-out keys, exponentials, the second product. Rows are read once per query
// block.

namespace {

constexpr float kLazy = 8.0f;  // the shift follows the maximum only when exponentials could grow past e^8

// Position of the row numbered `id` in a range, or -1.
inline int64_t position_of(const RowRange& r, int64_t id) {
  if (id < 0) return -1;
  if (!r.index) return id >= r.first && id < r.first + r.count ? id - r.first : -1;
  int64_t low = 0, high = r.count;  // index lists ascend
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (r.index[r.first + middle] < id)
      low = middle + 1;
    else
      high = middle;
  }
  return low < r.count && r.index[r.first + low] == id ? low : -1;
}

inline M is_finite(F a) { return Simd::gt(Simd::set1(kInf), Simd::max(a, Simd::sub(Simd::set1(0.0f), a))); }

// Running state of one strip of queries.
struct StripState {
  float max[L], sum_exp[L], sum_exp_rest[L], sum[L], sum_rest[L], block_max[L];
  int32_t group[L];
  int64_t hole[2][L];
};

// a += b with the rounding error carried in rest (Kahan), so that a million blocks add up like one.
inline void add_compensated(float* total, float* rest, F value) {
  const F old = Simd::load(total), y = Simd::sub(value, Simd::load(rest)), t = Simd::add(old, y);
  Simd::store(rest, Simd::select(is_finite(t), Simd::sub(Simd::sub(t, old), y), Simd::set1(0.0f)));
  Simd::store(total, t);
}

// scores -> logits, -inf where a pair is left out.
inline void logits_of_block(const ForwardItem& item, const RowRange& keys, int64_t first, int n, StripState& s,
                            float* z) {
  const F scale = Simd::set1(item.scale);
  I group[NV];
  for (int v = 0; v < NV; ++v) group[v] = Simd::load(s.group + v * W);
  for (int i = 0; i < n; ++i) {
    const int64_t key = keys.row(first + i);
    const F bias = Simd::set1(item.bias ? item.bias[key] : 0.0f);
    for (int v = 0; v < NV; ++v) {
      F logit = Simd::fma(Simd::load(z + i * L + v * W), scale, bias);
      if (item.key_group) {
        const M same = Simd::eq(group[v], Simd::set1(item.key_group[key]));
        logit = Simd::select(same, Simd::set1(-kInf), logit);
      }
      Simd::store(z + i * L + v * W, logit);
    }
  }
}

inline void fill_holes(const StripState& s, int64_t first, int n, float* z) {
  for (int h = 0; h < 2; ++h)
    for (int lane = 0; lane < L; ++lane) {
      const int64_t at = s.hole[h][lane] - first;
      if (at >= 0 && at < n) z[at * L + lane] = -kInf;
    }
}

// A logit, or what its place adds: 0 where a pair does not count.
inline F counted(F z) { return Simd::select(Simd::eq(z, Simd::set1(-kInf)), Simd::set1(0.0f), z); }

// Follows the block's maximum: rescales what was summed with the old shift.
inline void follow_max(StripState& s, const float* z, int n, float* mean, int64_t dim) {
  bool grew = false;
  for (int v = 0; v < NV; ++v) {
    F top = Simd::load(z + v * W);
    for (int i = 1; i < n; ++i) top = Simd::max(top, Simd::load(z + i * L + v * W));
    Simd::store(s.block_max + v * W, top);
    const F limit = Simd::add(Simd::load(s.max + v * W), Simd::set1(kLazy));
    grew |= Simd::bits(Simd::gt(top, limit)) != 0;
  }
  if (!grew) return;
  for (int v = 0; v < NV; ++v) {
    const F old = Simd::load(s.max + v * W), now = Simd::max(old, Simd::load(s.block_max + v * W));
    const M same = Simd::eq(old, now);
    const F factor = Simd::select(same, Simd::set1(1.0f), exp(Simd::sub(old, now)));
    Simd::store(s.max + v * W, now);
    Simd::store(s.sum_exp + v * W, Simd::mul(factor, Simd::load(s.sum_exp + v * W)));
    Simd::store(s.sum_exp_rest + v * W, Simd::mul(factor, Simd::load(s.sum_exp_rest + v * W)));
    if (mean)
      for (int64_t d = 0; d < dim; ++d)
        Simd::store(mean + d * L + v * W, Simd::mul(factor, Simd::load(mean + d * L + v * W)));
  }
}

inline F shift_of(F max) { return Simd::select(is_finite(max), max, Simd::set1(0.0f)); }

// logits -> exponentials in place, and their sums.
inline void exponentials(StripState& s, float* z, int n) {
  for (int v = 0; v < NV; ++v) {
    const F shift = shift_of(Simd::load(s.max + v * W));
    F total = Simd::set1(0.0f);
    for (int i = 0; i < n; ++i) {
      const F p = exp(Simd::sub(Simd::load(z + i * L + v * W), shift));
      Simd::store(z + i * L + v * W, p);
      total = Simd::add(total, p);
    }
    add_compensated(s.sum_exp + v * W, s.sum_exp_rest + v * W, total);
  }
}

// Leaves a block's exponentials with the queries of a strip from number `query` on, and the shift they were made with:
// -inf as long as there was no logit, so that the factor of what is kept is 0 and not infinite.
inline void keep(const Kept& kept, int64_t block, int64_t query, const StripState& s, const float* z, int n) {
  static_assert(CHUNK % L == 0, "a strip of queries lies in one chunk");
  float* out = kept.exps + block * NB * kept.queries + query / CHUNK * NB * CHUNK + query % CHUNK;
  for (int i = 0; i < n; ++i)
    for (int v = 0; v < NV; ++v) {
      const F exps = Simd::load(z + i * L + v * W);
      kept.streamed ? Simd::stream(out + i * CHUNK + v * W, exps) : Simd::store(out + i * CHUNK + v * W, exps);
    }
  for (int v = 0; v < NV; ++v) {
    const F max = Simd::load(s.max + v * W), none = Simd::set1(-kInf);
    Simd::store(kept.shifts + block * kept.queries + query + v * W,
                Simd::select(Simd::eq(max, none), none, shift_of(max)));
  }
}

template <class A>
void forward_block(const ForwardItem& item, int64_t first, int n, const float* rows, const float* pairs,
                   const float* panel, int64_t query, StripState& s, float* mean, float* z, const Ahead& ahead) {
  const int64_t dim = item.keys.matrix.dim;
  score_block<A>(rows, n, panel, words_of<A>(dim), z, ahead);
  logits_of_block(item, item.keys, first, n, s, z);
  fill_holes(s, first, n, z);
  if (item.sum)
    for (int i = 0; i < n; ++i)
      for (int v = 0; v < NV; ++v)
        add_compensated(s.sum + v * W, s.sum_rest + v * W, counted(Simd::load(z + i * L + v * W)));
  follow_max(s, z, n, mean, dim);
  exponentials(s, z, n);
  if (item.kept.exps) keep(item.kept, first / NB, query, s, z, n);
  if (mean) {
    pair_weights<A>(z, n);
    add_weighted<A>(pairs, n, z, dim, mean);
  }
}

template <class A>
void forward_with(const ForwardItem& item, Workspace& ws) {
  [[maybe_unused]] const typename A::Scope scope;
  const RowRange &query = item.query, &keys = item.keys;
  const int64_t dim = keys.matrix.dim, words = words_of<A>(dim);
  const int strips = static_cast<int>((query.count + L - 1) / L);
  float* panels = ws.floats(kLanes, strips * words * L);
  float* rows = ws.floats(kRows, chunks_of(words) * NB * CHUNK);
  float* z = ws.floats(kScores, NB * L);
  float* means = item.mean ? ws.floats(kOut, strips * padded(dim) * L) : nullptr;
  StripState* states = reinterpret_cast<StripState*>(
      ws.floats(kState, strips * static_cast<int64_t>(sizeof(StripState) / sizeof(float))));

  for (int t = 0; t < strips; ++t) {
    StripState& s = states[t];
    std::memset(&s, 0, sizeof s);
    const int n = static_cast<int>(smaller<int64_t>(query.count - t * L, L));
    pack_lanes<A>(query, t * L, n, panels + t * words * L, ws);
    for (int lane = 0; lane < L; ++lane) {
      const int64_t row = lane < n ? query.row(t * L + lane) : -1;
      s.max[lane] = -kInf;
      s.group[lane] = row >= 0 && item.query_group ? item.query_group[row] : -1;
      for (int h = 0; h < 2; ++h)
        s.hole[h][lane] = row >= 0 && item.left_out[h] ? position_of(keys, item.left_out[h][row]) : -1;
    }
  }
  if (means) std::memset(means, 0, static_cast<size_t>(strips * padded(dim) * L) * sizeof(float));

  for (int64_t first = 0; first < keys.count; first += NB) {
    const int n = static_cast<int>(smaller<int64_t>(keys.count - first, NB));
    pack_rows<A>(keys, first, n, rows);
    const float* pairs = means ? pair_rows<A>(rows, dim, n, ws) : nullptr;
    for (int t = 0; t < strips; ++t) {
      forward_block<A>(item, first, n, rows, pairs, panels + t * words * L, query.first + t * L, states[t],
                       means ? means + t * padded(dim) * L : nullptr, z, {keys, first + NB, t, strips});
    }
  }
  if (item.kept.streamed) Simd::end_of_stream();

  for (int t = 0; t < strips; ++t) {
    const float* found = means ? unpack_lanes(means + t * padded(dim) * L, dim, ws) : nullptr;
    for (int lane = 0; lane < smaller<int64_t>(query.count - t * L, L); ++lane) {
      const int64_t row = query.row(t * L + lane);
      item.max[row] = states[t].max[lane];
      item.sum_exp[row] = states[t].sum_exp[lane];
      if (item.sum) item.sum[row] = states[t].sum[lane];
      if (means)
        std::memcpy(item.mean + row * dim, found + lane * padded(dim), static_cast<size_t>(dim) * sizeof(float));
    }
  }
}

// ---- gradient pass ----

// What a query brings to its coefficients, for a strip of lanes or for one streamed row.
struct QueryTerms {
  F neg_lse, g_neg, pos_lse, g_pos, g_sum;
};

inline F negative_coefficient(F z, const QueryTerms& q) { return Simd::mul(q.g_neg, exp(Simd::sub(z, q.neg_lse))); }

inline F positive_coefficient(F z, const QueryTerms& q) {
  const F c = Simd::fma(q.g_pos, exp(Simd::sub(z, q.pos_lse)), q.g_sum);
  return Simd::select(Simd::eq(z, Simd::set1(-kInf)), Simd::set1(0.0f), c);  // such a key never counts
}

// Coefficients of a block whose lanes are queries and whose pairs are all positives, but for the excluded key.
inline void coefficients_of_queries(const GradientItem& item, int64_t first, int n, int64_t lane0, int lanes,
                                    float* z) {
  const F scale = Simd::set1(item.scale);
  float terms[3][L] = {};
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t query = item.lanes.row(lane0 + lane);
    terms[0][lane] = item.pos_lse[query];
    terms[1][lane] = item.g_pos[query];
    terms[2][lane] = item.g_sum[query];
  }
  for (int v = 0; v < NV; ++v) {
    const QueryTerms q{F{}, F{}, Simd::load(terms[0] + v * W), Simd::load(terms[1] + v * W),
                       Simd::load(terms[2] + v * W)};
    for (int i = 0; i < n; ++i) {
      const F bias = Simd::set1(item.bias ? item.bias[item.rows.row(first + i)] : 0.0f);
      const F logit = Simd::fma(Simd::load(z + i * L + v * W), scale, bias);
      Simd::store(z + i * L + v * W, positive_coefficient(logit, q));
    }
  }
  if (item.exclude)
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t at = position_of(item.rows, item.exclude[item.lanes.row(lane0 + lane)]) - first;
      if (at >= 0 && at < n) z[at * L + lane] = 0;
    }
}

// Coefficients of a block whose lanes are keys.
inline void coefficients_of_keys(const GradientItem& item, int64_t first, int n, int64_t lane0, int lanes, float* z) {
  const F scale = Simd::set1(item.scale);
  float bias[L] = {};
  int32_t group[L];
  for (int lane = 0; lane < L; ++lane) {
    const int64_t key = lane < lanes ? item.lanes.row(lane0 + lane) : -1;
    if (item.bias && key >= 0) bias[lane] = item.bias[key];
    group[lane] = key >= 0 && item.key_group ? item.key_group[key] : -2;
  }
  for (int i = 0; i < n; ++i) {
    const int64_t query = item.rows.row(first + i);
    const QueryTerms q{Simd::set1(item.neg_lse[query]), Simd::set1(item.g_neg[query]), Simd::set1(item.pos_lse[query]),
                       Simd::set1(item.g_pos[query]), Simd::set1(item.g_sum[query])};
    for (int v = 0; v < NV; ++v) {
      const F logit = Simd::fma(Simd::load(z + i * L + v * W), scale, Simd::load(bias + v * W));
      F c = negative_coefficient(logit, q);
      if (item.query_group) {
        const M same = Simd::eq(Simd::load(group + v * W), Simd::set1(item.query_group[query]));
        if (Simd::bits(same))
          c = Simd::select(same, item.group_is_positive ? positive_coefficient(logit, q) : Simd::set1(0.0f), c);
      }
      Simd::store(z + i * L + v * W, c);
    }
    // A positive given by its index is the whole set, so its softmax is 1.
    const int64_t chosen = item.positive ? position_of(item.lanes, item.positive[query]) - lane0 : -1;
    if (chosen >= 0 && chosen < lanes) z[i * L + chosen] = item.g_pos[query] + item.g_sum[query];
    const int64_t hole = item.exclude ? position_of(item.lanes, item.exclude[query]) - lane0 : -1;
    if (hole >= 0 && hole < lanes) z[i * L + hole] = 0;
  }
}

// What a strip of lanes sums beside rows, before coefficients are rounded for the product.
struct LaneSums {
  float bias[L], bias_rest[L], dot[L], dot_rest[L];

  void add_bias(const float* coefficients, int n) {
    for (int v = 0; v < NV; ++v) {
      F total = Simd::set1(0.0f);
      for (int i = 0; i < n; ++i) total = Simd::add(total, Simd::load(coefficients + i * L + v * W));
      add_compensated(bias + v * W, bias_rest + v * W, total);
    }
  }
  void add_dots(const float* coefficients, const float* products, int n) {
    for (int v = 0; v < NV; ++v) {
      F total = Simd::set1(0.0f);
      for (int i = v * W; i < n * L; i += L)
        total = Simd::fma(Simd::load(coefficients + i), Simd::load(products + i), total);
      add_compensated(dot + v * W, dot_rest + v * W, total);
    }
  }
};

template <class A>
void gradient_with(const GradientItem& item, Workspace& ws) {
  [[maybe_unused]] const typename A::Scope scope;
  const RowRange &lanes = item.lanes, &streamed = item.rows;
  const int64_t dim = lanes.matrix.dim, words = words_of<A>(dim);
  const bool want_sums = item.out || item.out_scaled;
  const int strips = static_cast<int>((lanes.count + L - 1) / L);
  float* panels = ws.floats(kLanes, strips * words * L);
  float* rows = ws.floats(kRows, chunks_of(words) * NB * CHUNK);
  float* z = ws.floats(kScores, NB * L);
  float* sums = ws.floats(kOut, strips * padded(dim) * L);
  std::memset(sums, 0, static_cast<size_t>(strips * padded(dim) * L) * sizeof(float));
  constexpr int64_t kLaneSums = sizeof(LaneSums) / sizeof(float);
  LaneSums* lane_sums = reinterpret_cast<LaneSums*>(ws.floats(kState, strips * kLaneSums));
  std::memset(lane_sums, 0, static_cast<size_t>(strips) * sizeof(LaneSums));
  float* products = item.out_dot ? ws.floats(kMisc, NB * L) : nullptr;
  for (int t = 0; t < strips; ++t)
    pack_lanes<A>(lanes, t * L, static_cast<int>(smaller<int64_t>(lanes.count - t * L, L)), panels + t * words * L, ws);

  for (int64_t first = 0; first < streamed.count; first += NB) {
    const int n = static_cast<int>(smaller<int64_t>(streamed.count - first, NB));
    pack_rows<A>(streamed, first, n, rows);
    const float* pairs = want_sums ? pair_rows<A>(rows, dim, n, ws) : nullptr;
    for (int t = 0; t < strips; ++t) {
      const int count = static_cast<int>(smaller<int64_t>(lanes.count - t * L, L));
      score_block<A>(rows, n, panels + t * words * L, words, z, {streamed, first + NB, t, strips});
      if (products) std::memcpy(products, z, static_cast<size_t>(n * L) * sizeof(float));
      if (item.lanes_are_queries)
        coefficients_of_queries(item, first, n, t * L, count, z);
      else
        coefficients_of_keys(item, first, n, t * L, count, z);
      if (item.out_bias) lane_sums[t].add_bias(z, n);
      if (products) lane_sums[t].add_dots(z, products, n);
      if (want_sums) {
        pair_weights<A>(z, n);
        add_weighted<A>(pairs, n, z, dim, sums + t * padded(dim) * L);
      }
    }
  }

  for (int t = 0; t < strips; ++t) {
    const float* found = want_sums ? unpack_lanes(sums + t * padded(dim) * L, dim, ws) : nullptr;
    for (int lane = 0; lane < smaller<int64_t>(lanes.count - t * L, L); ++lane) {
      const int64_t row = lanes.row(t * L + lane);
      if (item.out_bias) item.out_bias[row] += lane_sums[t].bias[lane];
      if (item.out_dot) item.out_dot[row] += lane_sums[t].dot[lane];
      if (!want_sums) continue;
      const float* line = found + lane * padded(dim);
      if (item.out_scaled) store_row(item.out_scaled, lanes.matrix.dtype, row, line, dim, item.scale);
      if (item.out)
        for (int64_t d = 0; d < dim; ++d) item.out[row * dim + d] += line[d];
    }
  }
}

}  // namespace
