"""Dispatch plans: the worked example, errors, drops and the invariants of the two index maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmoe.dispatch import DispatchPlan, plan_dispatch
from npmoe.errors import PlanError
from npmoe.routing import Routing
from npmoe.stats import LoadStats, load_stats, max_violation

EXAMPLE = np.array([[2, 0], [2, 1], [0, 2]], np.int32)


def lists(plan: DispatchPlan) -> tuple[Any, ...]:
    return tuple(
        getattr(plan, n).tolist() for n in ("pair_ids", "token_ids", "row_ids", "expert_offsets")
    )


def test_worked_example() -> None:
    plan = plan_dispatch(EXAMPLE, num_experts=4)
    assert lists(plan) == (
        [1, 4, 3, 0, 2, 5],
        [0, 2, 1, 0, 1, 2],
        [[3, 0], [4, 2], [1, 5]],
        [0, 2, 3, 6, 6],
    )
    for name in ("pair_ids", "token_ids", "row_ids", "expert_offsets"):
        assert getattr(plan, name).dtype == np.int32
    assert (plan.num_rows, plan.num_experts, plan.num_tokens, plan.top_k) == (6, 4, 3, 2)
    assert plan.tokens_per_expert.tolist() == [2, 1, 3, 0]
    assert plan.capacity is None


def test_worked_example_with_capacity() -> None:
    plan = plan_dispatch(EXAMPLE, num_experts=4, capacity=2)
    assert lists(plan) == (
        [1, 4, 3, 0, 2],
        [0, 2, 1, 0, 1],
        [[3, 0], [4, 2], [1, -1]],
        [0, 2, 3, 5, 5],
    )
    assert plan.capacity == 2
    weights = np.array([[0.1, 0.9], [0.6, 0.4], [0.8, 0.2]])
    plan = plan_dispatch(
        EXAMPLE, num_experts=4, capacity=1, drop_policy="probability", topk_weights=weights
    )
    # Expert 0: routes 1 (0.9) and 4 (0.8); expert 2: routes 0 (0.1), 2 (0.6) and 5 (0.2).
    assert lists(plan) == ([1, 3, 2], [0, 1, 1], [[-1, 0], [2, 1], [-1, -1]], [0, 1, 2, 3, 3])


def test_rows_stay_in_token_order_inside_an_expert() -> None:
    ids = np.zeros((4, 1), np.int32)
    weights = np.array([[0.1], [0.9], [0.3], [0.5]])
    plan = plan_dispatch(
        ids, num_experts=1, capacity=3, drop_policy="probability", topk_weights=weights
    )
    assert plan.pair_ids.tolist() == [1, 2, 3]


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_ties_of_probability_go_to_the_lower_token(value: float) -> None:
    ids = np.array([[0], [1], [0], [0], [1], [0]], np.int32)
    arguments: dict[str, Any] = {"num_experts": 2, "capacity": 2}
    by_position = plan_dispatch(ids, **arguments)
    by_weight = plan_dispatch(
        ids, **arguments, drop_policy="probability", topk_weights=np.full((6, 1), value)
    )
    assert by_position.pair_ids.tolist() == by_weight.pair_ids.tolist() == [0, 2, 1, 4]


def test_too_many_routes_is_an_error_before_any_work() -> None:
    ids = np.broadcast_to(np.int32(0), (2**30, 2))  # a view of one number
    with pytest.raises(PlanError) as caught:
        plan_dispatch(ids, num_experts=4)
    assert str(caught.value) == (
        "plan_dispatch: topk_ids must hold fewer than 2**31 routes, got 2147483648. "
        "Split the batch."
    )


@pytest.mark.parametrize("bad", [-2, 4, 2**20, -(2**20)])
def test_ids_out_of_range(bad: int) -> None:
    ids = EXAMPLE.copy()
    ids[1, 1] = bad
    with pytest.raises(PlanError) as caught:
        plan_dispatch(ids, num_experts=4)
    assert str(caught.value) == (
        f"plan_dispatch: topk_ids must lie in -1..3, got {bad}. -1 means no expert."
    )
    ids[1, 1] = 3
    assert plan_dispatch(ids, num_experts=4).num_rows == 6


def test_probability_needs_weights() -> None:
    with pytest.raises(PlanError) as caught:
        plan_dispatch(EXAMPLE, num_experts=4, capacity=1, drop_policy="probability")
    assert str(caught.value) == (
        "plan_dispatch: topk_weights must be given with drop_policy='probability', got None."
    )


def test_minus_one_is_nowhere() -> None:
    plan = plan_dispatch(np.array([[-1, 1], [-1, -1], [0, -1]], np.int32), num_experts=2)
    assert lists(plan) == ([4, 1], [2, 0], [[-1, 1], [-1, -1], [0, -1]], [0, 1, 2])
    nothing = plan_dispatch(np.full((2, 2), -1, np.int32), num_experts=2, capacity=1)
    assert lists(nothing) == ([], [], [[-1, -1], [-1, -1]], [0, 0, 0])


@pytest.mark.parametrize("capacity", [None, 0, 5])
def test_no_tokens(capacity: int | None) -> None:
    plan = plan_dispatch(np.empty((0, 2), np.int32), num_experts=3, capacity=capacity)
    assert lists(plan) == ([], [], [], [0, 0, 0, 0])
    assert plan.row_ids.shape == (0, 2)


def test_capacity_zero_drops_all() -> None:
    plan = plan_dispatch(EXAMPLE, num_experts=4, capacity=0)
    assert lists(plan) == ([], [], [[-1, -1]] * 3, [0] * 5)


def check_invariants(plan: DispatchPlan, ids: np.ndarray, num_experts: int) -> None:
    flat, row_ids = ids.reshape(-1), plan.row_ids.reshape(-1)
    rows = np.arange(plan.num_rows)
    assert len(plan.pair_ids) == plan.num_rows
    np.testing.assert_array_equal(row_ids[plan.pair_ids], rows)
    kept = np.flatnonzero(row_ids >= 0)
    np.testing.assert_array_equal(plan.pair_ids[row_ids[kept]], kept)
    assert len(kept) == plan.num_rows
    np.testing.assert_array_equal(plan.token_ids, plan.pair_ids // max(ids.shape[1], 1))
    assert plan.expert_offsets.shape == (num_experts + 1,)
    assert plan.expert_offsets[0] == 0
    experts = flat[plan.pair_ids]
    np.testing.assert_array_equal(
        np.repeat(np.arange(num_experts), np.diff(plan.expert_offsets)), experts
    )
    order = np.lexsort((plan.pair_ids, experts))
    np.testing.assert_array_equal(order, rows)
    chosen = np.bincount(flat[flat >= 0], minlength=num_experts)
    limit = chosen if plan.capacity is None else np.minimum(chosen, plan.capacity)
    np.testing.assert_array_equal(plan.tokens_per_expert, limit)


@given(
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.integers(0, 12),
    num_experts=st.integers(1, 9),
    capacity=st.none() | st.integers(0, 5),
    policy=st.sampled_from(["position", "probability"]),
    data=st.data(),
)
def test_invariants(
    seed: int,
    num_tokens: int,
    num_experts: int,
    capacity: int | None,
    policy: Any,
    data: st.DataObject,
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(num_experts), (num_tokens, 1)), axis=1)
    ids = np.where(rng.random((num_tokens, top_k)) < 0.2, -1, order[:, :top_k]).astype(np.int32)
    weights = rng.integers(0, 4, ids.shape) / 4.0  # many ties
    plan = plan_dispatch(
        ids, num_experts=num_experts, capacity=capacity, drop_policy=policy, topk_weights=weights
    )
    check_invariants(plan, ids, num_experts)
    if capacity is None:
        return
    for e in range(num_experts):
        routes = np.flatnonzero(ids.reshape(-1) == e)
        if policy == "probability":
            routes = routes[np.argsort(-weights.reshape(-1)[routes], kind="stable")]
        mine = plan.pair_ids[plan.expert_offsets[e] : plan.expert_offsets[e + 1]]
        assert mine.tolist() == sorted(routes[:capacity].tolist())


@pytest.mark.parametrize("num_experts", [1, 3, 255, 256, 257, 1025, 65534, 65535, 65536, 70000])
@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("capacity", [None, 1])
def test_many_experts(num_experts: int, policy: Any, capacity: int | None) -> None:
    rng = np.random.default_rng(4)
    ids = rng.integers(-1, num_experts, (300, 1)).astype(np.int32)
    ids[:4, 0] = (num_experts - 1, -1, 0, num_experts - 1)
    plan = plan_dispatch(
        ids,
        num_experts=num_experts,
        capacity=capacity,
        drop_policy=policy,
        topk_weights=rng.random((300, 1)),
    )
    check_invariants(plan, ids, num_experts)


def stats_of(ids: np.ndarray, num_experts: int, capacity: int | None) -> LoadStats:
    plan = plan_dispatch(ids, num_experts=num_experts, capacity=capacity)
    routing = Routing(
        topk_ids=ids,
        topk_weights=np.ones(ids.shape),
        probs=np.ones((len(ids), num_experts)),
        router_logits=np.ones((len(ids), num_experts)),
        token_mask=None,
        sequence_length=len(ids),
    )
    return load_stats(routing, plan, num_experts)


def test_stats_of_the_worked_example() -> None:
    stats = stats_of(np.array([[2, 0], [2, 1], [2, 0], [0, -1]]), 4, capacity=1)
    assert stats.chosen_per_expert.tolist() == [3, 1, 3, 0]
    assert stats.kept_per_expert.tolist() == [1, 1, 1, 0]
    assert stats.num_tokens == 4
    assert stats.dropped_routes == 4
    assert stats.partially_dropped_tokens == 1  # token 1 keeps expert 1
    assert stats.fully_dropped_tokens == 2  # tokens 2 and 3
    assert stats.dropped_per_slot.tolist() == [3, 1]
    assert stats.drop_rate == 4 / 7
    assert stats.max_violation == 3 * 4 / 7 - 1
    assert stats.dead_experts == 1
    assert stats.utilisation == 3 / 4


def test_stats_without_drops_or_routes() -> None:
    dropless = stats_of(EXAMPLE, 4, None)
    assert (dropless.dropped_routes, dropless.drop_rate, dropless.utilisation) == (0, 0.0, None)
    assert stats_of(EXAMPLE, 4, 0).utilisation is None
    assert stats_of(EXAMPLE, 4, 0).drop_rate == 1.0
    nothing = stats_of(np.empty((0, 2), np.int64), 3, None)
    assert (nothing.drop_rate, nothing.max_violation, nothing.dead_experts) == (0.0, 0.0, 3)
    assert max_violation(np.array([5, 5, 5])) == 0.0
    assert max_violation(np.array([0, 0, 6])) == 2.0
