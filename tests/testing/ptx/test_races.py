"""Data races: a kernel that has one, its repaired twin that has none, under every schedule."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from ptx_cases import SCHEDULES, Batch, find, kernel, needs_compiler, run

pytestmark = needs_compiler
SHARED = ".shared .align 4 .b8 s[4096];"
# %r5 = address of s[tid], %r6 = address of s[(tid + shift) mod n]
ADDRESSES = """
mov.u32 %r4, s; shl.b32 %r5, %r1, 2; add.u32 %r5, %r4, %r5;
mov.u32 %r7, %ntid.x; add.u32 %r6, %r1, {shift}; rem.u32 %r6, %r6, %r7; shl.b32 %r6, %r6, 2;
add.u32 %r6, %r4, %r6;
mov.u32 %r8, 0; st.shared.u32 [%r5], %r8; bar.sync 0;
"""
OWN = "mul.wide.u32 %rd5, %r1, 4; add.s64 %rd6, %rd1, %rd5;"


def shared(text: str, shift: int = 1) -> str:
    return kernel(ADDRESSES.format(shift=shift) + text, declarations=SHARED)


# name -> (racy, repaired, grid, block, arguments)
PAIRS: dict[str, tuple[str, str, int, int, Any]] = {}


def pair(name: str, racy: str, repaired: str, grid: int, block: int, size: int = 0) -> None:
    PAIRS[name] = racy, repaired, grid, block, size


EXCHANGE = "st.shared.u32 [%r5], %r1; {between} ld.shared.u32 %r10, [%r6];"
pair(
    "read of another's write",
    shared(EXCHANGE.format(between="")),
    shared(EXCHANGE.format(between="bar.sync 0;")),
    1,
    64,
)
pair(
    "warps need more than a warp barrier",
    shared(EXCHANGE.format(between="bar.warp.sync -1;"), shift=32),
    shared(EXCHANGE.format(between="bar.warp.sync -1;"), shift=0),
    1, 64,
)  # fmt: skip
pair(
    "a warp barrier orders its warp",
    shared(EXCHANGE.format(between="")),
    shared(EXCHANGE.format(between="bar.warp.sync -1;")),
    1, 32,
)  # fmt: skip
pair(
    "a shuffle orders nothing",
    shared(EXCHANGE.format(between="shfl.sync.idx.b32 %r11, %r1, 0, 31, -1;")),
    shared(EXCHANGE.format(between="shfl.sync.idx.b32 %r11, %r1, 0, 31, -1; bar.warp.sync -1;")),
    1, 32,
)  # fmt: skip
REUSE = (
    "st.shared.u32 [%r5], %r1; bar.sync 0; ld.shared.u32 %r10, [%r6]; "
    "{between} st.shared.u32 [%r5], %r10;"
)
pair(
    "write after another's read",
    shared(REUSE.format(between="")),
    shared(REUSE.format(between="bar.sync 0;")),
    1,
    64,
)
pair(
    "all write one word",
    shared("st.shared.u32 [%r4], %r1;"),
    shared("setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [%r4], %r1;"),
    1, 64,
)  # fmt: skip
pair(
    "all write the same value",
    shared("mov.u32 %r10, 7; st.shared.u32 [%r4], %r10;"),
    shared("mov.u32 %r10, 7; setp.eq.u32 %p1, %r1, 5; @%p1 st.shared.u32 [%r4], %r10;"),
    1, 64,
)  # fmt: skip
pair(
    "bytes of one word are different places, the same byte is not",
    shared("cvt.u16.u32 %h1, %r1; shr.u32 %r10, %r1, 1; add.u32 %r10, %r4, %r10; "
           "st.shared.u8 [%r10], %h1;"),
    shared("cvt.u16.u32 %h1, %r1; add.u32 %r10, %r4, %r1; st.shared.u8 [%r10], %h1;"),
    1, 64,
)  # fmt: skip
pair(
    "a wide read over a narrow write",
    shared("cvt.u16.u32 %h1, %r1; st.shared.u16 [%r5], %h1; st.shared.u16 [%r5+2], %h1; "
           "ld.shared.u32 %r10, [%r6];"),
    shared("cvt.u16.u32 %h1, %r1; st.shared.u16 [%r5], %h1; st.shared.u16 [%r5+2], %h1; "
           "bar.sync 0; ld.shared.u32 %r10, [%r6];"),
    1, 64,
)  # fmt: skip
ZERO_FIRST = (
    "setp.eq.u32 %p1, %r1, 0; mov.u32 %r10, 0; @%p1 st.shared.u32 [%r4], %r10; {between} {add}"
)
PLAIN_ADD = "ld.shared.u32 %r11, [%r4]; add.u32 %r11, %r11, 1; st.shared.u32 [%r4], %r11;"
ATOM_ADD = "atom.shared.add.u32 %r11, [%r4], 1;"
pair(
    "an atomic made plain",
    shared(ZERO_FIRST.format(between="bar.sync 0;", add=PLAIN_ADD)),
    shared(ZERO_FIRST.format(between="bar.sync 0;", add=ATOM_ADD)),
    1, 64,
)  # fmt: skip
pair(
    "plain initialisation and atomics",
    shared(ZERO_FIRST.format(between="bar.warp.sync -1;", add=ATOM_ADD)),
    shared(ZERO_FIRST.format(between="bar.sync 0;", add=ATOM_ADD)),
    1, 64,
)  # fmt: skip
pair(
    "plain read of what others count",
    shared(ZERO_FIRST.format(between="bar.sync 0;", add=ATOM_ADD + "ld.shared.u32 %r12, [%r4];")),
    shared(
        ZERO_FIRST.format(
            between="bar.sync 0;", add=ATOM_ADD + "bar.sync 0; ld.shared.u32 %r12, [%r4];"
        )
    ),
    1,
    64,
)
pair(
    "volatile reads may meet atomics",
    shared(ZERO_FIRST.format(between="bar.sync 0;", add=ATOM_ADD + "ld.shared.u32 %r12, [%r4];")),
    shared(ZERO_FIRST.format(between="bar.sync 0;", add=ATOM_ADD + "ld.volatile.shared.u32 %r12, "
                                                                   "[%r4];")),
    1, 64,
)  # fmt: skip
NAMED = """
setp.ge.u32 %p1, %r1, 32; @%p1 bra CONSUMER;
st.shared.u32 [%r5], %r1; {arrive} bra.uni DONE;
CONSUMER: bar.sync 1, 64; sub.u32 %r10, %r5, 128; ld.shared.u32 %r11, [%r10];
DONE:"""
pair(
    "bar.arrive hands over what came before it",
    shared(NAMED.format(arrive="bar.arrive 1, 64; st.shared.u32 [%r5], %r1;")),
    shared(NAMED.format(arrive="bar.arrive 1, 64;")),
    1, 64,
)  # fmt: skip
HALF_BARRIER = (
    "shr.u32 %r8, %r1, 6; add.u32 %r8, %r8, 1; st.shared.u32 [%r5], %r1; bar.sync %r8, "
    "64; xor.b32 %r9, %r1, {mask}; shl.b32 %r9, %r9, 2; add.u32 %r9, %r4, %r9; "
    "ld.shared.u32 %r10, [%r9];"
)
pair(
    "a barrier of half the block orders that half",
    shared(HALF_BARRIER.format(mask=64)), shared(HALF_BARRIER.format(mask=32)), 1, 128,
)  # fmt: skip
pair(
    "blocks write one place",
    kernel("mov.u32 %r10, 1; setp.eq.u32 %p1, %r1, 0; @%p1 st.global.u32 [%rd1], %r10;"),
    kernel("mul.wide.u32 %rd5, %r2, 4; add.s64 %rd6, %rd1, %rd5; setp.eq.u32 %p1, %r1, 0; "
           "@%p1 st.global.u32 [%rd6], %r2;"),
    3, 32, 4,
)  # fmt: skip
pair(
    "a block reads what another writes",
    kernel("mul.wide.u32 %rd5, %r2, 4; add.s64 %rd6, %rd1, %rd5; st.global.u32 [%rd6], %r2; "
           "xor.b32 %r3, %r2, 1; mul.wide.u32 %rd5, %r3, 4; add.s64 %rd6, %rd1, %rd5; "
           "ld.global.u32 %r4, [%rd6];"),
    kernel("mul.wide.u32 %rd5, %r2, 4; add.s64 %rd6, %rd1, %rd5; st.global.u32 [%rd6], %r2; "
           "ld.global.u32 %r4, [%rd6];"),
    2, 1, 2,
)  # fmt: skip
pair(
    "threads of a block share global memory too",
    kernel(OWN + "st.global.u32 [%rd6], %r1; xor.b32 %r3, %r1, 1; mul.wide.u32 %rd5, %r3, 4; "
                 "add.s64 %rd6, %rd1, %rd5; ld.global.u32 %r4, [%rd6];"),
    kernel(OWN + "st.global.u32 [%rd6], %r1; bar.sync 0; xor.b32 %r3, %r1, 1; mul.wide.u32 %rd5, "
                 "%r3, 4; add.s64 %rd6, %rd1, %rd5; ld.global.u32 %r4, [%rd6];"),
    1, 64, 64,
)  # fmt: skip
FIRST_BLOCK = """
setp.eq.u32 %p1, %r1, 0; setp.eq.and.u32 %p1, %r2, 0, %p1; mov.u32 %r3, 0; @%p1 {init}
bar.sync 0; red.global.add.u32 [%rd1], 1;"""
pair(
    "what one block sets plainly, the others may not count on",
    kernel(FIRST_BLOCK.format(init="st.global.u32 [%rd1], %r3;")),
    kernel(FIRST_BLOCK.format(init="st.relaxed.gpu.global.u32 [%rd1], %r3;")),
    2,
    96,
    1,
)
pair(
    "an atomic of cta scope does not reach other blocks",
    kernel("red.relaxed.cta.global.add.u32 [%rd1], 1;"), kernel("red.relaxed.gpu.global.add.u32 "
                                                                "[%rd1], 1;"), 2, 32, 1,
)  # fmt: skip
# The last block to arrive reads what all wrote: the fences are what makes it right.
LAST_BLOCK = """
mul.wide.u32 %rd5, %r2, 4; add.s64 %rd6, %rd1, %rd5; st.global.u32 [%rd6+4], %r2;
{release} atom.global.add.u32 %r3, [%rd1], 1; {acquire}
mov.u32 %r4, %nctaid.x; sub.u32 %r4, %r4, 1; setp.ne.u32 %p1, %r3, %r4; @%p1 bra DONE;
ld.global.u32 %r5, [%rd1+4]; ld.global.u32 %r6, [%rd1+8]; ld.global.u32 %r7, [%rd1+12];
DONE:"""
FENCED = kernel(LAST_BLOCK.format(release="membar.gl;", acquire="membar.gl;"))
pair(
    "no fence before the ticket",
    kernel(LAST_BLOCK.format(release="", acquire="membar.gl;")),
    FENCED,
    3,
    1,
    4,
)
pair(
    "no fence after the ticket",
    kernel(LAST_BLOCK.format(release="membar.gl;", acquire="")),
    FENCED,
    3,
    1,
    4,
)
pair(
    "a fence of cta scope is not enough between blocks",
    kernel(LAST_BLOCK.format(release="fence.acq_rel.cta;", acquire="fence.acq_rel.gpu;")),
    kernel(LAST_BLOCK.format(release="fence.acq_rel.gpu;", acquire="fence.sc.gpu;")),
    3, 1, 4,
)  # fmt: skip
ACQ_REL = (
    LAST_BLOCK.replace("atom.global", "atom.{order}gpu.global")
    .replace("{release}", "")
    .replace("{acquire}", "")
)
pair(
    "orders on the atomic itself",
    kernel(ACQ_REL.format(order="release.")), kernel(ACQ_REL.format(order="acq_rel.")), 3, 1, 4,
)  # fmt: skip
# Block 0 tells block 1, which tells block 2 of it; words: data, first flag, second flag.
CHAIN = """
setp.eq.u32 %p1, %r2, 1; @%p1 bra MIDDLE; setp.eq.u32 %p1, %r2, 2; @%p1 bra LAST;
mov.u32 %r3, 1; st.global.u32 [%rd1], %r3; {first} st.relaxed.gpu.global.u32 [%rd1+4], %r3;
bra.uni DONE;
MIDDLE: ld.acquire.gpu.global.u32 %r3, [%rd1+4]; setp.eq.u32 %p1, %r3, 0; @%p1 bra MIDDLE;
{middle} st.relaxed.gpu.global.u32 [%rd1+8], %r3; bra.uni DONE;
LAST: ld.acquire.gpu.global.u32 %r3, [%rd1+8]; setp.eq.u32 %p1, %r3, 0; @%p1 bra LAST;
ld.global.u32 %r4, [%rd1];
DONE:"""
CHAIN_HOLDS = kernel(CHAIN.format(first="membar.gl;", middle="membar.gl;"))
pair(
    "a link of cta scope breaks a chain of blocks",
    kernel(CHAIN.format(first="membar.gl;", middle="membar.cta;")),
    CHAIN_HOLDS,
    3,
    1,
    3,
)
pair(
    "a narrow fence does not undo a wide one before it",
    kernel(CHAIN.format(first="membar.cta;", middle="membar.gl;")),
    kernel(CHAIN.format(first="membar.gl; membar.cta;", middle="membar.gl; membar.cta;")),
    3,
    1,
    3,
)
# Thread 0 learns of other blocks, and tells its block by a barrier.
THROUGH_BARRIER = """
setp.ne.u32 %p2, %r1, 0; @%p2 bra WAIT;
mul.wide.u32 %rd5, %r2, 4; add.s64 %rd6, %rd1, %rd5; st.global.u32 [%rd6+4], %r2;
membar.gl; atom.global.add.u32 %r3, [%rd1], 1; {acquire} st.shared.u32 [s], %r3;
WAIT: bar.sync 0;
ld.volatile.shared.u32 %r3, [s]; setp.ne.u32 %p1, %r3, 2; @%p1 bra DONE;
setp.eq.u32 %p1, %r1, 0; @%p1 bra DONE;
ld.global.u32 %r5, [%rd1+4]; ld.global.u32 %r6, [%rd1+8]; ld.global.u32 %r7, [%rd1+12];
DONE:"""
pair(
    "knowledge of other blocks passes through barriers",
    kernel(THROUGH_BARRIER.format(acquire=""), declarations=SHARED),
    kernel(THROUGH_BARRIER.format(acquire="membar.gl;"), declarations=SHARED),
    3, 32, 4,
)  # fmt: skip


def arguments(size: int) -> list[Any]:
    return [np.zeros(size, np.uint32) if size else None]


BATCH = Batch(text for racy, repaired, *_ in PAIRS.values() for text in (racy, repaired))


@pytest.mark.parametrize("schedule", [*SCHEDULES, 8, 9])
@pytest.mark.parametrize("name", PAIRS)
def test_race(name, schedule):
    racy, repaired, grid, block, size = PAIRS[name]
    BATCH.find(racy, grid, block, arguments(size), kind="race", schedule=schedule)
    BATCH.run(repaired, grid, block, arguments(size), schedule=schedule)


def test_the_message_of_a_race():
    text = shared(EXCHANGE.format(between=""))
    found = find(text, 1, 64, [None], "race")
    line = next(
        k for k, row in enumerate(text.split("\n"), 1) if "ld.shared.u32" in row
    )  # and st.shared
    assert found.kernel == "k"
    assert (found.place.line, found.place.thread, found.place.block) == (line, (0, 0, 0), (0, 0, 0))
    assert found.other is not None
    assert (found.other.line, found.other.thread) == (line, (63, 0, 0))
    assert (found.space, found.name, found.buffer) == ("shared", "s", None)
    message = str(found)
    assert message.startswith(f"k: [race] PTX line {line} `")
    assert f"PTX line {line} `ld.shared.u32 %r10, [%r6]`" in message
    assert "in shared memory, byte offset" in message
    assert "Put a __syncthreads()" in message


def test_the_message_tells_same_values_apart():
    same = PAIRS["all write the same value"][0]
    other = PAIRS["all write one word"][0]
    assert "Both write the same value" in str(find(same, 1, 64, [None], "race"))
    assert "Both write the same value" not in str(find(other, 1, 64, [None], "race"))


def test_the_message_between_blocks():
    racy, _, grid, block, size = PAIRS["blocks write one place"]
    found = find(racy, grid, block, arguments(size), "race", schedule="reversed")
    assert (found.place.block, found.other.block if found.other else None) == ((1, 0, 0), (2, 0, 0))
    assert (found.buffer, found.offset, found.name) == (0, 0, "args[0]")
    assert "args[0] in global memory, byte offset 0 of 16 (element 0 of 4 uint32)" in str(found)
    assert "Blocks are not ordered" in str(found)
    racy, _, grid, block, size = PAIRS["an atomic of cta scope does not reach other blocks"]
    assert "Widen the scope of the atomic to .gpu" in str(
        find(racy, grid, block, arguments(size), "race")
    )


def test_an_atomic_histogram_then_its_reading():
    """Many atomics on few words, by all blocks; then each block's own plain data: no finding."""
    text = kernel(
        "and.b32 %r3, %r1, 3; mul.wide.u32 %rd5, %r3, 4; add.s64 %rd6, %rd1, %rd5; "
        "red.global.add.u32 [%rd6], 1;"
    )
    for schedule in SCHEDULES:
        out = np.zeros(4, np.uint32)
        run(text, 5, 96, [out], schedule=schedule)
        assert list(out) == [120] * 4


def test_a_finding_goes_from_process_to_process():
    racy, _, grid, block, size = PAIRS["blocks write one place"]
    found = find(racy, grid, block, arguments(size), "race")
    again = pickle.loads(pickle.dumps(found))
    assert (str(again), vars(again)) == (str(found), vars(found))
