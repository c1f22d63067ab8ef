"""No kernel reads or writes beside its arrays: forbidden pages lie there."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need_numba

need_numba()

import npmoe

HERE = Path(__file__).resolve().parent
ROOT = Path(npmoe.__file__).resolve().parents[1]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect of Linux")


def script(what: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(HERE)])
    return subprocess.run(
        [sys.executable, str(HERE / "guarded_runs.py"), what],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


@linux
@pytest.mark.parametrize("side", ["after", "before"])
def test_nothing_beside_an_array_is_touched(side: str) -> None:
    result = script(side)
    assert (result.returncode, result.stdout) == (0, "35\n"), result.stderr


@linux
def test_a_touch_ends_the_process() -> None:
    """Or the test above could not fail."""
    assert script("plant").returncode == -signal.SIGSEGV
