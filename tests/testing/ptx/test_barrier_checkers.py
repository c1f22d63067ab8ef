"""Barriers that not everybody reaches, in every way; and the repaired twins."""

from __future__ import annotations

import pytest
from ptx_cases import SCHEDULES, Batch, find, kernel, needs_compiler, run

pytestmark = [needs_compiler, pytest.mark.parametrize("schedule", SCHEDULES)]
# name -> (mistake, repaired, block, kind, a word of the message)
CASES = {
    "some return first": (
        "setp.ge.u32 %p1, %r1, 48; @%p1 ret; bar.sync 0;",
        "setp.ge.u32 %p1, %r1, 48; bar.sync 0; @%p1 ret;",
        64,
        "barrier-divergence",
        "exited",
    ),
    "a guarded barrier": (
        "setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0;",
        "setp.lt.u32 %p1, %r1, 64; @%p1 bar.sync 0;",
        64,
        "barrier-divergence",
        "exited",
    ),
    "half of a warp": (
        "setp.lt.u32 %p1, %r1, 16; @%p1 bar.sync 1, 32; @!%p1 bar.sync 0;",
        "bar.sync 1, 32; bar.sync 0;",
        32,
        "barrier-divergence",
        "barrier",
    ),
    "two barrier instructions in one warp": (
        "setp.lt.u32 %p1, %r1, 16; @%p1 bra A; bar.sync 0; bra.uni B; A: bar.sync 0; B:",
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 0; bra.uni B; A: bar.sync 0; B:",
        64,
        "barrier-divergence",
        "different barrier instructions",
    ),
    "different barriers": (
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 1; bra.uni B; A: bar.sync 2; B:",
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 1; bra.uni B; A: bar.sync 1; B:",
        64,
        "barrier-divergence",
        "barrier 2",
    ),
    "different counts": (
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 1, 64; bra.uni B; A: bar.sync 1, 96; B:",
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 1, 64; bra.uni B; A: bar.sync 1, 64; B:",
        64,
        "barrier-divergence",
        "agree",
    ),
    "a count that nobody can fill": (
        "bar.sync 1, 96;",
        "bar.sync 1, 64;",
        64,
        "deadlock",
        "nobody in the block can go on",
    ),
    "an arrival too few": (
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra DONE; bar.sync 3, 64; DONE:",
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra ARRIVE; bar.sync 3, 64; bra.uni DONE; ARRIVE: "
        "bar.arrive 3, 64; DONE:",
        64,
        "barrier-divergence",
        "exited",
    ),
    "a barrier within a loop of different length": (
        "mov.u32 %r3, 0; shr.u32 %r4, %r1, 5; LOOP: bar.sync 0; add.u32 %r3, %r3, 1; "
        "setp.le.u32 %p1, %r3, %r4; @%p1 bra LOOP;",
        "mov.u32 %r3, 0; shr.u32 %r4, %r1, 6; LOOP: bar.sync 0; add.u32 %r3, %r3, 1; "
        "setp.le.u32 %p1, %r3, %r4; @%p1 bra LOOP;",
        64,
        "barrier-divergence",
        "exited",
    ),
    "different reductions": (
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.red.popc.u32 %r5, 0, %p1; bra.uni B; A: "
        "bar.red.and.pred %p2, 0, %p1; B:",
        "setp.lt.u32 %p1, %r1, 32; bar.red.popc.u32 %r5, 0, %p1;",
        64,
        "barrier-divergence",
        "agree",
    ),
    "a barrier that does not exist": (
        "bar.sync 16;",
        "bar.sync 15;",
        64,
        "bad-call",
        "there are 16",
    ),
    "a count that is no multiple of 32": (
        "bar.sync 1, 33;",
        "bar.sync 1, 64;",
        64,
        "bad-call",
        "multiple of 32",
    ),
    "waiting in a warp for one at the barrier": (
        "setp.eq.u32 %p1, %r1, 3; @%p1 bra A; bar.warp.sync -1; A: bar.sync 0;",
        "setp.eq.u32 %p1, %r1, 3; @%p1 bra A; A: bar.warp.sync -1; bar.sync 0;",
        32,
        "warp-divergence",
        "1 thread (first (3, 0, 0)) wait at barrier 0",
    ),
}


BATCH = Batch(
    kernel(text) for mistake, repaired, *_ in CASES.values() for text in (mistake, repaired)
)


@pytest.mark.parametrize("name", CASES)
def test_barrier(schedule, name):
    mistake, repaired, block, kind, words = CASES[name]
    found = BATCH.find(kernel(mistake), 1, block, [None], kind=kind, schedule=schedule)
    assert words in str(found)
    BATCH.run(kernel(repaired), 1, block, [None], schedule=schedule)


def test_unaligned_barriers_may_differ_within_a_warp(schedule):
    text = "setp.lt.u32 %p1, %r1, 16; @%p1 bra A; barrier.sync 0; bra.uni B; A: barrier.sync 0; B:"
    run(kernel(text), 1, 64, [None], schedule=schedule)
    find(
        kernel(text.replace("barrier.sync", "barrier.sync.aligned")),
        1,
        64,
        [None],
        "barrier-divergence",
        schedule=schedule,
    )


def test_blocks_of_no_whole_warp(schedule):
    assert run(kernel("bar.sync 0;"), 3, 45, [None], schedule=schedule).barriers == 3


def test_the_message_lists_the_groups(schedule):
    text = kernel("setp.ge.u32 %p1, %r1, 48; @%p1 ret; bar.sync 0;")
    message = str(find(text, 1, 64, [None], "barrier-divergence", schedule=schedule))
    assert "48 threads (first (0, 0, 0)) wait at barrier 0, PTX line" in message
    assert "`bar.sync 0`" in message
    assert "16 threads (first (48, 0, 0)) exited" in message
    assert "move it out of the branch, or do not return before it" in message
