"""Coverage, counts, bank conflicts and sectors: figures that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_cases import SCHEDULES, kernel, needs_compiler, run

from npmoe import RangeError

pytestmark = needs_compiler
BRANCHES = """
setp.lt.u32 %p1, %r1, 5;
@%p1 add.u32 %r3, %r1, 1;
@!%p1 add.u32 %r3, %r1, 2;
setp.gt.u32 %p2, %r1, 100;
@%p2 bra FAR;
bra.uni END;
FAR: add.u32 %r3, %r1, 3;
add.u32 %r3, %r1, 4;
END:
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_coverage_counts_threads(schedule):
    result = run(kernel(BRANCHES), 2, 32, [None], schedule=schedule)
    count = {
        i.text: n for i, n in zip(result.coverage.instructions, result.coverage.counts, strict=True)
    }
    assert count["setp.lt.u32 %p1, %r1, 5"] == 64
    assert count["@%p1 add.u32 %r3, %r1, 1"] == 10
    assert count["@!%p1 add.u32 %r3, %r1, 2"] == 54
    assert count["@%p2 bra FAR"] == 0
    assert [i.text for i in result.coverage.missed] == [
        "@%p2 bra FAR",
        "add.u32 %r3, %r1, 3",
        "add.u32 %r3, %r1, 4",
    ]
    assert result.instructions == 64 * 8 - 0
    assert result.opcodes["setp.lt.u32"] == 64
    assert result.coverage.fraction == 1 - 3 / len(result.coverage.instructions)


def test_coverage_adds_up():
    text = kernel(BRANCHES)
    few, many = run(text, 1, 3, [None]).coverage, run(text, 1, 128, [None]).coverage
    assert "@!%p1 add.u32 %r3, %r1, 2" in [i.text for i in few.missed]
    assert not (few + many).missed
    assert sum((few + many).counts) == sum(few.counts) + sum(many.counts)
    with pytest.raises(
        RangeError,
        match=r"^Coverage: other must be of the same kernel as k, "
        r"got k with \d+ instructions against",
    ):
        few + run(kernel("mov.u32 %r3, 1;"), 1, 1, [None]).coverage


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("size", "stride", "degree"),
    [
        ("u32", 4, 1),
        ("u32", 8, 2),
        ("u32", 128, 32),
        ("u32", 0, 1),
        ("u32", 132, 1),
        ("u64", 8, 1),
        ("u64", 16, 2),
        ("v4.u32", 16, 1),
        ("v4.u32", 32, 2),
        ("v4.u32", 0, 1),
        ("u8", 1, 1),
    ],
)
def test_bank_conflicts(size, stride, degree, schedule):
    registers = {"u32": "%r3", "u64": "%rd5", "v4.u32": "{%r3, %r3, %r3, %r3}", "u8": "%r3"}[size]
    results = registers.replace("%r3, %r3, %r3, %r3", "%r10, %r11, %r12, %r13")
    text = kernel(
        f"""mov.u32 %r3, 0; mov.u64 %rd5, 0; mov.u32 %r4, s; mad.lo.u32 %r4, %r1, {stride}, %r4;
        setp.eq.u32 %p1, %r1, 0; setp.ne.u32 %p2, {stride}, 0; or.pred %p1, %p1, %p2;
        @%p1 st.shared.{size} [%r4], {registers}; bar.sync 0;
        ld.shared.{size} {results}, [%r4];""",
        declarations=".shared .align 16 .b8 s[8448];",
    )
    result = run(text, 1, 64, [None], traffic=True, schedule=schedule)
    load = next(t for t in result.traffic if t.instruction.parts[0] == "ld")
    assert (load.space, load.requests, load.worst) == ("shared", 2, degree)
    assert load.transactions == degree * load.ideal
    assert (load in result.bank_conflicts()) == (degree > 1)


@pytest.mark.parametrize(
    ("stride", "sectors", "ideal"), [(4, 4, 4), (8, 8, 4), (32, 32, 4), (0, 1, 1), (128, 32, 4)]
)
def test_global_sectors(stride, sectors, ideal):
    text = kernel(
        f"mul.wide.u32 %rd5, %r1, {stride}; add.s64 %rd6, %rd1, %rd5; ld.global.u32 %r3, [%rd6];"
    )
    result = run(text, 3, 32, [np.zeros(1024, np.uint32)], traffic=True)
    (load,) = result.traffic
    assert (load.requests, load.transactions, load.ideal, load.worst, load.bytes) == (
        3,
        3 * sectors,
        3 * ideal,
        sectors,
        384,
    )
    assert bool(result.uncoalesced()) == (sectors > ideal)


def test_traffic_is_counted_only_when_asked_for():
    text = kernel("ld.global.u32 %r3, [%rd1];")
    assert run(text, 1, 32, [np.zeros(1, np.uint32)]).traffic == ()


def test_lanes_of_a_loop_are_matched_by_turn():
    """Lane l reads l + 1 words: request n has the lanes that are still there."""
    text = kernel(
        """mov.u32 %r3, 0; LOOP: mul.wide.u32 %rd5, %r3, 4; add.s64 %rd6, %rd1, %rd5;
        ld.global.u32 %r4, [%rd6];
        add.u32 %r3, %r3, 1; setp.le.u32 %p1, %r3, %r1; @%p1 bra LOOP;"""
    )
    (load,) = run(text, 1, 32, [np.zeros(32, np.uint32)], traffic=True, schedule=5).traffic
    assert (load.requests, load.transactions, load.bytes) == (32, 32, 4 * 32 * 33 // 2)


def test_the_same_seed_gives_the_same_interleaving():
    """Atomics hand out tickets in the order of execution."""
    text = kernel(
        "atom.global.add.u32 %r3, [%rd1], 1; mul.wide.u32 %rd5, %r1, 4; add.s64 %rd6, %rd2, %rd5; "
        "st.global.u32 [%rd6], %r3;", ".u64 p0, .u64 p1"
    )  # fmt: skip

    def tickets(schedule):
        out = np.zeros(64, np.uint32)
        run(text, 1, 64, [np.zeros(1, np.uint32), out], schedule=schedule)
        return list(out)

    assert tickets("in-order") == list(range(64))
    assert tickets("reversed") == list(range(64))[::-1]
    assert tickets(5) == tickets(5)
    assert tickets(5) != tickets(6)
    assert sorted(tickets(5)) == list(range(64))


def test_blocks_run_in_the_order_of_the_schedule():
    text = kernel(
        "atom.global.add.u32 %r3, [%rd1], 1; mul.wide.u32 %rd5, %r2, 4; "
        "add.s64 %rd6, %rd2, %rd5; st.global.u32 [%rd6], %r3;",
        ".u64 p0, .u64 p1",
    )
    orders = {}
    for schedule in (*SCHEDULES, 8):
        out = np.zeros(16, np.uint32)
        run(text, 16, 1, [np.zeros(1, np.uint32), out], schedule=schedule)
        orders[schedule] = list(map(int, out))
        assert sorted(orders[schedule]) == list(range(16))
    assert orders["in-order"] == list(range(16))
    assert orders["reversed"] == list(range(16))[::-1]
    assert len({tuple(o) for o in orders.values()}) == 4
