// bf16 products on AMX tiles (16 x 16 scores, 32 dimensions an instruction), for the softmax passes. The packed layouts
// are those of the vector kernels: a tile is a window into them. Search keeps to vectors, whose rounding it can repeat
// anywhere.
#pragma once
#include "tile.inl"

#ifdef FASTCOMPAT_AMX

namespace {

struct Amx {
  static constexpr int PACK = 2, STEP = 16;

  // The tile registers of the thread, all 16 rows of 64 bytes, for as long as an item runs. In the configuration, byte
  // 0 is the palette, a 16-bit number from byte 16 on each tile's bytes in a row, a byte from 48 on its rows.
  struct Scope {
    Scope() {
      alignas(64) uint8_t config[64] = {1};
      for (int tile = 0; tile < 8; ++tile) {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = 16;
      }
      asm volatile("" : : "r"(config) : "memory");  // gcc 12 takes the next line to read eight bytes alone
      _tile_loadconfig(config);
    }
    Scope(const Scope&) = delete;
    ~Scope() { _tile_release(); }
  };
};

constexpr int kSide = 16;  // rows, and words of a row, in a tile
constexpr int kBlockBytes = CHUNK * sizeof(float), kLaneBytes = L * sizeof(float);
static_assert(L == 2 * kSide && NB % kSide == 0 && CHUNK % kSide == 0 && NB / 2 <= CHUNK, "tiles must fit the layouts");

// Tiles 0 to 3 are sums of 32 rows (16 without `two`) x 32 lanes.
inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void load_sums(const float* from, bool two) {
  _tile_loadd(0, from, kLaneBytes);
  _tile_loadd(1, from + kSide, kLaneBytes);
  if (!two) return;
  _tile_loadd(2, from + kSide * L, kLaneBytes);
  _tile_loadd(3, from + kSide * L + kSide, kLaneBytes);
}

inline void store_sums(float* to, bool two) {
  _tile_stored(0, to, kLaneBytes);
  _tile_stored(1, to + kSide, kLaneBytes);
  if (!two) return;
  _tile_stored(2, to + kSide * L, kLaneBytes);
  _tile_stored(3, to + kSide * L + kSide, kLaneBytes);
}

// sums += a [rows][16 words] x b [16 words][L]
inline void add_products(const float* a, const float* b, bool two) {
  _tile_loadd(6, b, kLaneBytes);
  _tile_loadd(7, b + kSide, kLaneBytes);
  _tile_loadd(4, a, kBlockBytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if (!two) return;
  _tile_loadd(5, a + kSide * CHUNK, kBlockBytes);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

template <>
void score_block<Amx>(const float* block, int n, const float* panel, int64_t words, float* scores,
                      const Prefetch& prefetch) {
  for (int first = 0; first < n; first += 2 * kSide) {
    prefetch.fetch(first / kSide);
    prefetch.fetch(first / kSide + 1);
    const bool two = first + kSide < n;
    float* out = scores + first * L;
    for (int64_t from = 0; from == 0 || from < words; from += PIECE) {
      clear_sums();
      for (int64_t w = from; w < smaller(words, from + PIECE); w += kSide)
        add_products(block + (w / CHUNK * NB + first) * CHUNK + w % CHUNK, panel + w * L, two);
      float sums[2 * kSide * L];
      store_sums(from ? sums : out, two);
      for (int i = 0; from && i < (two ? 2 : 1) * kSide * L; i += W)
        Simd::store(out + i, Simd::add(Simd::load(out + i), Simd::load(sums + i)));
    }
  }
}

// [dim, rounded up to 16][64 words]: a word holds a dimension of two rows. Rows past n are zero.
template <>
const float* interleave_rows<Amx>(const float* block, int64_t dim, int n, Workspace& ws) {
  float* interleaved = ws.floats(kInterleaved, padded(dim) * CHUNK);
  for (int first = 0; first < n; first += 2 * kSide)
    for (int64_t d = 0; d < dim; d += kSide) {
      __m512i words[kSide];
      for (int m = 0; m < kSide; ++m) words[m] = words_of_two_rows(block, first + 2 * m, n, d);
      transpose(words);
      for (int j = 0; j < kSide; ++j) _mm512_storeu_si512(interleaved + (d + j) * CHUNK + first / 2, words[j]);
    }
  return interleaved;
}

template <>
void interleave_weights<Amx>(float* weights, int n) {
  interleave_weights<Bf16>(weights, n);
  const int words = (n + 1) / 2, whole = (words + kSide - 1) / kSide * kSide;
  std::memset(weights + words * L, 0, static_cast<size_t>(whole - words) * kLaneBytes);
}

template <>
void add_weighted<Amx>(const float* rows, int n, const float* weights, int64_t dim, float* out) {
  const int words = (n + 1) / 2;
  for (int64_t d = 0; d < dim; d += 2 * kSide) {
    const bool two = d + kSide < dim;
    load_sums(out + d * L, two);
    for (int w = 0; w < words; w += kSide) add_products(rows + d * CHUNK + w, weights + w * L, two);
    store_sums(out + d * L, two);
  }
}

}  // namespace

#endif
