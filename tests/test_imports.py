"""What `import npmoe` loads, and how long it takes."""

from __future__ import annotations

import re
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


def milliseconds(log: str, module: str) -> float:
    """Return the cumulative time of one module in the output of -X importtime."""
    found = re.findall(rf"^import time: +\d+ \| +(\d+) \| +{module}$", log, flags=re.MULTILINE)
    assert len(found) == 1, log
    return int(found[0]) / 1000.0


def test_import_adds_less_than_60_ms_to_numpy() -> None:
    """Where NumPy's own import takes 90 ms or less; slower or busier machines get as much more."""
    seen = []
    for _ in range(5):  # other processes only ever make it slower
        log = python("-X", "importtime", "-c", "import npmoe").stderr
        numpy = milliseconds(log, "numpy")
        seen.append((milliseconds(log, "npmoe") - numpy, 60.0 * max(1.0, numpy / 90.0)))
        if seen[-1][0] < seen[-1][1]:
            return
    raise AssertionError(f"(added, allowed) in milliseconds: {seen}")


def test_reading_of_import_times() -> None:
    log = "import time:       100 |      45000 | numpy\nimport time: 7 | 61500 | npmoe\n"
    assert milliseconds(log, "npmoe") - milliseconds(log, "numpy") == 16.5


def test_public_names() -> None:
    assert sorted(npmoe.__all__) == list(dict.fromkeys(sorted(npmoe.__all__)))
    for name in npmoe.__all__:
        assert getattr(npmoe, name) is not None


def test_versions_agree() -> None:
    import accel

    assert accel.NPMOE_ACCEL_VERSION == npmoe.__version__
    result = python("-c", "import npmoe; print(npmoe.__version__)")
    assert result.stdout.strip() == npmoe.__version__
