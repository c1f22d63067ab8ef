// Who last wrote and who since read every cell of an allocation, and whether an access races.
//
// A cell covers 4 bytes until somebody touches less; then the whole allocation is split to 2 or 1.
// A cell remembers its last writer, one group of readers (lanes of one warp at one clock), and in
// `more` whoever else is not ordered before them. Of other blocks, one reader and one atomic writer
// are remembered: a race with any of them is a race.
#pragma once
#include "clocks.hpp"

namespace ptx {

struct Mark {
  u32 warp;   // number in the grid, plus one; 0: nobody
  u32 lanes, clock;
  u32 info;   // site << 8 | Access
};

struct Cell {
  Mark write, read;
  u32 more;  // index into Shadow::more, 0: none; the top bit says that writes are among them
};
enum : u32 { HAS_WRITES = 1u << 31 };

struct Race { Mark mark; u32 lane; };

struct Shadow {
  u64 bytes = 0;
  u32 shift = 2;
  bool one_block = false;  // shared memory: no other block will ever look
  Cell* cells = nullptr;
  std::vector<std::vector<Mark>> more;
  std::vector<u32> unused;

  Shadow() {}
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;
  ~Shadow() { free(cells); }

  u64 count() const { return ((bytes + (1ull << shift) - 1) >> shift) + 1; }

  void reset(u64 size) {
    if (size != bytes || !cells) {
      free(cells);
      bytes = size, shift = 2;
      cells = (Cell*)calloc(count(), sizeof(Cell));  // pages are touched when used
    } else {
      memset(cells, 0, count() * sizeof(Cell));
    }
    more.clear(), unused.clear();
  }

  void split(u32 to) {
    u64 coarse = count(), factor = 1ull << (shift - to);
    Cell* fine = (Cell*)calloc(coarse * factor, sizeof(Cell));
    for (u64 i = 0; i < coarse; i++)
      for (u64 k = 0; k < factor; k++) {
        Cell& c = fine[i * factor + k] = cells[i];
        if (c.more && k) {
          u32 copy = take();
          more[copy] = more[c.more & ~HAS_WRITES];
          c.more = copy | (c.more & HAS_WRITES);
        }
      }
    free(cells);
    cells = fine, shift = to;
  }

  u32 take() {
    if (more.empty()) more.emplace_back();
    if (!unused.empty()) {
      u32 at = unused.back();
      unused.pop_back();
      return at;
    }
    more.emplace_back();
    return (u32)more.size() - 1;
  }

  std::vector<Mark>& list(const Cell& c) { return more[c.more & ~HAS_WRITES]; }

  void forget(Cell& c) {
    if (!c.more) return;
    list(c).clear();
    unused.push_back(c.more & ~HAS_WRITES);
    c.more = 0;
  }
};

// What the checks need to know of the accessing thread.
struct Accessor {
  Clocks* clocks;
  u32 first_warp, thread, warp, lane;  // first_warp: number of the block's warp 0, plus one
  u32 mark_warp() const { return first_warp + warp; }
  u32 now() const { return clocks->now[warp]; }
};

// The lane of `m` that is not ordered before the accessor, or -1.
static inline int unordered_lane(const Accessor& a, const Mark& m) {
  u32 w = m.warp - a.first_warp;
  Clocks& c = *a.clocks;
  if (w < c.warps) {
    if (m.clock <= c.base[w]) return -1;
    u32 lanes = m.lanes;
    if (w == a.warp) lanes &= ~(1u << a.lane);
    const Row& row = c.of[a.thread].row;
    for (; lanes; lanes &= lanes - 1) {
      u32 lane = (u32)__builtin_ctz(lanes);
      if (row.empty() || row[w * 32 + lane] < m.clock) return (int)lane;
    }
    return -1;
  }
  u32 other = (m.warp - 1) / c.warps, w0 = other * c.warps + 1;
  const Elsewhere* known = c.of[a.thread].elsewhere.get();
  const Row* row = nullptr;
  if (known) {
    auto found = known->find(other);
    if (found != known->end()) row = &found->second;
  }
  for (u32 lanes = m.lanes; lanes; lanes &= lanes - 1) {
    u32 lane = (u32)__builtin_ctz(lanes);
    if (!row || (*row)[(m.warp - w0) * 32 + lane] < m.clock) return (int)lane;
  }
  return -1;
}

static inline bool may_overlap(const Accessor& a, const Mark& m, u32 access) {
  if (!(access & STRONG) || !(m.info & STRONG)) return false;
  bool same_block = m.warp - a.first_warp < a.clocks->warps;
  return same_block || !((access | m.info) & CTA_SCOPE);
}

// A race between the access and what the mark stands for?
static inline bool races(const Accessor& a, const Mark& m, u32 access, Race& race) {
  if (!m.warp) return false;
  if (!((access | m.info) & WRITE)) return false;
  if (may_overlap(a, m, access)) return false;
  int lane = unordered_lane(a, m);
  if (lane < 0) return false;
  race.mark = m, race.lane = (u32)lane;
  return true;
}

enum : u32 { MARK_CLASS = WRITE | STRONG | CTA_SCOPE };  // its low bits: WRITE, STRONG
static_assert(WRITE == 1 && STRONG == 2, "prune() uses them as an index");

// Below the last barrier of its block: ordered before everything that the block does from now on.
static inline bool settled(const Accessor& a, const Mark& m) {
  u32 w = m.warp - a.first_warp;
  return w < a.clocks->warps && m.clock <= a.clocks->base[w];
}

// Drop marks that can decide nothing any more. A plain access stands for all that is ordered before
// it, because whoever races with those races with it; a strong one does not, since others may overlap
// it. Of settled marks and of other blocks' one of each class is kept (global memory only).
static inline void prune(Shadow& s, std::vector<Mark>& list, const Accessor& a, u32 info) {
  size_t out = 0;
  u32 kept = 0;
  for (Mark& m : list) {
    bool own = m.warp - a.first_warp < a.clocks->warps, still = settled(a, m);
    if (own && !(info & STRONG) && unordered_lane(a, m) < 0) continue;
    if (still && s.one_block) continue;
    if (still || !own) {
      u32 bit = 1u << ((m.info & MARK_CLASS & 3) | (own ? 4 : 0));
      if (kept & bit) continue;
      kept |= bit;
    }
    list[out++] = m;
  }
  list.resize(out);
}

static inline Mark* find_mark(Shadow& s, const Cell& c, const Mark& like) {
  if (c.more)
    for (Mark& m : s.list(c))
      if (m.warp == like.warp && m.clock == like.clock && !((m.info ^ like.info) & MARK_CLASS)) return &m;
  return nullptr;
}

// Keep `add` beside the marks of a cell; `info` is of the access that is made.
static inline void remember(Shadow& s, Cell& c, const Accessor& a, const Mark& add, u32 info) {
  if (Mark* same = find_mark(s, c, add)) {
    same->lanes |= add.lanes;
    return;
  }
  if (!c.more) c.more = s.take();
  if (add.info & WRITE) c.more |= HAS_WRITES;
  std::vector<Mark>& list = s.list(c);
  if (list.size() == list.capacity()) prune(s, list, a, info);
  list.push_back(add);
}

static inline bool races_with_more(Shadow& s, const Cell& c, const Accessor& a, u32 info, Race& race) {
  for (Mark& m : s.list(c))
    if (races(a, m, info, race)) return true;
  return false;
}

static inline bool check_read(Shadow& s, Cell& c, const Accessor& a, u32 info, Race& race) {
  if (races(a, c.write, info, race)) return true;
  if ((c.more & HAS_WRITES) && races_with_more(s, c, a, info, race)) return true;
  Mark& r = c.read;
  Mark mine = {a.mark_warp(), 1u << a.lane, a.now(), info};
  if (r.warp == mine.warp && r.clock == mine.clock && !((r.info ^ info) & MARK_CLASS)) {
    r.lanes |= mine.lanes;
  } else if (!r.warp || (r.warp - a.first_warp < a.clocks->warps && unordered_lane(a, r) < 0 &&
                         (!(info & STRONG) || (r.info & STRONG)))) {
    r = mine;
  } else if (Mark* same = find_mark(s, c, mine)) {  // the next lane finds its warp in the cell itself
    mine.lanes |= same->lanes;
    *same = r;
    r = mine;
  } else {
    remember(s, c, a, r, info);
    r = mine;
  }
  return false;
}

static inline bool check_write(Shadow& s, Cell& c, const Accessor& a, u32 info, Race& race) {
  if (races(a, c.write, info, race) || races(a, c.read, info, race)) return true;
  if (c.more && races_with_more(s, c, a, info, race)) return true;
  Mark mine = {a.mark_warp(), 1u << a.lane, a.now(), info};
  if (!(info & STRONG)) {
    s.forget(c);
  } else {  // others may overlap this access and still race with what came before it
    if (c.write.warp && !(s.one_block && settled(a, c.write))) remember(s, c, a, c.write, info);
    if (c.read.warp && !(s.one_block && settled(a, c.read))) remember(s, c, a, c.read, info);
  }
  c.read.warp = 0;
  c.write = mine;
  return false;
}

}  // namespace ptx
