// CUDA threads as fibers of one OS thread: their stacks and the switch between them. AddressSanitizer follows the
// stacks; for ThreadSanitizer every CUDA thread is a thread.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <random>
#include <stdexcept>

#include "background.h"
#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emu {

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
  Groups copies;
  unsigned launch = 0;  // the last that it ran in
#ifndef __x86_64__
  ucontext_t context;
#endif
};

// Threads that can go on: by warp where the schedule gives warps priorities, otherwise in one list.
struct Ready {
  std::vector<std::vector<Fiber*>> lists;
  size_t head = 0, count = 0;  // the first list's first thread, if it is a queue; all threads
};

struct Machine {
  std::deque<Fiber> pool;      // all there are, kept between launches
  size_t next = 0;             // the first that the next cluster takes
  std::vector<Fiber*> fibers;  // the cluster's
  unsigned launches = 0;
  Ready ready;
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

EMU_UNWATCHED inline void dirty_stack() {
  volatile uint64_t words[2 << 10];
  for (auto& w : words) w = ~uint64_t{0};  // an uninitialised float starts as NaN
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
  machine.ready.lists[seed < 2 ? 0 : f->warp].push_back(f);
  ++machine.ready.count;
}

}  // namespace emu
