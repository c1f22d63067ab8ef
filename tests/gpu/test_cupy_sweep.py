"""Every kernel on small launches, against NumPy, in three orders of threads; all its lines run."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from emulation import need_emulation, need_tables

need_emulation()

from device_sweep import LEAST, SCHEDULES, check_lines, judge, put
from sweep_catalog import Target, all_targets
from uncovered import UNCOVERED, key_of

from accel.cupy_raw.nvrtc import emulated_ptx
from accel.device.emulated import EmulatedDevice
from accel.device.kernel import Kernel
from accel.device.source import FOLDER
from npmoe.testing import ptx
from npmoe.testing.balls import Ball, Model

TARGETS = all_targets()
# One of each group of variants that differ in a type or a block size alone; the rest are drawn.
ALWAYS = ("count_routes", "combine_rows float32", "route_rows float32", "activation float32")


def drawn(seed: int, count: int) -> list[Target]:
    """Draw targets, those of `ALWAYS` among them."""
    others = [t for t in TARGETS if t.name not in ALWAYS]
    return [t for t in TARGETS if t.name in ALWAYS] + random.Random(seed).sample(others, count)


def sharpen(target: Target, schedule: str | int) -> EmulatedDevice:
    """Run the sharp cases of a target."""
    device = EmulatedDevice(emulated_ptx, schedule=schedule)
    for case in target.sharp():
        case.run(device)
    return device


@pytest.mark.parametrize("target", drawn(2, 9), ids=lambda t: t.name)
def test_sharp_cases_of_a_sample(target: Target) -> None:
    device = sharpen(target, "in-order")
    own = [c for k, c in device.coverage.items() if k.entry == target.entry]
    assert own
    assert min(c.fraction for c in own) >= LEAST
    # In other orders, some of them.
    cases = list(target.sharp())
    for schedule in SCHEDULES[1:]:
        other = EmulatedDevice(emulated_ptx, schedule=schedule)
        for case in random.Random(3).sample(cases, min(3, len(cases))):
            case.run(other)


@pytest.mark.exhaustive
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_all_cases(target: Target, schedule: str | int) -> None:
    device = EmulatedDevice(emulated_ptx, schedule=schedule)
    for case in target.full():
        case.run(device)


def code_of(i: ptx.Instruction) -> str:
    """Return the line of source that an instruction comes from."""
    if i.source is None:
        return ""
    path = FOLDER / Path(i.source.file).name
    return path.read_text(encoding="utf-8").split("\n")[i.source.line - 1].strip()


def check_coverage(kernel: Kernel, coverage: ptx.Coverage) -> None:
    """Compare what did not run with the table."""
    lines = UNCOVERED.get(key_of(kernel), {})
    check_lines(kernel, coverage, code_of, {code: count for code, (count, _) in lines.items()})


@pytest.mark.parametrize("entry", ["fill_blocks", "scan_blocks", "combine_rows", "row_dot"])
def test_lines_that_do_not_run_are_listed(entry: str) -> None:
    need_tables()
    for target in TARGETS:
        if target.entry == entry and not target.name.endswith("16"):
            device = sharpen(target, "in-order")
            for kernel, coverage in device.coverage.items():
                if kernel.entry == entry:
                    check_coverage(kernel, coverage)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_all_lines_that_do_not_run_are_listed(target: Target) -> None:
    need_tables()
    for kernel, coverage in sharpen(target, "in-order").coverage.items():
        if kernel.entry == target.entry:
            check_coverage(kernel, coverage)


def test_the_table_has_reasons() -> None:
    entries = {t.entry for t in TARGETS}
    for (entry, *_), lines in UNCOVERED.items():
        assert entry in entries
        assert all(count > 0 and len(reason) > 20 for count, reason in lines.values())


def test_a_listed_line_that_runs_and_an_unlisted_one_that_does_not_fail() -> None:
    need_tables()
    target = next(t for t in TARGETS if t.name == "scan_blocks")
    device = EmulatedDevice(emulated_ptx)
    next(target.sharp()).run(device)
    kernel, coverage = next((k, c) for k, c in device.coverage.items() if k.entry == "scan_blocks")
    with pytest.raises(AssertionError, match="listed"):
        check_coverage(kernel, coverage)  # one case does not run all
    everything = ptx.Coverage(
        coverage.kernel, coverage.instructions, (1,) * len(coverage.instructions)
    )
    with pytest.raises(AssertionError, match="listed"):
        check_coverage(kernel, everything)


def test_the_judge_sees_wrong_and_forbidden_numbers() -> None:
    want = Ball.exact(np.ones((2, 3)), Model.of(np.float32))
    rows = np.full((3, 3), np.nan, np.float32)
    rows[:2] = 1
    written = np.array([True, True, False])
    judge(put(rows), want, "right", written=written)
    with pytest.raises(AssertionError, match="mean nothing"):
        judge(put(np.ones((3, 3), np.float32)), want, "rows", written=written)
    rows[1, 2] = 1 + 2.0**-20
    for exact in (True, False):
        with pytest.raises(AssertionError):
            judge(put(rows), want, "wrong", written=written, exact=exact)
