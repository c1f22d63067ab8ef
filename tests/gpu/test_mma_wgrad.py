"""Weight gradients on tensor cores, from their compiled PTX: right numbers, no findings."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from emulation import need_emulation
from kernel_references import expect_wgrad
from kernel_runs import (
    TILE,
    TYPES,
    UNTOUCHED,
    Blocks,
    WeightGradient,
    draw_numbers,
    draw_owners,
    run_wgrad,
    sort_routes,
)

from npmoe.testing.bounds import assert_within

need_emulation()
SCHEDULES = ("in-order", "reversed", 7)
EXHAUSTIVE = pytest.mark.exhaustive
ALL = [WeightGradient(*c) for c in itertools.product(TYPES, (0, 1, 2), (True, False))]
CHOSEN = [
    WeightGradient("bfloat16", 0, True),
    WeightGradient("bfloat16", 1, False),
    WeightGradient("half16", 2, True),
    WeightGradient("float", 0, False),
    WeightGradient("float", 1, True),
]


def draw_rows(
    variant: WeightGradient, rng: Any, blocks: Blocks, M: int, N: int, exact: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of routes, or of tokens."""
    tokens = blocks.num_routes // blocks.top_k
    rows = [tokens if variant.gather == 3 - i else blocks.num_routes for i in (1, 2)]
    left, right = (
        draw_numbers(rng, (r, n), variant.operand, exact) for r, n in zip(rows, (M, N), strict=True)
    )
    return left, right


def check(
    variant: WeightGradient, M: int, N: int, *, tokens: int = 40, top_k: int = 2, experts: int = 4,
    exact: bool = True, accumulate: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Run and compare."""
    rng = np.random.default_rng([M, N, tokens])
    blocks = sort_routes(draw_owners(rng, tokens * top_k, experts), top_k, experts, 16)
    grad_y, x = draw_rows(variant, rng, blocks, M, N, exact)
    out = np.full((experts, M, N), UNTOUCHED, np.float32)
    if accumulate:
        out = draw_numbers(rng, out.shape, "float", True)
    before = out.copy() if accumulate else np.zeros_like(out)
    result = run_wgrad(variant, blocks, grad_y, x, out, accumulate=accumulate, **options)
    ball = expect_wgrad(blocks, variant.gather, grad_y, x)
    if exact:
        assert (out == before + ball.mid).all()
    else:
        assert_within(out, ball.mid, ball.rad, "grad_weight")
    empty = np.diff(blocks.expert_offsets) == 0
    assert (out[empty] == before[empty]).all()
    return result


@pytest.mark.parametrize("variant", CHOSEN, ids=str)
def test_exact(variant):
    """Integers, under three schedules; no access to shared memory takes too many passes."""
    rng = np.random.default_rng(ALL.index(variant))
    unit = variant.chunk if variant.aligned else 1
    for i, schedule in enumerate(SCHEDULES):
        M, N = (int(rng.integers(1, 150 // unit)) * unit for _ in range(2))
        result = check(
            variant, M, N, tokens=(3, 40, 90)[i], top_k=(2, 3, 1)[i], experts=(5, 3, 2)[i],
            accumulate=i == 1, schedule=schedule, traffic=i == 1,
        )  # fmt: skip
        for t in result.bank_conflicts():
            assert not t.instruction.source.file.endswith(("mma.cuh", "panels.cuh")), t


@pytest.mark.parametrize("variant", CHOSEN, ids=str)
def test_within_bounds(variant):
    check(variant, 24, 40, exact=False)


@pytest.mark.parametrize("variant", CHOSEN, ids=str)
def test_coverage(variant):
    """All but branches around loops that always begin."""
    unit = variant.chunk if variant.aligned else 1
    shapes = [(unit, TILE, 2, 1), (unit, TILE + unit, 3, 0), (TILE + unit, TILE, 1, 1)]
    runs = [
        check(variant, M, N, tokens=200, top_k=t, experts=1, accumulate=bool(a)).coverage
        for M, N, t, a in shapes
    ]
    coverage = sum(runs[1:], runs[0])
    assert coverage.fraction >= 0.95
    assert [i.text for i in coverage.missed if i.opcode != "bra"] == []


def test_no_bank_conflicts_in_whole_tiles():
    result = check(CHOSEN[0], TILE, TILE, traffic=True)
    assert not result.bank_conflicts()


@EXHAUSTIVE
@pytest.mark.parametrize("variant", ALL, ids=str)
def test_every_residue(variant):
    """Every M, N and number of rows that tiles and stages can end with."""
    unit = variant.chunk if variant.aligned else 1
    for n in range(unit, TILE + unit + 1, unit):
        check(variant, n, 24, tokens=6)
        check(variant, 24, n, tokens=6)
    for tokens in range(1, 70):
        check(variant, 24, 24, tokens=tokens, top_k=1, experts=1)
