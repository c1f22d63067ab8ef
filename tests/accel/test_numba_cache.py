"""Compiled kernels on disk: two processes at once, a third that finds them, and a changed part."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from needs import need_numba

need_numba()

import npmoe

ROOT = Path(npmoe.__file__).resolve().parents[1]

# A few small kernels: how they are kept does not depend on what they do.
RUN = """
import sys
import numpy as np
import npmoe
from accel.numba_cpu import rows
backend = npmoe.get_backend("numba", num_threads=2)
rng = np.random.default_rng(0)
ids = rng.permuted(np.tile(np.arange(5, dtype=np.int32), (40, 1)), axis=1)[:, :2]
x = rng.integers(-9, 9, (40, 6)).astype("float32")
reference = npmoe.get_backend("reference")
want = reference.plan_dispatch(ids, num_experts=5)
plan = backend.plan_dispatch(ids, num_experts=5)
assert (plan.row_ids == want.row_ids).all()
gathered = backend.gather_rows(x, plan)
assert (gathered == reference.gather_rows(x, want)).all()
kernels = (rows.count_routes, rows.place_routes, rows.gather)
hits = sum(sum(k.stats.cache_hits.values()) for k in kernels)
misses = sum(sum(k.stats.cache_misses.values()) for k in kernels)
print(hits, misses)
"""


def start(cache: Path, root: Path = ROOT) -> subprocess.Popen[str]:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-c", RUN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, cwd=root,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Return how many kernels were found on disk, and how many were compiled."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    hits, misses = map(int, out.split())
    return hits, misses


def test_two_processes_fill_one_cache_and_a_third_uses_it(tmp_path: Path) -> None:
    both = [start(tmp_path), start(tmp_path)]
    for process in both:
        hits, misses = finish(process)
        assert hits + misses == 3
    assert finish(start(tmp_path)) == (3, 0)
    assert not list(tmp_path.rglob("*.tmp*")), "half-written files are left"


def test_a_changed_part_is_compiled_anew(tmp_path: Path) -> None:
    """Numba watches the file of a kernel alone; its parts live in other files."""
    copy = tmp_path / "copy"
    skip = shutil.ignore_patterns("__pycache__", ".git", ".mypy_cache", "tests")
    for name in ("npmoe", "accel"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    cache = tmp_path / "cache"
    assert finish(start(cache, copy)) == (0, 3)
    path = copy / "accel" / "numba_cpu" / "emit.py"
    path.write_text(path.read_text() + "\n# changed\n")
    assert finish(start(cache, copy)) == (0, 3)
