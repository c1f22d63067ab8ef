"""Auxiliary losses: closed forms, gradients through the logits, masks and padding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from npmoe import MoEConfig, RangeError, ShapeError, gradcheck
from npmoe.losses import entropy_loss, load_balancing_loss, z_loss
from npmoe.routing import Routing, route

LOSSES = [load_balancing_loss, z_loss, entropy_loss]
U = 2.0**-53


def routing_of(logits: np.ndarray, top_k: int = 2, **arguments: Any) -> Routing:
    names = ("router_order", "nan_policy", "score_fn")
    fields = {n: arguments.pop(n) for n in names if n in arguments}
    cfg = MoEConfig(num_experts=logits.shape[1], top_k=top_k, **fields)
    return route(logits, cfg, **arguments)


@pytest.mark.parametrize("num_experts", [1, 2, 8])
def test_uniform_routing(num_experts: int) -> None:
    logits = np.full((2 * num_experts, num_experts), 0.25)
    ids = np.arange(2 * num_experts).reshape(-1, 1) % num_experts
    routing = routing_of(logits, 1, topk_ids=ids)
    log_e = math.log(num_experts)
    values = [f(routing, coefficient=3.0)[0] for f in LOSSES]
    expected = [3.0, 3.0 * (0.25 + log_e) ** 2, 3.0 * log_e]
    np.testing.assert_allclose(values, expected, rtol=16 * U, atol=16 * U)
    assert z_loss(routing_of(logits - 0.25, 1))[0] == pytest.approx(log_e**2, rel=16 * U)


def test_load_balancing_worked_numbers() -> None:
    # Choices: expert 0 three times, expert 1 once; mean probabilities 5/8 and 3/8.
    logits = np.log([[3.0, 1.0], [1.0, 1.0]])
    routing = routing_of(logits, 2, topk_ids=np.array([[0, -1], [0, 1]]))
    value, _ = load_balancing_loss(routing)
    # E * sum f_e P_e with f = n_e / (T*K) = (2/4, 1/4)
    assert value == pytest.approx(2 * (2 / 4 * 5 / 8 + 1 / 4 * 3 / 8), rel=8 * U)
    everything = routing_of(np.array([[60.0, 0.0], [60.0, 0.0]]), 1)
    assert load_balancing_loss(everything, coefficient=0.5)[0] == pytest.approx(1.0, rel=8 * U)


def test_z_and_entropy_worked_numbers() -> None:
    logits = np.log([[1.0, 3.0], [2.0, 2.0]])
    routing = routing_of(logits, 1)
    assert z_loss(routing)[0] == pytest.approx(math.log(4) ** 2, rel=8 * U)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75) + 2 * 0.5 * math.log(0.5)) / 2
    assert entropy_loss(routing, coefficient=-2.0)[0] == pytest.approx(-2.0 * entropy, rel=16 * U)


def test_entropy_of_certainty_is_zero() -> None:
    with np.errstate(under="ignore"):
        routing = routing_of(np.array([[0.0, -2000.0, -np.inf]]), 1)
    value, grad = entropy_loss(routing)
    assert value == 0.0
    assert not grad.any()


def test_z_loss_of_large_logits() -> None:
    for size in (700.0, -700.0, 1e4):
        routing = routing_of(np.full((3, 4), size), 1)
        assert z_loss(routing)[0] == pytest.approx((size + math.log(4)) ** 2, rel=16 * U)
    with_never = routing_of(np.array([[-np.inf, 0.0, 0.0]]), 1)
    value, grad = z_loss(with_never)
    assert value == pytest.approx(math.log(2) ** 2, rel=16 * U)
    assert grad[0, 0] == 0.0


MASK = np.array([True, False, True, True, False])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ["score_topk", "topk_score"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradient(loss: Callable[..., Any], masked: bool, order: str, top_k: int) -> None:
    logits = np.random.default_rng(0).standard_normal((5, 6))
    logits[:, 5] -= 8.0  # never chosen
    mask = MASK if masked else None

    def at(x: np.ndarray) -> Routing:
        return routing_of(x, top_k, token_mask=mask, router_order=order)

    value, grad = loss(at(logits), coefficient=1.5)
    assert type(value) is float
    gradcheck(
        lambda x: np.float64(loss(at(x), coefficient=1.5)[0]),
        lambda g, x: g * loss(at(x), coefficient=1.5)[1],
        [logits],
        decisions=lambda x: at(x).topk_ids,
    )
    assert (at(logits).topk_ids != 5).all()
    assert (grad[:, 5] != 0).tolist() == (MASK if masked else np.ones(5, bool)).tolist()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("padding", [7.0, np.nan, np.inf, -np.inf])
def test_padding_changes_nothing(loss: Callable[..., Any], padding: float) -> None:
    logits = np.random.default_rng(1).standard_normal((4, 3))
    longer = np.concatenate([logits, np.full((3, 3), padding)])
    value, grad = loss(routing_of(logits))
    mask = np.arange(7) < 4
    with_padding, padded_grad = loss(routing_of(longer, token_mask=mask))
    assert with_padding == pytest.approx(value, rel=16 * U)
    np.testing.assert_allclose(padded_grad[:4], grad, rtol=16 * U, atol=0)
    assert not padded_grad[4:].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_dropped_rows_count_as_padding(loss: Callable[..., Any]) -> None:
    logits = np.random.default_rng(1).standard_normal((4, 3))
    broken = np.concatenate([logits, [[np.nan, 0.0, 0.0]]])
    value, grad = loss(routing_of(logits))
    got, got_grad = loss(routing_of(broken, nan_policy="drop"))
    assert got == pytest.approx(value, rel=16 * U)
    assert not got_grad[4].any()
    np.testing.assert_allclose(got_grad[:4], grad, rtol=16 * U, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_clamped_rows_give_no_gradient(loss: Callable[..., Any]) -> None:
    broken = np.array([[0.5, 0.0, 1.0], [np.nan, 0.0, 0.0]])
    value, grad = loss(routing_of(broken, nan_policy="clamp"))
    assert math.isfinite(value)
    assert grad[0].all()
    assert not grad[1].any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_valid_token(loss: Callable[..., Any], num_tokens: int) -> None:
    mask = np.zeros(num_tokens, bool)
    value, grad = loss(routing_of(np.full((num_tokens, 4), np.nan), token_mask=mask))
    assert value == 0.0
    assert grad.shape == (num_tokens, 4)
    assert not grad.any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_and_coefficient(loss: Callable[..., Any], dtype: type) -> None:
    logits = np.random.default_rng(2).standard_normal((6, 4)).astype(dtype)
    before = logits.copy()
    routing = routing_of(logits)
    probs = routing.probs.copy()
    value, grad = loss(routing)
    assert grad.dtype == dtype
    assert not np.shares_memory(grad, routing.probs)
    doubled = loss(routing, coefficient=2.0)
    assert doubled[0] == 2 * value
    np.testing.assert_array_equal(doubled[1], 2 * grad)
    np.testing.assert_array_equal(logits, before)
    np.testing.assert_array_equal(routing.probs, probs)
    wide = loss(routing_of(logits.astype(np.float64)))[0]
    assert value == pytest.approx(wide, rel=64 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("loss", [z_loss, entropy_loss])
@pytest.mark.parametrize("score_fn", ["sigmoid", "sqrtsoftplus"])
def test_gradient_of_other_scores(loss: Callable[..., Any], score_fn: str) -> None:
    logits = np.random.default_rng(0).standard_normal((5, 4))

    def at(x: np.ndarray) -> tuple[float, np.ndarray]:
        return loss(routing_of(x, score_fn=score_fn, token_mask=MASK), coefficient=1.5)

    gradcheck(lambda x: np.float64(at(x)[0]), lambda g, x: g * at(x)[1], [logits])
    softmax = loss(routing_of(logits, token_mask=MASK), coefficient=1.5)[0]
    # The z-loss is one of logits, the entropy one of normalised scores.
    assert (at(logits)[0] == softmax) == (loss is z_loss)


def test_entropy_of_normalised_sigmoids() -> None:
    # Scores 3/4 and 1/4 sum to 1; 1/2 and 1/2 do too.
    logits = np.array([[math.log(3.0), -math.log(3.0)], [0.0, 0.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + math.log(2.0)
    value, _ = entropy_loss(routing_of(logits, 1, score_fn="sigmoid"))
    assert value == pytest.approx(entropy / 2, rel=16 * U)


@pytest.mark.parametrize("loss", LOSSES)
def test_messages(loss: Callable[..., Any]) -> None:
    routing = routing_of(np.zeros((2, 3)))
    with pytest.raises(RangeError) as caught:
        loss(routing, coefficient=math.nan)
    assert str(caught.value) == f"{loss.__name__}: coefficient must be finite, got nan."
    soft = dataclasses.replace(routing, topk_ids=np.zeros((6, 1), np.int32))
    with pytest.raises(ShapeError) as shape:
        loss(soft)
    assert str(shape.value) == (
        f"{loss.__name__}: routing.topk_ids must have shape (T, K) with T = 2, got (6, 1). "
        "T is bound by routing.probs. Soft routing sends every token everywhere and needs no "
        "such loss."
    )
