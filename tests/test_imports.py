"""What `import npmoe` loads, and how long it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import npmoe

ROOT = Path(npmoe.__file__).resolve().parents[1]
FORBIDDEN = (
    "accel",
    "cupy",
    "hypothesis",
    "matplotlib",
    "ml_dtypes",
    "numba",
    "pytest",
    "safetensors",
    "scipy",
    "threadpoolctl",
    "torch",
    "tqdm",
    "transformers",
)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )


def loaded(code: str) -> set[str]:
    result = python("-c", f"import sys\n{code}\nprint(*sys.modules)")
    return {name.partition(".")[0] for name in result.stdout.split()}


def test_import_loads_numpy_and_the_standard_library() -> None:
    names = loaded("import npmoe")
    assert not names & set(FORBIDDEN)
    foreign = {n for n in names if not n.startswith("_")} - set(sys.stdlib_module_names)
    startup = loaded("")  # hooks of an editable install, for example
    assert foreign - startup == {"npmoe", "numpy"}


def test_running_the_layer_loads_nothing_more() -> None:
    names = loaded(
        "import npmoe, numpy as np\n"
        "cfg = npmoe.MoEConfig(hidden_size=4)\n"
        "npmoe.MoELayer(cfg)(np.ones((2, 4), 'float32'))"
    )
    assert not names & set(FORBIDDEN)


@pytest.mark.parametrize("name", ["scipy", "accel"])
def test_the_check_can_fail(name: str) -> None:
    assert name in loaded(f"import npmoe, {name}") & set(FORBIDDEN)


TIMES = (
    "from time import process_time as now\n"
    "a = now()\nimport numpy\nb = now()\nimport npmoe\nc = now()\nprint(b - a, c - b)"
)


def test_import_adds_less_than_60_ms_to_numpy() -> None:
    """In processor time, where NumPy takes 90 ms itself; a slower machine gets as much more."""
    seen = []
    for _ in range(5):  # other processes only ever make it slower
        numpy, added = (1000.0 * float(s) for s in python("-c", TIMES).stdout.split())
        seen.append((added, 60.0 * max(1.0, numpy / 90.0)))
    assert any(added < allowed for added, allowed in seen), seen


def test_public_names() -> None:
    assert len(set(npmoe.__all__)) == len(npmoe.__all__)
    for name in npmoe.__all__:
        assert getattr(npmoe, name) is not None


def test_versions_agree() -> None:
    import accel

    marker = accel.NPMOE_ACCEL_VERSION
    assert npmoe.__version__ == marker
    result = python("-c", "import npmoe; print(npmoe.__version__)")
    assert result.stdout.strip() == npmoe.__version__
