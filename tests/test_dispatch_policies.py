"""Who gets a row: drop policies, slots, stretches of tokens, identity experts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmoe import PlanError, RangeError
from npmoe._config_rules import LITERALS
from npmoe.dispatch import DispatchPlan, capacity_slots, plan_dispatch
from npmoe.testing.strategies import topk_ids_arrays

# Expert 0 is wanted by every token: first choice of 0 and 3, second of 1 and 2.
IDS = np.array([[0, 1], [2, 0], [1, 0], [0, 2]], np.int32)
WEIGHTS = np.array([[0.3, 0.2], [0.6, 0.4], [0.8, 0.1], [0.9, 0.05]])


def plan(capacity: int, policy: str, order: str = "priority") -> DispatchPlan:
    return plan_dispatch(
        IDS,
        num_experts=3,
        capacity=capacity,
        drop_policy=policy,  # type: ignore[arg-type]
        slot_order=order,  # type: ignore[arg-type]
        topk_weights=WEIGHTS,
        rng=np.random.default_rng(0),
    )


@pytest.mark.parametrize(
    ("policy", "queue"),
    [
        ("position", [0, 1, 2, 3]),
        ("k_major", [0, 3, 1, 2]),
        ("batch_priority", [3, 0, 2, 1]),  # tokens by first weight: 3, 2, 1, 0
        ("probability", [3, 1, 0, 2]),
    ],
)
def test_the_queue_at_expert_0(policy: str, queue: list[int]) -> None:
    column = [0, 1, 1, 0]
    for capacity in range(5):
        by_priority, by_token = plan(capacity, policy), plan(capacity, policy, "token")
        kept = [t for t in range(4) if by_priority.row_ids[t, column[t]] >= 0]
        assert kept == sorted(queue[:capacity])
        np.testing.assert_array_equal(by_priority.row_ids, by_token.row_ids)
        assert by_priority.slot_ids is not None
        assert by_token.slot_ids is not None
        for t in range(4):
            slot = queue.index(t) if t in queue[:capacity] else -1
            assert by_priority.slot_ids[t, column[t]] == slot
            place = kept.index(t) if t in kept else -1
            assert by_token.slot_ids[t, column[t]] == place


def test_a_random_queue_is_the_generators() -> None:
    got = plan(2, "random")
    order = np.argsort(np.random.default_rng(0).random(8))
    wanted = [p for p in order if IDS.ravel()[p] == 0]
    assert got.slot_ids is not None
    slots = got.slot_ids.ravel()
    assert [slots[p] for p in wanted] == [0, 1, -1, -1]


def test_stretches_have_their_own_rows() -> None:
    ids = np.zeros((6, 1), np.int32)
    got = plan_dispatch(ids, num_experts=2, capacity=[1, 2, 0])
    assert got.row_ids[:, 0].tolist() == [0, -1, 1, 2, -1, -1]
    assert got.slot_ids is not None
    assert got.slot_ids[:, 0].tolist() == [0, -1, 0, 1, -1, -1]
    assert got.capacity == 3
    assert plan_dispatch(ids, num_experts=2).slot_ids is None


def test_identity_experts_get_no_rows() -> None:
    ids = np.array([[0, 3], [4, 1]], np.int32)
    got = plan_dispatch(ids, num_experts=3, num_identity_experts=2)
    assert got.row_ids.tolist() == [[0, -1], [-1, 1]]
    assert got.expert_offsets.tolist() == [0, 1, 2, 2]
    with pytest.raises(PlanError) as caught:
        plan_dispatch(ids, num_experts=3, num_identity_experts=1)
    assert str(caught.value) == (
        "plan_dispatch: topk_ids must lie in -1..3, got 4. -1 means no expert."
    )


def test_what_policies_need() -> None:
    for policy in ("probability", "batch_priority"):
        with pytest.raises(PlanError) as caught:
            plan_dispatch(IDS, num_experts=3, capacity=1, drop_policy=policy)  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"plan_dispatch: topk_weights must be given with drop_policy={policy!r}, got None."
        )
    with pytest.raises(RangeError) as caught_range:
        plan_dispatch(IDS, num_experts=3, capacity=1, drop_policy="random")
    assert str(caught_range.value) == (
        "plan_dispatch: rng must be given with drop_policy='random', got None. Pass a numpy "
        "Generator, or use cfg.for_evaluation()."
    )
    # Without a capacity nothing is dropped, so nothing is needed.
    assert plan_dispatch(IDS, num_experts=3, drop_policy="random").num_rows == 8


@given(
    topk_ids_arrays(),
    st.integers(0, 4),
    st.sampled_from(LITERALS["drop_policy"]),
    st.sampled_from(LITERALS["slot_order"]),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 99),
)
def test_every_plan_is_canonical_and_full(
    ids: np.ndarray, capacity: int, policy: str, order: str, stretches: int, seed: int
) -> None:
    """Rows by expert and route, no expert over its capacity, none with room refuses."""
    ids = ids[: len(ids) // stretches * stretches]
    weights = np.random.default_rng(seed).integers(0, 4, ids.shape) / 4.0
    num_experts = int(ids.max(initial=0)) + 1
    got = plan_dispatch(
        ids,
        num_experts=num_experts,
        capacity=[capacity] * stretches,
        drop_policy=policy,  # type: ignore[arg-type]
        slot_order=order,  # type: ignore[arg-type]
        topk_weights=weights,
        rng=np.random.default_rng(seed),
    )
    experts = ids.ravel()[got.pair_ids]
    assert (np.diff(experts.astype(np.int64) * ids.size + got.pair_ids) > 0).all()
    assert np.array_equal(got.row_ids.ravel()[got.pair_ids], np.arange(got.num_rows))
    assert (got.row_ids >= 0).sum() == got.num_rows == got.expert_offsets[-1]
    assert got.slot_ids is not None
    np.testing.assert_array_equal(got.slot_ids >= 0, got.row_ids >= 0)
    length = len(ids) // stretches
    for b in range(stretches):
        rows = slice(b * length, (b + 1) * length)
        for e in range(num_experts):
            here = ids[rows] == e
            slots = got.slot_ids[rows][here & (got.row_ids[rows] >= 0)]
            assert sorted(slots) == list(range(min(capacity, int(here.sum()))))
            if order == "token" or policy == "position":
                assert sorted(slots) == list(slots)
    table = capacity_slots(got, stretches=stretches)
    used = np.argwhere(table < ids.size)
    assert sorted(table[table < ids.size]) == sorted(got.pair_ids)
    for b, e, slot in used:
        token, k = divmod(int(table[b, e, slot]), ids.shape[1])
        assert (ids[token, k], got.slot_ids[token, k]) == (e, slot)
        assert token // length == b


def test_slots_of_what_has_none() -> None:
    with pytest.raises(PlanError) as caught:
        capacity_slots(plan_dispatch(IDS, num_experts=3))
    assert str(caught.value) == ("capacity_slots: plan must have a capacity, got a dropless one.")
    both = plan_dispatch(np.zeros((4, 1), np.int32), num_experts=1, capacity=[1, 1])
    assert capacity_slots(both, stretches=2).tolist() == [[[0]], [[2]]]
    with pytest.raises(PlanError) as caught:
        capacity_slots(both)
    assert str(caught.value) == (
        "capacity_slots: stretches must be those of the plan, got 1. Two routes share a slot."
    )
    empty = plan_dispatch(IDS, num_experts=3, capacity=0)
    assert capacity_slots(empty).shape == (1, 3, 0)
