// Runs the threads of a grid in the order of a schedule, until they are done or a checker objects.
#pragma once
#include <algorithm>

#include "barriers.hpp"
#include "warp_ops.hpp"

namespace ptx {

enum Schedule { IN_ORDER, REVERSED, RANDOM };
enum Outcome { FINISHED, STALLED };

static inline void start_block(Machine& m, Block& b, u32 number) {
  const Launch& l = m.launch;
  b.machine = &m, b.number = number;
  b.view.ctaid[0] = number % l.grid[0], b.view.ctaid[1] = number / l.grid[0] % l.grid[1];
  b.view.ctaid[2] = number / l.grid[0] / l.grid[1];
  b.threads = l.block[0] * l.block[1] * l.block[2], b.warps = (b.threads + 31) / 32, b.live = b.threads;
  u64 register_bytes = (m.kernel->register_bytes + 15) & ~15ull;
  b.thread.assign(b.threads, Thread());
  b.registers.resize(b.threads * register_bytes + 16);
  b.local.resize(b.threads * m.local_bytes + 16);
  b.local_state.assign(b.threads * m.local_bytes + 16, EMPTY);
  b.copies.assign(b.threads, {});
  b.clocks.reset(b.threads, number);
  b.sync.clear(), b.ready.clear(), b.requests.clear();
  for (Barrier& bar : b.barrier) bar = Barrier();
  for (u32 i = 0; i < b.threads; i++) {
    Thread& t = b.thread[i];
    t.index = i, t.warp = i / 32, t.lane = i % 32, t.block = &b, t.launch = &m.launch, t.params = m.params;
    t.tid[0] = i % l.block[0], t.tid[1] = i / l.block[0] % l.block[1], t.tid[2] = i / l.block[0] / l.block[1];
    t.local = b.local.data() + i * m.local_bytes, t.local_state = b.local_state.data() + i * m.local_bytes;
    b.ready.push_back(i);
  }
  u64 total = 0, at = 0;
  for (const RegionSpec& spec : m.shared) total += (spec.size + 15) & ~15ull;
  b.shared_bytes.resize(total + 16);
  for (const RegionSpec& spec : m.shared) {
    u64 slot = spec.base >> WINDOW_SLOT_BITS;
    if (b.shared.size() <= slot) b.shared.resize(slot + 1);
    if (!b.shared[slot]) b.shared[slot].reset(new Region());
    Region& r = *b.shared[slot];
    r.base = spec.base, r.size = spec.size, r.space = SHARED, r.number = spec.number;
    r.data = b.shared_bytes.data() + at;
    r.state.assign(spec.size + 16, EMPTY);
    r.shadow.reset(spec.size);
    r.shadow.one_block = true;
    at += (spec.size + 15) & ~15ull;
  }
}

static inline void stop_deadlock(Block& b) {
  Thread* first = nullptr;
  Finding f;
  bool exited = false, collectives = false, differ = false;
  u32 groups = 0;
  Group group[8];
  for (Thread& t : b.thread) {
    u32 state = t.status == EXITED ? 0 : t.waiting == AT_BARRIER ? 1 : 2;
    u32 site = state ? t.wait_site : 0, key = state == 1 ? t.wait_key : state == 2 ? t.wait_mask : 0;
    if (!state) exited = true;
    if (state == 2) collectives = true;
    bool prefer = !first || (state == 2 && first->waiting != AT_COLLECTIVE);
    if (state && prefer) first = &t;
    if (state == 1 && first && first->waiting == AT_BARRIER && (first->wait_site != site || first->wait_key != key)) differ = true;
    u32 g = 0;
    while (g < groups && !(group[g].state == state && group[g].site == site && group[g].key == key)) g++;
    if (g == groups) {
      if (groups == 8) continue;
      group[groups++] = {state, site, key, 0, {t.tid[0], t.tid[1], t.tid[2]}};
    }
    group[g].count++;
  }
  f = make_finding(*first, collectives ? WARP_DIVERGENCE : exited || differ ? BARRIER_DIVERGENCE : DEADLOCK, first->wait_site);
  f.groups = groups;
  memcpy(f.group, group, sizeof group);
  stop(f);
}

static inline Status run_thread(Machine& m, Block& b, Thread& t, s32 budget) {
  u64 register_bytes = (m.kernel->register_bytes + 15) & ~15ull;
  t.budget = budget;
  Status s = m.kernel->run(t, b.registers.data() + t.index * register_bytes, m.launch.counts);
  m.steps += (u64)(budget - t.budget);
  t.status = s;
  if (s == EXITED) {
    b.live--, b.progress++;
    excuse_exited(b, t);
  }
  if (m.steps > m.launch.limit)
    stop_note(t, NO_PROGRESS, t.wait_site, "%llu memory accesses and backward branches were made",
              (unsigned long long)m.steps);
  return s;
}

static inline Outcome run_ordered(Machine& m, Block& b) {
  std::vector<u32> round;
  while (b.live) {
    if (b.ready.empty()) stop_deadlock(b);
    round.swap(b.ready);
    b.ready.clear();
    if (m.launch.schedule == REVERSED) std::sort(round.begin(), round.end(), std::greater<u32>());
    else std::sort(round.begin(), round.end());
    bool moved = false;
    for (u32 i : round) {
      if (run_thread(m, b, b.thread[i], 1 << 16) == PREEMPTED) b.ready.push_back(i);
      else moved = true;
    }
    if (!moved) return STALLED;
  }
  return FINISHED;
}

static inline Outcome run_random(Machine& m, Block& b) {
  u64 progress = b.progress, turns = 0;
  while (b.live) {
    if (b.ready.empty()) stop_deadlock(b);
    u64 r = m.next_random();
    size_t at = (size_t)(r >> 33) % b.ready.size();
    u32 i = b.ready[at];
    b.ready[at] = b.ready.back();
    b.ready.pop_back();
    // Mostly short turns; a long one lets a thread run far ahead of the others.
    s32 budget = (r & 15) == 0 ? 1024 : 1 + (s32)(r >> 4 & 7);
    if (run_thread(m, b, b.thread[i], budget) == PREEMPTED) b.ready.push_back(i);
    if (b.progress != progress) progress = b.progress, turns = 0;
    else if (++turns > 1024ull * b.threads) return STALLED;
  }
  return FINISHED;
}

// Blocks run one after another; while all that run are spinning, one more is started.
static inline void run_grid(Machine& m) {
  const Launch& l = m.launch;
  u32 blocks = l.grid[0] * l.grid[1] * l.grid[2];
  std::vector<u32> order(blocks);
  for (u32 i = 0; i < blocks; i++) order[i] = l.schedule == REVERSED ? blocks - 1 - i : i;
  if (l.schedule == RANDOM)
    for (u32 i = blocks; i > 1; i--) std::swap(order[i - 1], order[(size_t)(m.next_random() >> 20) % i]);
  std::vector<std::unique_ptr<Block>> active, idle;
  u32 next = 0;
  while (next < blocks || !active.empty()) {
    if (next < blocks) {
      if (idle.empty()) idle.emplace_back(new Block());
      active.push_back(std::move(idle.back()));
      idle.pop_back();
      start_block(m, *active.back(), order[next++]);
    }
    for (size_t i = 0; i < active.size();) {
      Block& b = *active[i];
      Outcome o = l.schedule == RANDOM ? run_random(m, b) : run_ordered(m, b);
      if (o == STALLED) { i++; continue; }
      if (l.traffic) m.traffic.close_all(b.requests);
      idle.push_back(std::move(active[i]));
      active.erase(active.begin() + (long)i);
    }
  }
}

}  // namespace ptx
