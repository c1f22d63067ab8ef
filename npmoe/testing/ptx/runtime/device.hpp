// What generated code sees: a thread, the memory interface, barriers and warp collectives.
// Everything declared and not defined here is compiled once, in runtime.cpp.
#pragma once
#include "convert_ops.hpp"
#include "integer_ops.hpp"

namespace ptx {

struct Block;
struct Knowledge;

enum Space { GENERIC = 0, GLOBAL = 1, SHARED = 2, LOCAL = 3, CONST = 4, PARAM = 5 };

// Every allocation is alone in the middle of a slot of the address space, so that no 32 bit slip of
// the arithmetic leads from one to another, and an underflow still names the right one.
enum : u64 { SLOT_BITS = 40, WINDOW_SLOT_BITS = 20 };
enum Slot { NO_SLOT = 0, SHARED_SLOT = 1, LOCAL_SLOT = 2, PARAM_SLOT = 3, FIRST_SLOT = 4 };
PTX_INLINE u64 slot_base(u64 slot) { return slot << SLOT_BITS | 1ull << (SLOT_BITS - 1); }
PTX_INLINE u64 window_base(u64 slot) { return slot << WINDOW_SLOT_BITS | 1ull << (WINDOW_SLOT_BITS - 1); }
PTX_INLINE u64 window(u64 slot) { return slot << SLOT_BITS; }

// How an access takes part in ordering; in the low byte of a mark.
enum Access { READ = 0, WRITE = 1, STRONG = 2, ACQUIRE = 4, RELEASE = 8, CTA_SCOPE = 16, RMW = 32, ASYNC = 64 };

enum Status { RUNNING, PREEMPTED, WAITING, EXITED };
enum Waiting { NOT_WAITING, AT_BARRIER, AT_COLLECTIVE };

struct Copy {  // one cp.async that has not been waited for
  u32 destination, bytes, site, group;
  u64 source;
  u32 source_bytes;
};

struct Launch;

struct Thread {
  u32 pc, depth, returns[16];
  s32 budget;                  // memory accesses and backward branches before the scheduler is asked
  u32 index, warp, lane;       // within the block
  u32 tid[3];
  Status status;
  Waiting waiting;
  u32 wait_site, wait_key, wait_mask, wait_count;
  u32 in[12], out[8];          // operands and results of collectives
  u32 predicate;
  Block* block;
  Launch* launch;
  const u8* params;
  u8* local;
  u8* local_state;
  Knowledge* knowledge;
  u32 next_group;
  u32 wait_op;
};

struct Launch {  // shared with Python: see binding.py
  u32 grid[3], block[3];
  u32 dynamic_shared, schedule;
  u64 seed, limit;
  u32 variant, traffic;
  u64* counts;
};

struct BlockView { u32 ctaid[3]; };  // the first member of a Block
PTX_INLINE u32 ctaid(const Thread& t, u32 axis) { return ((const BlockView*)t.block)->ctaid[axis]; }
PTX_INLINE u32 ntid(const Thread& t, u32 axis) { return t.launch->block[axis]; }
PTX_INLINE u32 nctaid(const Thread& t, u32 axis) { return t.launch->grid[axis]; }
u64 clock_now(Thread&);
u32 resident_lanes(Thread&);

// Check an access and hand out the host address of its bytes.
template <u32 N> const u8* read(Thread&, u32 space, u64 address, u32 site, u32 access);
template <u32 N> void write(Thread&, u32 space, u64 address, const u8* value, u32 site, u32 access);
template <u32 N> u8* modify(Thread&, u32 space, u64 address, u32 site, u32 access);
void fence(Thread&, u32 site, bool cta_scope);
u64 to_window(Thread&, u64 generic, u32 slot, u32 site);

void async_copy(Thread&, u32 shared_address, u64 source, u32 bytes, u32 source_bytes, u32 site);
void async_commit(Thread&);
void async_wait(Thread&, u32 groups_left, bool also_uncommitted);

// True: go on. False: return WAITING and come back at the instruction after.
bool barrier_sync(Thread&, u32 id, u32 count, u32 site, bool aligned);
void barrier_arrive(Thread&, u32 id, u32 count, u32 site, bool aligned);
enum Reduction { RED_NONE, RED_POPC, RED_AND, RED_OR };
bool barrier_reduce(Thread&, u32 id, u32 count, u32 site, bool aligned, u32 reduction, bool value);

enum Collective {
  SYNC_WARP, SHFL_UP, SHFL_DOWN, SHFL_BFLY, SHFL_IDX, VOTE_ALL, VOTE_ANY, VOTE_UNI, VOTE_BALLOT, MATCH_ANY, MATCH_ALL,
  REDUX_ADD, REDUX_MIN_U, REDUX_MAX_U, REDUX_MIN_S, REDUX_MAX_S, REDUX_AND, REDUX_OR, REDUX_XOR, ELECT,
  LDMATRIX, STMATRIX, MOVMATRIX, MMA
};
// `form` tells apart what threads must agree on beyond the operation (matrix shapes, counts).
bool collective(Thread&, u32 operation, u32 form, u32 mask, u32 site, bool aligned);

[[noreturn]] void stop_undefined(Thread&, u32 site, u32 reg);
[[noreturn]] void stop_division(Thread&, u32 site);
[[noreturn]] void stop_trap(Thread&, u32 site);
[[noreturn]] void stop_depth(Thread&, u32 site);
[[noreturn]] void stop_branch(Thread&, u32 site, u32 target);

// atom and red: Op gives the new value from the old one and the operands.
struct AtomAdd { template <class T> PTX_INLINE T apply(T o, T b, T) { return add<T>(o, b); } };
struct AtomMin { template <class T> PTX_INLINE T apply(T o, T b, T) { return min_<T>(o, b); } };
struct AtomMax { template <class T> PTX_INLINE T apply(T o, T b, T) { return max_<T>(o, b); } };
struct AtomAnd { template <class T> PTX_INLINE T apply(T o, T b, T) { return and_<T>(o, b); } };
struct AtomOr { template <class T> PTX_INLINE T apply(T o, T b, T) { return or_<T>(o, b); } };
struct AtomXor { template <class T> PTX_INLINE T apply(T o, T b, T) { return xor_<T>(o, b); } };
struct AtomExch { template <class T> PTX_INLINE T apply(T, T b, T) { return b; } };
struct AtomCas { template <class T> PTX_INLINE T apply(T o, T b, T c) { return o == b ? c : o; } };
struct AtomInc { template <class T> PTX_INLINE T apply(T o, T b, T) { return o >= b ? 0 : (T)(o + 1); } };
struct AtomDec { template <class T> PTX_INLINE T apply(T o, T b, T) { return o == 0 || o > b ? b : (T)(o - 1); } };
struct AtomFloatAdd {
  template <class T> PTX_INLINE T apply(T o, T b, T) { return fadd<T, RN, false, false>(o, b); }
};
template <class H> struct AtomHalfAdd {
  PTX_INLINE u16 apply(u16 o, u16 b, u16) { return hadd<H, false, false, false>(o, b); }
};
template <class H> struct AtomPairAdd {
  PTX_INLINE u32 apply(u32 o, u32 b, u32) {
    return pair(hadd<H, false, false, false>(low_half(o), low_half(b)), hadd<H, false, false, false>(high_half(o), high_half(b)));
  }
};
template <class T, class Op>
PTX_INLINE T atomic(Thread& t, u32 space, u64 address, T b, T c, u32 site, u32 access) {
  u8* at = modify<sizeof(T)>(t, space, address, site, access);
  T old = get<T>(at);
  put<T>(at, Op::apply(old, b, c));
  return old;
}

typedef Status (*Run)(Thread&, void* registers, u64* counts);
struct Kernel { const char* name; Run run; u32 register_bytes; };

}  // namespace ptx
