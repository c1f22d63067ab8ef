// Figures of memory traffic: how well the lanes of a warp use shared banks and global sectors.
//
// The n-th execution of a PTX line by the lanes of one warp makes the n-th request of that line.
// Threads do not run in lockstep here, so lanes that left a loop early are matched by that count.
#pragma once
#include "clocks.hpp"

namespace ptx {

struct SiteTraffic {  // shared with Python: see binding.py
  u32 site, space;
  u64 requests, transactions, ideal, worst, bytes;
};

struct Lanes {
  u32 mask = 0, bytes = 0;
  u64 address[32];
};

struct Request { u32 site, warp, space; u32 done[32]; std::map<u32, Lanes> open; };

// Shared: passes over the 32 banks of 4 bytes. Same word: one pass. 8 bytes: per half warp; 16: per quarter.
static inline u32 shared_passes(const Lanes& l) {
  u32 per_phase = l.bytes <= 4 ? 32 : l.bytes == 8 ? 16 : 8, passes = 0;
  for (u32 first = 0; first < 32; first += per_phase) {
    u64 words[32 * 4];
    u32 count = 0, load[32] = {0}, worst = 0;
    for (u32 i = first; i < first + per_phase; i++) {
      if (!(l.mask >> i & 1)) continue;
      u64 from = l.address[i] >> 2, to = (l.address[i] + l.bytes - 1) >> 2;
      for (u64 word = from; word <= to && count < 128; word++) {
        bool known = false;
        for (u32 k = 0; k < count && !known; k++) known = words[k] == word;
        if (!known) words[count++] = word, load[word & 31]++;
      }
    }
    for (u32 bank = 0; bank < 32; bank++)
      if (load[bank] > worst) worst = load[bank];
    passes += worst;
  }
  return passes;
}

static inline u32 shared_ideal(const Lanes& l) {
  u32 per_phase = l.bytes <= 4 ? 32 : l.bytes == 8 ? 16 : 8, phases = 0;
  for (u32 first = 0; first < 32; first += per_phase)
    if (l.mask >> first & (per_phase == 32 ? ~0u : (1u << per_phase) - 1)) phases++;
  return phases;
}

// Global: distinct sectors of 32 bytes.
static inline u32 global_sectors(const Lanes& l, u32& ideal) {
  u64 sectors[64];
  u32 count = 0, lanes = 0;
  for (u32 i = 0; i < 32; i++) {
    if (!(l.mask >> i & 1)) continue;
    lanes++;
    for (u64 s = l.address[i] >> 5; s <= (l.address[i] + l.bytes - 1) >> 5; s++) {
      bool known = false;
      for (u32 k = 0; k < count && !known; k++) known = sectors[k] == s;
      if (!known && count < 64) sectors[count++] = s;
    }
  }
  ideal = (lanes * l.bytes + 31) / 32;
  if (ideal > count) ideal = count;  // broadcasts need less
  return count;
}

struct Traffic {
  std::map<std::pair<u32, u32>, SiteTraffic> sites;  // by line and space

  void close(const Request& r, const Lanes& l) {
    SiteTraffic& t = sites[{r.site, r.space}];
    u32 ideal, used;
    if (r.space == SHARED) used = shared_passes(l), ideal = shared_ideal(l);
    else used = global_sectors(l, ideal);
    t.site = r.site, t.space = r.space, t.requests++, t.transactions += used, t.ideal += ideal;
    t.bytes += (u64)__builtin_popcount(l.mask) * l.bytes;
    u64 degree = r.space == SHARED ? (used + ideal - 1) / ideal : used;
    if (degree > t.worst) t.worst = degree;
  }

  void note(std::vector<Request>& requests, u32 warp, u32 lane, u32 full, u32 site, u32 space, u64 address, u32 bytes) {
    Request* r = nullptr;
    for (Request& q : requests)
      if (q.site == site && q.warp == warp && q.space == space) { r = &q; break; }
    if (!r) {
      requests.push_back({site, warp, space, {0}, {}});
      r = &requests.back();
    }
    u32 number = r->done[lane]++;
    Lanes& l = r->open[number];
    l.mask |= 1u << lane, l.bytes = bytes, l.address[lane] = address;
    if (l.mask == full) close(*r, l), r->open.erase(number);
  }

  void close_all(std::vector<Request>& requests) {
    for (Request& r : requests)
      for (auto& entry : r.open) close(r, entry.second);
    requests.clear();
  }
};

}  // namespace ptx
