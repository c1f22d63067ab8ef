"""naive capacity, drop policies and slots against values worked by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.naive import assign_slots, expert_capacity, keep_routes, route


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "fields", "expected"),
    [
        # 1000 / 8 * 1.25 = 156.25
        (1000, 8, 2, {"f": "1.25", "rounding": "floor", "count_top_k": False}, 156),
        (1000, 8, 2, {"f": "1.25", "rounding": "ceil", "count_top_k": False}, 157),
        # 400 / 8 * 1.1 = 55 exactly; in float64 it is 55.00000000000001
        (400, 8, 1, {"f": "1.1"}, 55),
        (400, 8, 1, {"f": 1.1}, 55),
        (400, 8, 1, {"f": "1.1", "rounding": "megatron_f64"}, 56),
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
        # Tutel: K floor(cf ceil(T / E)). 10 tokens on 4 experts are 3, times 1.25 is 3.75.
        (10, 4, 2, {"f": "1.25", "rounding": "tutel"}, 6),
        (10, 4, 2, {"f": "1.25", "rounding": "tutel", "count_top_k": False}, 3),
        (10, 4, 2, {"f": "1.25"}, 7),
        # 10 * 1.1 is 11 exactly, and just above it with 1.1 rounded to float32.
        (80, 8, 1, {"f": "1.1"}, 11),
        (80, 8, 1, {"f": "1.1", "rounding": "megatron_f64"}, 11),
        (80, 8, 1, {"f": "1.1", "rounding": "deepspeed_f32"}, 11),
        # 560 / 12 * 3.15 = 147 exactly; 3.15 is rounded to float32 once, after the product.
        (560, 12, 3, {"f": "1.05"}, 147),
        (560, 12, 3, {"f": "1.05", "rounding": "deepspeed_f32"}, 148),
        (0, 4, 2, {"f": "1.25", "rounding": "tutel"}, 0),
        (0, 4, 2, {"f": "1.25", "rounding": "megatron_f64"}, 0),
        (0, 4, 2, {"f": "1.25", "rounding": "deepspeed_f32"}, 0),
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


def float32_of(value: Fraction) -> Fraction:
    """Round to 24 bits, ties to even, in exact arithmetic."""
    if value == 0:
        return value
    exponent = math.floor(math.log2(float(value))) - 23
    unit = Fraction(2) ** exponent
    return round(value / unit) * unit


@pytest.mark.parametrize("factor", ["1.05", "1.1", "1.2"])
def test_floating_point_capacities_are_their_own_roundings_of_the_exact_one(factor: str) -> None:
    differs = {"megatron_f64": 0, "deepspeed_f32": 0}
    for rounding in differs:
        for num_experts in (8, 60):
            for top_k in (1, 4):
                cfg = MoEConfig(
                    num_experts=num_experts,
                    top_k=top_k,
                    capacity_factor=factor,
                    capacity_rounding=rounding,
                )
                for num_tokens in range(0, 2049, 16):
                    found = expert_capacity(num_tokens, cfg)
                    cf, share = float(factor), Fraction(num_tokens, num_experts)
                    if rounding == "megatron_f64":
                        product = Fraction(float(share * top_k)) * Fraction(cf)
                        expected = math.ceil(Fraction(float(product)))
                    else:
                        left = float32_of(Fraction(float(share)))
                        right = float32_of(Fraction(float(Fraction(cf) * top_k)))
                        expected = math.ceil(float32_of(left * right))
                    assert found == expected
                    differs[rounding] += found != math.ceil(share * top_k * Fraction(factor))
    assert sum(differs.values()) > 0


def test_how_often_floating_point_is_off_by_one() -> None:
    # Counted over the same grid from the upstream expressions: 362 in float64, 930 in float32.
    wrong = {"megatron_f64": 0, "deepspeed_f32": 0}
    factors = ("1.05", "1.1", "1.2", "1.25", "1.5", "1.75", "2")
    for E, K, factor in itertools.product((8, 16, 60, 64), (1, 2, 4, 8), factors):
        exact = Fraction(factor) * K / E
        for rounding in wrong:
            cfg = MoEConfig(
                num_experts=E, top_k=K, capacity_factor=factor, capacity_rounding=rounding
            )
            for T in range(2048):
                ceiling = -(-T * exact.numerator // exact.denominator)
                wrong[rounding] += expert_capacity(T, cfg) != ceiling
    assert wrong == {"megatron_f64": 362, "deepspeed_f32": 930}


def test_capacity_given_or_absent() -> None:
    assert expert_capacity(100, MoEConfig()) is None
    assert expert_capacity(100, MoEConfig(expert_capacity=3)) == 3
    assert expert_capacity(100, MoEConfig(expert_capacity=0)) == 0


# Tokens 0 to 3; expert 0 is wanted by (0,0) (1,0) (2,1) (3,1), expert 1 by (0,1) (2,0),
# expert 2 by (1,1).
IDS = np.array([[0, 1], [0, 2], [1, 0], [-1, 0]])
WEIGHTS = np.array([[0.4, 0.2], [0.9, 0.1], [0.6, 0.5], [0.0, 0.5]])
UNIFORMS = np.array([[0.9, 0.1], [0.5, 0.5], [0.8, 0.2], [0.0, 0.5]])


@pytest.mark.parametrize(
    ("policy", "capacity", "order", "expected"),
    [
        ("position", 2, "priority", [[0, 0], [1, 0], [1, -1], [-1, -1]]),
        ("position", 1, "priority", [[0, 0], [-1, 0], [-1, -1], [-1, -1]]),
        ("position", 3, "priority", [[0, 0], [1, 0], [1, 2], [-1, -1]]),
        ("position", 0, "priority", [[-1, -1], [-1, -1], [-1, -1], [-1, -1]]),
        ("position", None, "priority", [[0, 0], [1, 0], [1, 2], [-1, 3]]),
        # Token 2 wants expert 1 first, token 0 second.
        ("k_major", 3, "priority", [[0, 1], [1, 0], [0, 2], [-1, -1]]),
        ("k_major", 1, "priority", [[0, -1], [-1, 0], [0, -1], [-1, -1]]),
        ("k_major", 3, "token", [[0, 0], [1, 0], [1, 2], [-1, -1]]),
        # By first weight the tokens are 1, 2, 0, 3.
        ("batch_priority", 3, "priority", [[1, 1], [0, 0], [0, 2], [-1, -1]]),
        ("batch_priority", 1, "priority", [[-1, -1], [0, 0], [0, -1], [-1, -1]]),
        ("batch_priority", 3, "token", [[0, 0], [1, 0], [1, 2], [-1, -1]]),
        # Expert 0 ranks token 1 first, then tokens 2 and 3, which tie, and token 0 last.
        ("probability", 2, "priority", [[-1, 1], [0, 0], [0, 1], [-1, -1]]),
        ("probability", 3, "priority", [[-1, 1], [0, 0], [0, 1], [-1, 2]]),
        ("probability", 1, "priority", [[-1, -1], [0, 0], [0, -1], [-1, -1]]),
        ("probability", 3, "token", [[-1, 0], [0, 0], [1, 1], [-1, 2]]),
        # Expert 0 ranks token 2 first, then tokens 1 and 3, which tie, and token 0 last.
        ("random", 2, "priority", [[-1, 0], [1, 0], [1, 0], [-1, -1]]),
        ("random", 3, "token", [[-1, 0], [0, 0], [1, 1], [-1, 2]]),
    ],
)
def test_slots(policy: str, capacity: int | None, order: str, expected: list) -> None:
    cfg = MoEConfig(num_experts=3, top_k=2, expert_capacity=9, drop_policy=policy, slot_order=order)
    assert assign_slots(IDS, WEIGHTS, capacity, cfg, UNIFORMS).tolist() == expected


def test_a_random_drop_needs_its_numbers() -> None:
    cfg = MoEConfig(num_experts=3, top_k=2, expert_capacity=1, drop_policy="random")
    with pytest.raises(RangeError, match=r"^keep_routes: draws.drop must be given with"):
        keep_routes(IDS, WEIGHTS, [True] * 4, cfg)


def test_all_equal_weights_keep_the_first_tokens() -> None:
    for policy in ("position", "batch_priority", "probability", "k_major"):
        cfg = MoEConfig(num_experts=2, top_k=2, expert_capacity=3, drop_policy=policy)
        ids, weights = np.tile([1, 0], (6, 1)), np.full((6, 2), 0.5)
        kept, slots = keep_routes(ids, weights, [True] * 6, cfg)
        assert slots is not None
        assert kept[:, 0].tolist() == [True] * 3 + [False] * 3
        assert slots[:, 1].tolist() == [0, 1, 2, -1, -1, -1]


def test_capacity_counts_valid_tokens_of_each_sequence() -> None:
    # Two sequences of 4; all want expert 0, and the second has two padded tokens.
    ids = np.array([[0], [0], [0], [0], [0], [-1], [0], [-1]])
    valid = (ids[:, 0] >= 0).tolist()
    fields = {"num_experts": 2, "top_k": 1, "capacity_factor": "1"}
    cfg = MoEConfig(capacity_scope="sequence", **fields)
    kept, slots = keep_routes(ids, np.ones((8, 1)), valid, cfg, 4)
    assert slots is not None
    assert slots[:, 0].tolist() == [0, 1, -1, -1, 0, -1, -1, -1]
    assert (kept == (slots >= 0)).all()
    for other, length in ((MoEConfig(**fields), 4), (cfg, None)):
        _, slots = keep_routes(ids, np.ones((8, 1)), valid, other, length)
        assert slots is not None
        assert slots[:, 0].tolist() == [0, 1, 2, -1, -1, -1, -1, -1]


def test_each_sequence_has_its_own_random_ranks() -> None:
    cfg = MoEConfig(
        num_experts=2,
        top_k=1,
        expert_capacity=1,
        capacity_scope="sequence",
        drop_policy="random",
    )
    uniforms = np.array([[0.1], [0.9], [0.9], [0.1]])
    kept, _ = keep_routes(np.zeros((4, 1), int), np.ones((4, 1)), [True] * 4, cfg, 2, uniforms)
    assert kept[:, 0].tolist() == [True, False, False, True]


def test_identity_experts_have_no_buffer() -> None:
    cfg = MoEConfig(num_experts=2, top_k=1, num_identity_experts=1, expert_capacity=1)
    kept, slots = keep_routes(np.array([[2], [0], [2], [0]]), np.ones((4, 1)), [True] * 4, cfg)
    assert slots is not None
    assert kept[:, 0].tolist() == [True, True, True, False]
    assert slots[:, 0].tolist() == [-1, 0, -1, -1]


def test_nothing_is_dropped_without_a_capacity() -> None:
    ids = np.array([[0, -1], [0, 1], [0, 1]])
    kept, slots = keep_routes(ids, np.ones((3, 2)), [True] * 3, MoEConfig(num_experts=2))
    assert slots is None
    assert (kept == (ids >= 0)).all()


def test_what_experts_chose_fills_their_buffers_by_token() -> None:
    cfg = MoEConfig(num_experts=2, routing="expert_choice", expert_capacity=2)
    logits = np.log([[0.3, 0.7], [0.5, 0.5], [0.8, 0.2]])
    ids, weights, _, _ = route(logits, cfg)
    assert ids.tolist() == [[1, -1], [0, 1], [0, -1]]
    kept, slots = keep_routes(ids, weights, [True] * 3, cfg)
    assert slots is not None
    assert slots.tolist() == [[0, -1], [0, 1], [1, -1]]
    assert (kept == (ids >= 0)).all()


def test_no_expert_keeps_more_than_its_capacity() -> None:
    cfg = MoEConfig(num_experts=3, top_k=2, expert_capacity=2, drop_policy="probability")
    rng = np.random.default_rng(0)
    ids = np.array([rng.permutation(3)[:2] for _ in range(20)])
    kept, _ = keep_routes(ids, rng.random((20, 2)), [True] * 20, cfg)
    assert [int((kept & (ids == e)).sum()) for e in range(3)] == [2, 2, 2]
