// Walk of a block over streamed tiles: S = X Y^T of a tile, a function of S chosen by the caller, then O += f(S) Y.
// X rows [TM] stay with the block, Y rows come in tiles of TN = 8192 / TM; O [TM, 4 TN] lives in registers. Both
// products read Y in pieces of 64 x 64 through one ring of cp.async stages, so the loads of the next piece, product or
// tile run behind every matrix instruction. Y is read twice a tile (L2 serves the second); X stays in shared memory
// where it fits. 8 warps, each 32 x 32 of S and of every quarter of O: a warp's rows are the same in both products.
// A float operand is the sum of bf16 terms and its product the terms' products, smallest first. The matrix unit rounds
// towards zero: sums of a tile start from zero and are added up by ordinary instructions, which also rescale.
// Registers: O 128 (96 when split), S 32, sums of a tile 32, the rest for addresses: 255 at most, no spills.
#pragma once
#include "ops80.h"

namespace fastcompat::cuda::sm80 {

constexpr int kThreads = 256;
constexpr int kPiece = 64;  // columns: 128 bytes, eight 16-byte cells swizzled by the row
constexpr int kScores = 8192;
constexpr int kCursorBytes = 256;
constexpr int kInfos = 3;  // the ring runs at most two tiles ahead

// Rows of 16-bit numbers, 16-byte aligned; float rows are sums over planes.
struct Planes {
  const uint16_t* data;
  int64_t rows, stride, plane;
};

struct Walk {
  Planes x, y;
  int dim, terms, stages;
  bool resident;  // X lies in shared memory as a whole
  bool sums;      // O is wanted
  int split_tiles;
  int stage_bytes, info_bytes;
  int cursor_at, weights_at, info_at, x_at, own_at;  // bytes into shared memory
};

// How operands reach the matrix unit, and how many groups of TN columns of O fit into registers.
struct Bf16 {
  using Element = bf16;
  static constexpr bool split = false;
  static constexpr int groups = 4;
};
struct Fp16 {
  using Element = fp16;
  static constexpr bool split = false;
  static constexpr int groups = 4;
};
struct SplitFloat {  // 2 or 3 bf16 terms
  using Element = bf16;
  static constexpr bool split = true;
  static constexpr int groups = 3;
};

// Product number n of 6 is (left term, right term), a hexadecimal digit each, n = 0 the lowest: (0, 2), (1, 1), (2, 0),
// (0, 1), (1, 0), (0, 0), from the smallest. 3 products (two terms) are the last three, 1 the last.
__device__ __forceinline__ int left_term(int n) { return 0x010210 >> 4 * n & 15; }
__device__ __forceinline__ int right_term(int n) { return 0x001012 >> 4 * n & 15; }
__host__ __device__ constexpr int first_product(int terms) { return 6 - terms * (terms + 1) / 2; }

__device__ __forceinline__ uint16_t* cell(uint16_t* piece, int row, int column8) {
  return piece + row * kPiece + ((column8 ^ (row & 7)) * 8);
}

template <int ROWS>
__device__ __forceinline__ void load_piece(uint16_t* to, const Planes& from, int term, int64_t row0, int column0,
                                           int dim) {
  const int r = threadIdx.x / 8, c = threadIdx.x % 8;
  const int left = dim - column0 - c * 8, bytes = left >= 8 ? 16 : left > 0 ? left * 2 : 0;
  const uint16_t* source = from.data + term * from.plane + (row0 + r) * from.stride + column0 + c * 8;
  uint16_t* target = cell(to, r, c);
#pragma unroll
  for (int i = 0; i < ROWS; i += kThreads / 8) {
    const bool inside = row0 + r + i < from.rows && bytes;
    cp_async16(target + i * kPiece, inside ? source + i * from.stride : from.data, inside ? bytes : 0);
  }
}

// t[32, 32] += A[32, 64] B^T, B rows of the product's columns; TRANS: B rows are the 64 that are summed over.
template <class F, bool TRANS>
__device__ __forceinline__ void multiply(float (&t)[2][4][4], uint16_t* a, int row, uint16_t* b, int column) {
  using T = typename F::Element;
  const int lane = opaque(threadIdx.x % 32);  // addresses held over the loops around would spill
#pragma unroll
  for (int k = 0; k < kPiece / 16; ++k) {
    uint32_t fa[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) ldmatrix_x4<false>(fa[i], cell(a, row + i * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t fb[4];
      if constexpr (TRANS)
        ldmatrix_x4<true>(fb, cell(b + column / kPiece * kPiece * kPiece, k * 16 + lane % 16,
                                   column % kPiece / 8 + j * 2 + lane / 16));
      else
        ldmatrix_x4<false>(fb, cell(b, column + j * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
      const uint32_t low[2] = {fb[0], fb[1]}, high[2] = {fb[2], fb[3]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma_m16n8k16<T>(t[i][2 * j], fa[i], low);
        mma_m16n8k16<T>(t[i][2 * j + 1], fa[i], high);
      }
    }
  }
}

// s rounded to T goes to shared memory; s keeps what rounding left of it.
template <class F, int TM>
__device__ __forceinline__ void store_weights(uint16_t* weights, float (&s)[2][4][4], int row, int column) {
  const int lane = opaque(threadIdx.x % 32), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int c = column + j * 8;
        const uint32_t two = pack<typename F::Element>(s[i][j][2 * h], s[i][j][2 * h + 1]);
        uint16_t* to = cell(weights + c / kPiece * TM * kPiece, row + i * 16 + g + h * 8, c % kPiece / 8) + t * 2;
        *reinterpret_cast<uint32_t*>(to) = two;
        if constexpr (F::split) {
          s[i][j][2 * h] -= __uint_as_float(two << 16);
          s[i][j][2 * h + 1] -= __uint_as_float(two & 0xffff0000u);
        }
      }
}

__device__ __forceinline__ void clear(float (&t)[2][4][4]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) t[i / 16][i / 4 % 4][i % 4] = 0.0f;
}

// Row r, column n of a thread's part of a tile, 4 by 8 numbers as mma.sync lays them out.
__device__ __forceinline__ float& part(float (&s)[2][4][4], int r, int n) { return s[r / 2][n / 2][r % 2 * 2 + n % 2]; }

// s = s * factor of the row + t.
__device__ __forceinline__ void scale_add(float (&s)[2][4][4], const float (&factor)[4], float (&t)[2][4][4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int n = 0; n < 8; ++n) part(s, r, n) = fmaf(part(s, r, n), factor[r], part(t, r, n));
}

// Where a thread's 4 rows of 8 columns of S lie.
template <int TM>
struct Place {
  static constexpr int TN = kScores / TM, WN = TN / 32;
  int warp_row, warp_column, wn, g, t;
  __device__ __forceinline__ explicit Place(int thread) {
    const int warp = thread / 32, lane = thread % 32;
    wn = warp % WN;
    warp_row = warp / WN * 32;
    warp_column = wn * 32;
    g = lane / 4;
    t = lane % 4;
  }
  __device__ __forceinline__ int row(int r) const { return warp_row + r / 2 * 16 + g + r % 2 * 8; }
  __device__ __forceinline__ int column(int n) const { return warp_column + n / 2 * 8 + t * 2 + n % 2; }
};

// Reduction says what happens to scores:
//   bool wanted(tile)                 whether any pair of the tile counts
//   void load(info, row0)             cp.async of what it needs to know of the streamed rows
//   void apply(s, factor, info, tile) S -> weights in place; what O has to be multiplied with first
template <class F, int TM, class Reduction>
class TileWalk {
 public:
  static constexpr int TN = kScores / TM, HALVES = TN / kPiece, GROUPS = F::groups;

  __device__ __forceinline__ TileWalk(const Walk& w, unsigned char* smem, Reduction& reduction)
      : w(w), smem(smem), reduction(reduction) {
    const int64_t all = (w.y.rows + TN - 1) / TN;
    tiles = static_cast<int>(max(int64_t{0}, min(static_cast<int64_t>(w.split_tiles), all - first())));
  }

  // o [GROUPS]; [1] where sums are never wanted.
  template <int G>
  __device__ __forceinline__ void run(float (&o)[G][2][4][4]) {
    const Place<TM> at(threadIdx.x);
    uint16_t* weights = reinterpret_cast<uint16_t*>(smem + w.weights_at);
    start();
    int info = 0;
    for (int tile = wanted_from(0); tile < tiles; tile = wanted_from(tile + 1)) {
      float s[2][4][4], factor[4] = {1.0f, 1.0f, 1.0f, 1.0f};
      clear(s);
      for (int piece = 0; piece < pieces(); ++piece) {
        if constexpr (F::split) {
          float t[2][4][4];
          clear(t);
          for (int product = first_product(w.terms); product < 6; ++product) score(t, at, left_term(product), piece);
          scale_add(s, factor, t);
        } else {
          score(s, at, 0, piece);
        }
      }
      reduction.apply(s, factor, smem + w.info_at + info * w.info_bytes, first() + tile);
      info = info + 1 == kInfos ? 0 : info + 1;
      if constexpr (G == GROUPS) {
        for (int term = 0; term < terms() && groups(); ++term) {
          if (term) __syncthreads();  // the term before is still being read
          store_weights<F, TM>(weights, s, at.warp_row, at.warp_column);
          for (int group = 0; group < groups(); ++group) {
            float t[2][4][4];
            clear(t);
            for (int half = 0; half < HALVES; ++half)
              for (int other = terms() - 1 - term; other >= 0; --other)
                multiply<F, true>(t, weights + half * TM * kPiece, at.warp_row, next_stage(), at.warp_column);
#pragma unroll
            for (int n = 0; n < GROUPS; ++n)
              if (n == group) scale_add(o[n], factor, t);
          }
          for (int r = 0; r < 4; ++r) factor[r] = 1.0f;
        }
      }
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  // First streamed tile, row of X and column of O of this block; asked for again rather than kept in registers.
  __device__ __forceinline__ int64_t first() const { return static_cast<int64_t>(blockIdx.y) * w.split_tiles; }
  __device__ __forceinline__ static int64_t x0() { return static_cast<int64_t>(blockIdx.x) * TM; }
  __device__ __forceinline__ static int out0() { return static_cast<int>(blockIdx.z) * GROUPS * TN; }

  __device__ __forceinline__ int pieces() const { return (w.dim + kPiece - 1) / kPiece; }
  __device__ __forceinline__ int groups() const { return w.sums ? min(GROUPS, (w.dim - out0() + TN - 1) / TN) : 0; }

  int tiles;

 private:
  __device__ __forceinline__ int wanted_from(int tile) const {
    while (tile < tiles && !reduction.wanted(tile)) ++tile;
    return tile;
  }
  __device__ __forceinline__ int terms() const { return F::split ? w.terms : 1; }
  __device__ __forceinline__ void score(float (&s)[2][4][4], const Place<TM>& at, int term, int piece) {
    uint16_t* stage = next_stage();
    multiply<F, false>(s, w.resident ? resident_piece(term, piece) : stage, at.warp_row,
                       w.resident ? stage : stage + TM * kPiece, at.warp_column);
  }
  __device__ __forceinline__ uint16_t* resident_piece(int term, int piece) const {
    return reinterpret_cast<uint16_t*>(smem + w.x_at) + (term * pieces() + piece) * TM * kPiece;
  }

  __device__ __forceinline__ void start() {
    if (threadIdx.x % 32 == 0) cursor() = {wanted_from(0), 0, 0, 0, first_product(terms()), 0};
    if (w.resident)
      for (int term = 0; term < terms(); ++term)
        for (int piece = 0; piece < pieces(); ++piece)
          load_piece<TM>(resident_piece(term, piece), w.x, term, x0(), piece * kPiece, w.dim);
    for (int n = 0; n + 1 < w.stages; ++n) load();
  }

  // The oldest stage once it has arrived; the one that everybody has left is filled again. Each call commits one group
  // of copies, an empty one past the end, so that "all but the newest stages - 2 groups" is always the oldest stage.
  // The one barrier says both that every thread's part of that stage has arrived and that all have read the stage
  // before, which load() overwrites.
  __device__ __forceinline__ uint16_t* next_stage() {
    if (w.stages == 3)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    __syncthreads();
    return stage(following(load()));
  }

  __device__ __forceinline__ uint16_t* stage(int slot) const {
    return reinterpret_cast<uint16_t*>(smem + slot * w.stage_bytes);
  }
  __device__ __forceinline__ int following(int slot) const { return slot + 1 == w.stages ? 0 : slot + 1; }

  // What is loaded next. Each warp keeps it in shared memory: registers are short.
  struct Cursor {
    int tile, info, phase, part, product, slot;
  };
  __device__ __forceinline__ Cursor& cursor() const {
    return reinterpret_cast<Cursor*>(smem + w.cursor_at)[threadIdx.x / 32];
  }

  __device__ __forceinline__ int load() {
    __syncwarp();
    Cursor c = cursor();
    const int slot = c.slot;
    if (c.tile < tiles) {
      uint16_t* to = stage(slot);
      const int64_t y0 = (first() + c.tile) * TN;
      if (c.phase == 0) {
        const int column = c.part * kPiece;
        if (c.part == 0 && c.product == first_product(terms())) {
          reduction.load(smem + w.info_at + c.info * w.info_bytes, y0);
          c.info = c.info + 1 == kInfos ? 0 : c.info + 1;
        }
        if (!w.resident) {
          load_piece<TM>(to, w.x, left_term(c.product), x0(), column, w.dim);
          to += TM * kPiece;
        }
        load_piece<TN>(to, w.y, right_term(c.product), y0, column, w.dim);
      } else {
        const int column = out0() + c.part / HALVES * TN;
#pragma unroll
        for (int n = 0; n < TN / kPiece; ++n)
          load_piece<kPiece>(to + n * kPiece * kPiece, w.y, c.product, y0 + c.part % HALVES * kPiece,
                             column + n * kPiece, w.dim);
      }
      advance(c);
    }
    cp_async_commit();
    c.slot = following(slot);
    __syncwarp();
    if (threadIdx.x % 32 == 0) cursor() = c;
    return slot;
  }

  // Must follow run()'s order of next_stage() exactly. Phase 0 counts (piece, product); phase 1 + term counts (group,
  // half, right term from the smallest).
  __device__ __forceinline__ void advance(Cursor& c) const {
    if (c.phase == 0) {
      if (++c.product < 6) return;
      c.product = first_product(terms());
      if (++c.part < pieces()) return;
    } else {
      if (--c.product >= 0) return;
      c.product = terms() - c.phase;
      if (++c.part < groups() * HALVES) return;
    }
    c.part = 0;
    if (groups() && ++c.phase <= terms()) {
      c.product = terms() - c.phase;
      return;
    }
    c.phase = 0;
    c.product = first_product(terms());
    c.tile = wanted_from(c.tile + 1);
  }

  const Walk& w;
  unsigned char* smem;
  Reduction& reduction;
};

}  // namespace fastcompat::cuda::sm80
