"""What a run found: plain numbers, as frozen dataclasses and as JSON."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._half import named_dtype
from npmoe.benchmark.cases import Case, Cost, Direction, Load, count_cost
from npmoe.benchmark.machine import Machine

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Repeated measurements in order, their median and quartiles."""

    median: float
    lower_quartile: float
    upper_quartile: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: list[float]) -> Sample:
        """Summarise at least one measurement."""
        lower, middle, upper = (
            statistics.quantiles(values, n=4, method="inclusive")
            if len(values) > 1
            else 3 * [values[0]]
        )
        return cls(median=middle, lower_quartile=lower, upper_quartile=upper, values=tuple(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """By how much results differ from the NumPy backend's, relative, and what is allowed."""

    difference: float
    bound: float
    where: str

    @property
    def ok(self) -> bool:
        """Whether it is within the bound; NaN is not."""
        return self.difference <= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Peak bytes of one call beyond what the contract leaves out; None where not measured."""

    arrays: int | None
    resident: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One implementation in one case and direction.

    `ratio_to_best_peer` is how many times as fast as the fastest peer it is, by medians.
    """

    name: str
    is_peer: bool
    seconds: Sample
    share_of_limit: float
    ratio_to_best_peer: float | None
    memory: Memory
    agreement: Agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseTimings:
    """All implementations in one case and direction, and the limits of the same rounds.

    `other_load` is how many cores other processes kept busy meanwhile, or None if unknown.
    """

    case: Case
    direction: Direction
    load: Load
    cost: Cost
    flops_per_second: Sample
    bytes_per_second: Sample
    floor_seconds: float
    other_load: float | None
    timings: tuple[Timing, ...]

    @property
    def bound_by_memory(self) -> bool:
        """Whether the read bandwidth sets the floor, not arithmetic."""
        reading = self.cost.weight_bytes / self.bytes_per_second.median
        return reading > self.cost.flops / self.flops_per_second.median

    @property
    def num_rounds(self) -> int:
        """How often everything was measured."""
        return len(self.flops_per_second.values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "case": dataclasses.asdict(self.case),
            "direction": self.direction,
            "load": dataclasses.asdict(self.load),
            "cost": dataclasses.asdict(self.cost) | {"intensity": self.cost.intensity},
            "rounds": self.num_rounds,
            "other_load": self.other_load,
            "limits": {
                "flops_per_second": dataclasses.asdict(self.flops_per_second),
                "bytes_per_second": dataclasses.asdict(self.bytes_per_second),
                "floor_seconds": self.floor_seconds,
                "bound_by": "memory" if self.bound_by_memory else "arithmetic",
            },
            "implementations": [dataclasses.asdict(t) for t in self.timings],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Omission:
    """What was not timed, and why.

    Attributes
    ----------
    name : str
        Of the implementation.
    case : str or None
        None: in no case.
    direction : str or None
        None: in no direction.
    reason : str
    red_checks : tuple of str
        Names of the failed checks of a backend.
    asked : bool
        Whether the user named it, or it ran into a check: the run is then incomplete.
    """

    name: str
    reason: str
    case: str | None = None
    direction: str | None = None
    red_checks: tuple[str, ...] = ()
    asked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What was asked for.

    Attributes
    ----------
    cases : tuple of Case
    directions : tuple of {"forward", "forward+backward"}
    dtype : {"float32", "float64"}
        Of everything but the experts' weights.
    weights : str
        Dtype of the experts' weights: `dtype`, or beside float32 "float16" or "bfloat16".
    rounds : int
        At the most.
    budget : float
        Seconds for one case and direction; no round begins later, after the second one.
    threads : int
    precision : str or None
        The backends' option of that name, if they have one: "float32", or what they round to
        where the experts' products begin.
    """

    cases: tuple[Case, ...]
    directions: tuple[Direction, ...]
    dtype: str
    weights: str
    rounds: int
    budget: float
    threads: int
    precision: str | None = None

    @property
    def operands(self) -> str | None:
        """What the experts' products may round to, if not to `dtype`."""
        return None if self.precision == "float32" else self.precision

    @property
    def dtype_text(self) -> str:
        """Name the dtypes for people."""
        half = f", expert weights {self.weights}" if self.weights != self.dtype else ""
        products = f", products in {self.operands}" if self.operands is not None else ""
        return self.dtype + half + products

    @property
    def weight_itemsize(self) -> int:
        """Bytes of one number of the experts' weights."""
        return named_dtype("bench", self.weights, "numba").itemsize

    def cost(self, case: Case, load: Load, direction: Direction) -> Cost:
        """Count a case in these dtypes."""
        return count_cost(
            case,
            load,
            direction,
            itemsize=np.dtype(self.dtype).itemsize,
            weight_itemsize=self.weight_itemsize,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkResult:
    """Everything one run found.

    `checked` maps each backend to whether its conformance run was green.
    """

    machine: Machine
    settings: Settings
    checked: dict[str, bool]
    cases: tuple[CaseTimings, ...]
    omissions: tuple[Omission, ...]

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for could be timed."""
        return not any(o.asked for o in self.omissions)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; README.md has the schema."""
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "machine": dataclasses.asdict(self.machine),
            "settings": dataclasses.asdict(self.settings)
            | {"cases": [case.name for case in self.settings.cases]},
            "checked": self.checked,
            "cases": [case.to_dict() for case in self.cases],
            "omissions": [dataclasses.asdict(o) for o in self.omissions],
        }
