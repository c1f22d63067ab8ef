"""Grouped products on tensor cores, from their compiled PTX: right numbers, no findings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from emulation import need_emulation
from kernel_references import check_grouped
from kernel_runs import (
    EPILOGUES,
    TILE,
    TYPES,
    Curve,
    Variant,
    draw_problem,
    run_grouped,
)

from npmoe.testing import ptx

need_emulation()
EXHAUSTIVE = pytest.mark.exhaustive
SCHEDULES = ("in-order", "reversed", 7)
GATED = (
    "swiglu", "swiglu_oai", "swiglu_clamp_pre", "swiglu_clamp_post", "geglu", "geglu_tanh", "reglu",
)  # fmt: skip
PLAIN = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

FORMS = [(e, g) for e in EPILOGUES for g in (False, True) if not g or e.startswith("ACTIVATE")]
ALL = [
    Variant(operand, *form, *rest)
    for operand, form, *rest in itertools.product(
        TYPES, FORMS, (False, True), (False, True), (16, 64, 128), (True, False)
    )
]


def pairs_of(v: Variant) -> set[tuple]:
    """Every two choices that a variant makes together."""
    form = (v.epilogue, v.gated)
    choices = enumerate((v.operand, form, v.gather, v.transposed, v.block, v.aligned))
    return set(itertools.combinations(choices, 2))


def cover_pairs() -> list[Variant]:
    """Few variants in which every pair of choices occurs: the best next one until none is left."""
    left = set().union(*map(pairs_of, ALL))
    chosen = []
    while left:
        chosen.append(max(ALL, key=lambda v: len(pairs_of(v) & left)))
        left -= pairs_of(chosen[-1])
    return chosen


CHOSEN = cover_pairs()


def draw_shape(rng: np.random.Generator, v: Variant) -> tuple[int, int]:
    """N and K: about one tile and a few stages, any residue that the variant allows."""
    unit = v.chunk if v.aligned else 1
    halves = 2 if v.gated else 1
    N = int(rng.integers(1, 200 // (unit * halves) + 1)) * unit * halves
    return N, int(rng.integers(1, 130 // unit + 1)) * unit


def check_conflicts(result: ptx.LaunchResult) -> None:
    """The main loop and the copies take no pass over the banks more than they must."""
    for t in result.bank_conflicts():
        assert t.instruction.source is not None
        assert not t.instruction.source.file.endswith(("mma.cuh", "panels.cuh")), t


def test_sample_is_small():
    assert len(ALL) == 432
    assert len(CHOSEN) < 30


@pytest.mark.parametrize("variant", CHOSEN, ids=str)
def test_exact(variant):
    """Integers, so that every number has one right value, under three schedules."""
    rng = np.random.default_rng(CHOSEN.index(variant))
    for schedule in SCHEDULES:
        N, K = draw_shape(rng, variant)
        tokens = int(rng.choice([1, 9, 70]))
        problem = draw_problem(
            variant, N, K, tokens=tokens, top_k=int(rng.integers(1, 4)),
            experts=int(rng.choice([1, 5, 40])),
            bias=bool(rng.integers(2)), keep_y=bool(rng.integers(2)),
        )  # fmt: skip
        check_conflicts(run_grouped(problem, schedule=schedule, traffic=schedule == 7))
        check_grouped(problem, exact=True)


@pytest.mark.parametrize("variant", CHOSEN, ids=str)
def test_within_bounds(variant):
    """Real numbers and smooth curves."""
    i = CHOSEN.index(variant)
    N, K = draw_shape(np.random.default_rng(100 + i), variant)
    curve = Curve(GATED[i % len(GATED)] if variant.gated else PLAIN[i % len(PLAIN)])
    problem = draw_problem(variant, N, K, exact=False, curve=curve)
    run_grouped(problem, schedule=SCHEDULES[i % 3])
    check_grouped(problem, exact=False)


@pytest.mark.parametrize("operand", ["bfloat16", pytest.param("float", marks=EXHAUSTIVE)])
def test_same_bits_for_every_block(operand):
    results = []
    for block in (16, 64, 128):
        problem = draw_problem(Variant(operand, block=block), 136, 104, exact=False)
        run_grouped(problem)
        results.append(problem.y)
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()


@pytest.mark.parametrize("block", [16, 64, 128])
def test_no_bank_conflicts_in_whole_tiles(block):
    """The epilogue too; in tiles with tails lanes that sit out confuse its figures."""
    variant = Variant("bfloat16", block=block)
    problem = draw_problem(variant, 2 * TILE, 96, tokens=2 * block, experts=2)
    result = run_grouped(problem, traffic=True)
    check_grouped(problem, exact=True)
    assert not result.bank_conflicts()
    assert {t.space for t in result.traffic} == {"shared", "global"}


@EXHAUSTIVE
@pytest.mark.parametrize("variant", ALL, ids=str)
def test_every_variant(variant):
    rng = np.random.default_rng(ALL.index(variant))
    for schedule in SCHEDULES:
        problem = draw_problem(variant, *draw_shape(rng, variant), tokens=40)
        check_conflicts(run_grouped(problem, schedule=schedule, traffic=True))
        check_grouped(problem, exact=True)


@EXHAUSTIVE
@pytest.mark.parametrize("variant", CHOSEN, ids=str)
def test_every_residue(variant):
    """Every N and K that a tile and a stage can end with."""
    unit = variant.chunk if variant.aligned else 1
    half = 2 if variant.gated else 1
    shapes = [(n * half, 40) for n in range(unit, TILE + unit + 1, unit)]
    shapes += [(3 * unit * half, k) for k in range(unit, 66 + unit, unit)]
    for N, K in shapes:
        problem = draw_problem(variant, N, K, tokens=5)
        run_grouped(problem)
        check_grouped(problem, exact=True)


def sweep_coverage(variant: Variant) -> ptx.Coverage:
    """All that a variant can meet, in few launches, also beyond the limits of the curves."""
    unit = (variant.chunk if variant.aligned else 1) * (2 if variant.gated else 1)
    active = variant.epilogue.startswith("ACTIVATE")
    names = (GATED if variant.gated else PLAIN) if active else [None]
    total = None
    for name, full in itertools.product(names, (True, False)):
        curve = None if name is None else Curve(name)
        N, K = (3 * TILE + unit, 136 + unit) if full and name == names[0] else (2 * unit, 2 * unit)
        problem = draw_problem(
            variant, N, K, tokens=70, experts=2, bias=full, keep_y=full or name != names[0],
            exact=False, curve=curve,
        )  # fmt: skip
        if name is not None:
            widest = problem.y if "BACK" in variant.epilogue else problem.weight
            widest.reshape(-1)[::3] *= 16
        result = run_grouped(problem)
        check_grouped(problem, exact=False)
        total = result.coverage if total is None else total + result.coverage
    return total


@pytest.mark.parametrize("variant", [
    Variant("bfloat16", "STORE", block=16),
    Variant("half16", "ROUTED", gather=True, transposed=True, aligned=False),
    Variant("float", "ACTIVATE", gather=True, aligned=False),
    Variant("bfloat16", "ACTIVATE", gated=True, gather=True),
    Variant("bfloat16", "ACTIVATE_BACKWARD", gated=True, transposed=True),
], ids=str)  # fmt: skip
def test_coverage(variant):
    """All but branches around loops that always begin."""
    coverage = sweep_coverage(variant)
    assert coverage.fraction >= 0.95
    assert [i.text for i in coverage.missed if i.opcode != "bra"] == []
