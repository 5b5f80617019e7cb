// Runs a kernel: blocks and threads in the order that the seed wants, until all have exited or none can go on.
#pragma once
#include <cstdlib>

#include "meetings.h"

namespace emu {

inline Fiber* pick() {
  auto& ready = machine.ready;
  if (seed >= 2 && machine.random() % 16 == 0) finish_one_copy();
  while (machine.head == ready.size()) {
    ready.clear();
    machine.head = 0;
    if (!finish_one_copy()) return nullptr;
  }
  if (seed == 0) {
    Fiber* next = ready[machine.head++];
    if (machine.head > 4096) ready.erase(ready.begin(), ready.begin() + machine.head), machine.head = 0;
    return next;
  }
  size_t best = ready.size() - 1;
  if (seed >= 2) {  // warps have random priorities, redrawn now and then
    if (machine.random() % 64 == 0) machine.priority[machine.random() % machine.priority.size()] = machine.random();
    best = machine.random() % ready.size();
    for (size_t i = 0; i < ready.size(); ++i)
      if (machine.priority[ready[i]->warp] > machine.priority[ready[best]->warp]) best = i;
  }
  Fiber* next = ready[best];
  ready[best] = ready.back();
  ready.pop_back();
  return next;
}

inline std::string deadlock() {
  std::string report = "deadlock: " + std::to_string(machine.done) + " of " + std::to_string(machine.fibers.size()) +
                       " threads have exited";
  auto add = [&](const std::vector<Meeting>& meetings, const std::string& block) {
    for (const Meeting& m : meetings)
      report += std::string("; ") + m.op + " at " + text(m.at) + " in " + block + " has " + std::to_string(m.count) +
                " of " + std::to_string(m.need) + " threads";
  };
  for (const Block& block : machine.blocks)
    for (const auto& meetings : block.meetings) add(meetings, "block " + text(block.index));
  add(machine.cluster_meetings, "the cluster");
  for (const Fiber& f : machine.fibers)
    if (f.state == Fiber::WAITING && f.until) {
      report += std::string("; ") + f.op + " at " + text(f.at) + " never ends for block " + text(f.block->index) +
                " thread " + text(f.thread) + " and maybe others";
      break;
    }
  return report;
}

// Runs the blocks of one cluster together until all their threads have exited.
inline void run_cluster(size_t smem) {
  static const unsigned char patterns[] = {0xff, 0xff, 0x00, 0x3f, 0x7e};
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  std::vector<std::unique_ptr<unsigned char, void (*)(void*)>> memory;
  for (Block& block : machine.blocks) {  // blocks of exactly the size asked for: AddressSanitizer sees both ends
    void* raw = nullptr;
    if (posix_memalign(&raw, 1024, std::max<size_t>(smem, 1))) throw std::bad_alloc();
    memory.emplace_back(static_cast<unsigned char*>(raw), free);
    memset(raw, patterns[seed < 2 ? seed : seed % 5], smem);
    block.smem = memory.back().get();
    block.running = threads;
  }
  machine.ready.clear();
  machine.head = 0;
  machine.done = 0;
  machine.error.clear();
  machine.engine.clear();
  machine.cluster_meetings.clear();
  machine.priority.resize(machine.fibers.size() / 32 + 1);
  for (auto& p : machine.priority) p = machine.random();
  for (size_t i = 0; i < machine.fibers.size(); ++i) {
    Fiber& f = machine.fibers[i];
    f.id = static_cast<int>(i) % threads;
    f.block = &machine.blocks[i / threads];
    f.thread = {f.id % blockDim.x, f.id / blockDim.x % blockDim.y, f.id / blockDim.x / blockDim.y};
    f.lane = f.id % 32;
    f.warp = static_cast<int>(i) / 32;
    f.until = nullptr;
    f.copies = f.stores = {};
#ifdef __SANITIZE_THREAD__
    if (f.tsan) {  // a fresh thread on a fresh stack: blocks are not ordered with each other
      __tsan_destroy_fiber(f.tsan);
      drop_stack(f);
      make_stack(f);
    }
    f.tsan = __tsan_create_fiber(0);
#endif
    wake(&f);
  }
  while (machine.done < static_cast<int>(machine.fibers.size())) {
    Fiber* next = pick();
    if (!next) throw std::runtime_error(deadlock());
    machine.current = next;
    threadIdx = next->thread;
    blockIdx = next->block->index;
    switch_to(machine.scheduler, *next);
    machine.current = nullptr;
    if (!machine.error.empty()) throw std::runtime_error(machine.error);
  }
  if (!machine.engine.empty()) throw std::runtime_error("blocks exit while copies are under way");
}

// Fibers whose kernel has not ended are abandoned: their frames are not unwound, and ThreadSanitizer keeps its threads.
inline void drop_fibers() {
  for (Fiber& f : machine.fibers) {
#ifdef __SANITIZE_THREAD__
    if (f.tsan && f.state == Fiber::DONE) __tsan_destroy_fiber(f.tsan);
#endif
    drop_stack(f);
  }
  machine.fibers.clear();
}

// Told of every launch, which then does not run (launches.cu).
inline void (*recorder)(const void* kernel, dim3 block, size_t smem) = nullptr;

inline void launch(int cluster, dim3 grid, dim3 block, size_t smem, std::function<void()> kernel) {
  release(&machine.grid_start);
  Quiet quiet;
  std::lock_guard<std::mutex> lock(machine.one_launch);
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (!threads || threads > 1024)
    throw std::runtime_error("launch: a block of " + std::to_string(threads) + " threads");
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) throw std::runtime_error("launch: bad grid");
  if (cluster < 1 || cluster > 8 || grid.x % cluster) throw std::runtime_error("launch: bad cluster");
  if (smem > smem_limit)
    throw std::runtime_error("launch: " + std::to_string(smem) + " bytes of shared memory, emu::smem_limit is " +
                             std::to_string(smem_limit));
  counters.smem = std::max(counters.smem, smem);
  machine.smem_bytes = smem;
  machine.random.seed(seed);
  machine.late = seed % 2 == 0;
  machine.kernel = std::move(kernel);
  blockDim = block;
  gridDim = grid;
#ifdef __SANITIZE_THREAD__
  machine.scheduler.tsan = __tsan_get_current_fiber();
#endif
  if (machine.fibers.size() != threads * cluster) {
    drop_fibers();
    for (size_t i = 0; i < threads * cluster; ++i) make_stack(machine.fibers.emplace_back());
  }
  std::vector<size_t> order(size_t(grid.x) / cluster * grid.y * grid.z);  // the order of blocks is not promised either
  for (size_t i = 0; i < order.size(); ++i) order[i] = seed == 1 ? order.size() - 1 - i : i;
  if (seed >= 2) std::shuffle(order.begin(), order.end(), machine.random);
  try {
    for (size_t i : order) {
      const unsigned wide = grid.x / cluster;
      machine.blocks.clear();
      machine.blocks.resize(cluster);
      for (int rank = 0; rank < cluster; ++rank) {
        machine.blocks[rank].rank = rank;
        machine.blocks[rank].index = {unsigned(i % wide) * cluster + rank, unsigned(i / wide % grid.y),
                                      unsigned(i / wide / grid.y)};
      }
      run_cluster(smem);
    }
  } catch (...) {
    machine.current = nullptr;
    machine.engine.clear();
    drop_fibers();
    throw;
  }
  acquire(&machine.grid_end);
}

}  // namespace emu
