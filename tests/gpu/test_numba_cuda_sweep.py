"""Every Python kernel on small launches, against NumPy; its lines run, and mutants are noticed.

The cases, the judges and the mutants are those of the CUDA C++ kernels.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass, field

import pytest
from device_sweep import SCHEDULES, Mutants, check_lines
from equivalents import Equivalent
from mutants import Mutant, draw_mutants, find_mutants
from numba_cuda_cases import code_of, more_cases, need_numba_cuda
from numba_cuda_equivalents import EQUIVALENTS
from numba_cuda_uncovered import UNCOVERED, allowed_lines
from sweep_catalog import Target, all_targets, mutated_targets

from accel.device.emulated import EmulatedDevice
from accel.device.kernel import Kernel
from accel.numba_cuda.compiling import emulated_ptx, spell
from npmoe.testing import ptx

need_numba_cuda()

# There is no conversion of rows among the Python kernels: rows are multiplied as they are.
TARGETS = {
    t.name: t
    for t in all_targets()
    if t.entry != "cast" and t.name not in ("segment_sum float16", "segment_sum bfloat16")
}
MUTATED = [t.name for t in mutated_targets() if t.name in TARGETS]
SAMPLE = (
    "count_routes", "combine_rows float32", "finish_weights float32", "segment_sum float64",
    "grouped_gemm ACTIVATE-gated-16-float32-bfloat16", "grouped_wgrad 1 float32",
)  # fmt: skip


def emulate(schedule: str | int = "in-order") -> EmulatedDevice:
    return EmulatedDevice(emulated_ptx, spell, schedule)


def run_all(target: Target, schedule: str | int = "in-order") -> EmulatedDevice:
    """Run the sharp cases of a target."""
    device = emulate(schedule)
    for case in (*target.sharp(), *more_cases(target)):
        case.run(device)
    return device


def check_coverage(target: Target, coverage: ptx.Coverage) -> None:
    """Compare what did not run with the table."""
    check_lines(target.name, coverage, code_of, allowed_lines(target.name))


def coverages(target: Target, device: EmulatedDevice) -> dict[Kernel, ptx.Coverage]:
    """Return those of the target's own kernel."""
    found = {k: c for k, c in device.coverage.items() if k.entry == target.entry}
    assert found
    return found


@pytest.mark.parametrize("name", SAMPLE)
def test_sharp_cases(name: str) -> None:
    target = TARGETS[name]
    for coverage in coverages(target, run_all(target)).values():
        check_coverage(target, coverage)
    cases = list(target.sharp())
    for schedule in SCHEDULES[1:]:
        device = emulate(schedule)
        for case in random.Random(3).sample(cases, min(3, len(cases))):
            case.run(device)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TARGETS)
def test_all_lines_that_do_not_run_are_listed(name: str) -> None:
    for coverage in coverages(TARGETS[name], run_all(TARGETS[name])).values():
        check_coverage(TARGETS[name], coverage)


def test_a_listed_line_that_runs_and_an_unlisted_one_that_does_not_fail() -> None:
    target = TARGETS["combine_rows float32"]
    (coverage,) = coverages(target, run_all(target)).values()
    code = coverage.instructions
    for counts in ((1,) * len(code), (0,) + (1,) * (len(code) - 1)):
        with pytest.raises(AssertionError, match="misses"):
            check_coverage(target, ptx.Coverage(coverage.kernel, code, counts))


@pytest.mark.exhaustive
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", TARGETS)
def test_all_cases(name: str, schedule: str | int) -> None:
    target, device = TARGETS[name], emulate(schedule)
    for case in (*target.full(), *more_cases(target)):
        case.run(device)


@dataclass
class Verdict:
    """What became of the mutants of a kernel: all that nobody notices are argued for, or alive."""

    caught: Counter[str] = field(default_factory=Counter)
    unreached: Counter[str] = field(default_factory=Counter)
    argued: list[tuple[Mutant, Equivalent]] = field(default_factory=list)
    alive: list[Mutant] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.caught.total()} caught, {len(self.argued)} equivalent, "
            f"{self.unreached.total()} never run, {len(self.alive)} alive"
        )


def rows_for(entry: str, mutant: Mutant) -> list[Equivalent]:
    """Return the rows that argue for a mutant."""
    i = mutant.instruction
    change = f"{i.text} -> {mutant.edit.text}"
    return [e for e in EQUIVALENTS if e.fits(entry, mutant.kind, code_of(i), change)]


def judge(target: Target, count: int | None = None, seed: int = 0) -> Verdict:
    """Try all mutants of synchronisation, and so many others: on the sharp cases, then on all."""
    device, verdict = emulate(), Verdict()
    kernel = target.kernel(device)
    text, entry = emulated_ptx(kernel)
    every = find_mutants(text, entry)
    chosen = [m for m in every if m.synchronises]
    others = [m for m in every if not m.synchronises]
    chosen += others if count is None else draw_mutants(others, count, seed)
    missed = {i.line for i in run_all(target).coverage[kernel].missed}
    planted = Mutants(device, kernel, chosen)
    sharp, full = [*target.sharp(), *more_cases(target)], list(target.full())
    # Else what they notice is not the mutant.
    assert planted.noticed(None, sharp) is None
    for m in chosen:
        if planted.noticed(m, sharp):
            verdict.caught[m.kind] += 1
        elif not m.synchronises and m.instruction.line in missed:
            verdict.unreached[m.kind] += 1
        elif not m.synchronises and (rows := rows_for(entry, m)):
            verdict.argued.append((m, rows[0]))
        elif planted.noticed(None, full) is None and planted.noticed(m, full):
            verdict.caught[m.kind] += 1
        else:
            verdict.alive.append(m)
    return verdict


@pytest.mark.parametrize("name", ["place_routes", "scan_experts", "row_dot float32"])
def test_mutants_are_noticed(name: str) -> None:
    verdict = judge(TARGETS[name], 20, seed=1)
    assert not verdict.alive, "\n".join(map(str, verdict.alive))
    assert verdict.caught.total() >= 18


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MUTATED)
def test_all_mutants_are_noticed(name: str) -> None:
    verdict = judge(TARGETS[name])
    assert not verdict.alive, f"{verdict}\n" + "\n".join(map(str, verdict.alive))


def test_every_argument_has_a_line_of_a_kernel() -> None:
    """Find each row's mutants; `test_every_argument_is_needed` plants them."""
    for target in (TARGETS[name] for name in ("spread_experts float32", "combine_rows float32")):
        kernel = target.kernel(emulate())
        text, entry = emulated_ptx(kernel)
        rows = [rows_for(entry, m) for m in find_mutants(text, entry)]
        assert max(map(len, rows)) == 1, "two rows for one mutant"
        assert sum(map(bool, rows)) >= 2
    assert all(len(e.why) > 30 for e in EQUIVALENTS)


@pytest.mark.exhaustive
def test_every_argument_is_needed() -> None:
    needed = set()
    for name in MUTATED:
        target, device = TARGETS[name], emulate()
        kernel = target.kernel(device)
        text, entry = emulated_ptx(kernel)
        mutants = find_mutants(text, entry)
        planted = Mutants(device, kernel, [m for m in mutants if rows_for(entry, m)])
        sharp = [*target.sharp(), *more_cases(target)]
        for m in mutants:
            rows = rows_for(entry, m)
            if not set(rows) <= needed and planted.noticed(m, sharp) is None:
                needed.update(rows)
    assert [e for e in EQUIVALENTS if e not in needed] == []


def test_the_table_of_lines_has_reasons() -> None:
    for lines in UNCOVERED.values():
        assert all(count > 0 and len(why) > 20 for count, why in lines.values())
    used = {pattern for name in TARGETS for pattern in UNCOVERED if re.search(pattern, name)}
    assert used == set(UNCOVERED)
