"""Kernels as nvcc and numba-cuda compile them: right results, no findings;
mistakes planted in the PTX are found."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ptx_cases import SCHEDULES, needs_compiler

from npmoe.testing import ptx

pytestmark = needs_compiler
FOLDER = Path(__file__).with_name("kernels")
TEXTS = {p.stem: p.read_text() for p in FOLDER.glob("*.ptx")}


def run_gemm(
    module: ptx.CompiledModule, m: int, n: int, k: int, **options: Any
) -> tuple[np.ndarray, np.ndarray, ptx.LaunchResult]:
    """Integers, so that every order of summation gives the same bits."""
    (name,) = module.entries
    rng = np.random.default_rng(m * 97 + n * 7 + k)
    a, b = (rng.integers(-4, 5, s).astype(np.float32) for s in ((m, k), (k, n)))
    c = np.full((m, n), 777, np.float32)
    grid, block = (-(-n // 16), -(-m // 16)), (16, 16)
    if name == "numba_gemm":
        arrays = ptx.ReadOnly(a), ptx.ReadOnly(b), ptx.Uninitialized(c)
        args = [word for x in arrays for word in ptx.numba_array(x)]
    elif name == "tiled_gemm":
        args = [ptx.ReadOnly(a), ptx.ReadOnly(b), ptx.Uninitialized(c), m, n, k]
    else:
        half = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, np.ascontiguousarray(b.T))]
        args, block = (
            [ptx.ReadOnly(half[0]), ptx.ReadOnly(half[1]), ptx.Uninitialized(c), n, k],
            (32, 1),
        )
    return c, a @ b, module.launch(name, grid, block, args, **options)


SHAPES = {
    "tiled_gemm": [(16, 16, 16), (17, 33, 20), (1, 1, 1), (5, 40, 31)],
    "numba_gemm": [(16, 16, 16), (17, 33, 20), (1, 1, 1)],
    "mma_gemm": [(16, 16, 16), (32, 16, 48), (16, 48, 32)],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "shape"), [(n, s) for n, shapes in SHAPES.items() for s in shapes]
)
def test_gemm(name, shape, schedule):
    got, expected, _ = run_gemm(ptx.load(TEXTS[name]), *shape, schedule=schedule)
    assert (got == expected).all()


@pytest.mark.parametrize("schedule", [*SCHEDULES, 11])
@pytest.mark.parametrize("n", [0, 1, 300])
def test_block_scan(n, schedule):
    rng = np.random.default_rng(n)
    ids = rng.integers(-1, 10, max(n, 1)).astype(np.int32)
    offsets, order = np.zeros(11, np.int32), np.full(max(n, 1), -5, np.int32)
    args = [ptx.ReadOnly(ids), n, 10, ptx.Uninitialized(offsets), order]
    ptx.launch(TEXTS["block_scan"], "block_scan", 1, 64, args, schedule=schedule)
    kept = ids[:n]
    counts = np.bincount(kept[kept >= 0], minlength=10)
    assert (offsets == np.concatenate([[0], np.cumsum(counts)])).all()
    for e in range(10):
        assert sorted(order[offsets[e] : offsets[e + 1]]) == list(np.flatnonzero(kept == e))


@pytest.mark.parametrize("which", range(8))
def test_mathematics(which):
    """nvcc's own bounds for f32 functions are below 4 ulp, fast exp in the logistic below 5."""
    n = 70
    x = np.linspace(-6, 6, n, dtype=np.float32)
    u = np.linspace(-9, 9, n)
    u[3] = 1e6 if which == 5 else u[3]  # the slow reduction of sin, a call
    y, v = np.zeros(n, np.float32), np.zeros(n)
    coverage = ptx.launch(
        TEXTS["math"], "math", 3, 32, [x, y, u, v, n, which], schedule=which
    ).coverage
    i = np.arange(n)
    functions = {
        0: (lambda a: a / (1 + math.exp(-a)), lambda d: d / (1 + math.exp(-d))),
        1: (math.tanh, lambda d: d + 1),
        2: (math.erf, lambda d: d + 2),
        3: (lambda a: math.log(a * a + 1), lambda d: d + 3),
        4: (lambda a: math.sqrt(a * a + 2) / 3, lambda d: d + 4),
        5: (lambda a: math.sin(a) + math.cos(a), math.sin),
        6: (None, None),
        7: (lambda a: (abs(a) + 0.5) ** 1.5, lambda d: d + 7),
    }
    if which == 6:
        assert (y == x * (i % 4 + 1).astype(np.float32)).all()
        assert (v == i // 7 + i % 5 + i * 1000003 % 97).all()
        return
    f, g = functions[which]
    expected = np.array([f(float(a)) for a in x])
    assert (abs(y - expected) <= 5 * 2.0**-23 * np.maximum(abs(expected), 2.0**-3)).all()
    expected = np.array([g(d) for d in u])
    assert (abs(v - expected) <= 3 * 2.0**-53 * np.maximum(abs(expected), 2.0**-3)).all()
    assert coverage.fraction > 0.02


def mutants(name: str) -> dict[str, ptx.Edit]:
    """Barriers and waits deleted or loosened, atomics made plain: one at a time."""
    out = {}
    for k, row in enumerate(TEXTS[name].split("\n"), 1):
        new = None
        if re.match(r"\s*(bar\.sync|cp\.async\.commit)", row):
            new = ""
        elif "cp.async.wait_group 1" in row:
            new = row.replace("wait_group 1", "wait_group 2")
        elif m := re.match(r"\s*atom\.shared\.add\.u32\s+(%r\d+), (\[%r\d+\]), (\S+);", row):
            new = (
                f"ld.shared.u32 {m[1]}, {m[2]}; "
                f"{{ .reg .b32 t; add.u32 t, {m[1]}, {m[3]}; st.shared.u32 {m[2]}, t; }}"
            )
        if new is not None:
            out[f"line {k}: {row.strip()}"] = ptx.Edit(k, new)
    return out


@pytest.mark.parametrize("name", ["tiled_gemm", "mma_gemm"])
def test_every_synchronisation_mutant_of_a_gemm_is_found(name):
    edits = mutants(name)
    assert len(edits) >= 2
    module = ptx.load(TEXTS[name], edits=edits)
    assert {find_in_gemm(module, None, 144, s) for s in SCHEDULES} == {None}
    for edit in edits:
        for schedule in SCHEDULES:
            kinds = {find_in_gemm(module, edit, k, schedule) for k in (16, 48, 64, 144)} - {None}
            assert kinds, f"{edit}: not found under schedule {schedule}"
            assert kinds <= {"race", "async", "uninitialized"}


def find_in_gemm(module: ptx.CompiledModule, edit: str | None, k: int, schedule: Any) -> str | None:
    """The kind of the finding; without one the result must be right."""
    try:
        got, expected, _ = run_gemm(module, 16, 16, k, schedule=schedule, edit=edit)
    except ptx.PtxFinding as found:
        return found.kind
    assert (got == expected).all()
    return None


def test_every_synchronisation_mutant_of_the_scan_is_found():
    ids = np.repeat(np.arange(10, dtype=np.int32), 20)
    edits = mutants("block_scan")
    assert sum("atom" in what for what in edits) == 2
    module = ptx.load(TEXTS["block_scan"], edits=edits)
    for edit in edits:
        kinds = set()
        for schedule in (*SCHEDULES, 1, 2, 3):
            args = [ids, 200, 10, np.zeros(11, np.int32), np.zeros(200, np.int32)]
            try:
                module.launch("block_scan", 1, 96, args, schedule=schedule, edit=edit)
            except ptx.PtxFinding as f:
                kinds.add(f.kind)
        assert kinds, edit
        assert kinds <= {"race", "uninitialized"}, edit


def test_the_source_line_is_named():
    """nvcc -lineinfo says where each instruction comes from; the message carries it on."""
    lines = (FOLDER / "tiled_gemm.cu").read_text().split("\n")
    edits = mutants("tiled_gemm")
    module = ptx.load(TEXTS["tiled_gemm"], edits=edits)
    with pytest.raises(ptx.PtxFinding) as caught:
        run_gemm(module, 16, 16, 32, edit=list(edits)[1])  # the barrier after the reads
    places = re.findall(r"tiled_gemm\.cu:(\d+)", str(caught.value))
    assert len(places) == 2
    assert all(("as[" in lines[int(p) - 1] or "bs[" in lines[int(p) - 1]) for p in places)


def test_figures_of_the_mma_kernel():
    """Rows of 48 bytes keep ldmatrix and cp.async free of bank conflicts; one stage has two mma."""
    _, _, result = run_gemm(ptx.load(TEXTS["mma_gemm"]), 16, 16, 64, traffic=True)
    assert result.async_copies == 32 * 2 * 4
    assert result.opcodes["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] == 32 * 4 * 2
    assert result.barriers == 8
    loads = [t for t in result.traffic if t.instruction.parts[0] == "ldmatrix"]
    assert loads
    assert all(t.transactions == t.ideal for t in loads)
