// Runs a kernel: blocks and threads in the order that the seed wants, until all have exited or none can go on.
#pragma once
#include <cstdlib>

#include "meetings.h"

namespace emu {

inline Fiber* pick() {
  auto& [lists, head, count] = machine.ready;
  const unsigned random = machine.random();
  if (seed >= 2 && random % 16 == 0) finish_one_copy();
  while (!count)
    if (!finish_one_copy()) return nullptr;
  --count;
  std::vector<Fiber*>* list = &lists[0];
  if (seed == 0) {
    Fiber* next = (*list)[head++];
    if (head > 4096 || !count) list->erase(list->begin(), list->begin() + head), head = 0;
    return next;
  }
  size_t at = list->size() - 1;
  if (seed >= 2) {  // warps have random priorities, redrawn now and then
    auto& priority = machine.priority;
    if (random / 16 % 64 == 0) priority[machine.random() % priority.size()] = machine.random();
    size_t best = lists.size();
    for (size_t warp = 0; warp < lists.size(); ++warp)
      if (!lists[warp].empty() && (best == lists.size() || priority[warp] > priority[best])) best = warp;
    list = &lists[best];
    at = random / 1024 % list->size();
  }
  Fiber* next = (*list)[at];
  (*list)[at] = list->back();
  list->pop_back();
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
  for (const Fiber* f : machine.fibers)
    if (f->state == Fiber::WAITING && f->until) {
      report += std::string("; ") + f->op + " at " + text(f->at) + " never ends for block " + text(f->block->index) +
                " thread " + text(f->thread) + " and maybe others";
      break;
    }
  return report;
}

// Takes the threads of one cluster. Launches are ordered, and so a thread of one may go on in the next; the blocks of
// one launch are not, and ThreadSanitizer must see that: there a block's threads have run no other of the launch.
inline void take_fibers(size_t count) {
#ifdef __SANITIZE_THREAD__
  constexpr size_t MOST = 2304;  // each costs about a megabyte
#else
  constexpr size_t MOST = 0;
#endif
  if (machine.next + count > std::max(MOST, count)) machine.next = 0;
  while (machine.pool.size() < machine.next + count) make_stack(machine.pool.emplace_back());
  machine.fibers.clear();
  for (; machine.fibers.size() < count; ++machine.next) {
    Fiber& f = machine.pool[machine.next];
    machine.fibers.push_back(&f);
#ifdef __SANITIZE_THREAD__
    if (f.tsan && f.launch == machine.launches) {
      __tsan_destroy_fiber(f.tsan);
      drop_stack(f);
      make_stack(f);
      f.tsan = nullptr;
    }
    if (!f.tsan) f.tsan = __tsan_create_fiber(0);
#endif
    f.launch = machine.launches;
  }
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
  take_fibers(threads * machine.blocks.size());
  const size_t warps = machine.fibers.size() / 32 + 1;
  machine.ready.lists.assign(warps, {});
  machine.ready.head = machine.ready.count = 0;
  machine.done = 0;
  machine.error.clear();
  machine.engine.clear();
  machine.cluster_meetings.clear();
  machine.priority.resize(warps);
  for (auto& p : machine.priority) p = machine.random();
  for (size_t i = 0; i < machine.fibers.size(); ++i) {
    Fiber& f = *machine.fibers[i];
    f.id = static_cast<int>(i) % threads;
    f.block = &machine.blocks[i / threads];
    f.thread = {f.id % blockDim.x, f.id / blockDim.x % blockDim.y, f.id / blockDim.x / blockDim.y};
    f.lane = f.id % 32;
    f.warp = static_cast<int>(i) / 32;
    f.until = nullptr;
    f.copies = {};
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
  for (Fiber& f : machine.pool) {
#ifdef __SANITIZE_THREAD__
    if (f.tsan && f.state == Fiber::DONE) __tsan_destroy_fiber(f.tsan);
#endif
    drop_stack(f);
  }
  machine.fibers.clear();
  machine.pool.clear();
}

// Told of every launch, which then does not run (launches.cu).
inline void (*recorder)(const void* kernel, dim3 block, size_t smem) = nullptr;

inline void launch(int cluster, dim3 grid, dim3 block, size_t smem, std::function<void()> kernel) {
  release(&machine.grid_start);
  Quiet quiet;
  std::lock_guard<std::mutex> lock(machine.one_launch);
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
  ++machine.launches;
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
