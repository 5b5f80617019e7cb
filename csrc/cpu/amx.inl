// bf16 products on AMX tiles (16 x 16 scores, 32 dimensions an instruction), for the softmax passes. The packed layouts
// are those of the vector kernels: a tile is a window into them. Search keeps to vectors, whose rounding it can repeat
// anywhere.

namespace {

struct Amx {
  static constexpr int PACK = 2, STEP = 16;

  // The tile registers of the thread, all 16 rows of 64 bytes, for as long as an item runs.
  struct Scope {
    Scope() {
      alignas(64) uint8_t config[64] = {1};
      for (int tile = 0; tile < 8; ++tile) {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = 16;
      }
      _tile_loadconfig(config);
    }
    Scope(const Scope&) = delete;
    ~Scope() { _tile_release(); }
  };
};

constexpr int kSide = 16;  // rows, and words of a row, in a tile
constexpr int kBlockBytes = CHUNK * sizeof(float), kLaneBytes = L * sizeof(float);
static_assert(L == 2 * kSide && NB % kSide == 0 && CHUNK % kSide == 0 && NB / 2 <= CHUNK, "tiles must fit the layouts");

template <>
void score_block<Amx>(const float* block, int n, const float* panel, int64_t words, float* scores, const Ahead& ahead) {
  for (int first = 0; first < n; first += 2 * kSide) {
    ahead.fetch(first / kSide);
    ahead.fetch(first / kSide + 1);
    const bool two = first + kSide < n;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t w = 0; w < words; w += kSide) {
      const float* a = block + (w / CHUNK * NB + first) * CHUNK + w % CHUNK;
      _tile_loadd(6, panel + w * L, kLaneBytes);
      _tile_loadd(7, panel + w * L + kSide, kLaneBytes);
      _tile_loadd(4, a, kBlockBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (two) {
        _tile_loadd(5, a + kSide * CHUNK, kBlockBytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, scores + first * L, kLaneBytes);
    _tile_stored(1, scores + first * L + kSide, kLaneBytes);
    if (two) {
      _tile_stored(2, scores + (first + kSide) * L, kLaneBytes);
      _tile_stored(3, scores + (first + kSide) * L + kSide, kLaneBytes);
    }
  }
}

inline void transpose(__m512i (&r)[kSide]) {
  __m512i t[kSide];
  for (int i = 0; i < kSide; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < kSide; i += 4) {
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
  for (int i = 0; i < kSide; ++i) r[i] = t[i];
}

// [dim, rounded up to 16][64 words]: a word holds a dimension of two rows. Rows past n are zero.
template <>
const float* pair_rows<Amx>(const float* block, const RowRange& r, int64_t, int n, Workspace& ws) {
  const int64_t dim = r.matrix.dim;
  float* pairs = ws.floats(kRowPairs, padded(dim) * CHUNK);
  for (int first = 0; first < n; first += 2 * kSide)
    for (int64_t d = 0; d < dim; d += kSide) {
      const float* from = block + d / (2 * CHUNK) * NB * CHUNK + d % (2 * CHUNK) / 2;
      __m512i words[kSide];
      for (int m = 0; m < kSide; ++m) {
        const int row = first + 2 * m;
        const __m256i zero = _mm256_setzero_si256();
        const __m256i even = row < n ? _mm256_loadu_si256((const __m256i*)(from + row * CHUNK)) : zero;
        const __m256i odd = row + 1 < n ? _mm256_loadu_si256((const __m256i*)(from + (row + 1) * CHUNK)) : zero;
        words[m] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      }
      transpose(words);
      for (int j = 0; j < kSide; ++j) _mm512_storeu_si512(pairs + (d + j) * CHUNK + first / 2, words[j]);
    }
  return pairs;
}

template <>
void pair_weights<Amx>(float* weights, int n) {
  pair_weights<Bf16>(weights, n);
  const int words = (n + 1) / 2, whole = (words + kSide - 1) / kSide * kSide;
  std::memset(weights + words * L, 0, static_cast<size_t>(whole - words) * kLaneBytes);
}

template <>
void add_weighted<Amx>(const float* rows, int n, const float* weights, int64_t dim, float* out) {
  const int words = (n + 1) / 2;
  for (int64_t d = 0; d < dim; d += 2 * kSide) {
    const bool two = d + kSide < dim;
    float* o = out + d * L;
    _tile_loadd(0, o, kLaneBytes);
    _tile_loadd(1, o + kSide, kLaneBytes);
    if (two) {
      _tile_loadd(2, o + kSide * L, kLaneBytes);
      _tile_loadd(3, o + kSide * L + kSide, kLaneBytes);
    }
    for (int w = 0; w < words; w += kSide) {
      const float* a = rows + d * CHUNK + w;
      _tile_loadd(6, weights + w * L, kLaneBytes);
      _tile_loadd(7, weights + w * L + kSide, kLaneBytes);
      _tile_loadd(4, a, kBlockBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (two) {
        _tile_loadd(5, a + kSide * CHUNK, kBlockBytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, o, kLaneBytes);
    _tile_stored(1, o + kSide, kLaneBytes);
    if (two) {
      _tile_stored(2, o + kSide * L, kLaneBytes);
      _tile_stored(3, o + kSide * L + kSide, kLaneBytes);
    }
  }
}

}  // namespace
