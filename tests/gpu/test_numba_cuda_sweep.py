"""Every Python kernel on small launches, against NumPy; its lines run, and mutants are noticed.

The cases, the judges and the mutants are those of the CUDA C++ kernels.
"""

from __future__ import annotations

import random

import pytest
from device_sweep import SCHEDULES, Mutants
from mutants import SYNCHRONISATION, Mutant, draw_mutants, find_mutants
from numba_cuda_cases import more_cases, need_numba_cuda
from sweep_catalog import Target, all_targets, mutated_targets

from accel.device.emulated import EmulatedDevice
from accel.numba_cuda.compiling import emulated_ptx, spell

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
# Least share of PTX that the cases reach; the rest is listed with reasons in the README.
LEAST = 0.95


def emulate(schedule: str | int = "in-order") -> EmulatedDevice:
    return EmulatedDevice(emulated_ptx, spell, schedule)


def run_all(target: Target, schedule: str | int = "in-order") -> EmulatedDevice:
    """Run the sharp cases of a target."""
    device = emulate(schedule)
    for case in (*target.sharp(), *more_cases(target)):
        case.run(device)
    return device


@pytest.mark.parametrize("name", SAMPLE)
def test_sharp_cases(name: str) -> None:
    target = TARGETS[name]
    covered = {k: c for k, c in run_all(target).coverage.items() if k.entry == target.entry}
    assert covered
    for kernel, coverage in covered.items():
        assert coverage.fraction >= LEAST, f"{kernel}: {coverage.missed}"
    cases = list(target.sharp())
    for schedule in SCHEDULES[1:]:
        device = emulate(schedule)
        for case in random.Random(3).sample(cases, min(3, len(cases))):
            case.run(device)


@pytest.mark.exhaustive
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", TARGETS)
def test_all_cases(name: str, schedule: str | int) -> None:
    target, device = TARGETS[name], emulate(schedule)
    for case in (*target.full(), *more_cases(target)):
        case.run(device)
    for kernel, coverage in device.coverage.items():
        if kernel.entry == target.entry:
            assert coverage.fraction >= LEAST, f"{kernel}: {coverage.missed}"


def survivors(target: Target, count: int | None, seed: int, *, full: bool = False) -> list[Mutant]:
    """Try all mutants of synchronisation, and so many others; return those nobody notices."""
    device = emulate()
    kernel = target.kernel(device)
    text, entry = emulated_ptx(kernel)
    found = find_mutants(text, entry)
    first = [m for m in found if m.kind in SYNCHRONISATION]
    others = [m for m in found if m.kind not in SYNCHRONISATION]
    chosen = first + (others if count is None else draw_mutants(others, count, seed))
    subject = Mutants(device, kernel, chosen)
    cases = [*(target.full() if full else target.sharp()), *more_cases(target)]
    return [m for m in chosen if subject.noticed(m, cases) is None]


@pytest.mark.parametrize("name", ["place_routes", "scan_experts", "row_dot float32"])
def test_mutants_are_noticed(name: str) -> None:
    alive = survivors(TARGETS[name], 20, seed=1)
    shown = "\n".join(map(str, alive))
    assert not [m for m in alive if m.synchronises], shown
    assert len(alive) <= 1, shown


def is_live(mutant: Mutant, missed: set[int]) -> bool:
    """Say whether a mutant changes what can happen.

    Lines that no case reaches are not: top_k or num_experts 0, arguments of log1p that exp does not
    give. Nor is a comparison of floats that are equal: maxima, limits and the pieces of curves and
    of the library's functions agree there.
    """
    i = mutant.instruction
    of_equals = mutant.kind == "comparison flipped" and i.parts[-1] in ("f32", "f64")
    return i.line not in missed and not of_equals


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MUTATED)
def test_all_mutants_are_noticed(name: str) -> None:
    target = TARGETS[name]
    alive = survivors(target, None, seed=0, full=True)
    assert not [m for m in alive if m.synchronises], "\n".join(map(str, alive))
    device = run_all(target)
    kernel = target.kernel(device)
    text, entry = emulated_ptx(kernel)
    missed = {i.line for i in device.coverage[kernel].missed}
    live = [m for m in find_mutants(text, entry) if is_live(m, missed)]
    alive = [m for m in alive if is_live(m, missed)]
    assert len(alive) <= 0.05 * len(live), "\n".join(map(str, alive))
