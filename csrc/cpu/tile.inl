// The tile engine: packing, the micro-kernel, and tiles of scores. Included once per instruction set, after simd_*.h.
//
// Lanes are the stationary side (queries, or keys in the key gradient): L of them side by side in vector lanes, packed
// as [words][L]. Rows are the streamed side, packed block by block as [chunk][row][64 words], so that a broadcast
// operand sits at a constant distance. A word is one float, or two bf16 where the instruction set multiplies pairs.
// Every product of a pair is added in the order of its dimensions, PIECE words at a time, in every tile shape: one
// pair, one score.
#include "kernels.h"

namespace {

using namespace fastcompat;
using F = Simd::F;
using I = Simd::I;
using M = Simd::M;

constexpr int W = Simd::W;
constexpr int NV = 2;                       // vectors of lanes in a strip
constexpr int L = NV * W;                   // lanes of a strip
constexpr int MR = Simd::MR;                // rows of a register tile
constexpr int NB = MR * (MR > 8 ? 8 : 16);  // rows of a packed block, even
constexpr int CHUNK = 64;                   // words of a row that lie together
constexpr int PIECE = 256;                  // words whose products are summed from zero before they join the others

constexpr float kInf = __builtin_inff(), kNan = __builtin_nanf("");

struct Fp32 {
  static constexpr int PACK = 1;  // dimensions in a word
  static constexpr int STEP = 1;  // words that are multiplied at once
  struct Scope {};                // what a thread sets up for an item
  static F step(F acc, const float* a, F b) { return Simd::fma(Simd::set1(*a), b, acc); }
  static F step(F acc, F a, F b) { return Simd::fma(a, b, acc); }
};

#ifdef FASTCOMPAT_BF16
struct Bf16 {
  static constexpr int PACK = 2, STEP = 1;
  struct Scope {};
  static F step(F acc, const float* a, F b) { return step(acc, Simd::set1(*a), b); }
  static F step(F acc, F a, F b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
};
#endif

enum Slot {
  kLanes,
  kRows,
  kRowPairs,
  kScores,
  kOut,
  kState,
  kConvert,
  kMisc,
  kLine,
  kNorms,
  kScreen,
  kFetched,
  kStarts
};

template <int N>
struct Int {
  static constexpr int value = N;
};

// fn(Int<n>) for a run-time n in 1..N
template <int N, class Fn>
inline void with_count(int n, Fn&& fn) {
  if constexpr (N > 0) {
    if (n == N)
      fn(Int<N>{});
    else
      with_count<N - 1>(n, fn);
  }
}

template <class T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}

// Words of a row, zeros up to a whole step included.
template <class A>
inline int64_t words_of(int64_t dim) {
  return (dim + A::PACK * A::STEP - 1) / (A::PACK * A::STEP) * A::STEP;
}
inline int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }
inline int64_t chunks_of(int64_t words) { return (words + CHUNK - 1) / CHUNK; }

// ---- reading and writing rows ----

inline const void* row_pointer(const Matrix& m, int64_t row) {
  return static_cast<const char*>(m.data) + row * m.stride * (m.dtype == DType::f32 ? 4 : 2);
}

inline void to_floats(float* out, const Matrix& m, int64_t row, int64_t from, int64_t n) {
  const void* p = row_pointer(m, row);
  int64_t d = 0;
  if (m.dtype == DType::f32) {
    const float* in = static_cast<const float*>(p) + from;
    for (; d + W <= n; d += W) Simd::store(out + d, Simd::load(in + d));
    for (; d < n; ++d) out[d] = in[d];
  } else if (m.dtype == DType::bf16) {
    const uint16_t* h = static_cast<const uint16_t*>(p) + from;
    for (; d + W <= n; d += W) Simd::store(out + d, Simd::load_bf16(h + d));
    for (; d < n; ++d) out[d] = bf16_to_float(h[d]);
  } else {
    const uint16_t* h = static_cast<const uint16_t*>(p) + from;
    for (; d + W <= n; d += W) Simd::store(out + d, Simd::load_f16(h + d));
    for (; d < n; ++d) out[d] = f16_to_float(h[d]);
  }
}

// A row as floats, in place where it is that already.
inline const float* floats_of(const Matrix& m, int64_t row, float* line) {
  if (m.dtype == DType::f32) return static_cast<const float*>(row_pointer(m, row));
  to_floats(line, m, row, 0, m.dim);
  return line;
}

void load_row(float* out, const Matrix& m, int64_t row) { to_floats(out, m, row, 0, m.dim); }

void store_row(void* out, DType dtype, int64_t row, const float* in, int64_t dim, float factor) {
  if (dtype == DType::f32) {
    float* o = static_cast<float*>(out) + row * dim;
    for (int64_t d = 0; d < dim; ++d) o[d] = factor * in[d];
  } else if (dtype == DType::bf16) {
    uint16_t* o = static_cast<uint16_t*>(out) + row * dim;
    for (int64_t d = 0; d < dim; ++d) o[d] = float_to_bf16(factor * in[d]);
  } else {
    uint16_t* o = static_cast<uint16_t*>(out) + row * dim;
    int64_t d = 0;
    for (; d + W <= dim; d += W) Simd::store_f16(o + d, Simd::mul(Simd::set1(factor), Simd::load(in + d)));
    for (; d < dim; ++d) o[d] = float_to_f16(factor * in[d]);
  }
}

// ---- packing ----

// The words of a row: where they lie, or in `line`.
template <class A>
inline const float* words_of_row(const Matrix& m, int64_t row, float* line) {
  if constexpr (A::PACK == 1) {
    return floats_of(m, row, line);
  } else {
    std::memset(line + m.dim / 2, 0, static_cast<size_t>(words_of<A>(m.dim) - m.dim / 2) * sizeof(float));
    std::memcpy(line, row_pointer(m, row), static_cast<size_t>(m.dim) * 2);
    return line;
  }
}

// [words][L], lanes past n are zero.
template <class A>
void pack_lanes(const RowRange& r, int64_t first, int n, float* panel, Workspace& ws) {
  const int64_t words = words_of<A>(r.matrix.dim);
  float* lines = ws.floats(kConvert, (W + 1) * words);
  float* zeros = lines + W * words;
  std::memset(zeros, 0, static_cast<size_t>(words) * sizeof(float));
  for (int v = 0; v < NV; ++v) {
    const float* rows[W];
    for (int i = 0, lane = v * W; i < W; ++i, ++lane)
      rows[i] = lane < n ? words_of_row<A>(r.matrix, r.row(first + lane), lines + i * words) : zeros;
    for (int64_t w = 0; w < words; w += W) {
      const int width = static_cast<int>(smaller<int64_t>(W, words - w));
      F column[W];
      Simd::columns(rows, w, width, column);
      for (int j = 0; j < width; ++j) Simd::store(panel + (w + j) * L + v * W, column[j]);
    }
  }
}

// Sums [padded(dim)][L] -> a row of padded(dim) numbers for every lane.
inline const float* unpack_lanes(const float* sums, int64_t dim, Workspace& ws) {
  float* rows = ws.floats(kLine, L * padded(dim));
  for (int64_t d = 0; d < dim; d += W) {
    const float* lines[W];
    for (int i = 0; i < W; ++i) lines[i] = sums + (d + i) * L;
    for (int v = 0; v < NV; ++v) {
      F column[W];
      Simd::columns(lines, v * W, W, column);
      for (int j = 0; j < W; ++j) Simd::store(rows + (v * W + j) * padded(dim) + d, column[j]);
    }
  }
  return rows;
}

// [chunk][NB][64]; words past the last of a row are never read.
template <class A>
void pack_rows(const RowRange& r, int64_t first, int n, float* block) {
  const int64_t dim = r.matrix.dim;
  for (int64_t c = 0; c * CHUNK < words_of<A>(dim); ++c) {
    const int64_t from = c * CHUNK * A::PACK, count = smaller<int64_t>(dim - from, CHUNK * A::PACK);
    const int64_t words = smaller<int64_t>(words_of<A>(dim) - c * CHUNK, CHUNK);
    for (int i = 0; i < n; ++i) {
      float* out = block + (c * NB + i) * CHUNK;
      const int64_t row = r.row(first + i);
      if (A::PACK == 1) {
        to_floats(out, r.matrix, row, from, count);
      } else {
        std::memset(out + count / 2, 0, static_cast<size_t>(words - count / 2) * sizeof(float));
        std::memcpy(out, static_cast<const uint16_t*>(row_pointer(r.matrix, row)) + from,
                    static_cast<size_t>(count) * 2);
      }
    }
  }
}

// Always inlined: gcc takes a function of prefetches alone for one without effect, and drops its calls.
inline __attribute__((always_inline)) void prefetch_row(const Matrix& m, int64_t row) {
  const char* data = static_cast<const char*>(row_pointer(m, row));
  const int64_t bytes = m.dim * (m.dtype == DType::f32 ? 4 : 2);
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(data + b, 0, 2);
}

// The next block, fetched into the cache a little with every tile, so that packing it finds it there.
struct Ahead {
  const RowRange& rows;
  int64_t first;
  int strip, strips;

  inline __attribute__((always_inline)) void fetch(int tile) const {
    constexpr int kTiles = NB / MR;
    const int n = static_cast<int>(smaller<int64_t>(rows.count - first, NB)), parts = strips * kTiles;
    const int part = strip * kTiles + tile;
    for (int i = n * part / parts; i < n * (part + 1) / parts; ++i) prefetch_row(rows.matrix, rows.row(first + i));
  }
};

#ifdef FASTCOMPAT_BF16
// Dimensions d .. d + 16 of rows `row` and `row + 1` of a packed bf16 block, a word each; rows past n are zero.
inline __m512i words_of_two_rows(const float* block, int row, int n, int64_t d) {
  const float* from = block + (d / (2 * CHUNK) * NB + row) * CHUNK + d % (2 * CHUNK) / 2;
  const __m256i zero = _mm256_setzero_si256();
  const __m256i even = row < n ? _mm256_loadu_si256((const __m256i*)from) : zero;
  const __m256i odd = row + 1 < n ? _mm256_loadu_si256((const __m256i*)(from + CHUNK)) : zero;
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// 16 x 16 words: rows become columns.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#endif

// The block as the weighted sum wants it: one word per dimension, holding A::PACK rows. fp32: the block itself.
template <class A>
const float* pair_rows(const float* block, int64_t dim, int n, Workspace& ws) {
  if constexpr (A::PACK == 1) {
    (void)dim, (void)n, (void)ws;
    return block;
  } else {
#ifdef FASTCOMPAT_BF16
    float* pairs = ws.floats(kRowPairs, chunks_of(dim) * (NB / 2) * CHUNK);
    for (int i = 0; i < n; i += 2)
      for (int64_t d = 0; d < dim; d += 16)
        _mm512_storeu_si512(pairs + (d / CHUNK * (NB / 2) + i / 2) * CHUNK + d % CHUNK,
                            words_of_two_rows(block, i, n, d));
    return pairs;
#endif
  }
}

// ---- products ----

// acc[r][lane] += sum_k a(r, k) * b[k][lane]; DOWN: a(r, k) = a[k * 64 + r], else a[r * 64 + k].
template <class A, int R, bool DOWN>
inline __attribute__((always_inline)) void multiply(const float* a, const float* b, int64_t count, F (&acc)[R][NV]) {
  for (int64_t k = 0; k < count; ++k) {
    F lanes[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) lanes[v] = Simd::load(b + k * L + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float* word = DOWN ? a + k * CHUNK + r : a + r * CHUNK + k;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = A::step(acc[r][v], word, lanes[v]);
    }
  }
}

template <int R>
inline __attribute__((always_inline)) void clear(F (&acc)[R][NV]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = Simd::set1(0.0f);
}

// acc += products of the words from .. to of R rows of a packed block, from row `first`, with the L lanes of a panel.
template <class A, int R>
inline __attribute__((always_inline)) void add_scores(const float* block, int first, const float* panel, int64_t from,
                                                      int64_t to, F (&acc)[R][NV]) {
  for (int64_t w = from; w < to; w += CHUNK)
    multiply<A, R, false>(block + w * NB + first * CHUNK, panel + w * L, smaller<int64_t>(to - w, CHUNK), acc);
}

// Scores of R rows of a packed block, from row `first`, with the L lanes of a panel.
template <class A, int R>
inline __attribute__((always_inline)) void score_tile(const float* block, int first, const float* panel, int64_t words,
                                                      F (&acc)[R][NV]) {
  float total[R][L];
  for (int64_t from = 0;;) {
    clear(acc);
    add_scores<A, R>(block, first, panel, from, smaller(words, from + PIECE), acc);
    if (from) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = Simd::add(Simd::load(total[r] + v * W), acc[r][v]);
    }
    from += PIECE;
    if (from >= words) return;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) Simd::store(total[r] + v * W, acc[r][v]);
  }
}

// scores [n][L] of a whole packed block; meanwhile fetches part t of `strips` of the next one. A piece of a panel stays
// in the first cache while the rows pass.
template <class A>
void score_block(const float* block, int n, const float* panel, int64_t words, float* scores, const Ahead& ahead) {
  for (int64_t from = 0; from == 0 || from < words; from += PIECE)
    for (int first = 0; first < n; first += MR) {
      if (from == 0) ahead.fetch(first / MR);
      with_count<MR>(smaller(n - first, MR), [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        float* out = scores + first * L;
        F acc[R][NV];
        clear(acc);
        add_scores<A, R>(block, first, panel, from, smaller(words, from + PIECE), acc);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            float* at = out + r * L + v * W;
            Simd::store(at, from ? Simd::add(Simd::load(at), acc[r][v]) : acc[r][v]);
          }
      });
    }
}

// out [dim][L] += sum over the rows of a block of row[dim] * weights[row][L]; rows and weights in words of A::PACK
// rows. A block is summed by itself first: the rounding error grows with the square root of NB + N/NB, not of N.
template <class A>
void add_weighted(const float* rows, int n, const float* weights, int64_t dim, float* out) {
  const int64_t words = (n + A::PACK - 1) / A::PACK, cap = NB / A::PACK;
  for (int64_t c = 0; c * CHUNK < dim; ++c) {
    const int width = static_cast<int>(smaller<int64_t>(dim - c * CHUNK, CHUNK));
    const int tiles = (width + MR - 1) / MR;
    for (int t = 0; t < tiles; ++t) {  // tiles of nearly equal height
      const int from = width * t / tiles, to = width * (t + 1) / tiles;
      with_count<MR>(to - from, [&](auto height) {
        constexpr int R = decltype(height)::value;
        float* o = out + (c * CHUNK + from) * L;
        F acc[R][NV];
        clear(acc);
        multiply<A, R, true>(rows + c * cap * CHUNK + from, weights, words, acc);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            float* at = o + r * L + v * W;
            Simd::store(at, Simd::add(Simd::load(at), acc[r][v]));
          }
      });
    }
  }
}

// weights [n][L] as the product wants them, in place: words of A::PACK rows.
template <class A>
void pair_weights(float* weights, int n) {
  if constexpr (A::PACK == 2) {
#ifdef FASTCOMPAT_BF16
    for (int i = 0; i < n; i += 2)
      for (int v = 0; v < NV; ++v) {
        __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(Simd::load(weights + i * L + v * W)));
        __m512i odd = _mm512_setzero_si512();
        if (i + 1 < n)
          odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(Simd::load(weights + (i + 1) * L + v * W)));
        _mm512_storeu_si512(weights + (i / 2) * L + v * W, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
#endif
  } else {
    (void)weights, (void)n;
  }
}

// e^x = 2^n e^r, n = floor(x / ln 2), with relative error below 1.2e-7; 0 where it would be subnormal, NaN kept.
inline F exp(F x) {
  x = Simd::exponent_range(x);
  const F n = Simd::floor(Simd::mul(x, Simd::set1(0x1.715476p+0f)));
  // ln 2 in two parts, the first so short that its product with n is exact: r loses nothing where x is large.
  const F r = Simd::fma(n, Simd::set1(0x1.bd0106p-13f), Simd::fma(n, Simd::set1(-0x1.63p-1f), x));
  F p = Simd::set1(0x1.fe553ep-10f);
  p = Simd::fma(p, r, Simd::set1(0x1.fef9bcp-8f));
  p = Simd::fma(p, r, Simd::set1(0x1.5755d2p-5f));
  p = Simd::fma(p, r, Simd::set1(0x1.553884p-3f));
  p = Simd::fma(p, r, Simd::set1(0x1.0000bap-1f));
  p = Simd::fma(p, r, Simd::set1(0x1.fffffap-1f));
  return Simd::times_pow2(Simd::fma(p, r, Simd::set1(1.0f)), n);
}

}  // namespace
