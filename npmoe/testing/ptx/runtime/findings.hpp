// A finding: what went wrong, where, between whom. Thrown by the checkers, caught by the launch.
#pragma once
#include <stdio.h>
#include <stdarg.h>

#include "device.hpp"

namespace ptx {

enum Kind {
  NOTHING, RACE, OUT_OF_BOUNDS, MISALIGNED, UNINITIALIZED, READ_ONLY_WRITE, ASYNC_UNWAITED, BARRIER_DIVERGENCE,
  DEADLOCK, WARP_DIVERGENCE, UNDEFINED_REGISTER, DIVISION_BY_ZERO, TRAP, NO_PROGRESS, BAD_CALL
};

struct Who { u32 block[3], thread[3]; };

struct Group {  // threads of the block in one state, for deadlocks
  u32 state, site, key, count;  // 0 exited, 1 barrier, 2 collective, 3 ready
  u32 first[3];
};

struct Finding {  // shared with Python: see binding.py
  u32 kind, site, other_site, access, other_access, space;
  u32 buffer, size, register_, same_value, groups, has_other;
  Who who, other;
  s64 offset;
  u64 extent, address;
  Group group[8];
  char note[160];
};

PTX_INLINE Who who(const Thread& t) {
  Who w;
  for (u32 a = 0; a < 3; a++) w.block[a] = ctaid(t, a), w.thread[a] = t.tid[a];
  return w;
}

PTX_INLINE Finding make_finding(const Thread& t, Kind kind, u32 site) {
  Finding f;
  memset(&f, 0, sizeof f);
  f.kind = kind;
  f.site = site;
  f.who = who(t);
  return f;
}

[[noreturn]] static inline void stop(const Finding& f) { throw f; }

[[noreturn]] __attribute__((format(printf, 4, 5)))
static inline void stop_note(const Thread& t, Kind kind, u32 site, const char* format, ...) {
  Finding f = make_finding(t, kind, site);
  va_list list;
  va_start(list, format);
  vsnprintf(f.note, sizeof f.note, format, list);
  va_end(list);
  throw f;
}

}  // namespace ptx
