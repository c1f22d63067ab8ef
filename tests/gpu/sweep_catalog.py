"""Every kernel variant that the sweep knows, with the cases that try it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import sweep_plans
from device_sweep import Case
from sweep_products import Form, all_gradients, all_products, forms, sharp_gradients, sharp_products
from sweep_router import all_routes, sharp_routes
from sweep_rows import (
    CASTS,
    SHARP,
    VERBS,
    activation_cases,
    all_shapes,
    cast_cases,
    half_segments,
    row_cases,
)

from accel.device.emulated import EmulatedDevice
from accel.device.kernel import Kernel

REALS = ("float32", "float64")
Source = Callable[[], Iterator[Case]]


@dataclass(frozen=True, slots=True)
class Target:
    """An entry in one variant: few cases that reach every line, and all."""

    name: str
    entry: str
    sharp: Source
    full: Source

    def kernel(self, device: EmulatedDevice) -> Kernel:
        """Run the first case, and return the variant that it launched."""
        before = set(device.launches)
        next(self.sharp()).run(device)
        found = [k for k in device.launches if k.entry == self.entry]
        fresh = [k for k in found if k not in before]
        return (fresh or found)[-1]


def _products(form: Form) -> Target:
    return Target(
        f"grouped_gemm {form}", "grouped_gemm", partial(sharp_products, form),
        partial(all_products, form),
    )  # fmt: skip


def _gradient(gather: int, real: str) -> Target:
    return Target(
        f"grouped_wgrad {gather} {real}", "grouped_wgrad", partial(sharp_gradients, gather, real),
        partial(all_gradients, gather, real),
    )  # fmt: skip


def _plan(entry: str) -> Target:
    return Target(
        entry, entry, lambda: (s.case for s in sweep_plans.SHARP),
        lambda: (s.case for s in sweep_plans.all_sorts()),
    )  # fmt: skip


def _rows(entry: str, real: str) -> Target:
    return Target(
        f"{entry} {real}", entry, lambda: row_cases(entry, real, SHARP),
        lambda: row_cases(entry, real, all_shapes()),
    )  # fmt: skip


def _one(name: str, entry: str, cases: Source, full: Source | None = None) -> Target:
    return Target(name, entry, cases, full or cases)


PLAN = ("count_routes", "scan_experts", "place_routes", "scan_blocks", "fill_blocks")


def all_targets() -> list[Target]:
    """List them."""
    targets = [_products(f) for real in REALS for f in forms(real)]
    targets += [_products(f) for half in ("float16", "bfloat16") for f in forms("float32", half)]
    for real in REALS:
        targets += [_gradient(gather, real) for gather in range(3)]
        targets += [_rows(entry, real) for entry in sorted({e for e, _ in VERBS.values()})]
        for back, entry in enumerate(("activation", "activation_backward")):
            targets.append(
                _one(f"{entry} {real}", entry, partial(activation_cases, bool(back), real))
            )
        targets.append(
            _one(f"route_rows {real}", "route_rows", partial(sharp_routes, real),
                 partial(all_routes, real))
        )  # fmt: skip
    for half in ("float16", "bfloat16"):
        full: Any = partial(half_segments, half, all_shapes())
        targets.append(
            _one(f"segment_sum {half}", "segment_sum", partial(half_segments, half), full)
        )
    targets += [_one(f"cast {a} {b}", "cast", partial(cast_cases, a, b)) for a, b in CASTS]
    return targets + [_plan(entry) for entry in PLAN]


def mutated_targets() -> list[Target]:
    """List those whose mutants are tried: float32 alone, where the other dtypes have the same text
    but for types and the library's functions, and one conversion."""
    return [
        t
        for t in all_targets()
        if not t.name.endswith(("float64", "-float16", "-bfloat16"))
        and (t.entry != "cast" or t.name == "cast float32 bfloat16")
        and (t.entry != "segment_sum" or t.name.endswith("float32"))
    ]
