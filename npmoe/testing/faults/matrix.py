"""The kill matrix: every planted mistake, and the check that found it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from npmoe._half import named_dtype
from npmoe.testing.conformance.registry import check_function
from npmoe.testing.conformance.report import Report
from npmoe.testing.faults.fault import Fault

MODULES = (
    *("align", "block_gemm", "gemm", "combine", "router", "activation", "loss"),
    *("experts", "moe", "backend", "half"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What became of one fault."""

    fault: Fault
    killed_by: str | None
    message: str
    case: str
    seconds: float

    @property
    def by_name(self) -> bool:
        """Whether the check that names the mistake found it."""
        return self.killed_by == self.fault.check


def all_faults() -> tuple[Fault, ...]:
    """Return every planted mistake; their names are distinct."""
    found: list[Fault] = []
    for module in MODULES:
        found += import_module(f"npmoe.testing.faults.{module}").FAULTS
    return tuple(found)


def run_fault(fault: Fault, *, quick: bool = True, seed: int = 0) -> Kill:
    """Run the kit on one fault; the check that should find it first, then all others."""
    start = time.perf_counter()
    check = check_function(fault.kind)
    options = dict(fault.options)
    report: Report = check(
        fault.subject, **options, quick=quick, seed=seed, only=[fault.check], name=fault.name
    )
    if report.passed:
        report = check(fault.subject, **options, quick=quick, seed=seed, stop=True, name=fault.name)
    failure = report.failures[0] if report.failures else None
    return Kill(
        fault=fault,
        killed_by=None if failure is None else failure.check,
        message="" if failure is None else failure.message,
        case="" if failure is None else failure.case.note,
        seconds=time.perf_counter() - start,
    )


def kill_matrix(
    *, quick: bool = True, seed: int = 0, progress: Callable[[str], None] | None = None
) -> Iterator[Kill]:
    """Yield what became of every fault, in order.

    Raises
    ------
    BackendUnavailableError
        Before the first, if a fault needs a package that is missing: ml_dtypes.
    """
    faults = all_faults()
    for fault in faults:
        named_dtype("kill_matrix", str(dict(fault.options).get("dtype", "float32")), "test")
    for fault in faults:
        if progress is not None:
            progress(fault.name)
        yield run_fault(fault, quick=quick, seed=seed)
