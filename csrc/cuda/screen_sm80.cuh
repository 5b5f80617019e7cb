// Screening: score tiles on tensor cores, of which only pairs that may matter are handed on, as intervals that hold
// their exact score. inner_ij = <q_i, k_j> * a_j + b_j is compared with one limit per row and tile; all else is for
// survivors. Fused: matrix product, metric, limit. Read twice: queries, once per tile of keys (from L2).
//
// A block: 128 queries x 128 keys, 4 warps of 64 x 64, 4 stages of 32 columns. Between two barriers a warp issues 64
// matrix instructions, 16 loads of fragments and about 80 others.
//
// 128 registers of accumulators, 228 to 254 in all; 78.5 KiB of shared memory: two blocks on an SM of sm_80 and sm_90,
// one on sm_86, sm_89 and sm_120. Floor: 2 B N D operations at the rate of mma.sync (about 60 % of Hopper's peak).
#pragma once
#include "ops80.h"
#include "scores.cuh"

namespace fastcompat::cuda::sm80 {

constexpr int THREADS = 128, STAGES = 4, STAGE_BYTES = 2 * TILE * PIECE * 2;
constexpr int STASHED = 16;  // scores of a thread in one row of its tile

// Rows as tensor cores read them: 16-bit elements, rows 16-byte aligned.
struct Operand {
  const uint16_t* data;
  int64_t stride;       // elements
  int columns;          // past the last one it reads as zeros
  const int64_t* rows;  // by position, or null: row = position - first
  int64_t first;

  __device__ const uint16_t* row(int64_t position) const {
    return data + (rows ? rows[position] : position - first) * stride;
  }
};

struct Screen {
  Operand query, keys;
  int pieces;      // of PIECE columns
  bool two_terms;  // packed rows are [high | low]: low*high, high*low, high*high
  Space space;
  int64_t first_query, end_query;
  int64_t begin, end, per_split;  // positions; per_split is a multiple of TILE
  int query_blocks;

  __host__ __device__ int terms() const { return two_terms ? 3 : 1; }
};

struct Shared {
  unsigned char* stages;
  float* stash;              // [STASHED, THREADS], each thread's own
  RowFactors *keys, *query;  // [TILE]
  float* limits;             // [TILE]
  unsigned char* rest;       // the reduction's own

  static constexpr size_t bytes =
      STAGES * STAGE_BYTES + STASHED * THREADS * 4 + 2 * TILE * sizeof(RowFactors) + TILE * 4;

  __device__ explicit Shared(unsigned char* smem) {
    stages = smem;
    stash = reinterpret_cast<float*>(stages + STAGES * STAGE_BYTES);
    keys = reinterpret_cast<RowFactors*>(stash + STASHED * THREADS);
    query = keys + TILE;
    limits = reinterpret_cast<float*>(query + TILE);
    rest = reinterpret_cast<unsigned char*>(limits + TILE);
  }
};

// Rows of 64 bytes; 16-byte groups are swizzled so that 8 neighbouring rows fill the 32 banks.
__device__ __forceinline__ int tile_offset(int row, int group) {
  return row * PIECE * 2 + (group ^ (row / 2 & 3)) * 16;
}

// Streams pieces of the block's queries and of one tile of keys after the other into the stages. A thread copies the
// same 16 bytes of four query rows and four keys, 32 rows apart. Past the last row it copies that row again, unread.
struct Stream {
  const Screen& p;
  unsigned char* const to;  // of this thread, in the first stage
  const uint16_t *queries[4], *keys[4];
  int query_column, key_column, piece = 0, term = 0, stage = 0;
  int64_t position;  // first of the tile being fetched
  const int64_t end;

  __device__ Stream(const Screen& p, unsigned char* stages, int64_t first_query, int64_t begin, int64_t end)
      : p(p), to(stages + tile_offset(threadIdx.x / 4, threadIdx.x % 4)), position(begin), end(end) {
#pragma unroll
    for (int i = 0; i < 4; ++i) queries[i] = p.query.row(min(first_query + threadIdx.x / 4 + i * 32, p.end_query - 1));
    if (position < end) find_keys();
    start_term();
  }

  __device__ void find_keys() {
#pragma unroll
    for (int i = 0; i < 4; ++i) keys[i] = p.keys.row(min(position + threadIdx.x / 4 + i * 32, end - 1));
  }
  __device__ void start_term() {
    const int low = p.two_terms ? p.pieces * PIECE : 0;
    query_column = threadIdx.x % 4 * 8 + (term == 0 ? low : 0);
    key_column = threadIdx.x % 4 * 8 + (term == 1 ? low : 0);
  }

  // Starts the next piece; always one group of copies.
  __device__ __forceinline__ void fetch() {
    if (position < end) {
      unsigned char* at = to + stage * STAGE_BYTES;
      const int query_left = p.query.columns - query_column, keys_left = p.keys.columns - key_column;
      if (query_left >= 8 && keys_left >= 8)
        copy(at, 16, 16);  // constant sizes take a fifth of the instructions
      else
        copy(at, min(max(query_left, 0), 8) * 2, min(max(keys_left, 0), 8) * 2);
      query_column += PIECE;
      key_column += PIECE;
      if (++piece == p.pieces) {
        piece = 0;
        if (++term == p.terms()) {
          term = 0;
          position += TILE;
          if (position < end) find_keys();
        }
        start_term();
      }
    }
    stage = (stage + 1) % STAGES;
    cp_async_commit();
  }

 private:
  __device__ __forceinline__ void copy(unsigned char* at, int query_bytes, int key_bytes) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) cp_async16(at + i * 32 * PIECE * 2, queries[i] + query_column, query_bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) cp_async16(at + (TILE + i * 32) * PIECE * 2, keys[i] + key_column, key_bytes);
  }
};

// acc += queries of this warp x keys of this warp over one piece, at these offsets for its first and second 16 columns.
template <class T>
__device__ __forceinline__ void multiply_piece(const unsigned char* stage, const int (&rows)[2],
                                               const int (&columns)[2], float (&acc)[4][8][4]) {
#pragma unroll
  for (int step = 0; step < PIECE / 16; ++step) {
    uint32_t a[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) ldmatrix_x4<false>(a[i], stage + rows[step] + i * 16 * PIECE * 2);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t b[4];
      ldmatrix_x4<false>(b, stage + columns[step] + j * 16 * PIECE * 2);
      const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        mma_m16n8k16<T>(acc[i][2 * j], a[i], b0);
        mma_m16n8k16<T>(acc[i][2 * j + 1], a[i], b1);
      }
    }
  }
}

// Reduction: every thread enters start_tile(first, end), end_tile(), which is a barrier at least, and finish(). A
// thread asks active() and threshold(), what a score must reach, of the row of its number; offer(row, column, position,
// low, high) is called for each survivor and says whether it needs resolve(row, column, position, score), which a whole
// warp enters.
//
// report: screen_kernel 254 registers; HMMA.16816.F32*, LDSM.16.M88.4, LDGSTS.E.BYPASS.128*
template <class T, class Reduction>
__global__ void __launch_bounds__(THREADS, 2)
    screen_kernel(const __grid_constant__ Screen p, const __grid_constant__ typename Reduction::Problem problem) {
  DYN_SMEM(smem);
  const Shared shared(smem);
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp_rows = tid / 64 * 64, warp_columns = tid / 32 % 2 * 64;
  const int64_t first_query = p.first_query + static_cast<int64_t>(blockIdx.x % p.query_blocks) * TILE;
  const int split = blockIdx.x / p.query_blocks;
  const int64_t begin = p.begin + split * p.per_split, end = min(begin + p.per_split, p.end);

  const bool has_query = first_query + tid < p.end_query;
  const RowFactors query = has_query ? p.space.query_factors[first_query + tid] : RowFactors{0, 0, 0, 0};
  shared.query[tid] = query;
  Reduction reduction(problem, p, shared, first_query, split);
  const RowFactors past_the_end = {0, -CUDART_INF_F, 0, 0};
  auto terms_of = [&](int64_t at) { return at < end ? p.space.key_factors[at] : past_the_end; };
  auto tile_of = [&](int64_t at) { return p.space.tiles[min(at, p.end - 1) / TILE]; };
  RowFactors next_terms = terms_of(begin + tid);  // fetched a tile ahead, as is
  KeyBounds next_tile = tile_of(begin);
  Stream stream(p, shared.stages, first_query, begin, end);
  for (int s = 0; s < STAGES - 1; ++s) stream.fetch();

  const int rows_at[2] = {tile_offset(warp_rows + lane % 16, lane / 16),
                          tile_offset(warp_rows + lane % 16, 2 + lane / 16)};
  const int key_row = TILE + warp_columns + lane % 8 + lane / 16 * 8;
  const int keys_at[2] = {tile_offset(key_row, lane / 8 % 2), tile_offset(key_row, 2 + lane / 8 % 2)};
  const int steps = p.pieces * p.terms();
  int stage = 0;
  for (int64_t first = begin; first < end; first += TILE) {
    shared.keys[tid] = next_terms;
    next_terms = terms_of(first + TILE + tid);
    reduction.start_tile(first, end);
    shared.limits[tid] = has_query && reduction.active()
                             ? limit_at(inner_level(reduction.threshold(), query, p.space), query, next_tile, p.space)
                             : CUDART_NAN_F;  // which nothing reaches, not even infinity
    next_tile = tile_of(first + TILE);
    float acc[4][8][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v) acc[i][j][v] = 0;
    for (int step = 0; step < steps; ++step) {
      // A group of copies is committed each step, so all but the newest STAGES - 2 are this stage and those before. The
      // barrier: every thread's part of it has arrived, and all have read the stage before, which fetch() overwrites.
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      stream.fetch();
      multiply_piece<T>(shared.stages + stage * STAGE_BYTES, rows_at, keys_at, acc);
      stage = (stage + 1) % STAGES;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const RowFactors& k = shared.keys[warp_columns + j * 8 + lane % 4 * 2 + v];
        const float multiply = k.multiply, add = k.add;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) acc[i][j][h * 2 + v] = __fmaf_rn(acc[i][j][h * 2 + v], multiply, add);
      }
    uint32_t rows = 0;  // of this thread's 8, those with a survivor
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      float top = -CUDART_INF_F;  // a NaN is overlooked, but then the limit is -inf
#pragma unroll
      for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(acc[r / 2][j][r % 2 * 2], acc[r / 2][j][r % 2 * 2 + 1]));
      if (top >= shared.limits[warp_rows + r / 2 * 16 + r % 2 * 8 + lane / 4]) rows |= 1u << r;
    }
    if (__any_sync(kAllLanes, rows))
#pragma unroll 1
      for (int r = 0; r < 8; ++r) {
        const int row = warp_rows + r / 2 * 16 + r % 2 * 8 + lane / 4;
        uint32_t unsure = 0;
        if (rows >> r & 1) {
#pragma unroll
          for (int known = 0; known < 8; ++known)  // registers have no index
            if (known == r)
#pragma unroll
              for (int e = 0; e < STASHED; ++e)
                shared.stash[e * THREADS + tid] = acc[known / 2][e / 2][known % 2 * 2 + e % 2];
          const float limit = shared.limits[row];
#pragma unroll 1
          for (int e = 0; e < STASHED; ++e) {
            const float inner = shared.stash[e * THREADS + tid];
            const int column = warp_columns + e / 2 * 8 + lane % 4 * 2 + e % 2;
            if (inner < limit || first + column >= end) continue;
            float low, high;
            score_interval(inner, shared.query[row], shared.keys[column], p.space, low, high);
            if (reduction.offer(row, column, first + column, low, high)) unsure |= 1u << e;
          }
        }
        if (Reduction::resolves)
          for (uint32_t lanes = __ballot_sync(kAllLanes, unsure); lanes; lanes &= lanes - 1) {
            const int from = __ffs(lanes) - 1, its_row = __shfl_sync(kAllLanes, row, from);
            for (uint32_t left = __shfl_sync(kAllLanes, unsure, from); left; left &= left - 1) {
              const int e = __ffs(left) - 1, column = warp_columns + e / 2 * 8 + from % 4 * 2 + e % 2;
              const float score = score_of(p.space, first_query + its_row, shared.query[its_row],
                                           p.space.row(first + column), shared.keys[column]);
              reduction.resolve(its_row, column, first + column, score);
            }
          }
      }
    reduction.end_tile();
  }
  cp_async_wait<0>();
  reduction.finish();
}

}  // namespace fastcompat::cuda::sm80
