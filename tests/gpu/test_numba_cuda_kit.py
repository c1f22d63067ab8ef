"""The conformance kit on the Python kernels, executed from their PTX."""

from __future__ import annotations

import pytest
from numba_cuda_cases import need_numba_cuda

from accel.numba_cuda import EmulatedNumbaCudaBackend
from npmoe.testing import check_backend

need_numba_cuda()


def test_the_whole_kit() -> None:
    backend = EmulatedNumbaCudaBackend(schedule="reversed")
    report = check_backend(backend, quick=True)
    assert report.passed, str(report)
    summary = backend.emulator.summary()
    assert summary["findings"] == []
    files = {kernel.file for kernel in backend.emulator.launches}
    assert files == {"plan", "rows", "router", "grouped_simt", "wgrad_simt"}


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_dtypes(dtype: str) -> None:
    backend = EmulatedNumbaCudaBackend(schedule=5)
    report = check_backend(
        backend, quick=True, dtype=dtype, only=["layer-forward", "layer-backward"]
    )
    assert report.passed, str(report)
    assert not backend.emulator.findings


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("schedule", ["in-order", "reversed", 11])
def test_everything(dtype: str, schedule: str | int) -> None:
    backend = EmulatedNumbaCudaBackend(schedule=schedule)
    report = check_backend(backend, quick=dtype != "float32", dtype=dtype)
    assert report.passed, str(report)
    assert not backend.emulator.findings
