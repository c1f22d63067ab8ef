// read, write and modify as generated code calls them; fences; cp.async.
#pragma once
#include "block.hpp"

namespace ptx {

PTX_INLINE void note_traffic(Thread& t, u32 space, u64 address, u32 bytes, u32 site) {
  if (!t.launch->traffic || (space != SHARED && space != GLOBAL)) return;
  Block& b = *t.block;
  u32 left = b.threads - t.warp * 32, full = left >= 32 ? ~0u : (1u << left) - 1;
  machine(t).traffic.note(b.requests, t.warp, t.lane, full, site, space, address, bytes);
}

// Local memory has no races: only bounds, alignment and initialisation.
static inline u8* local_access(Thread& t, u64 address, u32 bytes, u32 site, u32 access) {
  Machine& m = machine(t);
  u64 slot = address >> WINDOW_SLOT_BITS, before = 0;
  for (const RegionSpec& spec : m.local) {
    if (spec.base >> WINDOW_SLOT_BITS == slot) {
      Region shape;
      shape.base = spec.base, shape.size = spec.size, shape.space = LOCAL, shape.number = spec.number;
      check_bounds(t, &shape, address, bytes, site, access, LOCAL);
      u64 offset = address - spec.base;
      u8* state = t.local_state + before + offset;
      if (access & WRITE) memset(state, FULL, bytes);
      else check_full(t, shape, state, offset, bytes, site, access);
      return t.local + before + offset;
    }
    before += (spec.size + 15) & ~15ull;
  }
  check_bounds(t, nullptr, address, bytes, site, access, LOCAL);
  return nullptr;
}

template <u32 N> const u8* read(Thread& t, u32 space, u64 address, u32 site, u32 access) {
  if (space == LOCAL || (space == GENERIC && address >> SLOT_BITS == LOCAL_SLOT))
    return local_access(t, address & ((1ull << SLOT_BITS) - 1), N, site, READ);
  Region* r = find_region(t, space, address);
  check_bounds(t, r, address, N, site, access, space);
  u64 offset = address - r->base;
  if (!r->state.empty() && !all_full<N>(r->state.data() + offset))
    check_full(t, *r, r->state.data() + offset, offset, N, site, access);
  if (!r->read_only) {
    if (access & STRONG)
      synchronise(t.block->clocks, t.index, space == SHARED ? t.block->sync : machine(t).sync, address, access);
    check_races<N>(t, *r, offset, site, access, t.block->accessor(t), nullptr);
  }
  note_traffic(t, space, address, N, site);
  return r->data + offset;
}

static inline void check_writable(Thread& t, Region& r, u64 offset, u32 bytes, u32 site, u32 access) {
  if (r.read_only)
    stop(make_access_finding(t, READ_ONLY_WRITE, site, &r, r.base + offset, bytes, access, 0));
  if (r.state.empty()) return;
  for (u32 i = 0; i < bytes; i++)
    if (r.state[offset + i] == IN_FLIGHT) check_full(t, r, &r.state[offset + i], offset + i, 1, site, access);
}

template <u32 N> void write(Thread& t, u32 space, u64 address, const u8* value, u32 site, u32 access) {
  if (space == LOCAL || (space == GENERIC && address >> SLOT_BITS == LOCAL_SLOT)) {
    memcpy(local_access(t, address & ((1ull << SLOT_BITS) - 1), N, site, WRITE), value, N);
    return;
  }
  Region* r = find_region(t, space, address);
  check_bounds(t, r, address, N, site, access, space);
  u64 offset = address - r->base;
  check_writable(t, *r, offset, N, site, access);
  if (access & STRONG)
    synchronise(t.block->clocks, t.index, space == SHARED ? t.block->sync : machine(t).sync, address, access);
  check_races<N>(t, *r, offset, site, access, t.block->accessor(t), value);
  if (!r->state.empty()) memset(r->state.data() + offset, FULL, N);
  note_traffic(t, space, address, N, site);
  memcpy(r->data + offset, value, N);
}

template <u32 N> u8* modify(Thread& t, u32 space, u64 address, u32 site, u32 access) {
  if (space == LOCAL || (space == GENERIC && address >> SLOT_BITS == LOCAL_SLOT))
    stop_note(t, BAD_CALL, site, "an atomic instruction was given an address in local memory");
  Region* r = find_region(t, space, address);
  check_bounds(t, r, address, N, site, access, space);
  u64 offset = address - r->base;
  check_writable(t, *r, offset, N, site, access);
  if (!r->state.empty() && !all_full<N>(r->state.data() + offset))
    check_full(t, *r, r->state.data() + offset, offset, N, site, access);
  synchronise(t.block->clocks, t.index, space == SHARED ? t.block->sync : machine(t).sync, address, access);
  check_races<N>(t, *r, offset, site, access, t.block->accessor(t), nullptr);
  note_traffic(t, space, address, N, site);
  return r->data + offset;
}

void fence(Thread& t, u32, bool cta_scope) { fence_thread(t.block->clocks, t.index, cta_scope); }

u64 to_window(Thread& t, u64 generic, u32 slot, u32 site) {
  if (generic >> SLOT_BITS != slot)
    stop_note(t, OUT_OF_BOUNDS, site, "cvta.to was given the generic address 0x%llx, which is not in that state space",
              (unsigned long long)generic);
  return generic & ((1ull << SLOT_BITS) - 1);
}

// A copy is checked as a write of its destination when it is issued; the bytes arrive when it is
// waited for, and until then nobody may touch them.
template <u32 N> void issue_copy(Thread& t, u32 address, u64 source, u32 source_bytes, u32 site) {
  u32 space = SHARED;
  u64 at = address;
  Region* r = find_region(t, space, at);
  u32 access = WRITE | ASYNC;
  check_bounds(t, r, at, N, site, access, SHARED);
  u64 offset = at - r->base;
  check_writable(t, *r, offset, N, site, access);
  check_races<N>(t, *r, offset, site, access, t.block->accessor(t), nullptr);
  memset(r->state.data() + offset, IN_FLIGHT, N);
  note_traffic(t, SHARED, at, N, site);
  t.block->copies[t.index].push_back({address, N, site, t.next_group, source, source_bytes});
}

template <u32 N> void check_source(Thread& t, u64 source, u32 bytes, u32 site, u8* out) {
  if (bytes == N) { memcpy(out, read<N>(t, GLOBAL, source, site, READ), N); return; }
  if (source & (N - 1)) {
    u32 space = GLOBAL;
    stop(make_access_finding(t, MISALIGNED, site, find_region(t, space, source), source, N, READ, GLOBAL));
  }
  u32 i = 0;
  for (; bytes - i >= 4; i += 4) memcpy(out + i, read<4>(t, GLOBAL, source + i, site, READ), 4);
  for (; i < bytes; i++) out[i] = *read<1>(t, GLOBAL, source + i, site, READ);
}

static inline void fetch_source(Thread& t, const Copy& c, u8* out) {
  memset(out, 0, 16);
  u32 bytes = c.source_bytes < c.bytes ? c.source_bytes : c.bytes;
  if (c.bytes == 16) check_source<16>(t, c.source, bytes, c.site, out);
  else if (c.bytes == 8) check_source<8>(t, c.source, bytes, c.site, out);
  else check_source<4>(t, c.source, bytes, c.site, out);
}

void async_copy(Thread& t, u32 address, u64 source, u32 bytes, u32 source_bytes, u32 site) {
  machine(t).async_copies++;
  if (source_bytes > bytes)
    stop_note(t, BAD_CALL, site, "cp.async was given src-size %u, more than its cp-size %u", source_bytes, bytes);
  u8 ignored[16];
  Copy probe = {address, bytes, site, 0, source, source_bytes};
  if (source_bytes) fetch_source(t, probe, ignored);
  if (bytes == 16) issue_copy<16>(t, address, source, source_bytes, site);
  else if (bytes == 8) issue_copy<8>(t, address, source, source_bytes, site);
  else issue_copy<4>(t, address, source, source_bytes, site);
}

void async_commit(Thread& t) { t.next_group++; }

void async_wait(Thread& t, u32 groups_left, bool also_uncommitted) {
  std::vector<Copy>& copies = t.block->copies[t.index];
  size_t out = 0;
  for (const Copy& c : copies) {
    bool done = also_uncommitted || (c.group < t.next_group && t.next_group - c.group > groups_left);
    if (!done) { copies[out++] = c; continue; }
    u8 bytes[16];
    u32 traffic = t.launch->traffic;
    t.launch->traffic = 0;  // the source was counted when the copy was issued
    if (c.source_bytes) fetch_source(t, c, bytes);
    else memset(bytes, 0, sizeof bytes);
    t.launch->traffic = traffic;
    u32 space = SHARED;
    u64 at = c.destination;
    Region* r = find_region(t, space, at);
    u64 offset = at - r->base;
    memcpy(r->data + offset, bytes, c.bytes);
    memset(r->state.data() + offset, FULL, c.bytes);
    Accessor a = t.block->accessor(t);
    for (u64 i = offset >> r->shadow.shift; i < (offset + c.bytes) >> r->shadow.shift; i++)
      r->shadow.cells[i].write.clock = a.now();  // it was this thread's since it was issued
  }
  copies.resize(out);
}

}  // namespace ptx
