"""Importance and load losses: closed forms, gradients, masks, messages."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from npmoe import MoEConfig, RangeError, ShapeError, gradcheck
from npmoe.losses import importance_loss, load_loss
from npmoe.routing import Routing, route, stable_topk

U = 2.0**-53
STD = 0.5
SCORES = ["softmax", "sigmoid", "sqrtsoftplus"]
MASK = np.array([True, True, False, True, True])


def routing_of(logits: np.ndarray, top_k: int = 2, **arguments: Any) -> Routing:
    names = ("score_fn", "router_noise_std", "nan_policy")
    fields = {name: arguments.pop(name) for name in names if name in arguments}
    cfg = MoEConfig(
        hidden_size=1,
        intermediate_size=1,
        num_experts=logits.shape[1],
        top_k=top_k,
        **fields,
    )
    return route(logits, cfg, **arguments)


def noisy(logits: np.ndarray, top_k: int = 2, **arguments: Any) -> Routing:
    rng = np.random.default_rng(11)
    return routing_of(logits, top_k, router_noise_std=STD, rng=rng, **arguments)


def phi(u: float) -> float:
    return 0.5 * math.erfc(-u / math.sqrt(2.0))


def with_noise(clean: list[list[float]], logits: list[list[float]], top_k: int) -> Routing:
    routing = routing_of(np.array(logits), top_k)
    return dataclasses.replace(routing, clean_logits=np.array(clean))


def test_importance_by_hand() -> None:
    # I = (1.1, 0.9): mean 1, squares 0.01 + 0.01.
    routing = routing_of(np.log([[0.6, 0.4], [0.5, 0.5]]), 1)
    assert importance_loss(routing)[0] == pytest.approx(0.01, rel=64 * 10 * U)
    value, _ = importance_loss(routing, variance="bessel", coefficient=3.0)
    assert value == pytest.approx(0.06, rel=64 * 10 * U)
    uniform = routing_of(np.zeros((3, 4)))
    assert importance_loss(uniform)[0] == 0.0
    assert not importance_loss(uniform)[1].any()
    everything = routing_of(np.array([[0.0, -800.0, -800.0, -800.0]]))
    assert importance_loss(everything)[0] == 3.0
    assert importance_loss(everything, variance="bessel")[0] == 4.0


def test_load_by_hand() -> None:
    # Noisy logits choose expert 0 at 1.0; clean ones are 0.5, 0 and -0.5 below that.
    routing = with_noise([[0.5, 1.0, 1.5]], [[1.0, 0.25, -1.0]], 1)
    load = [1 - phi(0.5 / 0.25), 1 - phi(0.0), 1 - phi(-0.5 / 0.25)]
    mean = sum(load) / 3
    want = sum((n - mean) ** 2 for n in load) / 3 / mean**2
    assert load_loss(routing, noise_std=0.25)[0] == pytest.approx(want, rel=64 * U)
    got, _ = load_loss(routing, noise_std=0.25, variance="bessel", coefficient=2.0)
    assert got == pytest.approx(3.0 * want, rel=64 * U)
    # The second largest, -1.0 of expert 1 here, is the threshold of K = 2.
    routing = with_noise([[0.5, -1.0, -1.5]], [[1.0, -1.0, -2.0]], 2)
    load = [1 - phi(-1.5), 0.5, 1 - phi(0.5)]
    mean = sum(load) / 3
    want = sum((n - mean) ** 2 for n in load) / 3 / mean**2
    assert load_loss(routing, noise_std=1.0)[0] == pytest.approx(want, rel=64 * U)


def test_load_gradient_by_hand() -> None:
    # E = 2, one token: L_1 = 1/2 at the threshold itself, which is its own noisy logit.
    routing = with_noise([[1.0, 0.0]], [[1.0, -0.5]], 1)
    _, grad = load_loss(routing, noise_std=1.0)
    # Shifting all logits of a token changes nothing.
    assert grad.sum() == pytest.approx(0.0, abs=4 * U)
    lower = 1 - phi(1.0)
    mean = (0.5 + lower) / 2
    relative = (lower - mean) / mean
    slope = (2 / mean) * (relative / 2 - relative**2 / 2)  # d CV^2 / d L_1
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    assert grad[0, 1] == pytest.approx(slope * density, rel=64 * U)


@pytest.mark.parametrize("variance", ["population", "bessel"])
@pytest.mark.parametrize("score_fn", SCORES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_rng", [False, True])
def test_importance_gradient(variance: Any, score_fn: str, masked: bool, with_rng: bool) -> None:
    logits = np.random.default_rng(0).standard_normal((5, 4))
    mask = MASK if masked else None

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        make = noisy if with_rng else routing_of
        routing = make(x, score_fn=score_fn, token_mask=mask)
        return importance_loss(routing, variance=variance, coefficient=1.5)

    gradcheck(lambda x: np.float64(loss(x)[0]), lambda g, x: g * loss(x)[1], [logits])
    value, grad = loss(logits)
    assert type(value) is float
    assert (grad[mask] if masked else grad).all()
    assert not masked or not grad[~MASK].any()


def test_importance_is_without_noise() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 4))
    for score_fn in SCORES:
        value, grad = importance_loss(noisy(logits, score_fn=score_fn))
        want, want_grad = importance_loss(routing_of(logits, score_fn=score_fn))
        assert value == pytest.approx(want, rel=64 * U)
        np.testing.assert_allclose(grad, want_grad, rtol=0, atol=16 * U)


@pytest.mark.parametrize("variance", ["population", "bessel"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_gradient(variance: Any, masked: bool, top_k: int) -> None:
    logits = np.random.default_rng(4).standard_normal((5, 4))
    mask = MASK if masked else None

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        routing = noisy(x, top_k, token_mask=mask)
        return load_loss(routing, noise_std=STD, variance=variance, coefficient=1.5)

    gradcheck(
        lambda x: np.float64(loss(x)[0]),
        lambda g, x: g * loss(x)[1],
        [logits],
        decisions=lambda x: stable_topk(noisy(x, top_k).router_logits, top_k),
    )
    value, grad = loss(logits)
    assert type(value) is float
    assert (grad[mask] if masked else grad).all()
    assert not masked or not grad[~MASK].any()
    np.testing.assert_allclose(grad.sum(axis=1), 0.0, atol=32 * U)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_and_forbidden_logits(dtype: type) -> None:
    clean = np.array([[0.0, -np.inf, 1e30, -1e30], [-np.inf, -np.inf, 0.0, 0.5]], dtype)
    for top_k in (1, 2, 3):
        routing = dataclasses.replace(routing_of(clean, top_k), clean_logits=clean)
        value, grad = load_loss(routing, noise_std=STD)
        assert math.isfinite(value)
        assert np.isfinite(grad).all()
        assert grad[0, 1] == grad[1, 0] == grad[1, 1] == 0.0
    # Expert 0 of the second token is never chosen: three of four experts share its load.
    routing = with_noise([[-np.inf, 0.0, 0.0, 0.0]], [[-np.inf, 0.0, 0.0, 0.0]], 3)
    assert load_loss(routing, noise_std=STD)[0] == pytest.approx(1 / 3, rel=16 * U)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_padding_dtype_and_inputs(dtype: type) -> None:
    logits = np.random.default_rng(1).standard_normal((4, 3)).astype(dtype)
    unit = float(np.finfo(dtype).eps)
    longer = np.concatenate([logits, np.full((3, 3), np.nan, dtype)])
    mask = np.arange(7) < 4
    clean, padded = noisy(logits), noisy(longer, token_mask=mask)
    for loss in (importance_loss, lambda r: load_loss(r, noise_std=STD)):
        before = clean.router_logits.copy(), clean.probs.copy()
        value, grad = loss(clean)
        got, got_grad = loss(padded)
        assert grad.dtype == got_grad.dtype == dtype
        assert got == pytest.approx(value, rel=64 * unit)
        np.testing.assert_allclose(got_grad[:4], grad, rtol=0, atol=64 * unit)
        assert not got_grad[4:].any()
        np.testing.assert_array_equal(clean.router_logits, before[0])
        np.testing.assert_array_equal(clean.probs, before[1])
        np.testing.assert_array_equal(clean.clean_logits, logits)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_valid_token(num_tokens: int) -> None:
    routing = noisy(np.full((num_tokens, 4), np.nan), token_mask=np.zeros(num_tokens, bool))
    for value, grad in (importance_loss(routing), load_loss(routing, noise_std=STD)):
        assert value == 0.0
        assert grad.shape == (num_tokens, 4)
        assert not grad.any()


def test_clamped_rows_give_no_gradient() -> None:
    broken = np.array([[0.5, 0.0, 1.0], [np.nan, 0.0, 0.0]])
    routing = noisy(broken, nan_policy="clamp")
    for value, grad in (importance_loss(routing), load_loss(routing, noise_std=STD)):
        assert math.isfinite(value)
        assert grad[0].all()
        assert not grad[1].any()
    nothing = noisy(broken[1:], nan_policy="clamp")
    for value, grad in (importance_loss(nothing), load_loss(nothing, noise_std=STD)):
        assert value == 0.0
        assert not grad.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_std": 0.0}, "noise_std must be finite and > 0, got 0.0."),
        ({"noise_std": math.nan}, "noise_std must be finite and > 0, got nan."),
        ({"noise_std": math.inf}, "noise_std must be finite and > 0, got inf."),
        ({"variance": "std"}, "variance must be one of 'population', 'bessel', got 'std'."),
        ({"coefficient": math.inf}, "coefficient must be finite, got inf."),
    ],
)
def test_messages(arguments: dict[str, Any], message: str) -> None:
    routing = noisy(np.zeros((2, 3)))
    with pytest.raises(RangeError) as caught:
        load_loss(routing, **{"noise_std": STD, **arguments})
    assert str(caught.value) == "load_loss: " + message
    if "noise_std" not in arguments:
        with pytest.raises(RangeError) as caught:
            importance_loss(routing, **arguments)
        assert str(caught.value) == "importance_loss: " + message


def test_messages_about_the_routing() -> None:
    with pytest.raises(RangeError) as caught:
        load_loss(routing_of(np.zeros((2, 3))), noise_std=STD)
    assert str(caught.value) == (
        "load_loss: routing.clean_logits must be the logits before noise, got None. "
        "Route with router_noise_std > 0 and an rng; without noise there is no such loss."
    )
    lonely = noisy(np.zeros((2, 1)), 1)
    assert importance_loss(lonely)[0] == load_loss(lonely, noise_std=STD)[0] == 0.0
    with pytest.raises(RangeError) as caught:
        importance_loss(lonely, variance="bessel")
    assert str(caught.value) == (
        "importance_loss: variance must be 'population' with E = 1, got 'bessel'. "
        "E is bound by routing.probs."
    )
    soft = dataclasses.replace(lonely, topk_ids=np.zeros((6, 1), np.int32))
    for loss in (importance_loss, lambda r: load_loss(r, noise_std=STD)):
        with pytest.raises(ShapeError, match=r"_loss: routing.topk_ids must have shape \(T, K\)"):
            loss(soft)
