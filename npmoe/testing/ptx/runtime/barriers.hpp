// bar and barrier: counting arrivals, the rules of .aligned, ordering, reductions.
#pragma once
#include "block.hpp"

namespace ptx {

[[noreturn]] static inline void stop_divergent(Thread& t, u32 site, Thread& other, const char* note) {
  Finding f = make_finding(t, BARRIER_DIVERGENCE, site);
  f.has_other = 1, f.other = who(other), f.other_site = other.waiting ? other.wait_site : 0;
  snprintf(f.note, sizeof f.note, "%s", note);
  stop(f);
}

// .aligned: all threads of a warp execute the same barrier instruction.
static inline void check_aligned(Block& b, Thread& t) {
  u32 site = t.wait_site;
  for (u32 l = 0; l < 32; l++) {
    Thread* o = b.lane(t.warp, l);
    if (!o || o == &t || o->status == EXITED) continue;
    bool at_barrier = o->waiting == AT_BARRIER;
    if (at_barrier && (o->wait_site != site || o->wait_key != t.wait_key))
      stop_divergent(t, site, *o, "the threads of one warp wait at different barrier instructions");
    if (!at_barrier)
      stop_divergent(t, site, *o, "the barrier was complete before every thread of the warp had come to it");
  }
}

static inline void finish_barrier(Block& b, Barrier& bar, Thread& last, bool aligned) {
  u32 checked = 0;  // a bit for each warp
  for (u32 i : bar.waiting) {
    Thread& t = b.thread[i];
    if (aligned && !(checked >> t.warp & 1)) check_aligned(b, t);
    checked |= 1u << t.warp;
  }
  if (bar.expected == b.threads && !bar.left_behind) join_block(b.clocks);
  else join_members(b.clocks, bar.waiting, &bar.released);
  for (u32 i : bar.waiting) {
    Thread& t = b.thread[i];
    t.out[0] = bar.reduction == RED_POPC ? bar.popc : bar.reduction == RED_AND ? bar.all : bar.any;
    if (&t == &last) t.waiting = NOT_WAITING;
    else b.make_ready(t);
  }
  bar = Barrier();
  b.machine->barriers++, b.progress++;
}

template <class... A>
[[noreturn]] static inline void stop_disagreement(Thread& t, u32 site, const Barrier& bar, const char* format, A... a) {
  Finding f = make_finding(t, BARRIER_DIVERGENCE, site);
  f.other_site = bar.site;
  snprintf(f.note, sizeof f.note, format, a...);
  stop(f);
}

static inline bool arrive(Thread& t, u32 id, u32 count, u32 site, bool aligned, bool waits, u32 reduction, bool value) {
  Block& b = *t.block;
  if (id >= 16) stop_note(t, BAD_CALL, site, "barrier %u does not exist: there are 16", id);
  if (count % 32) stop_note(t, BAD_CALL, site, "a barrier count must be a multiple of 32, got %u", count);
  Barrier& bar = b.barrier[id];
  u32 expected = count ? count : b.threads;
  if (bar.arrived && bar.expected != expected)
    stop_disagreement(t, site, bar, "%u threads are expected here at barrier %u, and %u", expected, id, bar.expected);
  if (bar.arrived && bar.reduction != reduction)
    stop_disagreement(t, site, bar, "barrier %u has one reduction here, and another%s", id, "");
  bar.expected = expected, bar.site = site, bar.reduction = reduction;
  bar.arrived++, bar.popc += value, bar.all &= value, bar.any |= value;
  if (waits) {
    t.waiting = AT_BARRIER, t.wait_site = site, t.wait_key = id, t.wait_count = expected;
    bar.waiting.push_back(t.index);
  } else {
    leave_behind(b.clocks, t.index, bar.released);
    bar.left_behind = true;
  }
  if (bar.arrived < bar.expected) return false;
  finish_barrier(b, bar, t, aligned);
  return true;
}

bool barrier_sync(Thread& t, u32 id, u32 count, u32 site, bool aligned) {
  return arrive(t, id, count, site, aligned, true, RED_NONE, false);
}
void barrier_arrive(Thread& t, u32 id, u32 count, u32 site, bool aligned) {
  arrive(t, id, count, site, aligned, false, RED_NONE, false);
}
bool barrier_reduce(Thread& t, u32 id, u32 count, u32 site, bool aligned, u32 reduction, bool value) {
  return arrive(t, id, count, site, aligned, true, reduction, value);
}

}  // namespace ptx
