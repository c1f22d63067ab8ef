// Instructions that the threads of a warp execute together: arrival, then one function for all.
#pragma once
#include "matrix_ops.hpp"

namespace ptx {

struct Members {
  Thread* lane[32];
  u32 mask = 0;
};

static inline void shuffle(const Members& w, u32 operation) {
  for (u32 l = 0; l < 32; l++) {
    if (!(w.mask >> l & 1)) continue;
    Thread& t = *w.lane[l];
    u32 b = t.in[1] & 31, c = t.in[2], segment = c >> 8 & 31, clamp = c & 31;
    u32 most = (l & segment) | (clamp & ~segment), least = l & segment;
    s32 from;
    bool valid;
    if (operation == SHFL_UP) from = (s32)l - (s32)b, valid = from >= (s32)most;
    else if (operation == SHFL_DOWN) from = (s32)(l + b), valid = from <= (s32)most;
    else if (operation == SHFL_BFLY) from = (s32)(l ^ b), valid = from <= (s32)most;
    else from = (s32)(least | (b & ~segment)), valid = from <= (s32)most;
    if (!valid) from = (s32)l;
    if (!(w.mask >> from & 1))
      stop_note(t, WARP_DIVERGENCE, t.wait_site,
                "this thread reads the register of lane %d, which does not take part (membermask 0x%08x)", from, t.wait_mask);
    t.out[0] = w.lane[from]->in[0], t.out[1] = valid;
  }
}

static inline void vote(const Members& w, u32 operation) {
  u32 ballot = 0;
  for (u32 l = 0; l < 32; l++)
    if (w.mask >> l & 1 && w.lane[l]->in[0]) ballot |= 1u << l;
  u32 result = operation == VOTE_ALL ? ballot == w.mask
             : operation == VOTE_ANY ? ballot != 0
             : operation == VOTE_UNI ? ballot == 0 || ballot == w.mask : ballot;
  for (u32 l = 0; l < 32; l++)
    if (w.mask >> l & 1) w.lane[l]->out[0] = result;
}

static inline void match(const Members& w, u32 operation) {
  for (u32 l = 0; l < 32; l++) {
    if (!(w.mask >> l & 1)) continue;
    u32 same = 0;
    for (u32 k = 0; k < 32; k++)
      if (w.mask >> k & 1 && w.lane[k]->in[0] == w.lane[l]->in[0] && w.lane[k]->in[1] == w.lane[l]->in[1]) same |= 1u << k;
    bool all = same == w.mask;
    w.lane[l]->out[0] = operation == MATCH_ANY ? same : all ? w.mask : 0;
    w.lane[l]->out[1] = all;
  }
}

static inline void reduce(const Members& w, u32 operation) {
  bool first = true;
  u32 r = 0;
  for (u32 l = 0; l < 32; l++) {
    if (!(w.mask >> l & 1)) continue;
    u32 v = w.lane[l]->in[0];
    if (first) { r = v, first = false; continue; }
    switch (operation) {
      case REDUX_ADD: r += v; break;
      case REDUX_MIN_U: r = min_<u32>(r, v); break;
      case REDUX_MAX_U: r = max_<u32>(r, v); break;
      case REDUX_MIN_S: r = (u32)min_<s32>((s32)r, (s32)v); break;
      case REDUX_MAX_S: r = (u32)max_<s32>((s32)r, (s32)v); break;
      case REDUX_AND: r &= v; break;
      case REDUX_OR: r |= v; break;
      default: r ^= v;
    }
  }
  for (u32 l = 0; l < 32; l++)
    if (w.mask >> l & 1) w.lane[l]->out[0] = r;
}

static inline void perform(Block& b, u32 warp, const Members& w, u32 operation, u32 form) {
  b.machine->collectives++, b.progress++;
  if (operation == SYNC_WARP) {
    std::vector<u32> members;
    for (u32 l = 0; l < 32; l++)
      if (w.mask >> l & 1) members.push_back(warp * 32 + l);
    join_members(b.clocks, members);
  } else if (operation <= SHFL_IDX) {
    shuffle(w, operation);
  } else if (operation <= VOTE_BALLOT) {
    vote(w, operation);
  } else if (operation <= MATCH_ALL) {
    match(w, operation);
  } else if (operation <= REDUX_XOR) {
    reduce(w, operation);
  } else if (operation == ELECT) {
    u32 leader = (u32)__builtin_ctz(w.mask);
    for (u32 l = 0; l < 32; l++)
      if (w.mask >> l & 1) w.lane[l]->out[0] = leader, w.lane[l]->out[1] = l == leader;
  } else if (operation == LDMATRIX) {
    ldmatrix(b, warp, form);
  } else if (operation == STMATRIX) {
    stmatrix(b, warp, form);
  } else if (operation == MOVMATRIX) {
    movmatrix(b, warp);
  } else {
    mma(b, warp, form);
  }
}

// Run what the threads of `t`'s mask wait for, if all of them that live are there.
static inline bool try_collective(Block& b, Thread& t, bool aligned) {
  Members w;
  for (u32 l = 0; l < 32; l++) {
    if (!(t.wait_mask >> l & 1)) continue;
    Thread* o = b.lane(t.warp, l);
    if (!o || o->status == EXITED) {
      if (aligned)
        stop_note(t, WARP_DIVERGENCE, t.wait_site, "all 32 threads of the warp must execute this together, but lane %u %s",
                  l, o ? "has exited" : "does not exist");
      continue;
    }
    if (o->waiting != AT_COLLECTIVE || o->wait_op != t.wait_op || o->wait_key != t.wait_key || o->wait_mask != t.wait_mask)
      return false;
    if (aligned && o->wait_site != t.wait_site) {
      Finding f = make_finding(t, WARP_DIVERGENCE, t.wait_site);
      f.has_other = 1, f.other = who(*o), f.other_site = o->wait_site;
      snprintf(f.note, sizeof f.note, "the threads of one warp execute this .aligned instruction at different places");
      stop(f);
    }
    w.lane[l] = o, w.mask |= 1u << l;
  }
  perform(b, t.warp, w, t.wait_op, t.wait_key);
  for (u32 l = 0; l < 32; l++)
    if (w.mask >> l & 1 && w.lane[l] != &t) b.make_ready(*w.lane[l]);
  t.waiting = NOT_WAITING;
  return true;
}

bool collective(Thread& t, u32 operation, u32 form, u32 mask, u32 site, bool aligned) {
  if (!(mask >> t.lane & 1))
    stop_note(t, WARP_DIVERGENCE, site, "membermask 0x%08x does not name the thread itself (lane %u)", mask, t.lane);
  t.waiting = AT_COLLECTIVE, t.wait_site = site, t.wait_op = operation, t.wait_key = form, t.wait_mask = mask;
  t.wait_count = aligned;
  return try_collective(*t.block, t, aligned);
}

// A thread left: those who waited for it need not wait any longer.
static inline void excuse_exited(Block& b, Thread& gone) {
  for (u32 l = 0; l < 32; l++) {
    Thread* o = b.lane(gone.warp, l);
    if (!o || o->waiting != AT_COLLECTIVE || !(o->wait_mask >> gone.lane & 1)) continue;
    if (try_collective(b, *o, o->wait_count != 0)) { b.make_ready(*o); return; }
  }
}

}  // namespace ptx
