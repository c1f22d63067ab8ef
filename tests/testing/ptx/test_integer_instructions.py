"""Integer instructions against values computed by hand."""

from __future__ import annotations

import pytest
from ptx_cases import Table, needs_compiler

pytestmark = needs_compiler
T = Table()
M = 1 << 32
HIGH = 0x80000000

T.add("add.s32 d, a, b;", "b32", "b32 b32", [((1, 2), 3), ((0x7FFFFFFF, 1), HIGH), ((-1, 1), 0)])
T.add("add.u16 d, a, b;", "b16", "b16 b16", [((65535, 2), 1)])
T.add("add.s64 d, a, b;", "b64", "b64 b64", [((2**63 - 1, 1), 2**63), ((-5, 3), -2)])
T.add(
    "add.sat.s32 d, a, b;",
    "b32",
    "b32 b32",
    [((0x7FFFFFFF, 1), 0x7FFFFFFF), ((-(2**31), -1), -(2**31)), ((3, 4), 7)],
)
T.add("sub.s32 d, a, b;", "b32", "b32 b32", [((1, 2), -1), ((HIGH, 1), 0x7FFFFFFF)])
T.add("sub.sat.s32 d, a, b;", "b32", "b32 b32", [((-(2**31), 1), -(2**31)), ((5, 3), 2)])
T.add("sub.u64 d, a, b;", "b64", "b64 b64", [((0, 1), 2**64 - 1)])
T.add("sub.u32 d, a, 5;", "b32", "b32", [(7, 2)])
T.add("mul.lo.s32 d, a, b;", "b32", "b32 b32", [((-3, 7), -21), ((0x10001, 0x10001), 0x20001)])
T.add("mul.lo.u16 d, a, b;", "b16", "b16 b16", [((65535, 65535), 1)])
T.add(
    "mul.lo.u64 d, a, b;", "b64", "b64 b64", [((2**33, 2**32), 0), ((2**33 + 1, 3), 3 * 2**33 + 3)]
)
T.add("mul.hi.u32 d, a, b;", "b32", "b32 b32", [((M - 1, M - 1), M - 2), ((HIGH, 2), 1)])
T.add("mul.hi.s32 d, a, b;", "b32", "b32 b32", [((-1, 1), -1), ((HIGH, HIGH), 0x40000000)])
T.add("mul.hi.u64 d, a, b;", "b64", "b64 b64", [((2**63, 4), 2)])
T.add("mul.hi.s64 d, a, b;", "b64", "b64 b64", [((-1, 1), -1)])
T.add("mul.hi.u16 d, a, b;", "b16", "b16 b16", [((0x8000, 4), 2)])
T.add("mul.wide.s32 d, a, b;", "b64", "b32 b32", [((-1, 4), -4), ((2**30, 8), 2**33)])
T.add("mul.wide.u32 d, a, b;", "b64", "b32 b32", [((-1, 4), 4 * (M - 1))])
T.add("mul.wide.s16 d, a, b;", "b32", "b16 b16", [((-2, 300), -600)])
T.add("mul.wide.u16 d, a, b;", "b32", "b16 b16", [((65535, 65535), 65535**2)])
T.add("mad.lo.s32 d, a, b, c;", "b32", "b32 b32 b32", [((3, -4, 5), -7)])
T.add("mad.lo.u64 d, a, b, c;", "b64", "b64 b64 b64", [((3, 2**40, 5), 3 * 2**40 + 5)])
T.add("mad.lo.u16 d, a, b, c;", "b16", "b16 b16 b16", [((300, 300, 1), 90001 % 65536)])
T.add("mad.hi.u32 d, a, b, c;", "b32", "b32 b32 b32", [((HIGH, 6, 10), 13)])
T.add("mad.hi.sat.s32 d, a, b, c;", "b32", "b32 b32 b32", [((HIGH, HIGH, 0x7FFFFFFF), 0x7FFFFFFF)])
T.add("mad.wide.u32 d, a, b, c;", "b64", "b32 b32 b64", [((-1, 2, 3), 2 * (M - 1) + 3)])
T.add("mad.wide.s32 d, a, b, c;", "b64", "b32 b32 b64", [((-1, 2, 3), 1)])
T.add("mad.wide.s16 d, a, b, c;", "b32", "b16 b16 b32", [((-3, 4, 2), -10)])
T.add("mul24.lo.u32 d, a, b;", "b32", "b32 b32", [((0x1000003, 5), 15)])
T.add("mad24.lo.u32 d, a, b, c;", "b32", "b32 b32 b32", [((0x1000003, 5, 2), 17)])
T.add("div.s32 d, a, b;", "b32", "b32 b32", [((-7, 2), -3), ((7, -2), -3), ((HIGH, -1), HIGH)])
T.add("div.u32 d, a, b;", "b32", "b32 b32", [((-7, 2), (M - 7) // 2)])
T.add("div.s64 d, a, b;", "b64", "b64 b64", [((-7, 2), -3)])
T.add("div.u16 d, a, b;", "b16", "b16 b16", [((65535, 256), 255)])
T.add("rem.s32 d, a, b;", "b32", "b32 b32", [((-7, 2), -1), ((7, -2), 1), ((HIGH, -1), 0)])
T.add("rem.u64 d, a, b;", "b64", "b64 b64", [((2**40 + 3, 2**40), 3)])
T.add("shl.b32 d, a, b;", "b32", "b32 b32", [((1, 31), HIGH), ((1, 32), 0), ((3, 0), 3)])
T.add("shl.b64 d, a, b;", "b64", "b64 b32", [((1, 63), 2**63), ((1, 64), 0)])
T.add("shl.b16 d, a, b;", "b16", "b16 b32", [((0xFFFF, 8), 0xFF00), ((1, 16), 0)])
T.add("shr.u32 d, a, b;", "b32", "b32 b32", [((HIGH, 31), 1), ((HIGH, 40), 0)])
T.add(
    "shr.s32 d, a, b;",
    "b32",
    "b32 b32",
    [((HIGH, 31), -1), ((HIGH, 40), -1), ((16, 2), 4), ((16, 99), 0)],
)
T.add("shr.s64 d, a, b;", "b64", "b64 b32", [((-16, 2), -4), ((-1, 70), -1)])
T.add("shr.s16 d, a, b;", "b16", "b16 b32", [((-16, 2), -4)])
T.add("shr.b64 d, a, b;", "b64", "b64 b32", [((-1, 60), 15)])
T.add(
    "shf.l.wrap.b32 d, a, b, c;",
    "b32",
    "b32 b32 b32",
    [((HIGH, 1, 1), 3), ((5, 9, 32), 9), ((5, 9, 33), 18)],
)
T.add("shf.r.wrap.b32 d, a, b, c;", "b32", "b32 b32 b32", [((2, 1, 1), HIGH | 1), ((5, 9, 32), 5)])
T.add(
    "shf.l.clamp.b32 d, a, b, c;",
    "b32",
    "b32 b32 b32",
    [((5, 9, 32), 5), ((5, 9, 99), 5), ((HIGH, 1, 1), 3)],
)
T.add("shf.r.clamp.b32 d, a, b, c;", "b32", "b32 b32 b32", [((5, 9, 32), 9), ((5, 9, 40), 9)])
T.add("and.b32 d, a, b;", "b32", "b32 b32", [((0xF0F0, 0xFF00), 0xF000)])
T.add("or.b64 d, a, b;", "b64", "b64 b64", [((2**40, 1), 2**40 + 1)])
T.add("xor.b16 d, a, b;", "b16", "b16 b16", [((0xFFFF, 0x00FF), 0xFF00)])
T.add("not.b32 d, a;", "b32", "b32", [(0, -1)])
T.add("not.b64 d, a;", "b64", "b64", [(1, -2)])
T.add("cnot.b32 d, a;", "b32", "b32", [(0, 1), (7, 0)])
T.add("neg.s32 d, a;", "b32", "b32", [(5, -5), (HIGH, HIGH)])
T.add("neg.s64 d, a;", "b64", "b64", [(5, -5)])
T.add("abs.s32 d, a;", "b32", "b32", [(-5, 5), (5, 5), (HIGH, HIGH)])
T.add("abs.s64 d, a;", "b64", "b64", [(-(2**40), 2**40)])
T.add("min.s32 d, a, b;", "b32", "b32 b32", [((-1, 1), -1)])
T.add("min.u32 d, a, b;", "b32", "b32 b32", [((-1, 1), 1)])
T.add("max.s64 d, a, b;", "b64", "b64 b64", [((-1, 1), 1)])
T.add("max.u16 d, a, b;", "b16", "b16 b16", [((0xFFFF, 1), 0xFFFF)])
T.add("max.s16 d, a, b;", "b16", "b16 b16", [((0xFFFF, 1), 1)])
T.add("popc.b32 d, a;", "b32", "b32", [(0xF0F0, 8), (0, 0), (-1, 32)])
T.add("popc.b64 d, a;", "b32", "b64", [(-1, 64)])
T.add("clz.b32 d, a;", "b32", "b32", [(1, 31), (0, 32), (HIGH, 0)])
T.add("clz.b64 d, a;", "b32", "b64", [(1, 63), (0, 64)])
T.add("brev.b32 d, a;", "b32", "b32", [(1, HIGH), (0x12345678, 0x1E6A2C48)])
T.add("brev.b64 d, a;", "b64", "b64", [(1, 2**63)])
T.add("bfind.u32 d, a;", "b32", "b32", [(1, 0), (0, -1), (HIGH, 31)])
T.add("bfind.s32 d, a;", "b32", "b32", [(-1, -1), (-2, 0), (HIGH, 30)])
T.add("bfind.shiftamt.u32 d, a;", "b32", "b32", [(1, 31), (0, -1)])
T.add("bfind.u64 d, a;", "b32", "b64", [(2**40, 40)])
T.add(
    "bfe.u32 d, a, b, c;",
    "b32",
    "b32 b32 b32",
    [((0x12345678, 8, 8), 0x56), ((0xFF, 4, 0), 0), ((0xF0000000, 28, 16), 0xF)],
)
T.add(
    "bfe.s32 d, a, b, c;",
    "b32",
    "b32 b32 b32",
    [((0x80, 4, 4), -8), ((0x70, 4, 4), 7), ((HIGH, 31, 5), -1)],
)
T.add("bfe.u64 d, a, b, c;", "b64", "b64 b32 b32", [((2**40 * 5, 40, 4), 5)])
T.add(
    "bfi.b32 d, a, b, c, x;",
    "b32",
    "b32 b32 b32 b32",
    [((0xAB, -1, 8, 8), 0xFFFFABFF), ((1, 2, 40, 4), 2), ((1, 2, 3, 0), 2)],
)
T.add("bfi.b64 d, a, b, c, x;", "b64", "b64 b64 b32 b32", [((3, 0, 40, 2), 3 * 2**40)])
T.add("bmsk.clamp.b32 d, a, b;", "b32", "b32 b32", [((4, 8), 0xFF0), ((0, 40), -1)])
T.add(
    "szext.clamp.s32 d, a, b;", "b32", "b32 b32", [((0xFF, 8), -1), ((0x7F, 8), 127), ((5, 40), 5)]
)
T.add("szext.wrap.u32 d, a, b;", "b32", "b32 b32", [((0xFFF, 36), 0xF)])
T.add("sad.s32 d, a, b, c;", "b32", "b32 b32 b32", [((3, 10, 100), 107), ((-3, 4, 0), 7)])
T.add("sad.u32 d, a, b, c;", "b32", "b32 b32 b32", [((-1, 0, 1), 0)])
T.add(
    "lop3.b32 d, a, b, c, 0x96;", "b32", "b32 b32 b32", [((0xF0, 0xCC, 0xAA), 0xF0 ^ 0xCC ^ 0xAA)]
)
T.add(
    "lop3.b32 d, a, b, c, 0xEA;", "b32", "b32 b32 b32", [((0xF0, 0xCC, 0xAA), (0xF0 & 0xCC) | 0xAA)]
)
T.add("lop3.b32 d, a, b, c, 0x1B;", "b32", "b32 b32 b32", [((0, 0, 0), -1), ((-1, -1, 0), 0)])
T.add("prmt.b32 d, a, b, 0x5410;", "b32", "b32 b32", [((0x33221100, 0x77665544), 0x55441100)])
T.add(
    "prmt.b32 d, a, b, c;", "b32", "b32 b32 b32", [((0x33221180, 0x77665544, 0x7608), 0x776680FF)]
)
T.add(
    "prmt.b32.rc16 d, a, b, c;",
    "b32",
    "b32 b32 b32",
    [((0x33221100, 0, 1), 0x33223322), ((0x33221100, 0, 0), 0x11001100)],
)
T.add("prmt.b32.f4e d, a, b, c;", "b32", "b32 b32 b32", [((0x33221100, 0x77665544, 1), 0x44332211)])
T.add("prmt.b32.b4e d, a, b, c;", "b32", "b32 b32 b32", [((0x33221100, 0x77665544, 0), 0x55667700)])
T.add("prmt.b32.rc8 d, a, b, c;", "b32", "b32 b32 b32", [((0x33221100, 0, 2), 0x22222222)])
T.add("prmt.b32.ecl d, a, b, c;", "b32", "b32 b32 b32", [((0x33221100, 0, 1), 0x33221111)])
T.add("prmt.b32.ecr d, a, b, c;", "b32", "b32 b32 b32", [((0x33221100, 0, 2), 0x22221100)])
T.add("dp4a.s32.s32 d, a, b, c;", "b32", "b32 b32 b32", [((0x01FF0203, 0x01010101, 10), 15)])
T.add("dp4a.u32.u32 d, a, b, c;", "b32", "b32 b32 b32", [((0x000000FF, 0x00000002, 1), 511)])
T.add("dp4a.u32.s32 d, a, b, c;", "b32", "b32 b32 b32", [((0x000000FF, 0x000000FF, 0), -255)])
T.add(
    "add.cc.u32 d, a, b; addc.u32 e, a, 0;",
    "b32 b32",
    "b32 b32",
    [((-1, 1), (0, M)), ((1, 1), (2, 1))],
)
T.add(
    "sub.cc.u32 d, a, b; subc.u32 e, a, 0;",
    "b32 b32",
    "b32 b32",
    [((0, 1), (-1, -1)), ((5, 3), (2, 5))],
)
T.add(
    "mad.lo.cc.u32 d, a, b, c; madc.hi.u32 e, a, b, 0;",
    "b32 b32",
    "b32 b32 b32",
    [((-1, -1, -1), (0, M - 1))],
)
T.add("add.cc.u64 d, a, b; addc.u64 e, a, 0;", "b64 b64", "b64 b64", [((-1, 2), (1, 0))])
T.add("mov.b32 d, a; and.b32 d, d, 0x0F;", "b32", "b32", [(0xFF, 15)], name="mov and immediate")
T.add(
    "setp.ne.u32 p, a, 0; not.pred q, p; selp.u32 d, 1, 2, q;",
    "b32",
    "b32",
    [(0, 1), (5, 2)],
    name="not.pred",
)
T.add(
    "setp.ne.u32 p, a, 0; setp.ne.u32 q, b, 0; and.pred p, p, q; selp.u32 d, 1, 0, p;",
    "b32", "b32 b32", [((0, 1), 0), ((5, 1), 1)], name="and.pred",
)  # fmt: skip
T.add(
    "setp.ne.u32 p, a, 0; setp.ne.u32 q, b, 0; xor.pred p, p, q; selp.u32 d, 1, 0, p;",
    "b32", "b32 b32", [((0, 1), 1), ((5, 1), 0)], name="xor.pred",
)  # fmt: skip
T.add(
    "setp.ne.u32 p, a, 0; setp.ne.u32 q, b, 0; or.pred p, p, q; selp.u32 d, 1, 0, p;",
    "b32", "b32 b32", [((0, 1), 1), ((0, 0), 0)], name="or.pred",
)  # fmt: skip


@pytest.mark.parametrize("name", T.cases)
def test_integer_instruction(name):
    T.check(name)
