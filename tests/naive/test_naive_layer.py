"""naive.moe_forward and moe_backward against closed forms and central differences."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

import npmoe.naive
from npmoe.config import MoEConfig
from npmoe.naive import moe_backward, moe_forward
from npmoe.naive.activations import relu, relu_slope
from npmoe.params import MoEParams


def small(**fields: object) -> MoEConfig:
    sizes = {"hidden_size": 3, "intermediate_size": 2, "num_experts": 3, "top_k": 2}
    return MoEConfig(**(sizes | fields))


def assert_close(actual: np.ndarray, expected: list | np.ndarray) -> None:
    """Allow the few roundings of a short sum whose terms are of the size of the result."""
    np.testing.assert_allclose(actual, expected, rtol=4e-15)


def test_two_tokens_by_hand() -> None:
    cfg = MoEConfig(
        hidden_size=1,
        intermediate_size=1,
        num_experts=2,
        top_k=2,
        activation="relu",
        expert_bias=True,
        router_bias=True,
    )
    params = MoEParams(
        router_weight=np.array([[0.0], [math.log(3.0)]]),
        router_bias=np.array([0.0, 0.0]),
        gate_up_proj=np.array([[[2.0]], [[-1.0]]]),
        down_proj=np.array([[[5.0]], [[7.0]]]),
        gate_up_bias=np.array([[1.0], [3.0]]),
        down_bias=np.array([[-4.0], [10.0]]),
    )
    # Token 1.0: expert 0 gives 5*relu(3)-4 = 11, expert 1 gives 7*relu(2)+10 = 24.
    # Token -1.0: expert 0 gives 5*relu(-1)-4 = -4, expert 1 gives 7*relu(4)+10 = 38.
    forward = moe_forward(np.array([[1.0], [-1.0]]), params, cfg)
    assert_close(forward.output, [[0.25 * 11 + 0.75 * 24], [-0.75 * 4 + 0.25 * 38]])
    assert forward.topk_ids.tolist() == [[1, 0], [0, 1]]
    grads = moe_backward(np.array([[1.0], [1.0]]), np.array([[1.0], [-1.0]]), params, cfg)
    assert_close(grads.down_bias, [[0.25 + 0.75], [0.75 + 0.25]])
    assert_close(grads.down_proj, [[[0.25 * 3]], [[0.75 * 2 + 0.25 * 4]]])
    assert_close(grads.gate_up_bias, [[0.25 * 5], [7.0]])
    assert_close(grads.gate_up_proj, [[[0.25 * 5]], [[0.75 * 7 - 0.25 * 7]]])
    # d output / d logit_1 = p_0 p_1 (y_1 - y_0) = 3/16 (13 and 42)
    assert_close(grads.router_bias, [-55 * 3 / 16, 55 * 3 / 16])
    assert_close(grads.router_weight, [[29 * 3 / 16], [-29 * 3 / 16]])
    router = np.array([[13.0], [42.0]]) * 3 / 16 * math.log(3.0)
    expert = [[0.25 * 10 - 0.75 * 7], [-0.25 * 7]]
    assert_close(grads.hidden_states, expert + router)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_all_experts_equal_is_one_dense_expert(draw, activation: str) -> None:
    cfg = small(activation=activation, renormalize=True, expert_bias=True)
    drawn = draw.params(cfg, 0)
    first = {n: np.repeat(getattr(drawn, n)[:1], 3, axis=0) for n in ("gate_up_proj", "down_proj")}
    first |= {n: np.repeat(getattr(drawn, n)[:1], 3, axis=0) for n in ("gate_up_bias", "down_bias")}
    params = dataclasses.replace(drawn, **first)
    x = np.random.default_rng(1).standard_normal((4, 3))
    pre = x @ params.gate_up_proj[0].T + params.gate_up_bias[0]
    if activation == "swiglu":
        act = pre[:, :2] / (1.0 + np.exp(-pre[:, :2])) * pre[:, 2:]
    elif activation == "gelu":
        act = pre * np.array([[0.5 * math.erfc(-z / math.sqrt(2.0)) for z in row] for row in pre])
    else:
        act = np.where(pre > 0, pre, 0.0)
    dense = act @ params.down_proj[0].T + params.down_bias[0]
    np.testing.assert_allclose(moe_forward(x, params, cfg).output, dense, atol=1e-14)


def test_relu_kink_takes_the_left_derivative(draw) -> None:
    for h in (1.0, 2.0**-30):
        assert (relu(0.0) - relu(-h)) / h == relu_slope(0.0) == 0.0
        assert (relu(h) - relu(0.0)) / h == relu_slope(h) == 1.0
    cfg = small(activation="relu", num_experts=1, top_k=1)
    params = draw.params(cfg, 2)
    # The one token is orthogonal to both rows of the first projection: every unit is at its kink.
    params = dataclasses.replace(
        params, gate_up_proj=np.array([[[1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]])
    )
    x = np.array([[1.0, -1.0, -1.0]])
    grads = moe_backward(np.ones((1, 3)), x, params, cfg)
    assert not grads.gate_up_proj.any()
    assert not grads.hidden_states.any()


def test_masked_rows_are_absent(draw) -> None:
    cfg = small(capacity_factor="0.5", expert_bias=True, router_bias=True)
    params = draw.params(cfg, 3)
    rng = np.random.default_rng(4)
    x, grad_output = rng.standard_normal((2, 4, 3))
    mask = np.array([False, True, True, False, True, True])
    padded, padded_grad = np.full((6, 3), np.nan), np.full((6, 3), np.nan)
    padded[mask], padded_grad[mask] = x, grad_output
    short, long = moe_forward(x, params, cfg), moe_forward(padded, params, cfg, token_mask=mask)
    assert not short.kept.all()
    for field in dataclasses.fields(short):
        one, other = getattr(short, field.name), getattr(long, field.name)
        assert (one is None) == (other is None)
        assert one is None or (other[mask] == one).all()
    assert not long.output[~mask].any()
    assert (long.topk_ids[~mask] == -1).all()
    grads = moe_backward(grad_output, x, params, cfg)
    aux = np.full((6, 3), np.nan)
    aux[mask] = 0.0
    padded_grads = moe_backward(
        padded_grad, padded, params, cfg, token_mask=mask, grad_router_logits=aux
    )
    assert not padded_grads.hidden_states[~mask].any()
    for field in dataclasses.fields(grads):
        one, other = getattr(grads, field.name), getattr(padded_grads, field.name)
        assert (one is None) == (other is None)
        if one is not None:
            assert (one == (other[mask] if field.name == "hidden_states" else other)).all()


def test_non_finite_tokens_can_be_dropped(draw) -> None:
    cfg = small(capacity_factor="1", nan_policy="drop")
    params = draw.params(cfg, 3)
    x = np.random.default_rng(5).standard_normal((5, 3))
    broken = x.copy()
    broken[2, 1] = np.nan
    mask = np.array([True, True, False, True, True])
    by_mask, by_policy = (
        moe_forward(x, params, cfg, token_mask=mask),
        moe_forward(broken, params, cfg),
    )
    assert (by_policy.output == by_mask.output).all()
    assert (by_policy.kept == by_mask.kept).all()
    grads = moe_backward(np.ones((5, 3)), broken, params, cfg, grad_router_logits=np.ones((5, 3)))
    expected = moe_backward(
        np.ones((5, 3)), x, params, cfg, token_mask=mask, grad_router_logits=np.ones((5, 3))
    )
    assert (grads.hidden_states == expected.hidden_states).all()
    assert (grads.gate_up_proj == expected.gate_up_proj).all()
    assert (grads.router_weight == expected.router_weight).all()


def test_dropped_tokens_contribute_nothing(draw) -> None:
    cfg = small(expert_capacity=0)
    params = draw.params(cfg, 6)
    x = np.random.default_rng(7).standard_normal((4, 3))
    assert not moe_forward(x, params, cfg).output.any()
    grads = moe_backward(np.ones((4, 3)), x, params, cfg)
    for field in dataclasses.fields(grads):
        array = getattr(grads, field.name)
        assert array is None or not array.any()


def test_empty_experts_have_zero_gradients(draw) -> None:
    cfg = small(expert_bias=True)
    params = draw.params(cfg, 6)
    x = np.random.default_rng(7).standard_normal((4, 3))
    replay = np.tile([2, 0], (4, 1))
    assert (moe_forward(x, params, cfg, topk_ids=replay).topk_ids == replay).all()
    grads = moe_backward(np.ones((4, 3)), x, params, cfg, topk_ids=replay)
    for array in (grads.gate_up_proj, grads.down_proj, grads.gate_up_bias, grads.down_bias):
        assert not array[1].any()
        assert array[0].any()
        assert array[2].any()
    # The router's probability of an expert without tokens still matters.
    assert grads.router_weight[1].any()


def test_no_tokens(draw) -> None:
    cfg = small(router_bias=True, capacity_factor="1")
    params = draw.params(cfg, 1)
    assert moe_forward(np.zeros((0, 3)), params, cfg).output.shape == (0, 3)
    grads = moe_backward(np.zeros((0, 3)), np.zeros((0, 3)), params, cfg)
    assert not grads.gate_up_proj.any()
    assert not grads.router_bias.any()


def test_files_stay_short_and_independent() -> None:
    files = sorted(Path(npmoe.naive.__file__).parent.glob("*.py"))
    assert len(files) > 10
    allowed = ("npmoe._typing", "npmoe.config", "npmoe.errors", "npmoe.naive")
    for path in files:
        lines = path.read_text().splitlines()
        assert len(lines) <= 150, path.name
        imports = [
            line.split()[1] for line in lines if line.startswith(("from npmoe", "import npmoe"))
        ]
        assert all(name.startswith(allowed) for name in imports), path.name
