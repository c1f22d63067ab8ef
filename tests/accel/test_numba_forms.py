"""The two forms of a product, their threshold, and every size beside a tile, block or task."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from needs import need_numba

need_numba()

from numba_problems import (
    Experts,
    assert_equal_numbers,
    draw_experts,
    expected_experts,
    plan_of,
    run_experts,
    spread_plan,
)

import npmoe
from accel.numba_cpu import launch, rows
from accel.numba_cpu.host import ROWS
from accel.numba_cpu.launch import SKINNY_ROWS, Group
from npmoe import MoEParams
from npmoe.dispatch import plan_dispatch
from npmoe.testing.balls import Ball, Model
from npmoe.testing.bounds import assert_within
from npmoe.testing.expert_bounds import expert_balls

DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
STORED = [*DTYPES, np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
floats = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def engine(dtype: Any = np.float32, **options: Any) -> Any:
    return npmoe.get_backend("numba", **options)._engines[np.dtype(dtype)]


def check_exact(case: Experts, dtype: Any, stored: Any = None) -> None:
    got = run_experts(npmoe.get_backend("numba"), case.astype(dtype, stored))
    assert all(value.dtype == dtype for value in got.values())
    assert_equal_numbers(got, expected_experts(case))


# The threshold.


def test_the_form_follows_from_the_rows() -> None:
    """The last column says how many rows, the first ones, go through the wide form."""
    lanes = engine().lanes
    counts = [SKINNY_ROWS - 1, SKINNY_ROWS, SKINNY_ROWS + 1, 0, 1, *range(40, 40 + lanes)]
    group = Group(plan_of(counts).expert_offsets, 0, len(counts))
    for invariant in (False, True):
        run = engine(batch_invariant=invariant)
        tasks = run._tasks(group, 100, 48, 512).tolist()
        wide = {e: wide_rows for e, _, _, _, _, _, wide_rows in tasks}
        assert sorted(wide) == [e for e, n in enumerate(counts) if n]
        for e, wide_rows in wide.items():
            rest = counts[e] % lanes
            if invariant:
                assert wide_rows == counts[e]
            elif counts[e] <= SKINNY_ROWS:
                assert wide_rows == 0
            else:
                left = rest if rest <= run.skinny_rest else 0
                assert wide_rows == counts[e] - left
    assert engine().skinny_rest < lanes


def test_tasks_cover_every_output_of_every_row_once() -> None:
    rng = np.random.default_rng(0)
    run = engine()
    for _ in range(200):
        counts = rng.integers(0, 70, 6) * rng.integers(0, 2, 6)
        outputs, step, block = (int(rng.integers(*r)) for r in ((1, 200), (1, 99), (1, 40)))
        block *= run.lanes
        plan = plan_of(counts.tolist())
        first, last = sorted(rng.choice(7, 2, replace=False).tolist())
        group = Group(plan.expert_offsets, first, last)
        tasks = run._tasks(group, outputs, step, block)
        seen = np.zeros((plan.num_rows, outputs), int)
        padded = np.zeros(sum(-(-n // run.lanes) for n in counts[first:last]) * run.lanes, int)
        for e, begin, n, start, width, padded_first, wide_rows in tasks.tolist():
            assert plan.expert_offsets[e] <= begin < begin + n <= plan.expert_offsets[e + 1]
            seen[begin : begin + n, start : start + width] += 1
            assert n <= block
            assert 0 <= wide_rows <= n
            assert padded_first % run.lanes == 0
            if start == 0:
                padded[padded_first : padded_first + n] += 1
        inside = slice(group.base, group.base + group.num_rows)
        assert (seen[inside] == 1).all()
        assert seen.sum() == group.num_rows * outputs
        assert padded.max(initial=0) <= 1
        assert padded.sum() == group.num_rows


def test_a_short_table_of_tasks_is_not_overrun() -> None:
    offsets = plan_of([5, 0, 9, 40]).expert_offsets
    whole = np.full((60, 7), -9, np.int64)
    count = rows.cut_tasks(offsets, 0, 4, 30, 7, 8, SKINNY_ROWS, 2, 8, whole)
    part = np.full((60, 7), -9, np.int64)
    assert rows.cut_tasks(offsets, 0, 4, 30, 7, 8, SKINNY_ROWS, 2, 8, part[:11]) == count
    np.testing.assert_array_equal(part[:11], whole[:11])
    assert (part[11:] == -9).all()
    assert (whole[count:] == -9).all()
    part[...] = -9
    sizes = (30, 40, 6, 12, 50, 16, 8, 0)
    count = rows.cut_gradient_tasks(offsets, 0, 4, *sizes, whole)
    # At most 12 outputs, 6 where rows are more; of an expert without rows all columns at once.
    assert count == 3 * 3 + 3 + 5 * 3 + 5 * 3
    assert rows.cut_gradient_tasks(offsets, 0, 4, *sizes, part[:3]) == count
    assert (part[3:] == -9).all()


def test_tasks_of_weight_gradients_cover_every_number_of_every_expert_once() -> None:
    rng = np.random.default_rng(0)
    panel = engine().panel
    for _ in range(200):
        counts = rng.integers(0, 70, 6) * rng.integers(0, 2, 6)
        outputs, width, step = (int(n) for n in rng.integers(1, 400, 3))
        least, most = sorted(int(n) for n in rng.integers(1, 90, 2))
        numbers, panels = (int(n) for n in rng.integers(1, 20_000, 2))
        offsets = plan_of(counts.tolist()).expert_offsets
        first, last = sorted(rng.choice(7, 2, replace=False).tolist())
        sizes = (outputs, width, least, most, numbers, step, panel, panels)
        tasks = np.full((6 * 400 * 400, rows.TASK), -9, np.int64)
        count = rows.cut_gradient_tasks(offsets, first, last, *sizes, tasks)
        assert count <= (last - first) * -(-outputs // least) * -(-width // step)
        seen = np.zeros((6, outputs, width), int)
        for e, begin, n, start, height, column, columns in tasks[:count].tolist():
            assert (begin, n) == (offsets[e], counts[e])
            assert start % ROWS == column % panel == 0
            assert height <= -(-most // ROWS) * ROWS
            seen[e, start : start + height, column : column + columns] += 1
        assert (seen[first:last] == 1).all()
        assert seen.sum() == (last - first) * outputs * width


def test_groups_take_as_many_experts_as_they_may() -> None:
    rng = np.random.default_rng(0)
    run = engine()
    for _ in range(200):
        counts = rng.integers(0, 90, int(rng.integers(1, 12))) * rng.integers(0, 2)
        least = int(rng.integers(0, 200))
        most = max(least, counts.max() + counts.sum() // launch._SHARE)
        ends, num_groups, padded = run.groups(plan_of(counts.tolist()).expert_offsets, least)
        cuts = [0, *ends[:num_groups].tolist()]
        assert cuts[-1] == len(counts)
        assert cuts == sorted(set(cuts))
        groups = [counts[a:b] for a, b in pairwise(cuts)]
        assert all(group.sum() <= most for group in groups)
        for group, (first, *_) in pairwise(groups):
            assert group.sum() + first > most
        lanes = run.lanes
        assert padded == max(sum(-(-n // lanes) * lanes for n in group) for group in groups)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 9])
def test_stages_wait_for_what_they_read_and_overwrite(groups: int) -> None:
    counts = [3, 0, 20, 5, 1, 9, 2, 8, 4][:groups]
    offsets = plan_of(counts).expert_offsets
    tasks = np.zeros((200, rows.TASK), np.int64)
    stages = np.full((2 * groups + 2, rows.STAGE), -1, np.int64)
    ends = np.arange(1, groups + 1)
    count = rows.cut_forward(offsets, ends, groups, 10, 6, 16, 7, 4, 8, SKINNY_ROWS, 2, 8, 70,
                             tasks, stages)  # fmt: skip
    begins = stages[:, rows.BEGIN].tolist()
    assert begins == sorted(begins)
    assert begins[0] == 0
    assert begins[-1] == count
    found: dict[int, list[int]] = {rows.ACTIVATE: [], rows.PROJECT: [], rows.SUM: []}
    slots = {}
    for stage, (kind, begin, _, slot) in enumerate(stages.tolist()[:-1]):
        found[kind].append(stage)
        slots[stage] = slot
        part = tasks[begin : begins[stage + 1]]
        if kind == rows.SUM:
            assert part[:, 1].tolist() == [0, rows.STEP]
            assert part[:, 2].tolist() == [rows.STEP, 70 - rows.STEP]
        else:
            expert = len(found[kind]) - 1
            assert (part[:, 0] == expert).all()
            widths = part[:, 4].sum()
            assert widths >= (10 if kind == rows.ACTIVATE else 7) * (counts[expert] > 0)
    written, read = found[rows.ACTIVATE], found[rows.PROJECT]
    assert len(written) == len(read) == groups
    needs = stages[:, rows.NEEDS].tolist()
    assert all(need <= stage for stage, need in enumerate(needs[:-1]))
    for i in range(groups):
        assert needs[read[i]] > written[i]
        assert slots[read[i]] == slots[written[i]]
        for j in range(i):
            if slots[written[j]] == slots[written[i]]:
                assert needs[written[i]] > read[j]
    assert found[rows.SUM] == [needs[2 * groups]] == [2 * groups]


@floats
@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh", "silu"])
@pytest.mark.parametrize("position", ["output", "mid", "input"])
def test_results_beside_the_threshold_are_in_bounds(
    position: str, activation: str, dtype: Any
) -> None:
    counts = [SKINNY_ROWS - 1, SKINNY_ROWS, SKINNY_ROWS + 1]
    case = draw_experts(
        plan_of(counts), 40, 37, activation=activation, integers=False, bias=True, position=position
    ).astype(dtype)
    got = run_experts(npmoe.get_backend("numba"), case)
    want, bounds = expected_experts(case), bounds_of(case, dtype)
    for name, bound in bounds.items():
        assert_within(got[name], want[name], bound, name)
        assert bound.max() < 0.01 * np.abs(want[name]).max(), name


def bounds_of(case: Experts, dtype: Any) -> dict[str, np.ndarray]:
    """Return the kit's bounds for one slot per token."""
    model, plan = Model.of(dtype), case.plan
    tokens = plan.token_ids
    owners = np.repeat(np.arange(plan.num_experts), plan.tokens_per_expert)
    wide = case.astype(np.float64)
    balls = expert_balls(
        Ball.exact(wide.x[tokens], model),
        Ball.exact(wide.topk_weights[tokens, 0], model),
        Ball.exact(wide.grad_output[tokens], model),
        owners, wide.params, wide.cfg, None, num_sums=0,
    )  # fmt: skip
    by_token = {
        "output": balls.rows.rad,
        "hidden_states": balls.grad_inputs.rad,
        "topk_weights": balls.grad_weights.rad[:, None],
    }
    found = {}
    for name, rad in by_token.items():
        found[name] = np.zeros(rad.shape)
        found[name][tokens] = rad
    names = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    return found | {name: getattr(balls, name) for name in names}


# Every size.


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_every_residue_of_both_sizes(stored: Any) -> None:
    """H and I run through all residues of the panel, with experts of both forms and empty ones."""
    dtype = stored if stored in DTYPES else np.float32
    panel = engine(dtype).panel
    plan = plan_of([0, 1, 3, SKINNY_ROWS, SKINNY_ROWS + 1, 37, 0])
    for hidden in range(1, panel + 3):
        inner = hidden * 29 % (panel + 3) + 1
        gated = hidden % 2 == 0
        case = draw_experts(
            plan, hidden, inner, activation="reglu" if gated else "relu", bias=hidden % 3 == 0,
            position=("output", "mid", "input")[hidden % 3], dropout=hidden % 5 == 0,
        )  # fmt: skip
        check_exact(case, dtype, stored)


@floats
def test_every_number_of_rows(dtype: Any) -> None:
    panel = engine(dtype).panel
    for count in range(panel + 3):
        case = draw_experts(plan_of([count, 2, panel + 2 - count]), 19, 21)
        check_exact(case, dtype)


@floats
@pytest.mark.parametrize("depth", [3, 4100])
def test_blocks_of_rows(depth: int, dtype: Any) -> None:
    """One row less, as many as, and one more than go through at once; and twice that."""
    run = engine(dtype)
    block = run._block(depth)
    assert block == (launch._MOST_ROWS if depth == 3 else run.panel)
    for count in (block - 1, block, block + 1, 2 * block + 1):
        case = draw_experts(plan_of([2, count, 1]), depth, 5, activation="relu")
        check_exact(case, dtype)


@floats
@pytest.mark.parametrize("depth", [3, 700, 4100])
def test_widths_beside_a_task(depth: int, dtype: Any) -> None:
    step = engine(dtype)._step(depth)
    plan = plan_of([2, SKINNY_ROWS + 5])
    for width in (step - 1, step, step + 1, 2 * step, 2 * step + 1):
        # The first product's outputs, then the second's.
        check_exact(draw_experts(plan, depth, width, activation="relu"), dtype)
        if depth < 1000:
            check_exact(draw_experts(plan, width, depth, activation="relu"), dtype)


@floats
def test_widths_beside_a_task_of_the_backward_pass(dtype: Any) -> None:
    plan = plan_of([2, SKINNY_ROWS + 5])
    back = engine(dtype)._least_back_step
    columns = launch._GRADIENT_COLUMNS
    steps = (back, 2 * back, launch._GRADIENT_OUTPUTS, launch._GRADIENT_MOST, columns, 4 * columns)
    for width in sorted({s + d for s in steps for d in (-1, 0, 1)}):
        check_exact(draw_experts(plan, 7, width), dtype)
        check_exact(draw_experts(plan, width, 7), dtype)


@floats
def test_more_rows_than_a_gradient_sums_at_once(dtype: Any) -> None:
    """Also with too many rows for all panels of the other side to stay."""
    for count, hidden in ((511, 3), (512, 3), (513, 3), (1030, 70), (400, 200)):
        check_exact(draw_experts(plan_of([count, 1]), hidden, 5), dtype)


@floats
def test_many_slots_many_groups(dtype: Any) -> None:
    """More rows than one group of experts takes; tokens in several experts, some routes gone."""
    plan = spread_plan(700, 40, 3)
    dropped = np.random.default_rng(1).random((700, 3)) < 0.2
    ids = np.where(dropped, -1, np.repeat(np.arange(40), plan.tokens_per_expert)[plan.row_ids])
    plan = plan_dispatch(ids.astype(np.int32), num_experts=40)
    check_exact(draw_experts(plan, 13, 9, bias=True), dtype)


@floats
@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_no_rows(top_k: int, dtype: Any) -> None:
    """No tokens; and tokens without a route, whose output is 0."""
    for tokens in (0, 4):
        ids = np.full((tokens, top_k), -1, np.int32)
        plan = plan_dispatch(ids, num_experts=3)
        case = draw_experts(plan, 5, 4, bias=True)
        check_exact(case, dtype)
        rows_of_nothing = np.zeros((0, 5), dtype)
        combined = npmoe.get_backend("numba").combine_rows(rows_of_nothing, plan)
        np.testing.assert_array_equal(combined, np.zeros((tokens, 5)))


@floats
def test_gradients_are_added_to_what_is_there(dtype: Any) -> None:
    case = draw_experts(plan_of([0, 3, SKINNY_ROWS + 9]), 33, 20, bias=True).astype(dtype)
    backend = npmoe.get_backend("numba")
    once = run_experts(backend, case)
    p = case.params
    arrays = {n: getattr(p, n).copy() for n in MoEParams.__dataclass_fields__
              if getattr(p, n) is not None}  # fmt: skip
    out = MoEParams(**arrays)
    added = run_experts(backend, case, out=out, accumulate=True)
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        assert added[name] is getattr(out, name)
        np.testing.assert_array_equal(added[name], once[name] + getattr(p, name))
    again = run_experts(backend, case, out=out)
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        assert again[name] is getattr(out, name)
        np.testing.assert_array_equal(again[name], once[name])


@pytest.mark.parametrize("bad", [0, 257, -1, True])
def test_number_of_threads(bad: int) -> None:
    with pytest.raises(npmoe.RangeError) as caught:
        npmoe.get_backend("numba", num_threads=bad)
    assert str(caught.value) == (
        f"get_backend: num_threads must be in 1..256, got {bad!r}. None takes the usable cores."
    )
