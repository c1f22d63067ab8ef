"""Loads and stores of every kind, variables, atomics, branches and calls: exact results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ptx_cases import HEADER, SCHEDULES, Batch, find, kernel, needs_compiler, run

from npmoe.testing import ptx
from npmoe.testing.ptx.families import HANDLERS

pytestmark = needs_compiler
# name -> (body, declarations in the kernel, those of the module, input words, expected words)
CASES: dict[str, tuple[str, str, str, list[int], list[int]]] = {
    "ld and st of bytes extend": (
        "ld.global.u8 %r3, [%rd1]; ld.global.s8 %r4, [%rd1]; st.global.u32 [%rd2], %r3; "
        "st.global.u32 [%rd2+4], %r4; st.global.u8 [%rd2+8], %r4;",
        "", "", [0x123456FE], [0xFE, 0xFFFFFFFE, 0xFE],
    ),
    "ld of halves extends": (
        "ld.global.s16 %r3, [%rd1]; ld.global.u16 %r4, [%rd1]; st.global.v2.b32 [%rd2], {%r3, "
        "%r4};",
        "", "", [0xFFFE], [0xFFFFFFFE, 0xFFFE],
    ),
    "vectors": (
        "ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%rd1]; st.global.v4.u32 [%rd2], {%r6, %r5, %r4, "
        "%r3};",
        "", "", [1, 2, 3, 4], [4, 3, 2, 1],
    ),
    "vectors of halves and doubles": (
        "ld.global.v2.u16 {%h1, %h2}, [%rd1]; ld.global.v2.b64 {%rd5, %rd6}, [%rd1]; "
        "st.global.v2.u16 [%rd2], {%h2, %h1}; st.global.u64 [%rd2+8], %rd6;",
        "", "", [0x00020001, 0, 7, 8], [0x00010002, 0, 7, 8],
    ),
    "32 bytes at once": (
        "ld.global.v4.u64 {%rd5, %rd6, %rd7, %rd8}, [%rd1]; "
        "ld.global.v8.b32 {%r3, %r4, %r5, %r6, %r7, %r8, %r9, %r10}, [%rd1]; "
        "st.global.v4.u64 [%rd2], {%rd8, %rd7, %rd6, %rd5}; st.global.u32 [%rd2+4], %r10;",
        "",
        "",
        [1, 2, 3, 4, 5, 6, 7, 8],
        [7, 8, 5, 6, 3, 4, 1, 2],
    ),
    "128 bits in a register": (
        "ld.global.v2.u64 {%rd5, %rd6}, [%rd1]; mov.b128 q, {%rd5, %rd6}; "
        "mov.b128 {%rd7, %rd8}, q; st.global.v2.u64 [%rd2], {%rd8, %rd7};",
        ".reg .b128 q;",
        "",
        [1, 2, 3, 4],
        [3, 4, 1, 2],
    ),
    "caches and qualifiers": (
        "ld.global.nc.u32 %r3, [%rd1]; ld.global.ca.u32 %r4, [%rd1]; "
        "ld.global.cg.L2::128B.u32 %r5, [%rd1]; "
        "ld.global.nc.L1::no_allocate.u32 %r6, [%rd1]; ld.volatile.global.u32 %r7, [%rd1]; "
        "ld.relaxed.gpu.global.u32 %r8, [%rd1]; "
        "ld.acquire.sys.global.u32 %r9, [%rd1]; add.u32 %r3, %r3, %r4; add.u32 %r3, %r3, %r5; "
        "add.u32 %r3, %r3, %r6; add.u32 %r3, %r3, %r7; "
        "add.u32 %r3, %r3, %r8; add.u32 %r3, %r3, %r9; st.global.wt.u32 [%rd2], %r3; "
        "st.release.gpu.global.u32 [%rd2+4], %r3; "
        "st.volatile.global.u32 [%rd2+8], %r3; prefetch.global.L2 [%rd1];",
        "", "", [5], [35, 35, 35],
    ),
    "shared, generic and cvta": (
        "mov.u32 %r3, s; ld.global.u32 %r4, [%rd1]; st.shared.u32 [%r3+4], %r4; cvt.u64.u32 %rd5, "
        "%r3; cvta.shared.u64 %rd6, %rd5; ld.u32 %r5, [%rd6+4]; "
        "isspacep.shared %p1, %rd6; isspacep.global %p2, %rd6; selp.u32 %r6, 1, 0, %p1; "
        "selp.u32 %r7, 1, 0, %p2; cvta.to.shared.u64 %rd7, %rd6; "
        "ld.shared.u32 %r8, [%rd7+4]; isspacep.global %p2, %rd1; selp.u32 %r9, 1, 0, %p2; "
        "st.global.v4.u32 [%rd2], {%r5, %r6, %r7, %r8}; st.u32 [%rd2+16], %r9;",
        ".shared .align 4 .b8 s[16];", "", [42], [42, 1, 0, 42, 1],
    ),
    "local memory through its window": (
        "mov.u64 %SPL, depot; cvta.local.u64 %SP, %SPL; ld.global.u32 %r3, [%rd1]; "
        "st.u32 [%SP+8], %r3; add.u64 %rd5, %SP, 8; cvta.to.local.u64 %rd6, %rd5; "
        "ld.local.u32 %r4, [%rd6]; isspacep.local %p1, %rd5; selp.u32 %r5, 1, 0, %p1; "
        "st.global.v2.u32 [%rd2], {%r4, %r5};",
        ".local .align 8 .b8 depot[16]; .reg .b64 %SP; .reg .b64 %SPL;", "", [9], [9, 1],
    ),
    "global variables": (
        "ld.global.u32 %r3, [table+4]; mov.u64 %rd5, table; ld.global.u16 %r4, [%rd5+8]; "
        "ld.global.u8 %r5, [bytes+2]; ld.global.u32 %r6, [zero]; ld.global.f32 %f1, [pi]; "
        "st.global.v4.u32 [%rd2], {%r3, %r4, %r5, %r6}; st.global.f32 [%rd2+16], %f1;",
        "", ".global .align 4 .u32 table[3] = {1, 0x22, 0x30003}; "
            ".global .align 1 .b8 bytes[4] = {1, 2, 3}; .global .u32 zero; "
            ".global .f32 pi = 0f40490FDB;",
        [], [0x22, 3, 3, 0, 0x40490FDB],
    ),
    "constants": (
        "ld.const.u32 %r3, [c+4]; mov.u64 %rd5, c; cvta.const.u64 %rd6, %rd5; ld.u32 %r4, [%rd6]; "
        "ld.const.v2.u32 {%r5, %r6}, [c]; st.global.v4.u32 [%rd2], {%r3, %r4, %r5, %r6};",
        "", ".const .align 8 .u32 c[2] = {7, 8};", [], [8, 7, 7, 8],
    ),
    "a global variable can be written": (
        "st.global.u32 [g], 5; ld.global.u32 %r3, [g]; add.u32 %r3, %r3, 1; st.global.u32 [g], "
        "%r3; ld.global.u32 %r4, [g]; st.global.u32 [%rd2], %r4;",
        "", ".global .u32 g = 1;", [], [6],
    ),
    "branches, guards and loops": (
        "mov.u32 %r3, 0; mov.u32 %r4, 0; LOOP: add.u32 %r3, %r3, %r4; add.u32 %r4, %r4, 1; "
        "setp.lt.u32 %p1, %r4, 10; @%p1 bra LOOP; bra.uni END; mov.u32 %r3, 99; END: "
        "st.global.u32 [%rd2], %r3;",
        "", "", [], [45],
    ),
    "brx.idx": (
        "ld.global.u32 %r3, [%rd1]; mov.u32 %r4, 0; T: .branchtargets A, B, C; brx.idx %r3, T; A: "
        "mov.u32 %r4, 1; bra E; B: mov.u32 %r4, 2; bra E; C: mov.u32 %r4, 3; E: "
        "st.global.u32 [%rd2], %r4;",
        "", "", [2], [3],
    ),
    "scopes hide names": (
        "mov.u32 %r3, 1; { .reg .b32 t; .reg .b32 %r3; mov.u32 %r3, 7; mov.u32 t, %r3; "
        "{ .reg .b32 t; mov.u32 t, 9; st.global.u32 [%rd2+8], t; } st.global.u32 [%rd2+4], t; "
        "} st.global.u32 [%rd2], %r3;",
        "", "", [], [1, 7, 9],
    ),
    "labels in scopes": (
        "mov.u32 %r3, 0; { L: add.u32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, 3; @%p1 bra L; } { L: "
        "add.u32 %r3, %r3, 10; setp.lt.u32 %p1, %r3, 40; @%p1 bra L; } st.global.u32 [%rd2], %r3;",
        "", "", [], [43],
    ),
    "exit": ("st.global.u32 [%rd2], 1; exit; st.global.u32 [%rd2], 2;", "", "", [], [1]),
    "parameters by address": (
        "mov.b64 %rd5, p0; ld.param.u64 %rd6, [%rd5+8]; st.global.u32 [%rd6], 3;", "", "", [], [3],
    ),
    "nothing to see": (
        "nanosleep.u32 20; pmevent 1; prefetchu.L1 [%rd1]; setmaxnreg.dec.sync.aligned.u32 40; "
        "ldu.global.u32 %r3, [%rd1]; st.global.u32 [%rd2], %r3; membar.sys; fence.sc.cta;",
        "", "", [1], [1],
    ),
}  # fmt: skip

ADD_ONE = """
.func (.param .b32 out) add_one(.param .b32 x)
{ .reg .b32 %r<4>; ld.param.u32 %r1, [x]; add.u32 %r2, %r1, 1; st.param.b32 [out], %r2; ret; }
.func (.param .b32 out) add_two(.param .b32 x)
{ .reg .b32 %r<4>; .param .b32 a; .param .b32 b; ld.param.u32 %r1, [x]; st.param.b32 [a], %r1;
call.uni (b), add_one, (a); ld.param.u32 %r2, [b]; st.param.b32 [a], %r2;
call.uni (b), add_one, (a); ld.param.b32 %r3, [b];
st.param.b32 [out], %r3; ret; }
.func store(.param .b64 to, .param .b32 x) { .reg .b32 %r<3>; .reg .b64 %rd<3>; .reg .pred %p<2>;
ld.param.u64 %rd1, [to]; ld.param.u32 %r1, [x]; setp.eq.u32 %p1, %r1, 0; @%p1 ret;
bar.warp.sync 1; st.u32 [%rd1], %r1; ret; }
"""
CALL = """{ .param .b32 a; .param .b32 r; st.param.b32 [a], %r3; call.uni (r), NAME, (a);
ld.param.b32 %r4, [r]; }"""
CASES["calls"] = (
    "mov.u32 %r3, 5; "
    + CALL.replace("NAME", "add_one")
    + " st.global.u32 [%rd2], %r4; "
    + CALL.replace("NAME", "add_two")
    + " st.global.u32 [%rd2+4], %r4;",
    "",
    ADD_ONE,
    [],
    [6, 7],
)
CASES["calls without result, that wait inside"] = (
    "mov.u32 %r3, 0; call store, (%rd2, %r3); mov.u32 %r3, 8; call store, (%rd2, "
    "%r3);", "", ADD_ONE, [], [8],
)  # fmt: skip


def text_of(name: str) -> str:
    body, inside, outside, _, _ = CASES[name]
    text = kernel(body, ".u64 p0, .u64 p1", inside)
    return text.replace("\n.visible", f"\n{outside}\n.visible")


BATCH = Batch(text_of(name) for name in CASES if CASES[name][2] != ADD_ONE)


@pytest.mark.parametrize("name", CASES)
def test_data_or_control(name):
    _, _, _, given, expected = CASES[name]
    out = np.zeros(8, np.uint32)
    args = [np.array(given or [0], np.uint32), out]
    launch = run if CASES[name][2] == ADD_ONE else BATCH.run  # functions have one name each
    launch(text_of(name), 1, 1, args, schedule=3)
    assert list(out[: len(expected)]) == expected


def atomic(operation: str, kind: str, register: str, extra: str = "") -> str:
    third = f", {register}3" if extra else ""
    return kernel(
        f"""mul.wide.u32 %rd5, %r1, 8; add.s64 %rd6, %rd1, %rd5;
        ld.global.b{kind} {register}2, [%rd6]; {extra}
        atom.global.{operation} {register}1, [%rd2], {register}2{third};
        add.s64 %rd7, %rd3, %rd5; st.global.b{kind} [%rd7], {register}1;""",
        ".u64 p0, .u64 p1, .u64 p2",
        ".reg .b32 a<4>; .reg .b64 b<4>; .reg .b16 c<4>;",
    )


def bits(value: Any, dtype: str) -> int:
    return int(np.array(value, dtype).view(f"u{np.dtype(dtype).itemsize}"))


# operation, width, register, first value, operands, the last value
ATOMICS = [
    ("add.u32", 32, "a", 5, [1, 2, 3], 11),
    ("add.s32", 32, "a", 5, [-1, -2, 3], 5),
    ("add.u64", 64, "b", 2**40, [1, 2], 2**40 + 3),
    ("add.f32", 32, "a", bits(1.5, "f4"), [bits(0.25, "f4"), bits(2.0, "f4")], bits(3.75, "f4")),
    ("add.f64", 64, "b", bits(1.5, "f8"), [bits(0.25, "f8")], bits(1.75, "f8")),
    ("add.noftz.f16x2", 32, "a", 0x3C003C00, [0x3C004000], 0x40004200),
    ("add.noftz.bf16x2", 32, "a", 0x3F803F80, [0x3F804000], 0x40004040),
    ("add.noftz.f16", 16, "c", 0x3C00, [0x4000], 0x4200),
    ("min.s32", 32, "a", 5, [-1, 7], 2**32 - 1),
    ("min.u32", 32, "a", 5, [-1, 7], 5),
    ("max.s32", 32, "a", 5, [-1, 7], 7),
    ("max.u32", 32, "a", 5, [-1, 7], 2**32 - 1),
    ("max.s64", 64, "b", 5, [-1, 7], 7),
    ("min.u64", 64, "b", 5, [-1, 4], 4),
    ("and.b32", 32, "a", 0xFF, [0xF0, 0x3C], 0x30),
    ("or.b32", 32, "a", 1, [2, 4], 7),
    ("xor.b64", 64, "b", 1, [3, 2**40], 2**40 + 2),
    ("exch.b32", 32, "a", 1, [9], 9),
    ("inc.u32", 32, "a", 2, [3, 3, 3], 1),
    ("dec.u32", 32, "a", 1, [3, 3, 3], 2),
]


@pytest.mark.parametrize(("operation", "width", "register", "first", "operands", "last"), ATOMICS)
def test_atomic(operation, width, register, first, operands, last):
    given = np.zeros((len(operands), 8), np.uint8)
    for t, value in enumerate(operands):
        given[t] = np.frombuffer((value % 2**64).to_bytes(8, "little"), np.uint8)
    cell = np.array([first % 2**width], f"u{width // 8}")
    old = np.zeros(len(operands), np.uint64)
    run(atomic(operation, str(width), register), 1, len(operands), [given, cell, old])
    assert int(cell[0]) == last
    assert int(old[0]) == first % 2**width


def test_compare_and_swap():
    for start, end in ((0, 77), (5, 5)):
        cell, old = np.array([start], np.uint32), np.zeros(1, np.uint64)
        run(
            atomic("cas.b32", "32", "a", "mov.u32 a3, 77;"),
            1,
            1,
            [np.zeros(1, np.uint64), cell, old],
        )
        assert (int(cell[0]), int(old[0])) == (end, start)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shared_and_reduced_atomics_in_every_order(schedule):
    text = kernel(
        """mov.u32 %r4, s; setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [%r4], 0; bar.sync 0;
        red.shared.add.u32 [%r4], %r1;
        atom.acq_rel.cta.shared::cta.add.u32 %r5, [%r4], 1; bar.sync 0;
        ld.shared.u32 %r6, [%r4]; @%p1 red.global.max.u32 [%rd1], %r6;""",
        declarations=".shared .align 4 .b8 s[4];",
    )
    out = np.zeros(1, np.uint32)
    run(text, 3, 96, [out], schedule=schedule)
    assert out[0] == 96 * 95 // 2 + 96


@pytest.mark.parametrize(
    ("size", "extra", "expected"),
    [
        ("4", "", [1, 0, 0, 0]), ("8", "", [1, 2, 0, 0]), ("16", "", [1, 2, 3, 4]),
        ("16", ", 8", [1, 2, 0, 0]), ("16", ", 0", [0, 0, 0, 0]), ("16", ", %r9", [1, 0, 0, 0]),
        ("16", ", %p2", [0, 0, 0, 0]), ("16", ", %p3", [1, 2, 3, 4]), ("8", ", 6", [1, 2, 0, 0]),
    ],
)  # fmt: skip
def test_cp_async(size, extra, expected):
    level = "cg" if size == "16" else "ca"
    text = kernel(
        f"""mov.u32 %r4, s; mov.u32 %r3, 0; mov.u32 %r9, 4;
        setp.eq.u32 %p2, %r3, 0; setp.ne.u32 %p3, %r3, 0;
        st.shared.v4.u32 [%r4], {{%r3, %r3, %r3, %r3}};
        cp.async.{level}.shared.global.L2::128B [%r4], [%rd1], {size}{extra};
        cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r4];
        st.global.v4.u32 [%rd2], {{%r5, %r6, %r7, %r8}};""",
        ".u64 p0, .u64 p1",
        ".shared .align 16 .b8 s[16];",
    )
    out = np.zeros(4, np.uint32)
    assert run(text, 1, 1, [np.array([1, 2, 3, 4], np.uint32), out]).async_copies == 1
    assert list(out) == expected


def test_brx_outside_its_table():
    text = text_of("brx.idx")
    assert "index 3" in str(
        find(text, 1, 1, [np.array([3], np.uint32), np.zeros(4, np.uint32)], "bad-call")
    )


def test_a_failed_assertion_is_a_trap():
    text = kernel("call.uni __assertfail, (%rd1);").replace(
        "\n.visible", "\n.extern .func __assertfail(.param .b64 a) .noreturn;\n.visible"
    )
    assert "an assertion that failed" in str(find(text, 1, 1, [None], "trap"))


def test_a_breakpoint_is_a_trap():
    find(kernel("brkpt;"), 1, 1, [None], "trap")


def test_cvta_to_the_wrong_space():
    text = kernel("cvta.to.shared.u64 %rd5, %rd1;")
    assert "not in that state space" in str(find(text, 1, 1, [np.zeros(1)], "out-of-bounds"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "wgmma.fence.sync.aligned;",
            "'wgmma.fence.sync.aligned' (PTX line 10: wgmma.fence.sync.aligned)",
        ),
        ("tex.1d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [%rd1, {%r1}];", "tex.1d"),
        (
            "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%f1}, {%r1}, {%r1}, {%f1};",
            "mma.sync.aligned.m8n8k4",
        ),
        (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r1}, "
            "{%r1,%r1}, {%f1,%f2,%f3,%f4};",
            "number of registers",
        ),
        ("ld.shared::cluster.u32 %r3, [%r1];", "clusters"),
        ("mov.u32 %r3, %cluster_ctaid.x;", "special register %cluster_ctaid.x"),
        ("add.rn.strange.f32 %f1, %f2, %f3;", "modifier .strange"),
        ("bra NOWHERE;", "the label NOWHERE"),
        ("ld.global.u32 %r3, [nothing];", "the name nothing"),
        ("fence.proxy.async;", "fence.proxy.async"),
        ("cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2;", "cvt.rn.satfinite.e4m3x2.f32"),
    ],
)
def test_unsupported_instructions_are_named(body, words):
    lines = kernel(f"\n{body}\n")
    where = next(k for k, row in enumerate(lines.split("\n"), 1) if row == body)
    with pytest.raises(ptx.PtxUnsupportedError) as caught:
        ptx.load(lines)
    assert words.replace("PTX line 10", f"PTX line {where}") in str(caught.value)
    assert f"PTX line {where}" in str(caught.value)
    assert isinstance(caught.value, NotImplementedError)


def test_recursion_and_missing_functions():
    loop = ".func f() { call.uni f; ret; }\n"
    with pytest.raises(ptx.PtxUnsupportedError, match="makes f recursive"):
        ptx.load(kernel("call.uni f;").replace("\n.visible", "\n" + loop + ".visible"))
    with pytest.raises(
        ptx.PtxUnsupportedError, match="calls vprintf, which has no body in this module"
    ):
        ptx.load(
            kernel("call.uni vprintf;").replace(
                "\n.visible", "\n.extern .func vprintf();\n.visible"
            )
        )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", "must hold a function, got none|no semicolon"),
        (HEADER + ".visible .entry k() { ret; ", "never closed"),
        (HEADER + ".visible .entry k() { ret; } }", "closes nothing"),
        (HEADER + ".visible .entry k() { .strange x; }", "is not understood: .strange x"),
        (HEADER + ".visible .entry k() { add.u32 %r1, 1?2, 3; }", "operand '1\\?2'"),
        (HEADER + ".global .u64 p = other;\n.visible .entry k() { ret; }", "initialiser 'other'"),
        (HEADER + ".visible .entry k(.reg .b32 x) { ret; }", "use .param"),
    ],
)
def test_what_is_not_ptx(text, words):
    with pytest.raises(ptx.PtxSyntaxError, match=words):
        ptx.parse(text)


def test_registers_must_be_declared():
    with pytest.raises(ptx.PtxUnsupportedError, match=r"%r77"):
        ptx.load(kernel("mov.u32 %r3, %r77;"))


def test_every_instruction_that_is_translated_has_a_test():
    folder = Path(__file__).parent
    text = "".join(p.read_text() for p in folder.glob("test_*.py"))
    missing = [name for name in HANDLERS if not re.search(rf"\b{name}[.; ]", text)]
    assert not missing
