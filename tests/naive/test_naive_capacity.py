"""naive capacity against values worked by hand, and its normalisation against differences."""

from __future__ import annotations

import numpy as np
import pytest

from npmoe.config import MoEConfig
from npmoe.naive import expert_capacity, keep_routes, renormalize_kept, renormalize_kept_backward


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "fields", "expected"),
    [
        # 1000 / 8 * 1.25 = 156.25
        (1000, 8, 2, {"f": "1.25", "rounding": "floor", "count_top_k": False}, 156),
        (1000, 8, 2, {"f": "1.25", "rounding": "ceil", "count_top_k": False}, 157),
        # 400 / 8 * 1.1 = 55 exactly; in float64 it is 55.00000000000001
        (400, 8, 1, {"f": "1.1"}, 55),
        (400, 8, 1, {"f": 1.1}, 55),
        (400, 8, 2, {"f": "1.1"}, 110),
        (10, 4, 1, {"f": "1", "rounding": "round"}, 2),  # 2.5 to even
        (14, 4, 1, {"f": "1", "rounding": "round"}, 4),  # 3.5 to even
        (11, 4, 1, {"f": "1", "rounding": "round"}, 3),  # 2.75
        (3, 8, 1, {"f": "1", "rounding": "floor"}, 0),
        (3, 8, 1, {"f": "1", "rounding": "floor", "min": 2}, 2),
        (3, 8, 1, {"f": "1", "min": 5, "multiple": 4}, 8),
        (32, 8, 1, {"f": "1", "multiple": 4}, 4),
        (33, 8, 1, {"f": "1", "multiple": 4}, 8),
        (3, 4, 2, {"f": "100"}, 150),
        (7, 3, 1, {"f": "1/3"}, 1),
        (0, 4, 2, {"f": "1.25"}, 0),
    ],
)
def test_capacity_from_a_factor(
    num_tokens: int, num_experts: int, top_k: int, fields: dict, expected: int
) -> None:
    cfg = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        capacity_factor=fields["f"],
        capacity_rounding=fields.get("rounding", "ceil"),
        capacity_count_top_k=fields.get("count_top_k", True),
        min_capacity=fields.get("min", 0),
        capacity_multiple=fields.get("multiple", 1),
    )
    assert expert_capacity(num_tokens, cfg) == expected


def test_capacity_given_or_absent() -> None:
    assert expert_capacity(100, MoEConfig()) is None
    assert expert_capacity(100, MoEConfig(expert_capacity=3)) == 3
    assert expert_capacity(100, MoEConfig(expert_capacity=0)) == 0


IDS = np.array([[0, 1], [0, 2], [1, 0], [-1, 0]])
WEIGHTS = np.array([[0.4, 0.2], [0.9, 0.1], [0.6, 0.5], [0.0, 0.5]])


@pytest.mark.parametrize(
    ("policy", "capacity", "expected"),
    [
        ("position", 2, [[1, 1], [1, 1], [1, 0], [0, 0]]),
        # Expert 0 ranks token 1 first, then tokens 2 and 3, which tie, and token 0 last.
        ("probability", 2, [[0, 1], [1, 1], [1, 1], [0, 0]]),
        ("position", 1, [[1, 1], [0, 1], [0, 0], [0, 0]]),
        ("probability", 1, [[0, 0], [1, 1], [1, 0], [0, 0]]),
        ("position", 3, [[1, 1], [1, 1], [1, 1], [0, 0]]),
        ("position", 0, [[0, 0], [0, 0], [0, 0], [0, 0]]),
        ("position", None, [[1, 1], [1, 1], [1, 1], [0, 1]]),
    ],
)
def test_kept_routes(policy: str, capacity: int | None, expected: list) -> None:
    cfg = MoEConfig(num_experts=3, top_k=2, expert_capacity=9, drop_policy=policy)
    assert keep_routes(IDS, WEIGHTS, capacity, cfg).astype(int).tolist() == expected


def test_no_expert_keeps_more_than_its_capacity() -> None:
    cfg = MoEConfig(num_experts=3, top_k=2, expert_capacity=2, drop_policy="probability")
    rng = np.random.default_rng(0)
    ids = np.array([rng.permutation(3)[:2] for _ in range(20)])
    kept = keep_routes(ids, rng.random((20, 2)), 2, cfg)
    assert [int((kept & (ids == e)).sum()) for e in range(3)] == [2, 2, 2]


def test_normalisation_over_the_kept() -> None:
    weights = np.array([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125], [0.5, 0.25, 0.125]])
    kept = np.array([[True, True, False], [False, True, False], [False, False, False]])
    found = renormalize_kept(weights, kept)
    assert found.tolist() == [[0.5 / 0.75, 0.25 / 0.75, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert not renormalize_kept(np.zeros((1, 2)), np.array([[True, True]])).any()
    # A lone survivor weighs 1 whatever its weight is, so its gradient is 0.
    assert not renormalize_kept_backward(np.ones((3, 3)), weights, kept)[1:].any()


def test_gradient_of_the_normalisation(assert_gradient) -> None:
    rng = np.random.default_rng(1)
    weights, grad = rng.uniform(0.1, 1.0, (3, 4)), rng.standard_normal((3, 4))
    kept = np.array([[True] * 4, [True, False, True, False], [False] * 4])

    def f(w: np.ndarray) -> float:
        return float((renormalize_kept(w, kept) * grad).sum())

    assert_gradient(f, weights, renormalize_kept_backward(grad, weights, kept))
