"""Shuffles, votes, matches, reductions, special registers, barriers that reduce."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_cases import SCHEDULES, find, kernel, needs_compiler

from npmoe.testing import ptx

pytestmark = needs_compiler
FULL = 0xFFFFFFFF
LANES = np.arange(32)


def body(text: str) -> str:
    """Lane l reads %r3 = in[l]; %r10 and %p1 are stored."""
    return f"""
mul.wide.u32 %rd10, %r1, 4; add.s64 %rd11, %rd1, %rd10; ld.global.u32 %r3, [%rd11];
mov.u32 %r10, 0; setp.ne.u32 %p1, %r10, 0; setp.ne.u32 %p2, %r3, 0;
{text}
mul.wide.u32 %rd12, %r1, 8; add.s64 %rd12, %rd2, %rd12; selp.u32 %r11, 1, 0, %p1;
st.global.v2.u32 [%rd12], {{%r10, %r11}};
"""


def shfl(mode: str, b: int, c: int) -> list[tuple[int, int]]:
    """shfl.sync from its definition in the PTX manual, lane by lane."""
    out = []
    segment, clamp = c >> 8 & 31, c & 31
    for lane in range(32):
        most, least = (lane & segment) | (clamp & ~segment), lane & segment
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[
            mode
        ]
        valid = j >= most if mode == "up" else j <= most
        out.append((100 + (j if valid else lane), int(valid)))
    return out


VALUES = 100 + LANES
SOME = (LANES % 3).astype(np.uint32)
CASES: dict[str, tuple[str, np.ndarray, list]] = {}
for mode, b, c in (
    ("up", 1, 0),
    ("up", 3, 0x1800),
    ("down", 2, 31),
    ("down", 5, 0x181F),
    ("bfly", 16, 31),
    ("bfly", 3, 0x1C1F),
    ("idx", 5, 31),
    ("idx", 3, 0x181F),
    ("idx", 9, 0x0007),
):
    CASES[f"shfl.{mode}.{b}.{c:#x}"] = (
        f"shfl.sync.{mode}.b32 %r10|%p1, %r3, {b}, {c}, -1;",
        VALUES,
        shfl(mode, b, c),
    )
CASES |= {
    "shfl without predicate": (
        "shfl.sync.bfly.b32 %r10, %r3, 1, 31, -1;",
        VALUES,
        [(100 + (l ^ 1), 0) for l in range(32)],
    ),
    "vote.all": ("vote.sync.all.pred %p1, %p2, -1;", SOME, [(0, 0)] * 32),
    "vote.any": ("vote.sync.any.pred %p1, %p2, -1;", SOME, [(0, 1)] * 32),
    "vote.uni": ("vote.sync.uni.pred %p1, %p2, -1;", SOME, [(0, 0)] * 32),
    "vote.all holds": ("vote.sync.all.pred %p1, %p2, -1;", VALUES, [(0, 1)] * 32),
    "vote.uni holds": ("vote.sync.uni.pred %p1, !%p2, -1;", VALUES, [(0, 1)] * 32),
    "vote.ballot": (
        "vote.sync.ballot.b32 %r10, %p2, -1;",
        SOME,
        [(sum(1 << l for l in range(32) if l % 3), 0)] * 32,
    ),
    "vote.ballot negated": (
        "vote.sync.ballot.b32 %r10, !%p2, -1;",
        SOME,
        [(sum(1 << l for l in range(32) if l % 3 == 0), 0)] * 32,
    ),
    "match.any": (
        "match.any.sync.b32 %r10, %r3, -1;",
        SOME,
        [(sum(1 << k for k in range(l % 3, 32, 3)), 0) for l in range(32)],
    ),
    "match.any.b64": (
        "mov.b64 %rd5, {%r3, %r3}; match.any.sync.b64 %r10, %rd5, -1;",
        SOME,
        [(sum(1 << k for k in range(l % 3, 32, 3)), 0) for l in range(32)],
    ),
    "match.all": ("match.all.sync.b32 %r10|%p1, %r3, -1;", SOME, [(0, 0)] * 32),
    "match.all holds": ("match.all.sync.b32 %r10|%p1, 7, -1;", SOME, [(FULL, 1)] * 32),
    "redux.add": ("redux.sync.add.u32 %r10, %r3, -1;", VALUES, [(int(VALUES.sum()), 0)] * 32),
    "redux.min.s32": (
        "sub.s32 %r3, %r3, 110; redux.sync.min.s32 %r10, %r3, -1;",
        VALUES,
        [(2**32 - 10, 0)] * 32,
    ),
    "redux.max.s32": (
        "sub.s32 %r3, %r3, 110; redux.sync.max.s32 %r10, %r3, -1;",
        VALUES,
        [(21, 0)] * 32,
    ),
    "redux.min.u32": (
        "sub.s32 %r3, %r3, 110; redux.sync.min.u32 %r10, %r3, -1;",
        VALUES,
        [(0, 0)] * 32,
    ),
    "redux.max.u32": (
        "sub.s32 %r3, %r3, 110; redux.sync.max.u32 %r10, %r3, -1;",
        VALUES,
        [(FULL, 0)] * 32,
    ),
    "redux.and": (
        "redux.sync.and.b32 %r10, %r3, -1;",
        VALUES,
        [(int(np.bitwise_and.reduce(VALUES)), 0)] * 32,
    ),
    "redux.or": (
        "redux.sync.or.b32 %r10, %r3, -1;",
        VALUES,
        [(int(np.bitwise_or.reduce(VALUES)), 0)] * 32,
    ),
    "redux.xor": (
        "redux.sync.xor.b32 %r10, %r3, -1;",
        VALUES,
        [(int(np.bitwise_xor.reduce(VALUES)), 0)] * 32,
    ),
    "elect": ("elect.sync %r10|%p1, -1;", VALUES, [(0, int(l == 0)) for l in range(32)]),
    "activemask": ("activemask.b32 %r10;", VALUES, [(1 << l, 0) for l in range(32)]),
    "bar.red.popc": ("bar.red.popc.u32 %r10, 0, %p2;", SOME, [(21, 0)] * 32),
    "bar.red.and": ("bar.red.and.pred %p1, 0, %p2;", SOME, [(0, 0)] * 32),
    "bar.red.or": ("bar.red.or.pred %p1, 0, !%p2;", SOME, [(0, 1)] * 32),
    "barrier.cta.red": ("barrier.cta.red.popc.aligned.u32 %r10, 1, 32, %p2;", SOME, [(21, 0)] * 32),
    "laneid": ("mov.u32 %r10, %laneid;", VALUES, [(l, 0) for l in range(32)]),
    "lanemask_lt": ("mov.u32 %r10, %lanemask_lt;", VALUES, [((1 << l) - 1, 0) for l in range(32)]),
    "lanemask_le": ("mov.u32 %r10, %lanemask_le;", VALUES, [((2 << l) - 1, 0) for l in range(32)]),
    "lanemask_eq": ("mov.u32 %r10, %lanemask_eq;", VALUES, [(1 << l, 0) for l in range(32)]),
    "lanemask_gt": (
        "mov.u32 %r10, %lanemask_gt;",
        VALUES,
        [(FULL & ~((2 << l) - 1), 0) for l in range(32)],
    ),
    "lanemask_ge": (
        "mov.u32 %r10, %lanemask_ge;",
        VALUES,
        [(FULL & ~((1 << l) - 1), 0) for l in range(32)],
    ),
    "warpid": ("mov.u32 %r10, %warpid;", VALUES, [(0, 0)] * 32),
    "clock": (
        "mov.u32 %r4, %clock; mov.u64 %rd5, %clock64; cvt.u32.u64 %r5, %rd5; "
        "setp.lt.u32 %p1, %r4, %r5;",
        VALUES,
        [(0, 1)] * 32,
    ),
}


@pytest.fixture(scope="module")
def module():
    text = ""
    for k, (code, _, _) in enumerate(CASES.values()):
        one = kernel(body(code), ".u64 p0, .u64 p1", name=f"k{k}")
        text += one if not text else one[one.index(".visible") :]
    return ptx.load(text)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_warp_instruction(module, name, schedule):
    _, given, expected = CASES[name]
    out = np.zeros((32, 2), np.uint32)
    number = list(CASES).index(name)
    module.launch(f"k{number}", 1, 32, [given.astype(np.uint32), out], schedule=schedule)
    assert [tuple(map(int, row)) for row in out] == expected


def test_special_registers_of_geometry():
    names = [f"%{kind}.{axis}" for kind in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
    stores = "\n".join(
        f"mov.u32 %r5, {n}; st.global.u32 [%rd3+{4 * k}], %r5;" for k, n in enumerate(names)
    )
    text = kernel(
        f"""
mov.u32 %r10, %tid.y; mov.u32 %r11, %tid.z; mov.u32 %r12, %ctaid.y; mov.u32 %r13, %ctaid.z;
mad.lo.u32 %r4, %r11, 3, %r10; mad.lo.u32 %r4, %r4, 2, %r1;
mad.lo.u32 %r6, %r13, 2, %r12; mad.lo.u32 %r6, %r6, 3, %r2; mad.lo.u32 %r4, %r6, 24, %r4;
mul.wide.u32 %rd3, %r4, 48; add.s64 %rd3, %rd1, %rd3;
{stores}"""
    )
    out = np.full((2, 2, 3, 4, 3, 2, 12), 77, np.uint32)
    ptx.launch(text, "k", (3, 2, 2), (2, 3, 4), [out])
    for at in np.ndindex(out.shape[:6]):
        bz, by, bx, z, y, x = at
        assert list(out[at]) == [x, y, z, 2, 3, 4, bx, by, bz, 3, 2, 2]


def test_special_register_of_dynamic_shared_memory():
    text = kernel("mov.u32 %r5, %dynamic_smem_size; st.global.u32 [%rd1], %r5;")
    out = np.zeros(1, np.uint32)
    ptx.launch(text, "k", 1, 1, [out], shared_mem=48)
    assert out[0] == 48


def test_lanes_that_have_exited_are_excused():
    text = kernel(
        """
setp.ge.u32 %p1, %r1, 16; @%p1 ret;
shfl.sync.idx.b32 %r10, %r1, 3, 31, -1;
mul.wide.u32 %rd5, %r1, 4; add.s64 %rd5, %rd1, %rd5; st.global.u32 [%rd5], %r10;"""
    )
    for schedule in SCHEDULES:
        out = np.zeros(32, np.uint32)
        ptx.launch(text, "k", 1, 32, [out], schedule=schedule)
        assert list(out) == [3] * 16 + [0] * 16


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_shuffle_from_a_lane_outside_the_mask(schedule):
    code = """
setp.ge.u32 %p1, %r1, 16; @%p1 bra DONE;
shfl.sync.down.b32 %r10, %r1, 8, {clamp}, 0xFFFF;
DONE:"""
    found = find(kernel(code.format(clamp=31)), 1, 32, [None], "warp-divergence", schedule=schedule)
    assert "does not take part" in str(found)
    ptx.launch(kernel(code.format(clamp=0x100F)), "k", 1, 32, [None], schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_lane_of_the_mask_that_never_comes(schedule):
    code = """
setp.ge.u32 %p1, %r1, 16; @%p1 bra OTHER;
shfl.sync.idx.b32 %r10, %r1, 3, 31, {mask};
bra.uni DONE;
OTHER: bar.warp.sync 0xFFFF0000;
DONE: {end}"""
    found = find(
        kernel(code.format(mask=-1, end="bar.warp.sync -1;")),
        1,
        32,
        [None],
        "warp-divergence",
        schedule=schedule,
    )
    assert "16 threads" in str(found)
    assert "membermask 0xffffffff" in str(found)
    ptx.launch(
        kernel(code.format(mask=0xFFFF, end="bar.warp.sync -1;")),
        "k",
        1,
        32,
        [None],
        schedule=schedule,
    )


def test_a_mask_without_the_thread_itself():
    found = find(kernel("bar.warp.sync 1;"), 1, 32, [None], "warp-divergence", schedule="reversed")
    assert "does not name the thread itself (lane 31)" in str(found)
