"""What `import npmoe` loads, and how long it takes."""

from __future__ import annotations

import ast
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
    """In processor time, since other processes slow the clock."""
    added = [float(python("-c", TIMES).stdout.split()[1]) for _ in range(3)]
    assert min(added) < 0.060, added


def test_all_public_names_load_nothing_more() -> None:
    names = loaded("import npmoe\nfor n in npmoe.__all__: getattr(npmoe, n)\ndir(npmoe)")
    assert not names & set(FORBIDDEN)


def test_the_table_of_homes_is_the_imports_for_type_checkers() -> None:
    tree = ast.parse(Path(npmoe.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    imports = {
        (node.module.removeprefix("npmoe").removeprefix("."), alias.name)
        for node in block.body
        for alias in node.names
    }
    table = {(home, name) for home, names in npmoe._HOMES.items() for name in names}
    assert imports == table | {("", "losses")}
    assert {name for _, name in imports} | {"__version__"} == set(npmoe.__all__)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'npmoe' has no attribute 'moe_sideways'"):
        npmoe.moe_sideways  # noqa: B018


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
