"""cvt, setp, set, selp, slct: every pair of kinds, exact bits."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_cases import Table, needs_compiler

pytestmark = needs_compiler
T = Table()
NAN, INF = 0x7FFFFFFF, 0x7F800000
M = 1 << 32


def half(value: float) -> int:
    """Bits of the nearest f16."""
    return int(np.float16(value).view(np.uint16))


def cvt(opcode: str, result: str, source: str, rows: list) -> None:
    T.add(f"{opcode} d, a;", result, source, rows)


cvt("cvt.u32.u16", "b32", "b16", [(0xFFFF, 0xFFFF)])
cvt("cvt.s32.s16", "b32", "b16", [(0xFFFF, -1)])
cvt("cvt.s64.s32", "b64", "b32", [(-5, -5)])
cvt("cvt.u64.u32", "b64", "b32", [(-5, M - 5)])
cvt("cvt.u64.s32", "b64", "b32", [(-5, -5)])
cvt("cvt.s32.u16", "b32", "b16", [(0xFFFF, 0xFFFF)])
cvt("cvt.u32.u64", "b32", "b64", [(2**40 + 7, 7)])
cvt("cvt.u16.u32", "b16", "b32", [(0x12345, 0x2345)])
cvt("cvt.u8.u32", "b32", "b32", [(0x1FF, 0xFF)])
cvt("cvt.s8.s32", "b32", "b32", [(0xFF, -1)])
cvt("cvt.s32.s8", "b32", "b32", [(0x180, -128)])
cvt("cvt.u32.u8", "b32", "b32", [(0x180, 0x80)])
cvt("cvt.sat.u8.s32", "b32", "b32", [(-3, 0), (300, 255), (7, 7)])
cvt("cvt.sat.s16.s32", "b16", "b32", [(40000, 32767), (-40000, -32768)])
cvt("cvt.sat.u32.s64", "b32", "b64", [(-1, 0), (2**40, M - 1)])
cvt("cvt.sat.s32.u32", "b32", "b32", [(-1, 2**31 - 1)])
cvt("cvt.rn.f32.s32", "f32", "b32", [(-3, -3.0), (2**24 + 1, float(2**24))])
cvt("cvt.rp.f32.s32", "f32", "b32", [(2**24 + 1, float(2**24 + 2))])
cvt("cvt.rz.f32.u32", "f32", "b32", [(-1, float(M - 256))])
cvt("cvt.rn.f32.u64", "f32", "b64", [(2**63, 2.0**63)])
cvt("cvt.rn.f64.s64", "f64", "b64", [(-(2**53) - 1, -(2.0**53))])
cvt("cvt.rn.f64.u64", "f64", "b64", [(-1, 2.0**64)])
cvt("cvt.rn.f64.s32", "f64", "b32", [(-7, -7.0)])
cvt("cvt.rn.f32.u8", "f32", "b32", [(0x1FF, 255.0)])
cvt("cvt.rzi.s32.f32", "b32", "f32", [(-2.9, -2), (1e20, 2**31 - 1), (-1e20, -(2**31)), (NAN, 0)])
cvt("cvt.rni.s32.f32", "b32", "f32", [(2.5, 2), (3.5, 4), (-0.5, 0)])
cvt("cvt.rmi.s32.f32", "b32", "f32", [(-2.1, -3), (2.9, 2)])
cvt("cvt.rpi.s32.f32", "b32", "f32", [(-2.9, -2), (2.1, 3)])
cvt("cvt.rzi.u32.f32", "b32", "f32", [(-1.5, 0), (2.0**32, M - 1), (3e9, 3000000000)])
cvt("cvt.rzi.s64.f32", "b64", "f32", [(2.0**40, 2**40), (NAN, 2**63), (INF, 2**63 - 1)])
cvt("cvt.rzi.u64.f64", "b64", "f64", [(2.0**63, 2**63), (-1.0, 0)])
cvt("cvt.rzi.s32.f64", "b32", "f64", [(-1e10, -(2**31)), (7.9, 7), (float("nan"), 2**31)])
cvt("cvt.rzi.ftz.s32.f32", "b32", "f32", [(7.9, 7)])
cvt("cvt.rpi.ftz.s32.f32", "b32", "f32", [(1, 0), (0.5, 1)])
cvt("cvt.rzi.s16.f32", "b16", "f32", [(1e6, 32767)])
cvt("cvt.rzi.u8.f32", "b32", "f32", [(300.0, 255), (-4.0, 0)])
cvt("cvt.f64.f32", "f64", "f32", [(1.5, 1.5)])
cvt("cvt.rn.f32.f64", "f32", "f64", [(0.1, float(np.float32(0.1))), (1e300, INF)])
cvt("cvt.rz.f32.f64", "f32", "f64", [(1 - 2.0**-40, 1 - 2.0**-24), (1e300, 0x7F7FFFFF)])
cvt("cvt.rp.f32.f64", "f32", "f64", [(1 + 2.0**-40, 1 + 2.0**-23)])
cvt("cvt.rn.ftz.f32.f64", "f32", "f64", [(1e-40, 0.0)])
cvt("cvt.sat.f32.f32", "f32", "f32", [(1.5, 1.0), (-0.5, 0.0), (0.25, 0.25), (NAN, 0.0)])
cvt("cvt.rni.f32.f32", "f32", "f32", [(2.5, 2.0), (-1.5, -2.0)])
cvt("cvt.rmi.f64.f64", "f64", "f64", [(-1.5, -2.0)])
cvt("cvt.rzi.f32.f32", "f32", "f32", [(-1.75, -1.0)])
cvt(
    "cvt.f32.f16",
    "f32",
    "b16",
    [(0x3C00, 1.0), (0x0001, 2.0**-24), (0x7C00, INF), (0xC500, -5.0), (0x7E01, NAN)],
)
cvt("cvt.f64.f16", "f64", "b16", [(0x3555, float(np.float16(1 / 3)))])
cvt("cvt.f32.bf16", "f32", "b16", [(0x3F80, 1.0), (0x0001, 1 << 16)])
cvt(
    "cvt.rn.f16.f32",
    "b16",
    "f32",
    [
        (1 / 3, half(1 / 3)),
        (65519.0, 0x7BFF),
        (65520.0, 0x7C00),
        (2.0**-25, 0),
        (1.5 * 2.0**-25, 1),
        (NAN, 0x7FFF),
        (-0.0, 0x8000),
    ],
)
cvt("cvt.rz.f16.f32", "b16", "f32", [(65535.0, 0x7BFF), (1 + 2.0**-11 + 2.0**-12, 0x3C00)])
cvt("cvt.rn.f16.f64", "b16", "f64", [(1 + 2.0**-11 + 2.0**-40, 0x3C01)])
cvt("cvt.rn.f16.s32", "b16", "b32", [(2049, 0x6800), (2051, 0x6802), (-1, 0xBC00)])
cvt("cvt.rzi.s32.f16", "b32", "b16", [(half(-2.75), -2), (0x7FFF, 0)])
cvt("cvt.rni.f16.f16", "b16", "b16", [(half(2.5), half(2.0))])
cvt("cvt.rn.sat.f16.f32", "b16", "f32", [(2.0, 0x3C00), (-1.0, 0)])
cvt(
    "cvt.rn.bf16.f32",
    "b16",
    "f32",
    [
        (1.0, 0x3F80),
        (1 + 2.0**-8, 0x3F80),
        (1 + 3 * 2.0**-8, 0x3F82),
        (NAN, 0x7FFF),
        (0x7F7FFFFF, 0x7F80),
    ],
)
cvt("cvt.rz.bf16.f32", "b16", "f32", [(1 + 3 * 2.0**-8, 0x3F81), (0x7F7FFFFF, 0x7F7F)])
cvt("cvt.rn.relu.bf16.f32", "b16", "f32", [(-2.0, 0), (2.0, 0x4000)])
cvt(
    "cvt.rna.tf32.f32",
    "b32",
    "f32",
    [(1 + 2.0**-11, 0x3F802000), (-1 - 2.0**-11, 0xBF802000), (1.0, 0x3F800000)],
)
T.add("cvt.rn.f16x2.f32 d, a, b;", "b32", "f32 f32", [((1.0, 2.0), 0x3C004000)])
T.add("cvt.rn.bf16x2.f32 d, a, b;", "b32", "f32 f32", [((1.0, 2.0), 0x3F804000)])
T.add("cvt.rn.relu.bf16x2.f32 d, a, b;", "b32", "f32 f32", [((-1.0, 2.0), 0x00004000)])


def compare(opcode: str, kind: str, rows: list) -> None:
    """Rows of ((a, b), truth)."""
    source = f"f{kind[1:]}" if kind in {"f32", "f64"} else f"b{16 if '16' in kind else kind[1:]}"
    T.add(
        f"{opcode}.{kind} p, a, b; selp.b32 d, 1, 0, p;",
        "b32",
        f"{source} {source}",
        rows,
        name=f"{opcode}.{kind}",
    )


for name, low, same, high in (
    ("eq", 0, 1, 0),
    ("ne", 1, 0, 1),
    ("lt", 1, 0, 0),
    ("le", 1, 1, 0),
    ("gt", 0, 0, 1),
    ("ge", 0, 1, 1),
):
    compare(f"setp.{name}", "s32", [((-1, 1), low), ((5, 5), same), ((1, -1), high)])
    compare(f"setp.{name}", "u64", [((1, 2**63), low), ((5, 5), same), ((-1, 1), high)])
    compare(
        f"setp.{name}",
        "f32",
        [
            ((-1.0, 1.0), low),
            ((5.0, 5.0), same),
            ((1.0, -1.0), high),
            ((NAN, 1.0), 0),
            ((0.0, -0.0), same),
        ],
    )
    compare(
        f"setp.{name}",
        "f16",
        [((half(-1), half(1)), low), ((half(5), half(5)), same), ((0x7FFF, half(1)), 0)],
    )
    compare(
        f"setp.{name}u",
        "f32",
        [((-1.0, 1.0), low), ((5.0, 5.0), same), ((1.0, -1.0), high), ((NAN, 1.0), 1)],
    )
    compare(f"setp.{name}u", "f64", [((1.0, float("nan")), 1), ((-1.0, 1.0), low)])
compare("setp.lt", "s16", [((0xFFFF, 1), 1)])
compare("setp.lt", "u16", [((0xFFFF, 1), 0)])
compare("setp.eq", "b32", [((3, 3), 1)])
compare("setp.lo", "u32", [((1, -1), 1)])
compare("setp.ls", "u32", [((1, 1), 1)])
compare("setp.hi", "u32", [((-1, 1), 1)])
compare("setp.hs", "u32", [((1, 2), 0)])
compare("setp.num", "f32", [((1.0, 2.0), 1), ((NAN, 2.0), 0)])
compare("setp.nan", "f32", [((1.0, 2.0), 0), ((2.0, NAN), 1)])
compare("setp.gt.ftz", "f32", [((1, 0.0), 0), ((1.0, 0.0), 1)])
compare("setp.lt", "bf16", [((0x3F80, 0x4000), 1)])
for join, truth in (("and", (0, 1, 0)), ("or", (1, 1, 0)), ("xor", (1, 0, 0))):
    T.add(
        f"setp.ne.s32 p, c, 0; setp.lt.{join}.s32 q, a, b, p; selp.b32 d, 1, 0, q;",
        "b32",
        "b32 b32 b32",
        [((1, 2, 0), truth[0]), ((1, 2, 1), truth[1]), ((2, 1, 0), truth[2])],
        name=f"setp.{join}",
    )
T.add(
    "setp.lt.s32 p|q, a, b; selp.b32 d, 1, 0, p; selp.b32 e, 1, 0, q;",
    "b32 b32",
    "b32 b32",
    [((1, 2), (1, 0)), ((2, 1), (0, 1))],
    name="setp two results",
)
T.add(
    "setp.ne.s32 q, c, 0; setp.lt.and.s32 p|q, a, b, !q; selp.b32 d, 1, 0, p; selp.b32 e, 1, 0, q;",
    "b32 b32",
    "b32 b32 b32",
    [((1, 2, 0), (1, 0)), ((1, 2, 1), (0, 0)), ((2, 1, 0), (0, 1))],
    name="setp negated",
)
T.add("set.lt.u32.s32 d, a, b;", "b32", "b32 b32", [((1, 2), -1), ((2, 1), 0)])
T.add("set.eq.f16.f16 d, a, b;", "b16", "b16 b16", [((0x3C01, 0x3C01), 0x3C00), ((1, 2), 0)])
T.add("set.gt.bf16.bf16 d, a, b;", "b16", "b16 b16", [((0x4000, 0x3F80), 0x3F80)])
PAIRS = [((0x3C004000, 0x40003C00), (1, 0)), ((0x40003C00, 0x3C004000), (0, 1))]
T.add("set.gt.f16x2.f16x2 d, a, b;", "b32", "b32 b32", [((0x3C004000, 0x40003C00), 0x00003C00)])
T.add("set.gt.u32.f16x2 d, a, b;", "b32", "b32 b32", [((0x3C004000, 0x40003C00), 0x0000FFFF)])
T.add(
    "setp.gt.f16x2 p|q, a, b; selp.b32 d, 1, 0, p; selp.b32 e, 1, 0, q;",
    "b32 b32", "b32 b32", PAIRS, name="setp of pairs",
)  # fmt: skip
T.add("set.gt.f32.f32 d, a, b;", "f32", "f32 f32", [((2.0, 1.0), 1.0), ((1.0, 2.0), 0.0)])
T.add(
    "setp.ne.s32 p, c, 0; selp.f32 d, a, b, p;",
    "f32",
    "f32 f32 b32",
    [((1.0, 2.0, 1), 1.0), ((1.0, 2.0, 0), 2.0)],
    name="selp.f32",
)
T.add(
    "setp.ne.s32 p, c, 0; selp.b64 d, a, b, p;",
    "b64",
    "b64 b64 b32",
    [((2**40, 2, 1), 2**40)],
    name="selp.b64",
)
T.add(
    "setp.ne.s32 p, c, 0; selp.b16 d, a, b, p;",
    "b16",
    "b16 b16 b32",
    [((7, 2, 0), 2)],
    name="selp.b16",
)
T.add("slct.b32.s32 d, a, b, c;", "b32", "b32 b32 b32", [((7, 8, 0), 7), ((7, 8, -1), 8)])
T.add(
    "slct.f32.f32 d, a, b, c;",
    "f32",
    "f32 f32 f32",
    [((7.0, 8.0, -0.5), 8.0), ((7.0, 8.0, NAN), 8.0)],
)
T.add("mov.b64 d, {a, b};", "b64", "b32 b32", [((1, 2), 2 * M + 1)])
T.add("mov.b64 {d, e}, a;", "b32 b32", "b64", [(2 * M + 1, (1, 2))])
T.add("mov.b32 {d, e}, a;", "b16 b16", "b32", [(0x12345678, (0x5678, 0x1234))])
T.add("mov.b32 d, {a, b};", "b32", "b16 b16", [((0x5678, 0x1234), 0x12345678)])
T.add("mov.b64 d, {a, b, c, x};", "b64", "b16 b16 b16 b16", [((1, 2, 3, 4), 0x0004000300020001)])
T.add("mov.b64 {_, d}, a;", "b32", "b64", [(2 * M + 1, 2)])
T.add("mov.f32 d, 0f3FC00000;", "f32", "", [((), 1.5)])
T.add("mov.f32 d, 1.5;", "f32", "", [((), 1.5)], name="mov decimal")
T.add("mov.f64 d, 0d3FF8000000000000;", "f64", "", [((), 1.5)])
T.add("mov.f32 d, a;", "f32", "f32", [(0x7FC00001, 0x7FC00001)], name="mov keeps NaN bits")
T.add("mov.u32 d, -5;", "b32", "", [((), -5)])
T.add("mov.b32 d, 0xFFFFFFFF;", "b32", "", [((), -1)])
T.add("mov.b32 d, WARP_SZ;", "b32", "", [((), 32)], name="mov WARP_SZ")
T.add(
    "setp.ne.s32 p, a, 0; mov.pred q, p; selp.b32 d, 1, 0, q;",
    "b32",
    "b32",
    [(3, 1), (0, 0)],
    name="mov.pred",
)
T.add(
    "setp.ne.s32 p, a, 0; mov.b32 d, 1; @p mov.b32 d, 2; @!p add.s32 d, d, 10;",
    "b32",
    "b32",
    [(3, 2), (0, 11)],
    name="guards",
)


@pytest.mark.parametrize("name", T.cases)
def test_conversion_or_comparison(name):
    T.check(name)
