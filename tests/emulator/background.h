// What the emulated hardware does beside the threads: asynchronous work in groups, and how ThreadSanitizer hears of it.
#pragma once
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "types_on_cpu.h"
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

// For the emulator's own arithmetic, which no sanitizer need watch.
#define EMU_UNWATCHED __attribute__((noinline, no_sanitize("address", "thread", "undefined")))

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

// Groups of asynchronous work, as cp.async and wgmma commit and await them.
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

}  // namespace emu
