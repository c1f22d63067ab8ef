"""The race detector against the definition: random programs, all pairs of accesses compared.

Programs have no data dependence, so which accesses are ordered does not depend on the schedule: the
verdict must be the same under every schedule, and must be that of the definition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from ptx_cases import SCHEDULES, kernel, needs_compiler

from npmoe.testing import ptx

pytestmark = needs_compiler
THREADS, WARPS, PROGRAMS = 96, 3, 50
PLAIN_READ, PLAIN_WRITE, STRONG_READ, STRONG_WRITE, ATOMIC = range(5)
CODE = {
    PLAIN_READ: "ld.{space}.u{bits} %r9, {at};",
    PLAIN_WRITE: "st.{space}.u{bits} {at}, %r8;",
    STRONG_READ: "ld.volatile.{space}.u{bits} %r9, {at};",
    STRONG_WRITE: "st.volatile.{space}.u{bits} {at}, %r8;",
    ATOMIC: "red.{space}.add.u32 {at}, 1;",
}


@dataclass
class Program:
    """Its text, and what the definition says of it."""

    body: list[str] = field(default_factory=list)
    racy: bool = False


class Definition:
    """Vector clocks for every thread, all accesses kept, all pairs compared."""

    def __init__(self, blocks: int, shared: bool) -> None:
        n = blocks * THREADS
        self.shared, self.clock = shared, np.zeros((n, n), int)
        np.fill_diagonal(self.clock, 1)
        self.accesses: list[tuple[int, int, int, int, int]] = []
        self.racy = False

    def join(self, members: list[int]) -> None:
        known = self.clock[members].max(axis=0)
        for m in members:
            self.clock[m] = known
        for m in members:
            self.clock[m, m] += 1

    def access(self, thread: int, kind: int, first: int, size: int) -> None:
        for other, its_clock, its_kind, its_first, its_size in self.accesses:
            if other == thread or its_first + its_size <= first or first + size <= its_first:
                continue
            if self.shared and other // THREADS != thread // THREADS:
                continue
            if kind in {PLAIN_READ, STRONG_READ} and its_kind in {PLAIN_READ, STRONG_READ}:
                continue
            if kind >= STRONG_READ and its_kind >= STRONG_READ:
                continue
            self.racy |= self.clock[thread, other] < its_clock
        self.accesses.append((thread, int(self.clock[thread, thread]), kind, first, size))


def draw(rng: np.random.Generator, blocks: int, shared: bool) -> Program:
    """A program of up to 14 steps over 8 bytes."""
    p, truth, space = Program(), Definition(blocks, shared), "shared" if shared else "global"
    for _ in range(rng.integers(3, 15)):
        what = rng.random()
        if what < 0.6:
            kind = int(rng.integers(0, 5))
            size = 4 if kind == ATOMIC else int(rng.choice([1, 2, 4]))
            first = int(rng.integers(0, 8 // size)) * size
            at = f"[%r4+{first}]" if shared else f"[%rd1+{first}]"
            code = CODE[kind].format(space=space, bits=8 * size, at=at)
            low, count = int(rng.integers(0, THREADS)), int(rng.choice([1, 1, 1, 2, 32]))
            block = int(rng.integers(0, blocks))
            p.body.append(
                f"sub.u32 %r5, %r1, {low}; setp.lt.u32 %p1, %r5, {count}; "
                f"setp.eq.and.u32 %p1, %r2, {block}, %p1; @%p1 {code}"
            )
            for t in range(low, min(low + count, THREADS)):
                truth.access(block * THREADS + t, kind, first, size)
            continue
        groups = barrier(rng, p)
        for b in range(blocks):
            for members in groups:
                truth.join([b * THREADS + t for t in members])
    p.racy = truth.racy
    return p


def barrier(rng: np.random.Generator, p: Program) -> list[list[int]]:
    """Write a barrier; give the groups of threads that it joins."""
    kind = int(rng.integers(0, 4))
    if kind == 0:
        p.body.append("bar.sync 0;")
        return [list(range(THREADS))]
    if kind == 1:
        p.body.append("bar.warp.sync -1;")
        return [list(range(w * 32, w * 32 + 32)) for w in range(WARPS)]
    if kind == 2:
        w = int(rng.integers(0, WARPS - 1))
        p.body.append(
            f"sub.u32 %r5, %r1, {w * 32}; setp.lt.u32 %p1, %r5, 64; @%p1 bar.sync {w + 1}, 64;"
        )
        return [list(range(w * 32, w * 32 + 64))]
    low = int(rng.integers(0, WARPS)) * 32
    mask = 0x0000FFFF
    p.body.append(f"sub.u32 %r5, %r1, {low}; setp.lt.u32 %p1, %r5, 16; @%p1 bar.warp.sync {mask};")
    return [list(range(low, low + 16))]


def programs(blocks: int, shared: bool) -> Iterator[Program]:
    rng = np.random.default_rng([blocks, shared, 5])
    for _ in range(PROGRAMS):
        yield draw(rng, blocks, shared)


@pytest.mark.parametrize(("blocks", "shared"), [(1, True), (2, True), (1, False), (3, False)])
def test_the_detector_agrees_with_the_definition(blocks, shared):
    text, drawn = "", list(programs(blocks, shared))
    start = "mov.u32 %r4, s; mov.u32 %r8, 7; mov.b64 %rd5, 0; setp.eq.u32 %p2, %r1, 0;\n"
    if shared:
        start += "@%p2 st.shared.u64 [%r4], %rd5; bar.sync 0;\n"
    for k, p in enumerate(drawn):
        body = start + "\n".join(p.body) + "\nbar.sync 0;"
        one = kernel(body, declarations=".shared .align 8 .b8 s[8];", name=f"k{k}")
        text += one if not text else one[one.index(".visible") :]
    module = ptx.load(text)
    assert 0.2 < np.mean([p.racy for p in drawn]) < 0.9
    for k, p in enumerate(drawn):
        for schedule in [*SCHEDULES, 8]:
            kind = None
            try:
                module.launch(f"k{k}", blocks, THREADS, [np.zeros(8, np.uint8)], schedule=schedule)
            except ptx.PtxFinding as found:
                kind = found.kind
            text = "\n".join(p.body)
            expected = "race" if p.racy else None
            assert kind == expected, f"program {k}, schedule {schedule}: {kind}\n{text}"
