"""The conformance kit on the CuPy backend, its kernels executed from their PTX."""

from __future__ import annotations

import json
from typing import Any

import pytest

from npmoe.backends import get_emulated_backend
from npmoe.cli import main
from npmoe.errors import BackendUnavailableError
from npmoe.testing import check_backend


@pytest.fixture(autouse=True)
def emulation() -> None:
    try:
        get_emulated_backend("cupy")
    except BackendUnavailableError as error:
        pytest.skip(f"needs the extra npmoe[emulate] and a C++ compiler: {error}")


def test_the_whole_kit_from_the_command_line(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    code = main(["check", "cupy", "--emulate", "reversed", "--quick", "--json", str(path)])
    told = capsys.readouterr().out
    assert code == 0, told
    assert "note: emulated, threads reversed: " in told
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["passed"] is True
    assert report["findings"] == []
    assert report["schedule"] == "reversed"
    files = {name.split(" of ")[1].split(" ")[0] for name in report["coverage"]}
    assert files == {"plan", "rows", "router", "grouped_simt", "wgrad_simt"}
    assert all(c["launches"] > 0 and 0 < c["fraction"] <= 1 for c in report["coverage"].values())


@pytest.mark.parametrize(
    ("precision", "schedule", "dtype"),
    [
        ("tf32", "in-order", "float32"),
        ("bfloat16", 5, "bfloat16"),
        ("float16", "reversed", "float32"),
    ],
)
def test_tensor_cores(precision: str, schedule: str | int, dtype: str) -> None:
    backend: Any = get_emulated_backend("cupy", precision=precision, schedule=schedule)
    checks = ["empty-experts-have-zero-gradient"]
    if dtype == "float32":
        checks += ["products-of-small-integers-are-exact", "operands-keep-their-bits"]
    else:
        checks += ["layer-backward"]
    report = check_backend(backend, quick=True, dtype=dtype, only=checks)
    assert report.passed, str(report)
    assert not backend.emulator.findings
    assert {k.file for k in backend.emulator.launches} >= {"grouped_mma", "wgrad_mma"}


def test_a_finding_is_a_failure_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from accel.cupy_raw import emulated
    from accel.device.kernel import Kernel

    def without_a_barrier(kernel: Kernel) -> tuple[str, str]:
        text, entry = emulated.emulated_ptx(kernel)
        return text.replace("bar.sync \t0;", "", 1) if kernel.file == "plan" else text, entry

    backend: Any = emulated.EmulatedCupyBackend()
    monkeypatch.setattr(backend.emulator, "_compile", without_a_barrier)
    report = check_backend(backend, quick=True, only=["verb-plan-dispatch"])
    assert not report.passed
    assert "PtxFinding: count_routes: [uninitialized]" in report.failures[0].message
    summary = backend.emulator.summary()
    assert summary["findings"][0]["kind"] == "uninitialized"
    assert summary["findings"][0]["kernel"].endswith(" of plan")
