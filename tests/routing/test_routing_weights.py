"""Scores and weights: score functions far from zero, normalisations, the soft-cap."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from npmoe import MoEConfig, gradcheck
from npmoe.dispatch import plan_dispatch
from npmoe.routing import (
    Routing,
    normalize_weights,
    normalize_weights_backward,
    renormalize_kept,
    route,
    score,
    score_slope,
    softcap,
    softcap_backward,
)

U = 2.0**-53


def config(num_experts: int = 4, top_k: int = 2, **fields: Any) -> MoEConfig:
    return MoEConfig(
        hidden_size=1, intermediate_size=1, num_experts=num_experts, top_k=top_k, **fields
    )


@pytest.mark.parametrize("x", [0.0, 1.0, -1.0, 20.0, 40.0, -40.0, -300.0, 700.0, 1e4, -1e4])
def test_score_functions_far_from_zero(x: float) -> None:
    logits = np.array([[x]])
    power = math.exp(-abs(x))
    sigmoid = (1.0 if x >= 0 else power) / (1.0 + power)
    np.testing.assert_allclose(score(logits, "sigmoid")[0, 0], sigmoid, rtol=8 * U)
    root = math.sqrt(max(x, 0.0) + math.log1p(power))
    np.testing.assert_allclose(score(logits, "sqrtsoftplus")[0, 0], root, rtol=8 * U)
    slope = score_slope(logits, score(logits, "sigmoid"), "sigmoid")[0, 0]
    np.testing.assert_allclose(slope, power / (1.0 + power) ** 2, rtol=12 * U)
    slope = score_slope(logits, score(logits, "sqrtsoftplus"), "sqrtsoftplus")[0, 0]
    np.testing.assert_allclose(slope, sigmoid / (2 * root) if root else 0.0, rtol=16 * U)


def test_minus_infinity_scores_zero() -> None:
    logits = np.array([[0.0, -np.inf]])
    for name in ("softmax", "sigmoid", "sqrtsoftplus"):
        assert score(logits, name)[0, 1] == 0.0
    for name in ("sigmoid", "sqrtsoftplus"):
        assert score_slope(logits, score(logits, name), name)[0, 1] == 0.0


def test_softcap() -> None:
    x = np.array([[0.0, 1.0, -30.0, 1e4]])
    np.testing.assert_allclose(softcap(x, 2.0), 2 * np.tanh(x / 2), rtol=4 * U)
    x = np.random.default_rng(0).standard_normal((3, 4))
    gradcheck(
        lambda v: softcap(v, 0.7), lambda g, v: softcap_backward(g, softcap(v, 0.7), 0.7), [x]
    )


def test_the_worked_row_of_two_probabilities() -> None:
    weights = normalize_weights(np.array([[0.52, 0.31]]), config(renormalize=True))
    assert np.round(weights, 2).tolist() == [[0.63, 0.37]]


@pytest.mark.parametrize(
    ("fields", "divisor"),
    [
        ({}, 0.7),
        ({"renorm_eps": 0.5}, 1.2),
        ({"renorm_eps": 0.5, "renorm_eps_mode": "max"}, 0.7),
        ({"renorm_eps": 0.9, "renorm_eps_mode": "max"}, 0.9),
        ({"renorm_p": 2}, 0.5),
        ({"renorm_p": 2, "renorm_eps": 0.25}, 0.75),
        ({"renorm_p": 2, "renorm_eps": 0.6, "renorm_eps_mode": "max"}, 0.6),
    ],
)
def test_norms_and_eps(fields: dict[str, Any], divisor: float) -> None:
    weights = np.array([[0.3, 0.4], [0.0, 0.0]])
    cfg = config(renormalize=True, **fields)
    got = normalize_weights(weights, cfg)
    np.testing.assert_allclose(got[0], weights[0] / divisor, rtol=4 * U)
    np.testing.assert_array_equal(got[1], 0.0)
    gradcheck(
        lambda w: normalize_weights(w, cfg),
        lambda g, w: normalize_weights_backward(g, w, cfg),
        [np.random.default_rng(1).random((5, 3)) + 0.05],
        decisions=lambda w: (
            (w.sum(axis=1), np.sqrt((w * w).sum(axis=1)))[cfg.renorm_p - 1] >= cfg.renorm_eps
        ),
    )


def test_the_gradient_at_the_switch_of_a_maximum_is_one_sided() -> None:
    """At D = eps exactly the normalisation counts, as torch.clamp(min=eps) passes gradient."""
    cfg = config(renormalize=True, renorm_eps=1.0, renorm_eps_mode="max")
    grad, at = np.array([[1.0, 0.0]]), np.array([[0.25, 0.75]])
    np.testing.assert_array_equal(normalize_weights_backward(grad, at, cfg), [[0.75, -0.25]])
    below = at * (1 - 2.0**-20)
    np.testing.assert_array_equal(normalize_weights_backward(grad, below, cfg), grad)


def test_rows_of_zeros_and_lone_weights() -> None:
    cfg = config(renormalize=True)
    weights = np.array([[0.0, 0.0], [0.0, 0.3]])
    np.testing.assert_array_equal(normalize_weights(weights, cfg), [[0.0, 0.0], [0.0, 1.0]])
    grad = normalize_weights_backward(np.array([[3.0, 4.0], [1.0, 2.0]]), weights, cfg)
    np.testing.assert_array_equal(grad[0], 0.0)
    assert grad[1, 1] == 0.0


@pytest.mark.parametrize("eps", [0.0, 1e-20])
def test_sigmoids_that_underflow(eps: float) -> None:
    """Trap: 0/0 when every chosen score underflows."""
    cfg = config(score_fn="sigmoid", renormalize=True, renorm_eps=eps, renorm_eps_mode="add")
    with np.errstate(all="raise", under="ignore"):
        weights = route(np.full((2, 4), -200.0, np.float32), cfg).topk_weights
    assert np.isfinite(weights).all()
    # In float32 the scores are subnormal or 0: eps decides between 0 and 1/2.
    small = np.exp(-200.0)
    expected = small / (2 * small + eps)
    got = route(np.full((2, 4), -200.0), cfg).topk_weights
    np.testing.assert_allclose(got, np.full((2, 2), expected), rtol=1e-12)


@pytest.mark.parametrize("single", [True, False])
def test_one_weight(single: bool) -> None:
    cfg = config(top_k=1, score_fn="sigmoid", renormalize=True, renorm_single=single)
    routing = route(np.array([[0.3, 0.1, -1.0, 0.0]]), cfg)
    expected = 1.0 if single else routing.probs[0, 0]
    assert routing.topk_weights.tolist() == [[expected]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("capacity", [None, 100])
def test_normalised_weights_sum_to_the_scale(
    bias: bool, groups: int, score_fn: str, capacity: int | None
) -> None:
    """Trap: a scale applied before the normalisation, or lost on some path."""
    drop = {} if capacity is None else {"renormalize_drop": "after", "expert_capacity": capacity}
    cfg = config(
        8,
        3,
        score_fn=score_fn,
        renormalize=True,
        routed_scaling_factor=2.5,
        selection_bias=bias,
        num_groups=groups,
        **drop,
    )
    logits = np.random.default_rng(2).standard_normal((20, 8))
    routing = route(logits, cfg, selection_bias=-np.arange(8.0) if bias else None)
    weights = routing.topk_weights
    if capacity is not None:
        plan = plan_dispatch(routing.topk_ids, num_experts=8, capacity=capacity)
        weights = renormalize_kept(routing, plan, cfg)
    np.testing.assert_allclose(weights.sum(axis=1), 2.5, rtol=8 * U)


def test_renormalising_what_was_kept() -> None:
    # Expert 0 keeps one token, so token 1 keeps its second slot alone and token 2 nothing.
    ids = np.array([[0, 1], [0, 2], [0, -1]], np.int32)
    plan = plan_dispatch(ids, num_experts=3, capacity=1)
    weights = np.array([[0.75, 0.125], [0.5, 0.25], [0.5, 0.0]])
    routing = Routing(
        topk_ids=ids,
        topk_weights=weights,
        probs=np.zeros((3, 3)),
        router_logits=np.zeros((3, 3)),
        sequence_length=3,
    )
    fields: dict[str, Any] = {
        "renormalize": True,
        "renormalize_drop": "after",
        "expert_capacity": 1,
    }
    before = weights.copy()
    got = renormalize_kept(routing, plan, config(3, **fields))
    np.testing.assert_array_equal(weights, before)
    np.testing.assert_array_equal(got, [[0.75 / 0.875, 0.125 / 0.875], [0.0, 1.0], [0.0, 0.0]])
    scaled = renormalize_kept(routing, plan, config(3, **fields, routed_scaling_factor=4.0))
    np.testing.assert_array_equal(scaled, 4.0 * got)


def test_identity_experts_are_never_dropped() -> None:
    ids = np.array([[0, 3], [0, 3]], np.int32)
    plan = plan_dispatch(ids, num_experts=3, num_identity_experts=1, capacity=1)
    routing = Routing(
        topk_ids=ids,
        topk_weights=np.array([[0.5, 0.25], [0.5, 0.25]]),
        probs=np.zeros((2, 4)),
        router_logits=np.zeros((2, 4)),
        sequence_length=2,
    )
    cfg = config(
        3, num_identity_experts=1, renormalize=True, renormalize_drop="after", expert_capacity=1
    )
    got = renormalize_kept(routing, plan, cfg)
    np.testing.assert_allclose(got, [[2 / 3, 1 / 3], [0.0, 1.0]], rtol=4 * U)
    assert plan.row_ids.tolist() == [[0, -1], [-1, -1]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_small_scores_do_not_vanish(dtype: type) -> None:
    x = np.array([[-60.0, -80.0, -90.0, -150.0]], dtype)
    got = score(x, "sqrtsoftplus")
    assert got.dtype == dtype
    unit = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(got, np.exp(x.astype(float) / 2), rtol=60 * unit)
    np.testing.assert_allclose(score_slope(x, got, "sqrtsoftplus"), got / 2, rtol=4 * unit)
    tiny = np.array([[3e-30, 4e-30]], dtype)
    cfg = config(renormalize=True, renorm_p=2)
    np.testing.assert_allclose(normalize_weights(tiny, cfg), [[0.6, 0.8]], rtol=4 * unit)


def test_a_clamped_row_takes_the_first_experts_whatever_the_bias() -> None:
    logits = np.array([[0.0, 1.0, 2.0, 3.0], [np.nan, 1.0, 2.0, 3.0]])
    for fields in (
        {"selection_bias": True},
        {"second_expert_policy": "sampling"},
        {"selection_bias": True, "num_groups": 2},
    ):
        cfg = config(nan_policy="clamp", **fields)
        bias = np.array([0.0, 0.0, 9.0, 9.0]) if cfg.selection_bias else None
        routing = route(logits, cfg, selection_bias=bias, rng=np.random.default_rng(0))
        assert routing.topk_ids[1].tolist() == [0, 1]
        assert not routing.topk_weights[1].any()
    assert softcap_backward(np.zeros(2), np.array([np.nan, 1.0]), 3.0).tolist() == [0.0, 0.0]


def test_replayed_ids_bring_their_own_width() -> None:
    cfg = config(top_k=1, score_fn="sigmoid", renormalize=True, renorm_single=False)
    logits = np.array([[0.3, 0.1, -1.0, 0.0]])
    two = route(logits, cfg, topk_ids=np.array([[1, 2]]))
    np.testing.assert_allclose(two.topk_weights.sum(), 1.0, rtol=4 * U)
    one = route(logits, cfg, topk_ids=np.array([[1]]))
    assert one.topk_weights[0, 0] == one.probs[0, 1]
