"""f32, f64 and half instructions: exact bits, by hand or with Python's exact arithmetic."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from ptx_cases import Table, needs_compiler, to_bits

pytestmark = needs_compiler
T = Table()
NAN32, INF32 = 0x7FFFFFFF, 0x7F800000
TINY = 0x00000001  # the least subnormal of f32
THIRD = struct.unpack("<f", struct.pack("<f", 1 / 3))[0]


def f32(value: float) -> float:
    """The nearest f32."""
    return float(np.float32(value))


def bits32(value: float) -> int:
    return to_bits(float(value), "f32")


def down32(exact: Fraction) -> float:
    """The largest f32 that is not above an exact value."""
    near = np.float32(float(exact))
    return (
        float(np.nextafter(near, np.float32(-np.inf)))
        if Fraction(float(near)) > exact
        else float(near)
    )


def up32(exact: Fraction) -> float:
    """The least f32 that is not below an exact value."""
    return -down32(-exact)


ONE_AND = (1.0, 2.0**-30)
T.add(
    "add.f32 d, a, b;", "f32", "f32 f32", [((1.5, 2.25), 3.75), (ONE_AND, 1.0), ((TINY, TINY), 2)]
)
T.add("add.rn.f32 d, a, 0f3F800000;", "f32", "f32", [(2.0, 3.0)])
T.add("add.rz.f32 d, a, b;", "f32", "f32 f32", [((1.0, -(2.0**-30)), 1 - 2.0**-24), (ONE_AND, 1.0)])
T.add(
    "add.rm.f32 d, a, b;", "f32", "f32 f32", [((-1.0, -(2.0**-30)), -1 - 2.0**-23), (ONE_AND, 1.0)]
)
T.add("add.rp.f32 d, a, b;", "f32", "f32 f32", [(ONE_AND, 1 + 2.0**-23)])
T.add(
    "add.ftz.f32 d, a, b;",
    "f32",
    "f32 f32",
    [((TINY, TINY), 0), ((1.0, TINY), 1.0), ((0x80000001, 0x80000001), 0x80000000)],
)
T.add(
    "add.sat.f32 d, a, b;",
    "f32",
    "f32 f32",
    [((0.75, 0.5), 1.0), ((-1.0, 0.5), 0.0), ((0.25, 0.5), 0.75), ((NAN32, 1.0), 0.0)],
)
T.add("add.f64 d, a, b;", "f64", "f64 f64", [((1.0, 2.0**-53), 1.0), ((0.1, 0.2), 0.1 + 0.2)])
T.add("add.rp.f64 d, a, b;", "f64", "f64 f64", [((1.0, 2.0**-60), 1 + 2.0**-52)])
T.add("sub.f32 d, a, b;", "f32", "f32 f32", [((1.5, 2.25), -0.75), ((INF32, INF32), NAN32)])
T.add("sub.rz.f32 d, a, b;", "f32", "f32 f32", [((1.0, 2.0**-30), 1 - 2.0**-24)])
T.add("sub.f64 d, a, b;", "f64", "f64 f64", [((1.0, 0.75), 0.25)])
T.add("mul.f32 d, a, b;", "f32", "f32 f32", [((1.5, 2.5), 3.75), ((THIRD, 3.0), f32(THIRD * 3.0))])
T.add("mul.rm.f32 d, a, b;", "f32", "f32 f32", [((THIRD, THIRD), down32(Fraction(THIRD) ** 2))])
T.add("mul.rp.f32 d, a, b;", "f32", "f32 f32", [((THIRD, THIRD), up32(Fraction(THIRD) ** 2))])
T.add("mul.ftz.f32 d, a, b;", "f32", "f32 f32", [((bits32(2.0**-100), bits32(2.0**-30)), 0)])
T.add("mul.f64 d, a, b;", "f64", "f64 f64", [((0.1, 0.1), 0.1 * 0.1)])
EPS = 2.0**-12
T.add(
    "fma.rn.f32 d, a, b, c;",
    "f32",
    "f32 f32 f32",
    [((1 + EPS, 1 - EPS, -1.0), -(2.0**-24)), ((2.0, 3.0, 4.0), 10.0)],
)
T.add("fma.rz.f32 d, a, b, c;", "f32", "f32 f32 f32", [((1.0, 1.0, -(2.0**-30)), 1 - 2.0**-24)])
T.add(
    "fma.rm.f32 d, a, b, c;",
    "f32",
    "f32 f32 f32",
    [((1.0, 1.0, -(2.0**-30)), 1 - 2.0**-24), ((1.0, 1.0, 2.0**-30), 1.0)],
)
T.add("fma.rn.ftz.f32 d, a, b, c;", "f32", "f32 f32 f32", [((1.0, TINY, 0.0), 0.0)])
T.add(
    "fma.rn.f64 d, a, b, c;",
    "f64",
    "f64 f64 f64",
    [((1 + 2.0**-30, 1 - 2.0**-30, -1.0), -(2.0**-60))],
)
T.add("mad.rn.f32 d, a, b, c;", "f32", "f32 f32 f32", [((1 + EPS, 1 - EPS, -1.0), -(2.0**-24))])
T.add(
    "div.rn.f32 d, a, b;",
    "f32",
    "f32 f32",
    [((1.0, 3.0), THIRD), ((1.0, 0.0), INF32), ((0.0, 0.0), NAN32)],
)
T.add("div.rz.f32 d, a, b;", "f32", "f32 f32", [((2.0, 3.0), down32(Fraction(2, 3)))])
T.add("div.rp.f32 d, a, b;", "f32", "f32 f32", [((1.0, 3.0), up32(Fraction(1, 3)))])
T.add("div.full.f32 d, a, b;", "f32", "f32 f32", [((1.0, 4.0), 0.25)])
T.add(
    "div.approx.f32 d, a, b;",
    "f32",
    "f32 f32",
    [((1.0, 4.0), 0.25), ((1.0, 2.0**127), 0.0), ((-1.0, 2.0**127), -0.0)],
)
T.add("div.approx.ftz.f32 d, a, b;", "f32", "f32 f32", [((TINY, 4.0), 0)])
T.add("div.rn.f64 d, a, b;", "f64", "f64 f64", [((1.0, 3.0), 1 / 3)])
T.add("rcp.rn.f32 d, a;", "f32", "f32", [(3.0, THIRD), (-0.0, 0xFF800000)])
T.add("rcp.rp.f32 d, a;", "f32", "f32", [(3.0, up32(Fraction(1, 3)))])
T.add("rcp.approx.ftz.f32 d, a;", "f32", "f32", [(4.0, 0.25), (TINY, INF32)])
T.add("rcp.rn.f64 d, a;", "f64", "f64", [(3.0, 1 / 3)])
T.add("sqrt.rn.f32 d, a;", "f32", "f32", [(2.0, f32(math.sqrt(2))), (-1.0, NAN32)])
T.add(
    "sqrt.rz.f32 d, a;",
    "f32",
    "f32",
    [
        (
            3.0,
            f32(math.sqrt(3))
            if f32(math.sqrt(3)) ** 2 < 3
            else float(np.nextafter(np.float32(math.sqrt(3)), np.float32(0))),
        )
    ],
)
T.add("sqrt.approx.f32 d, a;", "f32", "f32", [(4.0, 2.0)])
T.add("sqrt.rn.f64 d, a;", "f64", "f64", [(2.0, math.sqrt(2))])
T.add("rsqrt.approx.f32 d, a;", "f32", "f32", [(4.0, 0.5)])
T.add("rsqrt.approx.f64 d, a;", "f64", "f64", [(16.0, 0.25)])
T.add("ex2.approx.f32 d, a;", "f32", "f32", [(3.0, 8.0), (-1.0, 0.5), (-149.0, TINY)])
T.add("ex2.approx.ftz.f32 d, a;", "f32", "f32", [(3.0, 8.0), (-149.0, 0.0)])
T.add("lg2.approx.f32 d, a;", "f32", "f32", [(8.0, 3.0), (0.0, 0xFF800000)])
T.add("sin.approx.f32 d, a;", "f32", "f32", [(0.0, 0.0), (1.0, f32(math.sin(1.0)))])
T.add("cos.approx.f32 d, a;", "f32", "f32", [(0.0, 1.0)])
T.add("tanh.approx.f32 d, a;", "f32", "f32", [(0.0, 0.0), (100.0, 1.0), (0.5, f32(math.tanh(0.5)))])
T.add(
    "min.f32 d, a, b;",
    "f32",
    "f32 f32",
    [((1.0, 2.0), 1.0), ((NAN32, 2.0), 2.0), ((0.0, -0.0), -0.0), ((NAN32, NAN32), NAN32)],
)
T.add(
    "max.f32 d, a, b;",
    "f32",
    "f32 f32",
    [((1.0, 2.0), 2.0), ((1.0, NAN32), 1.0), ((-0.0, 0.0), 0.0)],
)
T.add("min.NaN.f32 d, a, b;", "f32", "f32 f32", [((NAN32, 2.0), NAN32), ((1.0, 2.0), 1.0)])
T.add("max.NaN.f32 d, a, b;", "f32", "f32 f32", [((2.0, NAN32), NAN32)])
T.add("max.ftz.f32 d, a, b;", "f32", "f32 f32", [((TINY, 0.0), 0.0)])
T.add("min.f64 d, a, b;", "f64", "f64 f64", [((1.0, -2.0), -2.0)])
T.add("max.f32 d, a, b, c;", "f32", "f32 f32 f32", [((1.0, 5.0, 3.0), 5.0)])
T.add("neg.f32 d, a;", "f32", "f32", [(1.5, -1.5), (0.0, -0.0)])
T.add("neg.ftz.f32 d, a;", "f32", "f32", [(TINY, -0.0)])
T.add("abs.f32 d, a;", "f32", "f32", [(-1.5, 1.5), (-0.0, 0.0)])
T.add("abs.f64 d, a;", "f64", "f64", [(-1.5, 1.5)])
T.add("neg.f64 d, a;", "f64", "f64", [(1.5, -1.5)])
T.add("copysign.f32 d, a, b;", "f32", "f32 f32", [((-1.0, 3.0), -3.0), ((2.0, -3.0), 3.0)])
T.add("copysign.f64 d, a, b;", "f64", "f64 f64", [((-1.0, 3.0), -3.0)])
for test, holds in (
    ("finite", "110001"),
    ("infinite", "001000"),
    ("number", "111001"),
    ("notanumber", "000110"),
    ("normal", "100000"),
    ("subnormal", "010000"),
):
    every = [1.0, TINY, INF32, NAN32, 0xFFC00000, 0.0]
    rows = [(v, int(h)) for v, h in zip(every, holds, strict=True)]
    T.add(f"testp.{test}.f32 p, a; selp.b32 d, 1, 0, p;", "b32", "f32", rows, name=f"testp.{test}")
T.add(
    "testp.subnormal.f64 p, a; selp.b32 d, 1, 0, p;",
    "b32",
    "f64",
    [(5e-324, 1), (1.0, 0)],
    name="testp.f64",
)

# Half types: 0x3C00 is 1.0 of f16, 0x3F80 of bf16.
H = {
    v: int(np.float16(v).view(np.uint16))
    for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 3.5, -1.0, 65504.0, 2049.0)
}
T.add(
    "add.f16 d, a, b;",
    "b16",
    "b16 b16",
    [((H[1.5], H[2.0]), H[3.5]), ((0x6800, 0x3C00), 0x6800), ((0x6800, 0x4200), 0x6802)],
)
T.add("add.rn.f16 d, a, b;", "b16", "b16 b16", [((0x7BFF, 0x7BFF), 0x7C00)])
T.add("sub.f16 d, a, b;", "b16", "b16 b16", [((H[3.5], H[2.0]), H[1.5])])
T.add("mul.f16 d, a, b;", "b16", "b16 b16", [((H[1.5], H[2.0]), H[3.0])])
T.add("mul.ftz.f16 d, a, b;", "b16", "b16 b16", [((0x0400, H[0.5]), 0)])
T.add("add.sat.f16 d, a, b;", "b16", "b16 b16", [((H[1.5], H[2.0]), H[1.0]), ((0x7FFF, H[1.0]), 0)])
T.add(
    "fma.rn.f16 d, a, b, c;",
    "b16",
    "b16 b16 b16",
    [
        ((H[1.5], H[2.0], H[0.5]), H[3.5]),
        ((0x3C01, 0x3C01, 0xBC00), int(np.float16((1 + 2.0**-10) ** 2 - 1).view(np.uint16))),
    ],
)
T.add("fma.rn.relu.f16 d, a, b, c;", "b16", "b16 b16 b16", [((H[-1.0], H[2.0], H[0.5]), 0)])
T.add(
    "min.f16 d, a, b;", "b16", "b16 b16", [((H[1.5], H[2.0]), H[1.5]), ((0x7FFF, H[2.0]), H[2.0])]
)
T.add("max.NaN.f16 d, a, b;", "b16", "b16 b16", [((H[1.5], 0x7E01), 0x7FFF)])
T.add("neg.f16 d, a;", "b16", "b16", [(H[1.0], 0xBC00)])
T.add("abs.f16 d, a;", "b16", "b16", [(0xBC00, H[1.0])])
T.add(
    "add.f16x2 d, a, b;",
    "b32",
    "b32 b32",
    [((H[1.5] << 16 | H[1.0], H[2.0] << 16 | H[2.0]), H[3.5] << 16 | H[3.0])],
)
T.add(
    "mul.f16x2 d, a, b;",
    "b32",
    "b32 b32",
    [((H[1.5] << 16 | H[1.0], H[2.0] << 16 | H[2.0]), H[3.0] << 16 | H[2.0])],
)
T.add(
    "fma.rn.f16x2 d, a, b, c;",
    "b32",
    "b32 b32 b32",
    [((H[1.5] << 16 | H[1.0], H[2.0] << 16 | H[2.0], H[0.5] << 16), H[3.5] << 16 | H[2.0])],
)
T.add(
    "max.f16x2 d, a, b;",
    "b32",
    "b32 b32",
    [((H[1.5] << 16 | H[3.0], H[2.0] << 16 | H[2.0]), H[2.0] << 16 | H[3.0])],
)
T.add("neg.f16x2 d, a;", "b32", "b32", [(H[1.0], 0x8000BC00)])
T.add("ex2.approx.f16 d, a;", "b16", "b16", [(H[1.0], H[2.0])])
T.add("tanh.approx.f16x2 d, a;", "b32", "b32", [(0, 0)])
T.add(
    "add.bf16 d, a, b;", "b16", "b16 b16", [((0x3F80, 0x3F80), 0x4000), ((0x4380, 0x3F80), 0x4380)]
)
T.add("mul.bf16 d, a, b;", "b16", "b16 b16", [((0x4000, 0x4040), 0x40C0)])
T.add("fma.rn.bf16 d, a, b, c;", "b16", "b16 b16 b16", [((0x4000, 0x4040, 0x3F80), 0x40E0)])
T.add(
    "fma.rn.bf16x2 d, a, b, c;",
    "b32",
    "b32 b32 b32",
    [((0x40003F80, 0x40403F80, 0x3F80), 0x40C04000)],
)
T.add("min.bf16x2 d, a, b;", "b32", "b32 b32", [((0x3F804000, 0x40003F80), 0x3F803F80)])
T.add("abs.bf16 d, a;", "b16", "b16", [(0xBF80, 0x3F80)])
T.add("tanh.approx.bf16 d, a;", "b16", "b16", [(0x42C8, 0x3F80)])


@pytest.mark.parametrize("name", T.cases)
def test_float_instruction(name):
    T.check(name)
