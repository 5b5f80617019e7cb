#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace fastcompat {
namespace {

// A thread's scratch memory stays with it between calls: small calls pay no page faults.
struct WorkspaceLease {
  Workspace& workspace;
  WorkspaceLease() : workspace(of_thread()) {}
  ~WorkspaceLease() { workspace.trim(); }

  static Workspace& of_thread() {
    thread_local Workspace workspace;
    return workspace;
  }
};

struct Job {
  const std::function<void(int64_t, Workspace&)>& fn;
  int64_t items;
  int seats;  // threads that may still join
  int active = 0;
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;  // of the error

  Job(const std::function<void(int64_t, Workspace&)>& fn, int64_t items, int seats)
      : fn(fn), items(items), seats(seats) {}

  void work() {
    try {
      WorkspaceLease lease;
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) fn(i, lease.workspace);
    } catch (...) {
      next.store(items, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }
};

class Pool {
 public:
  void run(Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(job.seats);
      jobs_.push_back(&job);
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    for (auto it = jobs_.begin(); it != jobs_.end(); ++it)
      if (*it == &job) {
        jobs_.erase(it);
        break;
      }
    left_.wait(lock, [&] { return job.active == 0; });
  }

 private:
  void grow(int wanted) {
    try {
      for (; threads_ < wanted; ++threads_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {  // fewer threads do the same work
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* job = nullptr;
      wake_.wait(lock, [&] {
        for (Job* j : jobs_)
          if (j->seats > 0) {
            job = j;
            return true;
          }
        return false;
      });
      --job->seats;
      ++job->active;
      lock.unlock();
      job->work();
      lock.lock();
      if (--job->active == 0) left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, left_;
  std::deque<Job*> jobs_;
  int threads_ = 0;
};

std::atomic<Pool*> current{nullptr};
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] {
  current.store(nullptr);
  forked.store(true);
});

// GNU OpenMP's parallel region, as torch has loaded it, or null. torch's threads spin for milliseconds after each of
// its operators: on the same cores, threads of our own would share them with those. After a fork they do not exist.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel torch_threads() {
  static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked.load() ? nullptr : found;
}

// The pool is never destroyed: its threads may be asleep in it when the process ends, or gone when it has forked.
Pool& pool() {
  Pool* p = current.load();
  if (!p) {
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(p, fresh))
      p = fresh;
    else
      delete fresh;
  }
  return *p;
}

}  // namespace

void parallel_for(int64_t items, int threads, const std::function<void(int64_t, Workspace&)>& fn) {
  if (items <= 0) return;
  if (threads <= 1 || items == 1) {
    WorkspaceLease lease;
    for (int64_t i = 0; i < items; ++i) fn(i, lease.workspace);
    return;
  }
  const int64_t helpers = (items < threads ? items : threads) - 1;
  Job job(fn, items, static_cast<int>(helpers));
  if (const Parallel parallel = torch_threads())  // always all of them: a smaller team would end the others
    parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(threads), 0);
  else
    pool().run(job);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace fastcompat
