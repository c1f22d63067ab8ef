// Who knows of whose accesses: vector clocks, one clock per warp.
//
// An access is stamped with the clock of its warp. A barrier of the whole block raises `base`, below
// which everything is ordered for everybody in the block. Anything finer (bar.warp.sync, a barrier of
// some threads, release and acquire through memory) is kept in rows: row[u] is the latest clock at
// which the owner of the row knows thread u to have let go of its accesses.
#pragma once
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "findings.hpp"

namespace ptx {

typedef std::vector<u32> Row;
typedef std::map<u32, Row> Elsewhere;  // block -> what is known of its threads

struct Snapshot {  // all that a thread knows at a release
  u32 block;
  bool cta_scope;
  Row own;
  std::shared_ptr<const Elsewhere> elsewhere;
};
typedef std::vector<std::shared_ptr<const Snapshot>> Release;

struct Knowledge {
  Row row;                                     // empty: nothing beyond `base`
  std::shared_ptr<const Elsewhere> elsewhere;  // null: nothing of other blocks
  Release fence;                               // what a strong write hands on
  Release seen;                                // what the next fence takes up
};

struct Clocks {
  u32 threads = 0, warps = 0, block = 0;
  std::vector<u32> now, base;  // per warp
  std::vector<Knowledge> of;   // per thread

  void reset(u32 n, u32 block_number) {
    threads = n, warps = (n + 31) / 32, block = block_number;
    now.assign(warps, 1);
    base.assign(warps, 0);
    of.assign(n, Knowledge());
  }
};

static inline void raise_row(Row& row, const Row& by) {
  if (row.size() < by.size()) row.resize(by.size(), 0);
  for (size_t i = 0; i < by.size(); i++)
    if (row[i] < by[i]) row[i] = by[i];
}

static inline void join_elsewhere(std::shared_ptr<const Elsewhere>& mine, const std::shared_ptr<const Elsewhere>& other) {
  if (!other || mine == other) return;
  if (!mine) { mine = other; return; }
  auto merged = std::make_shared<Elsewhere>(*mine);
  for (auto& entry : *other) raise_row((*merged)[entry.first], entry.second);
  mine = merged;
}

// Everybody in `members` learns what every one of them knew; their later accesses are new.
static inline void join_members(Clocks& c, const std::vector<u32>& members, Row* arrived = nullptr) {
  Row joined(c.threads, 0);
  std::shared_ptr<const Elsewhere> elsewhere;
  if (arrived) raise_row(joined, *arrived);
  for (u32 m : members) {
    if (!c.of[m].row.empty()) raise_row(joined, c.of[m].row);
    join_elsewhere(elsewhere, c.of[m].elsewhere);
  }
  for (u32 m : members) joined[m] = c.now[m / 32];
  for (u32 m : members) {
    raise_row(c.of[m].row, joined);
    c.of[m].elsewhere = elsewhere;
  }
  u32 last = ~0u;
  for (u32 m : members)
    if (m / 32 != last) last = m / 32, c.now[last]++;
}

static inline void join_block(Clocks& c) {
  std::shared_ptr<const Elsewhere> elsewhere;
  bool any = false;
  for (auto& k : c.of)
    if (k.elsewhere) join_elsewhere(elsewhere, k.elsewhere), any = true;
  if (any)
    for (auto& k : c.of) k.elsewhere = elsewhere;
  for (u32 w = 0; w < c.warps; w++) c.base[w] = c.now[w]++;
}

// bar.arrive: what the thread did so far goes to the barrier; what it does next does not.
static inline void leave_behind(Clocks& c, u32 thread, Row& arrived) {
  arrived.resize(c.threads, 0);
  if (!c.of[thread].row.empty()) raise_row(arrived, c.of[thread].row);
  arrived[thread] = c.now[thread / 32]++;
}

static inline std::shared_ptr<const Snapshot> snapshot(Clocks& c, u32 thread, bool cta_scope) {
  auto s = std::make_shared<Snapshot>();
  s->block = c.block, s->cta_scope = cta_scope;
  s->own.assign(c.threads, 0);
  for (u32 u = 0; u < c.threads; u++) s->own[u] = c.base[u / 32];
  if (!c.of[thread].row.empty()) raise_row(s->own, c.of[thread].row);
  s->own[thread] = c.now[thread / 32]++;
  s->elsewhere = c.of[thread].elsewhere;
  return s;
}

static inline void acquire(Clocks& c, u32 thread, const Release& from) {
  Knowledge& k = c.of[thread];
  for (auto& s : from) {
    if (s->block == c.block) {
      raise_row(k.row, s->own);
    } else if (!s->cta_scope) {
      auto told = std::make_shared<Elsewhere>();
      (*told)[s->block] = s->own;
      join_elsewhere(k.elsewhere, told);
    }
    if (!s->cta_scope || s->block == c.block) join_elsewhere(k.elsewhere, s->elsewhere);
  }
}

// Strong accesses to one address, and what was released through it.
typedef std::unordered_map<u64, Release> SyncTable;

static inline void synchronise(Clocks& c, u32 thread, SyncTable& table, u64 address, u32 access) {
  Knowledge& k = c.of[thread];
  bool reads = !(access & WRITE) || (access & RMW);
  if (reads && !table.empty()) {
    auto found = table.find(address);
    if (found != table.end()) {
      if (access & ACQUIRE) acquire(c, thread, found->second);
      else if (k.seen.empty() || k.seen.back() != found->second.back())
        k.seen.insert(k.seen.end(), found->second.begin(), found->second.end());
    }
  }
  if (!(access & WRITE)) return;
  Release mine = k.fence;
  if (access & RELEASE) mine.push_back(snapshot(c, thread, access & CTA_SCOPE));
  if (access & RMW) {
    if (!mine.empty()) { Release& all = table[address]; all.insert(all.end(), mine.begin(), mine.end()); }
  } else if (!mine.empty()) {
    table[address] = mine;
  } else if (!table.empty()) {
    table.erase(address);
  }
}

static inline void fence_thread(Clocks& c, u32 thread, bool cta_scope) {
  Knowledge& k = c.of[thread];
  if (!k.seen.empty()) acquire(c, thread, k.seen), k.seen.clear();
  Release hands_on;
  if (cta_scope)  // an earlier fence of wider scope still holds for what came before it
    for (auto& s : k.fence)
      if (!s->cta_scope) hands_on.push_back(s);
  hands_on.push_back(snapshot(c, thread, cta_scope));
  k.fence = hands_on;
}

}  // namespace ptx
