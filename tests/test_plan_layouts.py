"""Other programs' plans: examples by hand, there and back, what is lost, and contradictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmoe.dispatch import DispatchPlan, capacity_slots, plan_dispatch
from npmoe.errors import PlanError
from npmoe.plans.blocks import align_block_size
from npmoe.plans.layouts import (
    ScatterMoEPlan,
    from_group_sizes,
    from_megablocks,
    from_scattermoe,
    from_sonic,
    from_torch_offsets,
    to_group_sizes,
    to_megablocks,
    to_scattermoe,
    to_sonic,
    to_torch_offsets,
)
from npmoe.plans.tables import (
    from_blocks,
    from_capacity_slots,
    from_routing_map,
    from_routing_probs,
    to_blocks,
    to_routing_map,
    to_routing_probs,
)

EXAMPLE = np.array([[2, 0], [2, 1], [0, 2]], np.int32)
PLAN = plan_dispatch(EXAMPLE, num_experts=4)
SIZES = {"num_tokens": 3, "top_k": 2}
ARRAYS = ("pair_ids", "token_ids", "row_ids", "expert_offsets")


def same(a: DispatchPlan, b: DispatchPlan, *, slots: bool = False) -> None:
    for name in (*ARRAYS, "slot_ids") if slots else ARRAYS:
        x, y = getattr(a, name), getattr(b, name)
        if x is None or y is None:
            assert x is y
            continue
        assert x.dtype == y.dtype == np.int32, name
        np.testing.assert_array_equal(x, y, err_msg=name)
    assert (a.num_tokens, a.top_k) == (b.num_tokens, b.top_k)
    if slots:
        assert a.capacity == b.capacity


def lists(layout: Any) -> list[list[int]]:
    assert all(a.dtype == np.int32 for a in layout)
    return [a.tolist() for a in layout]


@st.composite
def choices(draw: st.DrawFn, holes: bool = True) -> tuple[np.ndarray, int]:
    E = draw(st.integers(1, 7))
    T, K = draw(st.integers(0, 9)), draw(st.integers(1, E))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :K].astype(np.int32)
    if holes:
        ids[rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -1
    return ids, E


@st.composite
def plans(draw: st.DrawFn, holes: bool = True) -> DispatchPlan:
    ids, E = draw(choices(holes))
    capacity = draw(st.none() | st.integers(0, 4)) if holes else None
    return plan_dispatch(ids, num_experts=E, capacity=capacity)


def test_worked_examples() -> None:
    experts, routes = [0, 0, 1, 2, 2, 2], [1, 4, 3, 0, 2, 5]
    assert lists(to_megablocks(PLAN)) == [routes, experts, [2, 3, 6, 6], [128, 256, 384, 384]]
    assert to_megablocks(PLAN, block_size=2).padded_bins.tolist() == [2, 4, 8, 8]
    assert lists(to_scattermoe(PLAN)) == [experts, routes, [2, 3, 6, 6]]
    assert lists(to_sonic(PLAN)) == [
        [0, 2, 3, 6, 6],
        [0, 2, 1, 0, 1, 2],
        routes,
        [3, 0, 4, 2, 1, 5],
        [0, 2, 4, 6],
    ]
    assert lists([to_torch_offsets(PLAN), to_group_sizes(PLAN)]) == [[2, 3, 6, 6], [2, 1, 3, 0]]
    assert to_routing_map(PLAN).tolist() == [
        [True, False, True, False],
        [False, True, True, False],
        [True, False, True, False],
    ]
    weights = np.array([[0.5, 0.25], [1.0, 2.0], [4.0, 8.0]], np.float32)
    probs = to_routing_probs(PLAN, weights)
    assert probs.dtype == np.float32
    assert probs.tolist() == [[0.25, 0, 0.5, 0], [0, 2.0, 1.0, 0], [4.0, 0, 8.0, 0]]


def test_sonic_numbers_kept_routes_without_gaps() -> None:
    plan = plan_dispatch(np.array([[-1, 1], [0, -1], [1, 0]], np.int32), num_experts=2)
    layout = to_sonic(plan)
    # Kept: route 1 of token 0, 2 of token 1, 4 and 5 of token 2.
    assert lists(layout) == [[0, 2, 4], [1, 2, 0, 2], [1, 3, 0, 2], [2, 0, 3, 1], [0, 1, 2, 4]]
    back = from_sonic(layout)
    assert back.row_ids.tolist() == [[2, -1], [0, -1], [3, 1]]
    assert from_sonic(layout, top_k=3).row_ids.tolist() == [[2, -1, -1], [0, -1, -1], [3, 1, -1]]


ROUND_TRIPS: dict[str, Callable[[DispatchPlan, dict[str, int]], DispatchPlan]] = {
    "megablocks": lambda p, sizes: from_megablocks(to_megablocks(p), **sizes),
    "scattermoe": lambda p, sizes: from_scattermoe(to_scattermoe(p), **sizes),
    "torch": lambda p, sizes: from_torch_offsets(to_torch_offsets(p), p.pair_ids, **sizes),
    "jax": lambda p, sizes: from_group_sizes(to_group_sizes(p), p.pair_ids, **sizes),
    **{
        dialect: lambda p, sizes, d=dialect: from_blocks(
            to_blocks(p, block_size=3, dialect=d),
            block_size=3,
            num_experts=p.num_experts,
            **sizes,
        )
        for dialect in ("vllm", "vllm_old_tail", "sglang", "naive")
    },
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
@given(plan=plans())
def test_there_and_back(name: str, plan: DispatchPlan) -> None:
    before = [getattr(plan, a).copy() for a in ARRAYS]
    back = ROUND_TRIPS[name](plan, {"num_tokens": plan.num_tokens, "top_k": plan.top_k})
    same(plan, back)
    assert back.capacity is None
    for a, x in zip(ARRAYS, before, strict=True):
        np.testing.assert_array_equal(getattr(plan, a), x)


@given(plan=plans(holes=False))
def test_sonic_there_and_back(plan: DispatchPlan) -> None:
    same(plan, from_sonic(to_sonic(plan), top_k=plan.top_k))


@given(plan=plans())
def test_sonic_loses_slots_only(plan: DispatchPlan) -> None:
    back = from_sonic(to_sonic(plan), top_k=plan.top_k)
    np.testing.assert_array_equal(back.token_ids, plan.token_ids)
    np.testing.assert_array_equal(back.expert_offsets, plan.expert_offsets)
    for kept, row_ids in zip(back.row_ids, plan.row_ids, strict=True):
        assert kept[kept >= 0].tolist() == row_ids[row_ids >= 0].tolist()
        assert (np.diff((kept < 0).astype(int)) >= 0).all()


@given(plan=plans(), seed=st.integers(0, 2**32 - 1))
def test_a_routing_map_loses_slots_only(plan: DispatchPlan, seed: int) -> None:
    weights = np.random.default_rng(seed).random((plan.num_tokens, plan.top_k))
    routing_map, probs = to_routing_map(plan), to_routing_probs(plan, weights)
    back = from_routing_map(routing_map, top_k=plan.top_k)
    np.testing.assert_array_equal(to_routing_map(back), routing_map)
    np.testing.assert_array_equal(back.expert_offsets, plan.expert_offsets)
    np.testing.assert_array_equal(back.token_ids, plan.token_ids)
    there = from_routing_probs(probs, back)
    np.testing.assert_array_equal(to_routing_probs(back, there), probs)
    kept = plan.row_ids >= 0
    np.testing.assert_array_equal(from_routing_probs(probs, plan), np.where(kept, weights, 0.0))
    rows_of = np.sort(np.where(kept, plan.row_ids, 2**30), axis=1)
    np.testing.assert_array_equal(
        np.sort(np.where(back.row_ids >= 0, back.row_ids, 2**30), axis=1), rows_of
    )


def test_a_map_orders_a_tokens_experts() -> None:
    plan = from_routing_map(np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]]))
    assert plan.top_k == 2
    assert plan.row_ids.tolist() == [[0, 2], [-1, -1], [1, -1]]
    assert from_routing_map(np.zeros((2, 3), bool)).row_ids.shape == (2, 0)


@pytest.mark.parametrize("dialect", ["vllm", "vllm_old_tail", "sglang", "naive"])
@given(plan=plans(), B=st.integers(1, 5))
def test_blocks_of_a_plan_are_those_of_its_kept_ids(
    dialect: Any, plan: DispatchPlan, B: int
) -> None:
    ids = np.full(plan.num_tokens * plan.top_k, -1)
    ids[plan.pair_ids] = np.repeat(np.arange(plan.num_experts), plan.tokens_per_expert)
    expected = align_block_size(
        ids.reshape(plan.num_tokens, plan.top_k), B, plan.num_experts, dialect=dialect
    )
    for a, b in zip(to_blocks(plan, block_size=B, dialect=dialect), expected, strict=True):
        if b is None:
            assert a is None
            continue
        assert a is not None
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("invalid", ["keep", "drop"])
def test_blocks_of_one_rank(invalid: Any) -> None:
    numbers = np.array([1, -1, 0, -1])
    blocks = align_block_size(EXAMPLE, 2, 4, numbers, invalid=invalid)
    plan = from_blocks(blocks, block_size=2, num_experts=2, **SIZES)
    local = np.append(numbers, -1)[EXAMPLE]
    same(plan, plan_dispatch(local.astype(np.int32), num_experts=2))


@given(chosen=choices(), capacity=st.integers(0, 4), order=st.sampled_from(["priority", "token"]))
def test_capacity_slots_there_and_back(
    chosen: tuple[np.ndarray, int], capacity: int, order: Any
) -> None:
    ids, E = chosen
    plan = plan_dispatch(
        ids, num_experts=E, capacity=capacity, drop_policy="k_major", slot_order=order
    )
    sizes = {"num_tokens": plan.num_tokens, "top_k": plan.top_k}
    same(plan, from_capacity_slots(capacity_slots(plan), **sizes, capacity=capacity), slots=True)


def test_capacity_slots_of_sequences() -> None:
    ids = np.array([[0, 1], [0, 2], [1, 0], [2, 0]], np.int32)
    plan = plan_dispatch(ids, num_experts=3, capacity=[1, 2])
    table = capacity_slots(plan, stretches=2)
    back = from_capacity_slots(table, num_tokens=4, top_k=2, capacity=3)
    same(plan, back, slots=True)
    assert from_capacity_slots(table, num_tokens=4, top_k=2).capacity == 4
    with pytest.raises(PlanError) as caught:
        from_capacity_slots(table[::-1], num_tokens=4, top_k=2)
    assert str(caught.value) == (
        "from_capacity_slots: table must hold every route in the buffers of its own sequence, got "
        "route 5 of sequence 1 in those of 0."
    )


def test_rows_of_an_unstable_sort_come_out_in_order() -> None:
    experts, routes = np.array([0, 0, 1, 2, 2, 2]), np.array([4, 1, 3, 5, 0, 2])
    layout = ScatterMoEPlan(experts, routes, np.array([2, 3, 6, 6]))
    same(from_scattermoe(layout, **SIZES), PLAN)


def test_a_plan_from_a_device_has_a_tail() -> None:
    tail = np.full(2, -1, np.int32)
    plan = plan_dispatch(np.array([[2, -1], [-1, 1]], np.int32), num_experts=3)
    long = DispatchPlan(
        pair_ids=np.append(plan.pair_ids, tail),
        token_ids=np.append(plan.token_ids, tail),
        row_ids=plan.row_ids,
        expert_offsets=plan.expert_offsets,
        num_tokens=2,
        top_k=2,
    )
    for convert in (to_megablocks, to_scattermoe, to_sonic, to_routing_map):
        for a, b in zip(convert(long), convert(plan), strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(to_blocks(long, block_size=2), to_blocks(plan, block_size=2), strict=True):
        np.testing.assert_array_equal(a, b)
    weights = np.ones((2, 2))
    np.testing.assert_array_equal(to_routing_probs(long, weights), to_routing_probs(plan, weights))


def test_a_layout_shares_no_memory_with_its_plan() -> None:
    layouts = (to_megablocks(PLAN), to_scattermoe(PLAN), to_sonic(PLAN), [to_torch_offsets(PLAN)])
    for layout in layouts:
        for array in layout:
            assert not any(np.shares_memory(array, getattr(PLAN, a)) for a in ARRAYS)
