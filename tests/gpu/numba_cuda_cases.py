"""What the tests of the Python kernels need, and cases beyond those of the CUDA C++ ones."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from device_sweep import Case
from sweep_catalog import Target
from sweep_rows import row_cases

from accel.numba_cuda import EmulatedNumbaCudaBackend


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
