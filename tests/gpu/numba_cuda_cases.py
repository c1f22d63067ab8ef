"""What the tests of the Python kernels need, and cases beyond those of the CUDA C++ ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from device_sweep import Case
from sweep_catalog import Target
from sweep_router import Route
from sweep_rows import row_cases

from accel import numba_cuda
from accel.numba_cuda import EmulatedNumbaCudaBackend
from npmoe.testing import ptx


def need_numba_cuda() -> None:
    """Skip the module without numba-cuda or a C++ compiler; fail if NPMOE_REQUIRE names it."""
    found = EmulatedNumbaCudaBackend.availability()
    if found.ok:
        return
    if "emulate" in os.environ.get("NPMOE_REQUIRE", "").replace(",", " ").split():
        pytest.fail(found.reason)
    pytest.skip(
        f"needs the extra npmoe[emulate] and a C++ compiler: {found.reason}",
        allow_module_level=True,
    )


def more_cases(target: Target) -> Iterator[Case]:
    """Yield them."""
    real = target.name.rsplit(" ", 1)[-1]
    if target.entry in ("combine_rows", "row_dot", "finish_weights", "segment_sum"):
        yield from row_cases(target.entry, real, [(3, 4, 2, 32, None), (2, 8, 3, 31, 1.0)])
    if target.entry == "route_rows":
        # exp of what lies between -745 and -708: subnormal in float64.
        order = ("router_order", "topk_score")
        yield Route(3, 64, 64, (order,), real, spread=1500).case
        # One expert can be chosen of two.
        options = order, ("selection_bias_on", "logits")
        yield Route(3, 70, 2, options, real, bias=True, nan_bias=True, spared=True).case


@cache
def _lines(file: str) -> list[str]:
    folder = Path(numba_cuda.__file__).parent
    return (folder / file).read_text(encoding="utf-8").split("\n")


def code_of(i: ptx.Instruction) -> str:
    """Return the line of Python that an instruction comes from; "" for one of no line."""
    return "" if i.source is None else _lines(Path(i.source.file).name)[i.source.line - 1].strip()
