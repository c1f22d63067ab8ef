// A thread block that runs: threads, registers, shared memory, barriers; and the machine around it.
#pragma once
#include "memory.hpp"
#include "traffic.hpp"

namespace ptx {

struct Barrier {
  u32 expected = 0, arrived = 0, site = 0;
  bool left_behind = false;  // somebody used bar.arrive
  u32 reduction = RED_NONE, popc = 0, all = 1, any = 0;
  std::vector<u32> waiting;
  Row released;
};

struct RegionSpec {  // shared with Python: see binding.py
  u64 base, size;
  u8* data;       // global and const: the caller's bytes; null for shared and local
  u32 space, number, read_only, uninitialized;
};

struct Machine {
  Launch launch;
  const Kernel* kernel;
  const u8* params;
  u64 param_bytes;
  std::vector<std::unique_ptr<Region>> global;  // by slot; null where nothing is
  std::vector<RegionSpec> shared, local;
  u64 local_bytes = 0;
  Region param_region;
  SyncTable sync;
  Traffic traffic;
  u64 random;
  u64 barriers = 0, collectives = 0, async_copies = 0, steps = 0;

  u64 next_random() {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return random;
  }
};

struct Block {
  BlockView view;  // first: see ctaid()
  u32 number = 0, threads = 0, warps = 0, live = 0;
  Machine* machine = nullptr;
  std::vector<Thread> thread;
  std::vector<u8> registers, local, local_state;
  std::vector<u8> shared_bytes;
  std::vector<std::unique_ptr<Region>> shared;  // by slot of the window
  Clocks clocks;
  SyncTable sync;
  Barrier barrier[16];
  std::vector<std::vector<Copy>> copies;  // per thread
  std::vector<u32> ready;
  std::vector<Request> requests;          // see traffic.hpp
  u64 progress = 0;                       // barriers and collectives passed, threads exited

  Accessor accessor(const Thread& t) {
    return {&clocks, number * warps + 1, t.index, t.warp, t.lane};
  }
  Thread* lane(u32 warp, u32 l) {
    u32 i = warp * 32 + l;
    return i < threads ? &thread[i] : nullptr;
  }
  void make_ready(Thread& t) {
    t.status = RUNNING, t.waiting = NOT_WAITING;
    ready.push_back(t.index);
  }
};

PTX_INLINE Machine& machine(Thread& t) { return *t.block->machine; }

// The allocation and kind of memory that an address means; null where there is none.
static inline Region* find_region(Thread& t, u32& space, u64& address) {
  Machine& m = machine(t);
  u64 slot = address >> SLOT_BITS;
  if (space == GENERIC) {
    if (slot == SHARED_SLOT || slot == LOCAL_SLOT) {
      space = slot == SHARED_SLOT ? SHARED : LOCAL;
      address &= (1ull << SLOT_BITS) - 1;
    } else {
      space = GLOBAL;
      if (slot == PARAM_SLOT) space = PARAM;
    }
  }
  if (space == SHARED) {
    u64 at = address >> WINDOW_SLOT_BITS;
    return at < t.block->shared.size() ? t.block->shared[at].get() : nullptr;
  }
  if (space == PARAM) return &m.param_region;
  if (slot < m.global.size()) return m.global[slot].get();
  return nullptr;
}

}  // namespace ptx
