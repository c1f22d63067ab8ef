// The one translation unit of the runtime: what is not inline, and the door for Python.
#include <cfenv>
#include <cmath>

#include "scheduler.hpp"

namespace ptx {

#define PTX_SIZES(X) X(1) X(2) X(4) X(8) X(16) X(32)
#define PTX_INSTANTIATE(N) \
  template const u8* read<N>(Thread&, u32, u64, u32, u32); \
  template void write<N>(Thread&, u32, u64, const u8*, u32, u32);
PTX_SIZES(PTX_INSTANTIATE)
template u8* modify<2>(Thread&, u32, u64, u32, u32);
template u8* modify<4>(Thread&, u32, u64, u32, u32);
template u8* modify<8>(Thread&, u32, u64, u32, u32);

u64 clock_now(Thread& t) { return ++machine(t).steps; }
// Any set that holds the thread is a right answer; the smallest hides the fewest mistakes.
u32 resident_lanes(Thread& t) { return 1u << t.lane; }

void stop_undefined(Thread& t, u32 site, u32 reg) {
  Finding f = make_finding(t, UNDEFINED_REGISTER, site);
  f.register_ = reg;
  stop(f);
}
void stop_division(Thread& t, u32 site) { stop(make_finding(t, DIVISION_BY_ZERO, site)); }
void stop_trap(Thread& t, u32 site) { stop(make_finding(t, TRAP, site)); }
void stop_depth(Thread& t, u32 site) { stop_note(t, BAD_CALL, site, "calls are nested more than 16 deep"); }
void stop_branch(Thread& t, u32 site, u32 target) {
  stop_note(t, BAD_CALL, site, "brx.idx was given index %u, which its table does not have", target);
}

static int host_mode(u32 mode) {
  return mode == RZ ? FE_TOWARDZERO : mode == RM ? FE_DOWNWARD : mode == RP ? FE_UPWARD : FE_TONEAREST;
}
struct RoundingScope {
  int before;
  explicit RoundingScope(u32 mode) : before(fegetround()) { fesetround(host_mode(mode)); }
  ~RoundingScope() { fesetround(before); }
};

template <class F> static F evaluate(u32 op, u32 mode, F a, F b, F c) {
  RoundingScope scope(mode);
  volatile F x = a, y = b, z = c, r;
  switch (op) {
    case OP_ADD: r = x + y; break;
    case OP_SUB: r = x - y; break;
    case OP_MUL: r = x * y; break;
    case OP_FMA: r = std::fma(x, y, z); break;
    case OP_DIV: r = x / y; break;
    case OP_SQRT: r = std::sqrt(x); break;
    default: r = (F)1 / x;
  }
  return r;
}
f64 rounded_op(u32 op, u32 mode, f64 a, f64 b, f64 c) { return evaluate<f64>(op, mode, a, b, c); }
f32 rounded_op(u32 op, u32 mode, f32 a, f32 b, f32 c) { return evaluate<f32>(op, mode, a, b, c); }

f64 approximate(u32 function, f64 x) {
  switch (function) {
    case FN_EX2: return std::exp2(x);
    case FN_LG2: return std::log2(x);
    case FN_SIN: return std::sin(x);
    case FN_COS: return std::cos(x);
    case FN_TANH: return std::tanh(x);
    default: return 1 / std::sqrt(x);
  }
}

f64 round_integer(f64 x, u32 mode) {
  switch (mode) {
    case RZ: return std::trunc(x);
    case RM: return std::floor(x);
    case RP: return std::ceil(x);
    case RNA: return std::round(x);
    default: return std::nearbyint(x);
  }
}

f64 round_to(f64 x, s32 mantissa, s32 least, f64 largest, u32 mode) {
  if (x == 0 || x - x != 0) return x;
  int e;
  std::frexp(x, &e);
  int unit = std::max(e - 1, (int)least) - mantissa;
  f64 r = std::ldexp(round_integer(std::ldexp(x, -unit), mode), unit);
  if (std::fabs(r) <= largest) return r;
  bool up = mode == RN || mode == RNA || (mode == RP && x > 0) || (mode == RM && x < 0);
  return std::copysign(up ? INFINITY : largest, x);
}
u16 encode_half(f64 x, u32 mode) {
  if (x != x) return Half::NAN_;
  f64 r = std::fabs(x = round_to(x, 10, -14, 65504, mode));
  u16 sign = std::signbit(x) ? 0x8000 : 0;
  if (r > 65504) return sign | Half::INF;
  if (r < 6.103515625e-05) return (u16)(sign | (u16)(r * 16777216));
  u64 v = bits<u64>(r);
  return (u16)(sign | (u16)(((v >> 52) - 1008) << 10) | (u16)(v >> 42 & 0x3ff));
}
u16 encode_bf16(f64 x, u32 mode) {
  if (x != x) return Bf16::NAN_;
  return (u16)(bits<u32>((f32)round_to(x, 7, -126, 3.3895313892515355e38, mode)) >> 16);
}
f32 encode_tf32(f32 x, u32 mode) {
  if (x != x) return quiet(x);
  return (f32)round_to(x, 10, -126, 3.4011621342146535e38, mode);
}

// a * b + c with the last bit of the double set where anything was lost: rounding it once more to
// a half type gives what one rounding of the exact value gives.
f64 round_to_odd_fma(f64 a, f64 b, f64 c) {
  f64 p = a * b, s = p + c, v = s - p, error = (p - (s - v)) + (c - v);
  if (error == 0 || s - s != 0 || (bits<u64>(s) & 1)) return s;
  bool away = (error > 0) == (s > 0);
  return bits<f64>(bits<u64>(s) + (away ? 1 : (u64)-1));
}

f32 integer_to_f32(s64 v, bool is_unsigned, u32 mode) {
  RoundingScope scope(mode);
  volatile s64 x = v;
  volatile u64 y = (u64)v;
  volatile f32 r = is_unsigned ? (f32)y : (f32)x;
  return r;
}
f64 integer_to_f64(s64 v, bool is_unsigned, u32 mode) {
  RoundingScope scope(mode);
  volatile s64 x = v;
  volatile u64 y = (u64)v;
  volatile f64 r = is_unsigned ? (f64)y : (f64)x;
  return r;
}
f32 f64_to_f32(f64 v, u32 mode) {
  RoundingScope scope(mode);
  volatile f64 x = v;
  volatile f32 r = (f32)x;
  return r;
}

static void add_region(Machine& m, const RegionSpec& spec) {
  if (spec.space == SHARED) { m.shared.push_back(spec); return; }
  if (spec.space == LOCAL) {
    m.local.push_back(spec);
    m.local_bytes += (spec.size + 15) & ~15ull;
    return;
  }
  std::unique_ptr<Region> r(new Region());
  r->base = spec.base, r->size = spec.size, r->data = spec.data, r->space = spec.space, r->number = spec.number;
  r->read_only = spec.read_only;
  if (spec.uninitialized) r->state.assign(spec.size + 32, EMPTY);
  if (!r->read_only) r->shadow.reset(spec.size);
  u64 slot = spec.base >> SLOT_BITS;
  if (m.global.size() <= slot) m.global.resize(slot + 1);
  m.global[slot] = std::move(r);
}

}  // namespace ptx

extern "C" int ptx_launch(
    const ptx::Kernel* kernel, const ptx::Launch* launch, const ptx::RegionSpec* regions, unsigned region_count,
    const unsigned char* params, unsigned long long param_bytes, ptx::Finding* finding, unsigned long long* totals,
    ptx::SiteTraffic* traffic, unsigned traffic_room) {
  using namespace ptx;
  Machine m;
  m.launch = *launch;
  m.kernel = kernel;
  m.params = params;
  m.random = (launch->seed + 1) * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < 4; i++) m.next_random();
  for (unsigned i = 0; i < region_count; i++) add_region(m, regions[i]);
  m.param_region.base = slot_base(PARAM_SLOT), m.param_region.size = param_bytes;
  m.param_region.data = (u8*)params, m.param_region.space = PARAM, m.param_region.read_only = true;
  int status = 0;
  try {
    run_grid(m);
  } catch (const Finding& f) {
    *finding = f;
    status = 1;
  } catch (const std::bad_alloc&) {
    status = 2;
  }
  totals[0] = m.barriers, totals[1] = m.collectives, totals[2] = m.async_copies, totals[3] = m.steps;
  unsigned at = 0;
  for (auto& site : m.traffic.sites)
    if (at < traffic_room) traffic[at++] = site.second;
  totals[4] = at;
  return status;
}
