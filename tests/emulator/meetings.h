// Where fibers wait: for each other in barriers and collectives, for a condition, for work in the background.
#pragma once
#include "fibers.h"

namespace emu {

// The one synchronisation primitive: `need` threads come together, and the last runs body(arguments, fibers) for all.
// orders: what was written before is visible after.
struct Party {
  std::vector<Meeting>* meetings;
  unsigned mask;
  int need;
  bool strict, orders;
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

inline bool differ(const char* a, const char* b) { return a != b && strcmp(a, b); }

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
      (party.strict && (found->at.line != at.line || differ(found->op, op) || differ(found->at.file, at.file))))
    fail("divergent: " + std::string(op) + " at " + text(at) + " while others wait in " + found->op + " at " +
         text(found->at));
  const auto token = found->token;
  me.argument = argument, me.op = op, me.at = at;
  found->waiting.push_back(&me);
  if (party.orders) release(token.get());
  if (++found->count < party.need) {
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
  if (party.orders) acquire(token.get());
  wake(&me);
  yield();
}
// A collective of the lanes in mask.
inline void warp_meet(unsigned mask, const char* op, Where at, void* argument, Body body, bool orders = false) {
  Fiber& me = self();
  if (!(mask >> me.lane & 1)) fail(op, at, "the thread is not in its own mask");
  const int need = __builtin_popcount(mask);
  meet({&me.block->meetings[WARP + me.id / 32], mask, need, true, orders}, op, at, argument, body);
}

inline void wait_until(const char* op, Where at, std::function<bool()> condition) {
  Quiet quiet;
  if (condition()) return;
  Fiber& me = self();
  me.op = op, me.at = at, me.until = std::move(condition), me.state = Fiber::WAITING;
  yield();
}
inline void wake_waiters() {
  for (Fiber* f : machine.fibers)
    if (f->state == Fiber::WAITING && f->until && f->until()) {
      f->until = nullptr;
      wake(f);
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

}  // namespace emu
