// The instructions of csrc/cuda/ops90.h, as the PTX manual lays them out.
#pragma once
#include "ops80_on_cpu.h"

namespace emu {

// The same place in the shared memory of another block of the cluster.
template <class P>
P* in_block(P* p, int rank, const char* op, Where at) {
  if (rank < 0 || rank >= int(machine.blocks.size())) fail(op, at, "no block of that rank in the cluster");
  if (!machine.blocks[rank].running) fail(op, at, "the other block has exited");
  return reinterpret_cast<P*>(machine.blocks[rank].smem + (reinterpret_cast<unsigned char*>(p) - shared_memory()));
}
// ---- mbarriers
struct Mbar {
  int32_t bytes;  // still to come
  uint32_t phase : 1, pending : 15, arrivals : 15, live : 1;
};
static_assert(sizeof(Mbar) == 8, "an mbarrier is one 64-bit word");

inline Mbar& mbar(uint64_t* p, const char* op, Where at, int rank = self().block->rank) {
  if (smem_address(p, at, 8) & 7) fail(op, at, "the mbarrier is not 8-byte aligned");
  Mbar& bar = *reinterpret_cast<Mbar*>(in_block(p, rank, op, at));
  if (!bar.live || !bar.arrivals || bar.arrivals > 1024 || bar.pending > bar.arrivals)
    fail(op, at, "the mbarrier was never initialised");
  return bar;
}
inline void mbar_settle(Mbar& bar) {
  if (bar.pending || bar.bytes) return;
  bar.phase ^= 1;
  bar.pending = bar.arrivals;
  wake_waiters();
}
inline void mbar_init(uint64_t* p, int arrivals, Where at) {
  Quiet quiet;
  smem_address(p, at, 8);
  const Mbar bar{0, 0, unsigned(arrivals), unsigned(arrivals), 1};
  memcpy(p, &bar, 8);
}
inline void mbar_arrive(uint64_t* p, int bytes, Where at, int rank) {
  Quiet quiet;
  const char* op = "mbarrier.arrive";
  Mbar& bar = mbar(p, op, at, rank);
  release(&bar);
  if (!bar.pending) fail(op, at, "more arrivals than the mbarrier was initialised for");
  bar.bytes += bytes;
  --bar.pending;
  mbar_settle(bar);
}
inline void mbar_arrive(uint64_t* p, int bytes, Where at) { mbar_arrive(p, bytes, at, self().block->rank); }
inline void mbar_arrive_remote(uint64_t* p, int rank, Where at) { mbar_arrive(p, 0, at, rank); }
inline void mbar_wait(uint64_t* p, int parity, Where at) {
  {
    Quiet quiet;
    const Mbar& bar = mbar(p, "mbarrier.wait", at);
    wait_until("mbarrier.wait", at, [&bar, parity] { return int(bar.phase) != parity; });
  }
  acquire(p);
}

// ---- copies
// A copy of `bytes` to shared memory that reports to bar.
inline void copy_in(unsigned char* dst, int bytes, std::vector<Range> reads, Mbar& bar, std::function<void()> move) {
  reads.push_back({dst, size_t(bytes), true});
  in_background(Async(&bar, std::move(reads), std::move(move), [&bar, bytes] {
    bar.bytes -= bytes;
    mbar_settle(bar);
  }));
}
struct TensorMap {
  const uint16_t* data;
  int64_t rows, cols, stride;
  int box_rows, box_cols;
};
template <class T>
TensorMap make_tensor_map(const T* data, int64_t rows, int64_t cols, int box_rows, int box_cols, int64_t stride) {
  static_assert(sizeof(T) == 2, "bf16 or fp16");
  if (box_cols != 64 || box_rows < 1 || box_rows > 256) throw std::runtime_error("tensor map: bad box");
  if (rows < 1 || cols < 1 || rows > int64_t(1) << 32) throw std::runtime_error("tensor map: bad size");
  if (stride * 2 % 16 || (reinterpret_cast<uintptr_t>(data) & 15) || stride < cols)
    throw std::runtime_error("tensor map: data and row pitch must be multiples of 16 bytes");
  return {reinterpret_cast<const uint16_t*>(data), rows, cols, stride, box_rows, box_cols};
}
constexpr uint32_t swizzle128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

inline void tensor_copy(void* dst, const TensorMap& map, int col, int row, uint64_t* bar, unsigned blocks, Where at) {
  Quiet quiet;
  const char* op = "tensor copy";
  const int bytes = map.box_rows * 128;
  if (smem_address(dst, at, bytes) & 1023) fail(op, at, "the destination is not 1024-byte aligned");
  if (!blocks || blocks >> machine.blocks.size()) fail(op, at, "no such block in the cluster");
  // Rows r of the box that lie in the matrix, and how many of their elements do.
  const int64_t first = std::max<int64_t>(0, -int64_t(row)), last = std::min<int64_t>(map.box_rows, map.rows - row);
  const int64_t left = std::max<int64_t>(0, -int64_t(col)), right = std::min<int64_t>(64, map.cols - col);
  auto source = [=](int64_t r, int64_t c) { return map.data + (row + r) * map.stride + col + c; };
  std::vector<Range> reads;
  if (left < right)
    for (int64_t r = first; r < last; ++r) reads.push_back({source(r, left), size_t(right - left) * 2, false});
  for (int rank = 0; rank < int(machine.blocks.size()); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    auto* to = static_cast<unsigned char*>(in_block(dst, rank, op, at));
    copy_in(to, bytes, reads, mbar(bar, op, at, rank), [=, rows = map.box_rows] {
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < 64; ++c) {
          const bool inside = r >= first && r < last && c >= left && c < right;
          const uint16_t value = inside ? *source(r, c) : 0;
          memcpy(to + swizzle128(r * 128 + c * 2), &value, 2);
        }
    });
  }
}

// ---- barriers
inline void named_barrier(int id, int threads, Where at) {
  if (id < 1 || id > 15) fail("bar", at, "named barriers are 1 to 15");
  if (threads % 32) fail("bar", at, "the number of threads must be a multiple of 32");
  meet({&self().block->meetings[BARRIER + id], 0, threads, false, true}, "bar.sync", at, nullptr, nothing);
}
inline void cluster_sync(Where at) {
  meet({&machine.cluster_meetings, 0, int(machine.fibers.size()), true, true}, "cluster_sync", at, nullptr, nothing);
}

// ---- wgmma: late schedules form the product when its group is awaited, early ones at once
struct Operand {  // A, from shared memory or from registers
  uint64_t descriptor;
  uint32_t registers[4];
  bool in_registers;
};
inline Operand operand(uint64_t descriptor) { return {descriptor, {}, false}; }
inline Operand operand(const uint32_t (&a)[4]) { return {0, {a[0], a[1], a[2], a[3]}, true}; }

// Where a tile of `rows` x 16 elements lies, 8 neighbouring elements after the other.
inline std::vector<const unsigned char*> tile_pieces(uint64_t d, int rows, bool mn_major, Where at) {
  if (d >> 62 != 1) fail("wgmma", at, "only the 128-byte swizzle is emulated");
  if (d >> 49 & 7) fail("wgmma", at, "the descriptor's base offset must be 0: tiles are 1024-byte aligned");
  auto field = [d](int bit) { return uint32_t(d >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), panel = field(16), group = field(32);
  std::vector<const unsigned char*> pieces;
  auto add = [&](uint32_t address) {
    const uint32_t offset = swizzle128(address) - SMEM_BASE;
    if (offset + size_t(16) > machine.smem_bytes) fail("wgmma", at, "a descriptor reaches outside shared memory");
    pieces.push_back(shared_memory() + offset);
  };
  if (mn_major)
    for (int k = 0; k < 16; ++k)
      for (int r = 0; r < rows; r += 8) add(start + r / 64 * panel + k / 8 * group + k % 8 * 128 + r % 64 * 2);
  else
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < 16; k += 8) add(start + r / 8 * group + r % 8 * 128 + k * 2);
  return pieces;
}
// put(row, column, value) of every element
template <class Put>
void read_pieces(const std::vector<const unsigned char*>& pieces, int rows, bool mn_major, Half type, Put put) {
  uint16_t eight[8];
  for (size_t p = 0; p < pieces.size(); ++p) {
    memcpy(eight, pieces[p], 16);
    for (int i = 0; i < 8; ++i) {
      const float value = to_float(eight[i], type);
      mn_major ? put(p % (rows / 8) * 8 + i, p / (rows / 8), value) : put(p / 2, p % 2 * 8 + i, value);
    }
  }
}

struct WgmmaPart {  // one thread's
  float* d;
  Operand a;
  uint64_t b;
  bool accumulate;
};
struct WgmmaGroup {
  std::vector<WgmmaPart> parts;
  std::vector<const unsigned char*> a, b;
  Half type;
  int columns;
  bool transposed;
};
inline void wgmma_multiply(const WgmmaGroup& g) {
  constexpr int kMost = 32;
  static float A[64][16];
  static Eight B[16][kMost], D[64][kMost];
  const WgmmaPart& first = g.parts[0];
  auto row = [](int thread, int h) { return thread / 32 * 16 + thread % 32 / 4 + h * 8; };
  if (first.a.in_registers)
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < 8; ++i)
        A[row(t, i / 2 % 2)][t % 4 * 2 + i % 2 + i / 4 * 8] = half_of(g.parts[t].a.registers[i / 2], i % 2, g.type);
  else
    read_pieces(g.a, 64, false, g.type, [](size_t row, size_t k, float value) { A[row][k] = value; });
  read_pieces(g.b, g.columns, g.transposed, g.type,
              [](size_t column, size_t k, float value) { B[k][column / 8][column % 8] = value; });
  auto each = [&](auto f) {
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < g.columns / 2; ++i) f(g.parts[t].d[i], D[row(t, i / 2 % 2)][i / 4], t % 4 * 2 + i % 2);
  };
  each([&](float& d, Eight& sums, int column) { sums[column] = first.accumulate ? d : 0.f; });
  multiply(D[0], A, B[0], 64, g.columns / 8, kMost);
  each([&](float& d, Eight& sums, int column) { d = sums[column]; });
  ++counters.mma;
}

inline void warpgroup_meet(const char* op, Where at, void* argument, Body body) {
  const int group = self().id / 128;
  meet({&self().block->meetings[WARPGROUP + group], 0, 128, true, false}, op, at, argument, body);
}
inline Groups& wgmma_groups() { return self().block->wgmma[self().id / 128]; }

inline void wgmma(Half type, float* d, int columns, Operand a, uint64_t b, bool accumulate, bool transposed, Where at) {
  WgmmaPart mine{d, a, b, accumulate};
  warpgroup_meet("wgmma", at, &mine, [=](const std::vector<Fiber*>& all) {
    auto group = std::make_shared<WgmmaGroup>();
    group->type = type, group->columns = columns, group->transposed = transposed;
    for (Fiber* f : all) {
      const auto& part = *static_cast<WgmmaPart*>(f->argument);
      if (part.b != b || part.accumulate != accumulate || part.a.descriptor != a.descriptor)
        fail("wgmma", at, "operands differ between the threads of a warpgroup");
      group->parts.push_back(part);
    }
    if (!a.in_registers) group->a = tile_pieces(a.descriptor, 64, false, at);
    group->b = tile_pieces(b, columns, transposed, at);
    std::vector<Range> reads;
    for (auto* pieces : {&group->a, &group->b})
      for (const unsigned char* piece : *pieces) reads.push_back({piece, 16, false});
    auto work = std::make_shared<Async>(
        &self().block->wgmma_done[self().id / 128], std::move(reads), [group] { wgmma_multiply(*group); }, [] {});
    if (!machine.late) work->run();
    wgmma_groups().open.push_back(machine.late ? std::function<void()>([work] { work->run(); }) : [] {});
  });
}
inline void wgmma_fence(Where at) { warpgroup_meet("wgmma.fence", at, nullptr, nothing); }
inline void wgmma_commit(Where at) {
  warpgroup_meet("wgmma.commit_group", at, nullptr, [](const std::vector<Fiber*>&) { wgmma_groups().commit(); });
}
inline void wgmma_wait(size_t left, Where at) {
  warpgroup_meet("wgmma.wait_group", at, nullptr, [=](const std::vector<Fiber*>&) { wgmma_groups().await(left); });
  acquire(&self().block->wgmma_done[self().id / 128]);
}

}  // namespace emu
