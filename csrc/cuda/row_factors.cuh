// One pass over the rows of a matrix before they are searched. Fused: the check for NaN and infinity, norms, the bounds
// of screening, and, where tensor cores cannot read the rows as they lie, a packed 16-bit copy:
//   float32: bf16(x), then bf16(x - bf16(x)) where two terms are kept;   16-bit: x, aligned and padded with zeros.
// One block reads TILE rows, a warp one row at a time. Floor: each row is read from memory once (and from cache once).
#pragma once
#include "ops80.h"
#include "scores.cuh"

namespace fastcompat::cuda {

constexpr int ROW_WARPS = 8;

struct RowPass {
  Matrix matrix;
  const int64_t* rows;  // null: every row in order
  int64_t first, end;   // positions
  Metric metric;
  bool keys;
  code_t* flag;                  // the smallest nonfinite_code,
  code_t flagged;                // of which this is row 0's
  const int64_t* checked_first;  // positions that count as read: [*checked_first, *checked_end); null: all
  const int64_t* checked_end;
  RowFactors* factors;  // by position
  KeyBounds* tiles;     // by position / TILE, or null
  uint16_t* packed;     // [end - first, n_terms * padded columns], or null
  int n_terms;          // of a float32: 1 or 2
};

__host__ __device__ inline int64_t padded_columns(int64_t dim) { return (dim + PIECE - 1) / PIECE * PIECE; }

// At least the square root of a sum of squares that was added in fp32: it may be off by (d + 64) 2^-22 of itself and,
// by underflow, by d 2^-124; 1.0001 covers the rounding of this function.
__device__ __forceinline__ float root_above(float square, int64_t dim) {
  const float d = static_cast<float>(dim);
  return 1.0001f * sqrtf(square * (1 + (d + 64) * 0x1p-22f) + d * 0x1p-124f);
}

// Packs a row; returns a bound of the norm of what the packed terms leave out.
template <class T>
__device__ __forceinline__ float pack_row(const RowPass& p, int64_t row, uint16_t* to, int64_t columns) {
  const bool rounds = p.matrix.dtype == DType::f32;
  float rest = 0, second = 0;
  for (int64_t d = threadIdx.x % 32 * 8; d < columns; d += 256) {
    float x[8] = {};
    if (d < p.matrix.dim) load8(p.matrix, row, d, x);
    for (int term = 0; term < p.n_terms; ++term) {
      uint32_t u[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u[i] = pack<T>(x[2 * i], x[2 * i + 1]);
        float low, high;
        two_floats(std::is_same_v<T, bf16> ? DType::bf16 : DType::f16, u[i], low, high);
        if (term) second += low * low + high * high;
        x[2 * i] -= low;
        x[2 * i + 1] -= high;
      }
      *reinterpret_cast<uint4*>(to + term * columns + d) = make_uint4(u[0], u[1], u[2], u[3]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) rest += x[i] * x[i];
  }
  if (!rounds) return 0;
  rest = warp_sum(rest);
  second = warp_sum(second);
  // Products of two second terms are left out: |second| <= 2^-8 |row|.
  return root_above(rest, p.matrix.dim) + (p.n_terms > 1 ? 0x1p-8f * root_above(second, p.matrix.dim) : 0.0f);
}

// report: row_kernel 63 registers; LDG.E.128*, STG.E.128*
template <class T>
__global__ void __launch_bounds__(32 * ROW_WARPS) row_kernel(const __grid_constant__ RowPass p) {
  DYN_SMEM(smem);
  KeyBounds* most = reinterpret_cast<KeyBounds*>(smem);  // [ROW_WARPS]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t tile = p.first / TILE + blockIdx.x, columns = padded_columns(p.matrix.dim);
  KeyBounds bounds = {0, 0, 0, 0};
  for (int64_t at = tile * TILE + warp; at < min((tile + 1) * TILE, p.end); at += ROW_WARPS) {
    const int64_t row = p.rows ? p.rows[at] : at;
    double wide;
    const float square = squared_norm(p.matrix, row, wide);
    RowFactors factors;
    set_factors(p.metric, p.keys, square, wide, factors);
    if (p.packed) factors.residual = pack_row<T>(p, row, p.packed + (at - p.first) * p.n_terms * columns, columns);
    factors.norm += root_above(square, p.matrix.dim) + factors.residual;
    const KeyBounds b = bounds_of(factors);
    bounds = {fmaxf(bounds.residual, b.residual), fmaxf(bounds.norm, b.norm), fmaxf(bounds.add, b.add),
              fmaxf(bounds.multiply, b.multiply)};
    if (lane) continue;
    p.factors[at] = factors;
    const bool checked = !p.checked_first || (at >= *p.checked_first && at < *p.checked_end);
    if (checked && !is_finite(wide)) atomicMin(p.flag, p.flagged + row);
  }
  if (lane == 0) most[warp] = bounds;
  __syncthreads();
  if (threadIdx.x || !p.tiles) return;
  for (int w = 1; w < ROW_WARPS; ++w)
    bounds = {fmaxf(bounds.residual, most[w].residual), fmaxf(bounds.norm, most[w].norm),
              fmaxf(bounds.add, most[w].add), fmaxf(bounds.multiply, most[w].multiply)};
  p.tiles[tile] = bounds;
}

// p.first is a multiple of TILE. fp16 rows are packed as fp16, all others as bf16.
inline void read_rows(const RowPass& p, void* stream) {
  if (p.first >= p.end) return;
  const dim3 grid(static_cast<unsigned>((p.end - p.first + TILE - 1) / TILE));
  auto kernel = p.matrix.dtype == DType::f16 ? row_kernel<fp16> : row_kernel<bf16>;
  launch(kernel, grid, dim3(32 * ROW_WARPS), ROW_WARPS * sizeof(KeyBounds), stream, p);
}

}  // namespace fastcompat::cuda
