"""naive soft routing against closed forms; its gradients are in test_naive_layer_gradients.py."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.naive import moe_backward, moe_forward
from npmoe.naive.soft_router import normalize, normalize_backward
from npmoe.params import MoEParams


def soft(**fields: object) -> MoEConfig:
    sizes = {"hidden_size": 3, "intermediate_size": 2, "num_experts": 2, "expert_capacity": 2}
    return MoEConfig(routing="soft", **(sizes | fields))


def test_normalisation_adds_its_eps_to_the_norm(assert_gradient) -> None:
    v = np.array([3e-6, 4e-6])
    np.testing.assert_allclose(normalize(v), [0.5, 4.0 / 6.0], rtol=1e-15)
    assert normalize(np.zeros(2)).tolist() == [0.0, 0.0]
    grad = np.array([0.3, -0.7])
    # At 0 the eps alone is left: the slope is 1e6.
    found = normalize_backward(grad, np.zeros(2))
    np.testing.assert_allclose(found, 1e6 * grad, rtol=1e-15)
    # Along v the derivative of |v| / (|v| + eps) is eps / (|v| + eps)^2.
    along = normalize_backward(np.array([1.0, 0.0]), np.array([1e-6, 0.0]))
    np.testing.assert_allclose(along, [0.25e6, 0.0], rtol=1e-9)
    w = np.array([0.5, -1.5])
    assert_gradient(lambda z: float(normalize(z) @ grad), w, normalize_backward(grad, w))


def test_one_slot_by_hand() -> None:
    # relu experts 2 relu(h) and 3 relu(h), one slot each, scale chosen to give logits +-ln 3.
    n = 2.0 / (2.0 + 1e-6)
    cfg = soft(hidden_size=1, intermediate_size=1, expert_capacity=1, activation="relu")
    params = MoEParams(
        router_weight=np.array([[2.0], [-2.0]]),
        gate_up_proj=np.array([[[1.0]], [[1.0]]]),
        down_proj=np.array([[[2.0]], [[3.0]]]),
        soft_scale=np.array(math.log(3.0) / n**2),
    )
    x = np.array([[2.0], [-2.0]])
    forward = moe_forward(x, params, cfg)
    ln3 = math.log(3.0)
    np.testing.assert_allclose(forward.logits, [[ln3, -ln3], [-ln3, ln3]], rtol=1e-14)
    assert forward.dispatch is not None
    np.testing.assert_allclose(forward.dispatch, [[0.9, 0.1], [0.1, 0.9]], rtol=1e-14)
    np.testing.assert_allclose(forward.probs, [[0.9, 0.1], [0.1, 0.9]], rtol=1e-14)
    # Slots hold .9 * 2 - .1 * 2 = 1.6 and -1.6; experts give 3.2 and 0.
    np.testing.assert_allclose(forward.output, [[0.9 * 3.2], [0.1 * 3.2]], rtol=1e-14)


def test_slots_belong_to_their_experts_in_blocks(draw) -> None:
    cfg = soft(expert_bias=True, activation="relu")
    params = dataclasses.replace(
        draw.params(cfg, 0),
        down_proj=np.zeros((2, 3, 2)),
        down_bias=np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
    )
    forward = moe_forward(np.random.default_rng(1).standard_normal((4, 3)), params, cfg)
    shares = [forward.probs[:, :2].sum(axis=1), forward.probs[:, 2:].sum(axis=1)]
    np.testing.assert_allclose(forward.output[:, :2].T, shares, rtol=1e-14)


@pytest.mark.parametrize("length", [None, 3])
def test_shares_sum_to_one_within_a_sequence(draw, length: int | None) -> None:
    cfg = soft()
    params, x = draw.params(cfg, 2), np.random.default_rng(3).standard_normal((6, 3))
    mask = np.array([True, True, False, False, True, True])
    forward = moe_forward(x, params, cfg, token_mask=mask, sequence_length=length)
    assert forward.dispatch is not None
    for start in range(0, 6, length or 6):
        columns = forward.dispatch[start : start + (length or 6)].sum(axis=0)
        np.testing.assert_allclose(columns, 1.0, rtol=1e-15)
    np.testing.assert_allclose(forward.probs.sum(axis=1), mask * 1.0, rtol=1e-15)


def test_sequences_do_not_see_each_other(draw) -> None:
    cfg = soft(expert_bias=True, shared_intermediate_size=2, output_bias=True)
    params = draw.params(cfg, 4)
    x, g = np.random.default_rng(5).standard_normal((2, 6, 3))
    both = moe_forward(x, params, cfg, sequence_length=3)
    one, other = moe_forward(x[:3], params, cfg), moe_forward(x[3:], params, cfg)
    assert both.output.tobytes() == np.concatenate([one.output, other.output]).tobytes()
    whole = moe_forward(x, params, cfg)
    assert (whole.output != both.output).any()
    grads = moe_backward(g, x, params, cfg, sequence_length=3)
    apart = [moe_backward(g[s], x[s], params, cfg) for s in (slice(0, 3), slice(3, 6))]
    summed = apart[0].gate_up_proj + apart[1].gate_up_proj
    np.testing.assert_allclose(grads.gate_up_proj, summed, rtol=1e-12, atol=1e-14)


def test_masked_tokens_are_absent(draw) -> None:
    cfg = soft(expert_bias=True, output_bias=True)
    params = draw.params(cfg, 6)
    x, g = np.random.default_rng(7).standard_normal((2, 4, 3))
    mask = np.array([True, False, True, True, False, True])
    padded, padded_g = np.full((6, 3), np.nan), np.full((6, 3), np.nan)
    padded[mask], padded_g[mask] = x, g
    short = moe_forward(x, params, cfg)
    for long in (
        moe_forward(padded, params, cfg, token_mask=mask),
        moe_forward(padded, params, dataclasses.replace(cfg, nan_policy="drop")),
    ):
        assert long.output[mask].tobytes() == short.output.tobytes()
        assert not long.output[~mask].any()
    grads = moe_backward(g, x, params, cfg)
    long_grads = moe_backward(padded_g, padded, params, cfg, token_mask=mask)
    assert not long_grads.hidden_states[~mask].any()
    assert (long_grads.hidden_states[mask] == grads.hidden_states).all()
    for name in ("router_weight", "soft_scale", "gate_up_proj", "down_bias", "output_bias"):
        assert (getattr(long_grads, name) == getattr(grads, name)).all()
    with pytest.raises(RangeError, match=r"^route: logits must have a finite largest value"):
        moe_forward(padded, params, cfg)
    none = moe_forward(padded, params, cfg, token_mask=np.zeros(6, bool))
    assert not none.output.any()


def test_no_tokens(draw) -> None:
    cfg = soft()
    params = draw.params(cfg, 8)
    for length in (None, 3):
        forward = moe_forward(np.zeros((0, 3)), params, cfg, sequence_length=length)
        assert forward.output.shape == (0, 3)
        none = np.zeros((0, 3))
        grads = moe_backward(none, none, params, cfg, sequence_length=length)
        assert not grads.router_weight.any()


def test_equal_tokens_share_equally(draw) -> None:
    cfg = soft(activation="relu")
    params = draw.params(cfg, 9)
    x = np.tile([[0.5, -1.0, 2.0]], (4, 1))
    forward = moe_forward(x, params, cfg)
    assert forward.dispatch is not None
    np.testing.assert_allclose(forward.dispatch, 0.25, rtol=1e-15)
    # Every slot is the token, so the output is the mixture of the experts on the token.
    act = np.maximum(x[0] @ params.gate_up_proj.transpose(0, 2, 1), 0.0)
    y = np.einsum("ei,ehi->eh", act, params.down_proj)
    share = forward.probs[0].reshape(2, 2).sum(axis=1)
    np.testing.assert_allclose(forward.output[0], share @ y, rtol=1e-13)
