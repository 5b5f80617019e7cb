// The instructions of csrc/cuda/ops80.h, lane by lane as the PTX manual lays them out.
#pragma once
#include "cuda_on_cpu.h"

namespace emu {

constexpr uint32_t SMEM_BASE = 1024;  // where a GPU places dynamic shared memory: not at 0

// The address of `bytes` bytes at p, which lie inside the block's shared memory.
inline uint32_t smem_address(const void* p, Where at, size_t bytes = 1) {
  const auto offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(shared_memory());
  if (offset > machine.smem_bytes || machine.smem_bytes - offset < bytes)
    fail("shared memory", at, "byte " + std::to_string(intptr_t(offset)) + " of " + std::to_string(machine.smem_bytes));
  return SMEM_BASE + static_cast<uint32_t>(offset);
}

enum class Half { bf16, fp16 };
template <class T>
constexpr Half half_type = std::is_same<T, __half>::value ? Half::fp16 : Half::bf16;

inline float to_float(uint16_t bits, Half type) {
  if (type == Half::fp16) {
    __half h;
    memcpy(&h, &bits, 2);
    return h;
  }
  __nv_bfloat16 h;
  h.bits = bits;
  return h;
}
inline float half_of(uint32_t v, int high, Half type) { return to_float(uint16_t(high ? v >> 16 : v), type); }

// How many rounds the 8 rows of one matrix take, one row per 16-byte bank group and round: 1 is free of conflicts.
inline void count_conflicts(const void* const (&rows)[8]) {
  int ways[8] = {};
  for (const void* row : rows) ++ways[reinterpret_cast<uintptr_t>(row) >> 4 & 7];
  ++counters.ldmatrix;
  counters.ldmatrix_ways += *std::max_element(ways, ways + 8);
}

struct Ldmatrix {
  const void* row;
  uint16_t elements[8];
  uint32_t* out;
};
inline void ldmatrix_x4(bool transposed, uint32_t (&r)[4], const void* row, Where at) {
  const char* op = transposed ? "ldmatrix.x4.trans" : "ldmatrix.x4";
  if (reinterpret_cast<uintptr_t>(row) & 15) fail(op, at, "the row is not 16-byte aligned");
  smem_address(row, at, 16);
  Ldmatrix mine{row, {}, r};
  memcpy(mine.elements, row, 16);  // by the lane itself, so that a race is seen as its own
  warp_meet(~0u, op, at, &mine, [=](const std::vector<Fiber*>& lanes) {
    auto of = [&](int lane) -> Ldmatrix& { return *static_cast<Ldmatrix*>(lanes[lane]->argument); };
    for (int m = 0; m < 4; ++m) {
      const void* rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = of(m * 8 + i).row;
      count_conflicts(rows);
      auto element = [&](int i, int j) -> uint32_t { return of(m * 8 + i).elements[j]; };
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, c = lane % 4 * 2;
        of(lane).out[m] =
            transposed ? element(c, g) | element(c + 1, g) << 16 : element(g, c) | element(g, c + 1) << 16;
      }
    }
  });
}

typedef float Eight __attribute__((vector_size(32)));
// D [M, 8N] += A [M, 16] B [16, 8N], the products of a sum one after the other.
EMU_UNWATCHED inline void multiply(Eight* D, const float (*A)[16], const Eight* B, int M, int N, int stride) {
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < N; ++j) D[i * stride + j] += A[i][k] * B[k * stride + j];
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
};
inline void mma_m16n8k16(Half type, float* d, const uint32_t* a, const uint32_t* b, Where at) {
  Mma mine{d, a, b};
  warp_meet(~0u, "mma.m16n8k16", at, &mine, [type](const std::vector<Fiber*>& lanes) {
    float A[16][16];
    Eight B[16], D[16];
    for (int lane = 0; lane < 32; ++lane) {
      const Mma& m = *static_cast<Mma*>(lanes[lane]->argument);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < 4; ++i) A[g + i % 2 * 8][t + i / 2 * 8 + h] = half_of(m.a[i], h, type);
        for (int i = 0; i < 2; ++i) B[t + i * 8 + h][g] = half_of(m.b[i], h, type);
        for (int i = 0; i < 2; ++i) D[g + i * 8][t + h] = m.d[i * 2 + h];
      }
    }
    multiply(D, A, B, 16, 1, 1);
    for (int lane = 0; lane < 32; ++lane) {
      const Mma& m = *static_cast<Mma*>(lanes[lane]->argument);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) m.d[i] = D[g + i / 2 * 8][t + i % 2];
    }
    ++counters.mma;
  });
}

// Late schedules move the bytes when the issuing thread awaits the group, early ones at once.
inline void cp_async(void* dst, const void* src, int size, int bytes, Where at) {
  if (bytes < 0 || bytes > size) fail("cp.async", at, "copies " + std::to_string(bytes) + " bytes");
  if ((reinterpret_cast<uintptr_t>(dst) | (bytes ? reinterpret_cast<uintptr_t>(src) : 0)) & (size - 1))
    fail("cp.async", at, "an address is not aligned");
  smem_address(dst, at, size);
  will_write(dst, size);
  auto move = [=] {
    if (bytes) memcpy(dst, src, bytes);
    if (bytes < size) memset(static_cast<char*>(dst) + bytes, 0, size - bytes);
  };
  if (!machine.late) move();
  Quiet quiet;
  self().copies.open.push_back(machine.late ? std::function<void()>(move) : [] {});
}
inline void cp_async_commit() {
  Quiet quiet;
  self().copies.commit();
}
inline void cp_async_wait(size_t left) { self().copies.await(left); }

}  // namespace emu
