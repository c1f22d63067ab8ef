"""Every example runs as it stands, in a process of its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
NEEDS_TORCH = {"06_throughput_vs_torch.py"}
SHORT = (
    *("01_forward.py", "02_gradcheck_your_change.py", "03_train_text.py"),
    "05_check_your_kernel.py",
)
EXAMPLES = sorted(p.name for p in FOLDER.glob("[0-9][0-9]_*.py"))
# OUT stands for a new folder.
ARGUMENTS = {
    "03_train_text.py": ["--steps", "2", "--out", "OUT"],
    "04_moe_vs_dense.py": ["--steps", "2", "--seeds", "1", "--out", "OUT"],
    "07_digits.py": ["--steps", "2", "--seeds", "1", "--out", "OUT"],
    "08_distillation.py": ["--steps", "2", "--teacher-steps", "2", "--seeds", "1"],
    "09_sparse_upcycling.py": ["--steps", "2", "--out", "OUT"],
    "10_lora_experts.py": ["--steps", "2", "--before-steps", "2"],
    "11_cached_routing.py": ["--rounds", "2", "--tokens", "8"],
    "12_router_craft.py": ["--steps", "2", "--seeds", "1"],
    "13_selection_bias.py": ["--steps", "10", "--out", "OUT"],
}
TELLS = {
    "01_forward.py": ["output (2, 6, 16) float32", "routes dropped"],
    "02_gradcheck_your_change.py": ["right:", "wrong:", "must agree"],
    "03_train_text.py": ["step 2: loss", "validation loss", "the quick"],
    "05_check_your_kernel.py": ["FAILED", "full-blocks-get-no-extra-block", "checks passed: WRONG"],
    "04_moe_vs_dense.py": ["moe   seed 0: validation loss", "dense seed 0", "advantage of the MoE"],
    "07_digits.py": ["dense model, seed 0: ", "all experts, seed 0: ", "| top-1 (Switch) | "],
    "08_distillation.py": ["teacher: ", "all labels: mean accuracy", "of the gap closed"],
    "09_sparse_upcycling.py": ["logits after upcycling differ by", "upcycled, trained"],
    "10_lora_experts.py": ["adapters of the experts", "every bit of the base is back: True"],
    "11_cached_routing.py": ["256 experts", "same bits", "(2 hits)"],
    "12_router_craft.py": ["all experts alike", "router frozen", "fading out", "times 10.0"],
    "13_selection_bias.py": ["selection bias  validation loss", "of all of them together", ".png"],
}


@pytest.fixture(scope="module")
def small_documentation(tmp_path_factory):
    """A short text in the place of Python's documentation, found first on the path."""
    folder = tmp_path_factory.mktemp("path")
    words = random.Random(0).choices(["quick", "brown", "fox", "jumps", "over\n"], k=1500)
    (folder / "pydoc_data").mkdir()
    (folder / "pydoc_data" / "__init__.py").touch()
    content = f"topics = {{'words': 'the quick ' + {' '.join(words)!r}}}\n"
    (folder / "pydoc_data" / "topics.py").write_text(content, encoding="utf-8")
    return folder


def test_the_examples_are_found():
    assert set(EXAMPLES) >= {*SHORT, *TELLS}
    assert set(ARGUMENTS) <= set(EXAMPLES)


@pytest.mark.parametrize("name", SHORT)
def test_the_first_examples_are_short(name):
    assert len((FOLDER / name).read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - NEEDS_TORCH))
def test_it_runs(name, tmp_path, small_documentation):
    if name in ARGUMENTS:
        pytest.importorskip("safetensors")
        pytest.importorskip("threadpoolctl")
    options = [str(tmp_path / "run") if a == "OUT" else a for a in ARGUMENTS.get(name, [])]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(FOLDER / name), *options],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(small_documentation), str(FOLDER.parent)]),
            "OPENBLAS_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in TELLS.get(name, []):
        assert words in done.stdout, done.stdout
