// CUDA threads as fibers of one OS thread: context switch, schedules, the one synchronisation primitive, reports.
// AddressSanitizer follows the stacks; for ThreadSanitizer every CUDA thread and every asynchronous copy is a thread.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "types_on_cpu.h"
#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void __tsan_read_range(void*, long);
void __tsan_write_range(void*, long);
}
#endif

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emu {

// What a schedule may decide: 0 round robin, 1 last in first out (one warp runs far ahead), from 2 on random. Even
// seeds do asynchronous work as late as allowed, odd ones as early. The byte that fills fresh shared memory differs
// too.
inline unsigned seed = 0;
inline size_t smem_limit = 99 << 10;  // of sm_86, sm_89 and sm_120; an sm_90 test raises it to 227 KiB

struct Counters {
  long switches, mma, ldmatrix, ldmatrix_ways, copies;
  size_t smem;
};
inline Counters counters;

// ThreadSanitizer: the emulator's own memory accesses are none of the kernel's; what orders threads is said explicitly.
#ifdef __SANITIZE_THREAD__
struct Quiet {
  Quiet() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Quiet() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
};
inline void release(void* p) { __tsan_release(p); }
inline void acquire(void* p) { __tsan_acquire(p); }
inline void will_write(void* p, size_t bytes) { __tsan_write_range(p, bytes); }  // from now on
#else
struct Quiet {
  Quiet() {}
  ~Quiet() {}
};
inline void release(void*) {}
inline void acquire(void*) {}
inline void will_write(void*, size_t) {}
#endif

struct Where {
  const char* file;
  int line;
};
constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
inline std::string text(Where w) {
  const char* slash = strrchr(w.file, '/');
  return std::string(slash ? slash + 1 : w.file) + ":" + std::to_string(w.line);
}
inline std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

// Work that the hardware does on its own: moves data, lets those who acquire `sync` see it, then reports completion.
// For ThreadSanitizer it is a thread that comes after the issuing one and touches `ranges`.
struct Range {
  const void* start;
  size_t bytes;
  bool write;
};
class Async {
 public:
  Async(void* sync, std::vector<Range> ranges, std::function<void()> move, std::function<void()> complete)
      : sync_(sync), ranges_(std::move(ranges)), move_(std::move(move)), complete_(std::move(complete)) {
#ifdef __SANITIZE_THREAD__
    proxy_ = __tsan_create_fiber(0);
#endif
  }
  void run() {
    Quiet quiet;
#ifdef __SANITIZE_THREAD__
    void* issuer = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(proxy_, __tsan_switch_to_fiber_no_sync);
    for (const Range& r : ranges_)
      r.write ? __tsan_write_range(const_cast<void*>(r.start), r.bytes)
              : __tsan_read_range(const_cast<void*>(r.start), r.bytes);
    __tsan_release(sync_);
    __tsan_switch_to_fiber(issuer, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(proxy_);
#endif
    move_();
    complete_();
  }

 private:
  void* sync_;
  std::vector<Range> ranges_;
  std::function<void()> move_, complete_;
#ifdef __SANITIZE_THREAD__
  void* proxy_;
#endif
};

// Groups of asynchronous work, as cp.async, wgmma and bulk stores commit and await them.
struct Groups {
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> committed;
  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  void await(size_t left) {
    while (const auto due = oldest(left))
      for (auto& run : *due) run();
  }
  bool idle() const { return open.empty() && committed.empty(); }

 private:
  std::shared_ptr<std::vector<std::function<void()>>> oldest(size_t left) {
    Quiet quiet;
    if (committed.size() <= left) return nullptr;
    auto due = std::make_shared<std::vector<std::function<void()>>>(std::move(committed.front()));
    committed.pop_front();
    return due;
  }
};

struct Fiber;
// Threads on their way into one barrier or collective instruction.
struct Meeting {
  unsigned mask;
  int need, count;  // threads it takes; threads that came, those that did not stay to wait included
  bool strict;      // all of them at the same place in the source
  const char* op;
  Where at;
  std::shared_ptr<char> token;  // what orders them, for ThreadSanitizer
  std::vector<Fiber*> waiting;
};

enum Scope { WARP = 0, BARRIER = 32, WARPGROUP = 48, SCOPES = 56 };
struct Block {
  uint3 index;
  int rank, running;  // in its cluster; threads that have not exited
  unsigned char* smem;
  std::vector<Meeting> meetings[SCOPES];
  Groups wgmma[8];
  char wgmma_done[8];
};

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
  uint3 thread;
  int id, lane, warp;  // in the block; of the warp; of the cluster
  Block* block;
  enum { READY, WAITING, DONE } state;
  const char* op;
  Where at;
  void* argument;
  std::function<bool()> until;
  Groups copies, stores;
#ifndef __x86_64__
  ucontext_t context;
#endif
};

struct Machine {
  std::deque<Fiber> fibers;
  std::vector<Fiber*> ready;
  size_t head = 0;
  int done = 0;
  std::vector<Block> blocks;  // of the cluster that runs
  std::vector<Meeting> cluster_meetings;
  Fiber* current = nullptr;
  Fiber scheduler;
  std::function<void()> kernel;
  std::string error;
  std::vector<Async> engine;  // copies under way
  bool late = true;
  std::mt19937 random;
  std::vector<uint32_t> priority;
  size_t smem_bytes = 0;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  char grid_start, grid_end, fence;
  std::mutex one_launch;
};
inline Machine machine;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK = 512 << 10;
#else
constexpr size_t STACK = 128 << 10;
#endif
constexpr size_t GUARD = 4096;

inline Fiber& self() { return *machine.current; }
inline unsigned char* shared_memory() { return self().block->smem; }

#ifdef __x86_64__
__attribute__((naked, noinline)) inline void jump(void** /*save*/, void* /*to*/) {
  asm volatile(
      "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
#endif

inline void switch_to(Fiber& from, Fiber& to) {
  {
    Quiet quiet;
    ++counters.switches;
  }
#ifdef __SANITIZE_ADDRESS__
  const bool leaving = &to == &machine.scheduler;
  __sanitizer_start_switch_fiber(&from.fake_stack, leaving ? machine.main_stack : to.stack,
                                 leaving ? machine.main_stack_bytes : STACK);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
  jump(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(from.fake_stack, &stack, &bytes);
  if (leaving) machine.main_stack = stack, machine.main_stack_bytes = bytes;  // back in a fiber: came from there
#endif
}
inline void yield() { switch_to(self(), machine.scheduler); }

// Ends the launch with a report; called in a fiber, thrown by the scheduler.
[[noreturn]] inline void fail(const std::string& message) {
  if (!machine.current) throw std::runtime_error(message);  // in the scheduler already
  Quiet quiet;
  machine.error = message + ", block " + text(self().block->index) + " thread " + text(self().thread);
  for (;;) yield();
}
[[noreturn]] inline void fail(const char* op, Where at, const std::string& message) {
  fail(std::string(op) + " at " + text(at) + ": " + message);
}

__attribute__((noinline)) inline void dirty_stack() {
  volatile char bytes[16 << 10];
  for (auto& b : bytes) b = static_cast<char>(0xff);  // an uninitialised float starts as NaN
}

inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.main_stack, &machine.main_stack_bytes);
#endif
  for (;;) {
    acquire(&machine.grid_start);
    dirty_stack();
    machine.kernel();
    release(&machine.grid_end);
    {
      Quiet quiet;
      if (!self().copies.idle()) fail("exit with cp.async work that was not awaited");
      if (!self().stores.idle()) fail("exit with bulk stores that were not awaited");
      self().state = Fiber::DONE;
      --self().block->running;
      ++machine.done;
    }
    yield();
  }
}

inline void make_stack(Fiber& f) {
  void* memory =
      mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for a fiber's stack");
  mprotect(memory, GUARD, PROT_NONE);
  f.stack = static_cast<char*>(memory) + GUARD;
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(f.stack + STACK);
  std::fill(top - 8, top, nullptr);
  top[-2] = reinterpret_cast<void*>(&fiber_main);
  f.sp = top - 8;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = STACK;
  makecontext(&f.context, fiber_main, 0);
#endif
}
inline void drop_stack(Fiber& f) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(f.stack, STACK);
#endif
  munmap(f.stack - GUARD, STACK + GUARD);
}

inline void wake(Fiber* f) {
  f->state = Fiber::READY;
  machine.ready.push_back(f);
}

// The one synchronisation primitive: `need` threads come together, and the last runs body(arguments, fibers) for all.
// A thread that does not stay is counted and goes on. orders: what was written before is visible after.
struct Party {
  std::vector<Meeting>* meetings;
  unsigned mask;
  int need;
  bool strict, orders, stays;
};
// What the last thread runs for all, who are in the order of their ids; a reference to the caller's function.
class Body {
 public:
  template <class F>
  Body(const F& f)
      : f_(&f), call_([](const void* f, const std::vector<Fiber*>& all) { (*static_cast<const F*>(f))(all); }) {}
  void operator()(const std::vector<Fiber*>& all) const { call_(f_, all); }

 private:
  const void* f_;
  void (*call_)(const void*, const std::vector<Fiber*>&);
};
inline const auto nothing = [](const std::vector<Fiber*>&) {};

inline void meet(Party party, const char* op, Where at, void* argument, Body body) {
  Quiet quiet;
  Fiber& me = self();
  auto& list = *party.meetings;
  auto found = std::find_if(list.begin(), list.end(), [&](Meeting& m) { return m.mask == party.mask; });
  if (found == list.end()) {
    list.push_back({party.mask, party.need, 0, party.strict, op, at, nullptr, {}});
    found = list.end() - 1;
#ifdef __SANITIZE_THREAD__
    found->token = std::make_shared<char>();
#endif
  }
  if (found->need != party.need ||
      (party.strict && (strcmp(found->op, op) || found->at.line != at.line || strcmp(found->at.file, at.file))))
    fail("divergent: " + std::string(op) + " at " + text(at) + " while others wait in " + found->op + " at " +
         text(found->at));
  const auto token = found->token;
  me.argument = argument, me.op = op, me.at = at;
  if (party.stays) found->waiting.push_back(&me);
  if (party.orders) release(token.get());
  if (++found->count < party.need) {
    if (!party.stays) return;
    me.state = Fiber::WAITING;
    yield();
    if (party.orders) acquire(token.get());
    return;
  }
  std::vector<Fiber*> all = std::move(found->waiting);
  list.erase(found);
  std::sort(all.begin(), all.end(), [](Fiber* a, Fiber* b) { return a->id < b->id; });
  body(all);
  for (Fiber* f : all)
    if (f != &me) wake(f);
  if (!party.stays) return;
  if (party.orders) acquire(token.get());
  machine.ready.push_back(&me);
  yield();
}
// A collective of the lanes in mask.
inline void warp_meet(unsigned mask, const char* op, Where at, void* argument, Body body, bool orders = false) {
  Fiber& me = self();
  if (!(mask >> me.lane & 1)) fail(op, at, "the thread is not in its own mask");
  const int need = __builtin_popcount(mask);
  meet({&me.block->meetings[WARP + me.id / 32], mask, need, true, orders, true}, op, at, argument, body);
}

inline void wait_until(const char* op, Where at, std::function<bool()> condition) {
  Quiet quiet;
  if (condition()) return;
  Fiber& me = self();
  me.op = op, me.at = at, me.until = std::move(condition), me.state = Fiber::WAITING;
  yield();
}
inline void wake_waiters() {
  for (Fiber& f : machine.fibers)
    if (f.state == Fiber::WAITING && f.until && f.until()) {
      f.until = nullptr;
      wake(&f);
    }
}

// Gives work to the copy engine: done at once, or whenever the schedule likes.
inline void in_background(Async work) {
  ++counters.copies;
  if (machine.late)
    machine.engine.push_back(std::move(work));
  else
    work.run();
}
inline bool finish_one_copy() {
  if (machine.engine.empty()) return false;
  const size_t i = seed < 2 ? 0 : machine.random() % machine.engine.size();
  Async work = std::move(machine.engine[i]);
  machine.engine.erase(machine.engine.begin() + i);
  work.run();
  return true;
}

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
