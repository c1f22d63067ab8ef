"""Load statistics: metrics of counts by hand, drops by slot, identity experts, the report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmoe.dispatch import plan_dispatch
from npmoe.routing import Routing
from npmoe.stats import (
    LoadStats,
    coefficient_of_variation,
    count_entropy,
    gini,
    load_stats,
    max_violation,
)

U = 2.0**-53
IDS = [[2, 0], [2, 1], [2, 0], [0, -1]]


def stats_of(
    ids: Any, num_experts: int, capacity: int | None = None, *, probs: Any = None, identity: int = 0
) -> LoadStats:
    ids = np.array(ids, np.int32)
    probs = np.ones((len(ids), num_experts)) if probs is None else np.array(probs)
    routing = Routing(
        topk_ids=ids,
        topk_weights=np.ones(ids.shape),
        probs=probs,
        router_logits=np.zeros(probs.shape),
        sequence_length=len(ids),
    )
    plan = plan_dispatch(
        ids, num_experts=num_experts, num_identity_experts=identity, capacity=capacity
    )
    return load_stats(routing, plan, num_experts)


def test_worked_example() -> None:
    stats = stats_of(IDS, 4, capacity=1)
    np.testing.assert_array_equal(stats.fraction, np.array([3, 1, 3, 0]) / 7)
    assert stats.chosen_per_slot.tolist() == [4, 3]
    assert stats.dropped_per_slot.tolist() == [3, 1]
    assert stats.overflow_per_slot.tolist() == [3 / 4, 1 / 3]
    assert stats.top_share_per_slot.tolist() == [3 / 4, 2 / 3]
    # Mean 7/4; squares 25, 9, 25 and 49 sixteenths.
    assert stats.variation == pytest.approx(math.sqrt(108 / 16 / 4) / (7 / 4), rel=8 * U)
    # Differences 2, 0, 3, 2, 1, 3 of the six pairs, each twice.
    assert stats.gini == pytest.approx(2 * 11 / (2 * 4 * 7), rel=4 * U)
    assert stats.entropy == pytest.approx(math.log(4), rel=4 * U)
    assert stats.identity_routes == 0


def test_entropy_is_of_normalised_rows_that_count() -> None:
    probs = [[0.75, 0.25], [1.5, 0.5], [1.0, 0.0], [0.0, 0.0]]
    one = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    stats = stats_of([[0]] * 4, 2, probs=probs)
    assert stats.entropy == pytest.approx(2 * one / 4, rel=8 * U)


def test_identity_experts_are_neither_chosen_nor_dropped() -> None:
    stats = stats_of([[0, 2], [0, 3], [1, 2]], 2, capacity=1, probs=np.ones((3, 4)), identity=2)
    assert stats.chosen_per_expert.tolist() == [2, 1]
    assert stats.kept_per_expert.tolist() == [1, 1]
    assert stats.identity_routes == 3
    assert stats.dropped_routes == 1
    assert stats.fully_dropped_tokens == 1
    assert stats.chosen_per_slot.tolist() == [3, 0]
    assert stats.overflow_per_slot.tolist() == [1 / 3, 0.0]
    assert stats.top_share_per_slot.tolist() == [2 / 3, 0.0]
    assert "identity  3 routes" in stats.report()


def test_report() -> None:
    assert stats_of(IDS, 4, capacity=1).report() == (
        "tokens    4; routes 7 chosen, 3 kept, 4 dropped (57.1%)\n"
        "load      MaxVio 0.714, CV 0.742, Gini 0.393, 1 of 4 experts unused\n"
        "router    entropy 1.386 nats\n"
        "capacity  1 rows per expert, 3 of 4 used; tokens with some routes dropped 1, with all 2\n"
        "slot 0    4 routes, 75.0% dropped, 75.0% to one expert\n"
        "slot 1    3 routes, 33.3% dropped, 66.7% to one expert"
    )
    dropless = stats_of(IDS, 4).report()
    assert "capacity" not in dropless
    assert "0 dropped (0.0%)" in dropless


def test_nothing_at_all() -> None:
    stats = stats_of(np.empty((0, 2)), 3, 1)
    assert (stats.variation, stats.gini, stats.entropy) == (0.0, 0.0, 0.0)
    assert stats.fraction.tolist() == [0.0] * 3
    assert stats.overflow_per_slot.tolist() == stats.top_share_per_slot.tolist() == [0.0, 0.0]
    assert stats.report().startswith("tokens    0; routes 0 chosen, 0 kept, 0 dropped (0.0%)")
    zeros = np.zeros(4, int)
    assert (gini(zeros), coefficient_of_variation(zeros), count_entropy(zeros)) == (0.0, 0.0, 0.0)


def test_extremes_of_the_metrics() -> None:
    balanced, alone = np.full(8, 5), np.array([0, 0, 0, 9, 0, 0, 0, 0])
    assert (gini(balanced), coefficient_of_variation(balanced)) == (0.0, 0.0)
    assert count_entropy(balanced) == pytest.approx(-8 * math.log(8), rel=8 * U)
    assert gini(alone) == 1 - 1 / 8
    assert coefficient_of_variation(alone) == pytest.approx(math.sqrt(7), rel=8 * U)
    assert count_entropy(alone) == 0.0
    assert max_violation(alone) == 7.0
    assert count_entropy(np.array([1, 3])) == pytest.approx(
        2 * (0.25 * math.log(0.25) + 0.75 * math.log(0.75)), rel=8 * U
    )


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12))
def test_gini_is_the_mean_difference(counts: list[int]) -> None:
    n = np.array(counts)
    pairs = np.abs(n[:, None] - n[None, :]).sum()
    expected = pairs / (2 * len(n) * n.sum()) if n.sum() else 0.0
    assert gini(n) == pytest.approx(expected, rel=8 * U)
