// Allocations and the checks of one access: bounds, alignment, permission, initialisation, races.
#pragma once
#include <stdlib.h>

#include "shadow.hpp"

namespace ptx {

enum State : u8 { EMPTY = 0, FULL = 1, IN_FLIGHT = 2 };

struct Region {
  u64 base = 0, size = 0;
  u8* data = nullptr;
  std::vector<u8> state;  // empty: every byte is initialised
  Shadow shadow;
  bool read_only = false;
  u32 space = GLOBAL, number = 0;
};

static inline Finding make_access_finding(
    const Thread& t, Kind kind, u32 site, const Region* region, u64 address, u32 bytes, u32 access, u32 space) {
  Finding f = make_finding(t, kind, site);
  f.access = access, f.space = region ? region->space : space, f.size = bytes, f.address = address;
  f.buffer = region ? region->number : ~0u;
  f.offset = region ? (s64)(address - region->base) : 0;
  f.extent = region ? region->size : 0;
  return f;
}

static inline void check_bounds(
    const Thread& t, const Region* region, u64 address, u32 bytes, u32 site, u32 access, u32 space) {
  u64 offset = region ? address - region->base : 0;
  if (!region || offset > region->size || region->size - offset < bytes)
    stop(make_access_finding(t, OUT_OF_BOUNDS, site, region, address, bytes, access, space));
  if (address & (bytes - 1))
    stop(make_access_finding(t, MISALIGNED, site, region, address, bytes, access, space));
}

static inline void check_full(
    const Thread& t, const Region& region, const u8* state, u64 offset, u32 bytes, u32 site, u32 access) {
  for (u32 i = 0; i < bytes; i++)
    if (state[i] != FULL) {
      Finding f = make_access_finding(
          t, state[i] == EMPTY ? UNINITIALIZED : ASYNC_UNWAITED, site, &region, region.base + offset, bytes, access, 0);
      if (state[i] == IN_FLIGHT) {
        const Cell& c = region.shadow.cells[(offset + i) >> region.shadow.shift];
        f.other_site = c.write.info >> 8, f.other_access = c.write.info & 0xff;
      }
      stop(f);
    }
}

template <u32 N> PTX_INLINE bool all_full(const u8* state) {
  static const u8 full[32] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  return memcmp(state, full, N) == 0;
}

[[noreturn]] static inline void stop_race(
    const Thread& t, const Region& region, u64 offset, u32 bytes, u32 site, u32 access, const Race& race,
    const u8* value) {
  Finding f = make_access_finding(t, RACE, site, &region, region.base + offset, bytes, access, 0);
  const Launch& l = *t.launch;
  u32 n = l.block[0] * l.block[1] * l.block[2], warps = (n + 31) / 32;
  u32 block = (race.mark.warp - 1) / warps, thread = (race.mark.warp - 1) % warps * 32 + race.lane;
  f.has_other = 1;
  f.other_site = race.mark.info >> 8, f.other_access = race.mark.info & 0xff;
  f.other.block[0] = block % l.grid[0], f.other.block[1] = block / l.grid[0] % l.grid[1];
  f.other.block[2] = block / l.grid[0] / l.grid[1];
  f.other.thread[0] = thread % l.block[0], f.other.thread[1] = thread / l.block[0] % l.block[1];
  f.other.thread[2] = thread / l.block[0] / l.block[1];
  f.same_value = value && (f.other_access & WRITE) && memcmp(value, region.data + offset, bytes) == 0;
  stop(f);
}

template <u32 N>
PTX_INLINE void check_races(
    const Thread& t, Region& region, u64 offset, u32 site, u32 access, const Accessor& a, const u8* value) {
  Shadow& s = region.shadow;
  const u32 need = N >= 4 ? 2 : N == 2 ? 1 : 0;
  if (s.shift > need) s.split(need);
  u64 first = offset >> s.shift, count = N >> s.shift;
  u32 info = site << 8 | access;
  Race race;
  for (u64 i = first; i < first + count; i++) {
    Cell& c = s.cells[i];
    if (access & WRITE ? check_write(s, c, a, info, race) : check_read(s, c, a, info, race))
      stop_race(t, region, offset, N, site, access, race, value);
  }
}

}  // namespace ptx
