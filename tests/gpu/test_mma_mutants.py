"""Mistakes planted in the compiled PTX of the tensor-core kernels are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from emulation import need_emulation
from kernel_references import check_grouped
from kernel_runs import (
    UNTOUCHED,
    Variant,
    WeightGradient,
    draw_numbers,
    draw_problem,
    run_grouped,
    run_wgrad,
    sort_routes,
)

from accel.cupy_raw.nvrtc import compile_kernel
from npmoe.testing import ptx

need_emulation()
GROUPED = Variant("bfloat16", gather=True)
WGRAD = WeightGradient("bfloat16", 1)


def plant(text: str) -> dict[str, ptx.Edit]:
    """Barriers and waits dropped or loosened, tails moved, groups and zero-fill lost."""
    edits = {}
    for number, line in enumerate(text.splitlines(), 1):
        word = line.strip()
        if word.startswith("bar.sync"):
            edits[f"{number} no barrier"] = ptx.Edit(line=number, text="")
        elif word.startswith("cp.async.wait_group"):
            loose = word.replace("2;", "3;").replace("0;", "1;")
            edits[f"{number} wait for fewer"] = ptx.Edit(line=number, text=loose)
        elif word.startswith("setp.ge.s32 ignored"):
            edits[f"{number} tail too long"] = ptx.Edit(
                line=number, text=word.replace(".ge.", ".gt.")
            )
        elif word.startswith("cp.async.commit_group"):
            edits[f"{number} no group"] = ptx.Edit(line=number, text="")
        elif word.startswith("cp.async.cg"):
            edits[f"{number} no zeros"] = ptx.Edit(line=number, text=word.replace(", ignored", ""))
    return edits


def survivors(
    text: str, run: Callable[[ptx.CompiledModule, str], None]
) -> tuple[list[str], dict[str, ptx.Edit]]:
    """Run every edit; name those that nobody noticed."""
    edits = plant(text)
    module = ptx.load(text, edits=edits)
    alive = []
    for name in edits:
        try:
            run(module, name)
        except (ptx.PtxFinding, AssertionError):
            continue
        alive.append(name)
    return alive, edits


def run_beside_nan(module: ptx.CompiledModule | None, K: int, name: str | None = None) -> None:
    """Products of numbers that lie between rows of NaN, so that no tail may touch a neighbour."""
    rng = np.random.default_rng(K)
    tokens, N = 2 * GROUPED.block, 130
    owners = np.where(np.arange(tokens) % 2, -1, 0)  # every other token is dropped
    blocks = sort_routes(owners, 1, 1, GROUPED.block)
    x = draw_numbers(rng, (tokens, K), "bfloat16", True)
    weight = draw_numbers(rng, (1, N, K), "bfloat16", True)
    clean = x[::2].astype(np.float64) @ weight[0, ::2].astype(np.float64).T
    x[1::2], weight[:, 1::2] = np.nan, np.nan
    problem = replace(
        draw_problem(GROUPED, N, K, tokens=1, bias=False), blocks=blocks, x=x, weight=weight,
        y=np.full((tokens, N), UNTOUCHED, np.float32),
    )  # fmt: skip
    run_grouped(problem, module, edit=name)
    assert (problem.y[: GROUPED.block, ::2] == clean).all()
    assert np.isnan(problem.y[: GROUPED.block, 1::2]).all()
    assert (problem.y[GROUPED.block :] == UNTOUCHED).all()


def run_rows_beside_nan(module: ptx.CompiledModule | None, R: int, name: str | None = None) -> None:
    """R rows of one expert, followed by rows of NaN of another."""
    rng = np.random.default_rng(R)
    owners = np.array([1] + [0] * R)  # token 0 is the other's
    blocks = sort_routes(owners, 1, 2, 16)
    M, N = 128, 128
    grad_y = draw_numbers(rng, (R + 1, M), "bfloat16", True)
    x = draw_numbers(rng, (R + 1, N), "bfloat16", True)
    clean = grad_y[:R].astype(np.float64).T @ x[1:].astype(np.float64)
    grad_y[R], x[0] = np.nan, np.nan
    out = np.zeros((2, M, N), np.float32)
    run_wgrad(WGRAD, blocks, grad_y, x, out, module=module, edit=name)
    assert (out[0] == clean).all()
    assert np.isnan(out[1]).all()


DEPTHS = (8, 40, 72, 104, 136)  # a tail in each stage of the prologue, and in the loop
ROWS = tuple(32 * stage + 16 * half + 3 for stage in range(4) for half in range(2))


@pytest.mark.parametrize("K", DEPTHS)
def test_tails_of_depth_touch_no_neighbour(K):
    run_beside_nan(None, K)


@pytest.mark.parametrize("R", ROWS)
def test_tails_of_rows_touch_no_neighbour(R):
    run_rows_beside_nan(None, R)


def test_grouped():
    """All are found: those of tails by NaN beside them."""

    def run(module: Any, name: str) -> None:
        for K in DEPTHS:
            run_beside_nan(module, K, name)
        problem = draw_problem(GROUPED, 136, 16, tokens=5)
        run_grouped(problem, module, edit=name)
        check_grouped(problem, exact=True)

    alive, edits = survivors(compile_kernel(GROUPED.kernel).decode(), run)
    assert len(edits) > 40
    assert alive == []


def test_wgrad():
    """All are found."""

    def run(module: Any, name: str) -> None:
        for R in ROWS:
            run_rows_beside_nan(module, R, name)

    alive, edits = survivors(compile_kernel(WGRAD.kernel).decode(), run)
    assert len(edits) > 40
    assert alive == []


@pytest.mark.parametrize("name", ["no barrier", "wait for fewer", "tail too long", "no zeros"])
def test_every_kind_is_planted(name):
    assert any(name in edit for edit in plant(compile_kernel(GROUPED.kernel).decode()))
