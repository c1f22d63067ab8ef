"""Soft MoE and the balanced assignments: closed forms, gradients, masks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import npmoe
from npmoe import MoEConfig, RangeError, gradcheck
from npmoe.routing import quantile_balance, sinkhorn, stable_topk
from npmoe.routing.soft import (
    soft_combine,
    soft_combine_backward,
    soft_dispatch,
    soft_dispatch_backward,
    soft_route,
    soft_route_backward,
    soft_weights_backward,
)

CFG = MoEConfig(
    hidden_size=4, intermediate_size=3, num_experts=3, routing="soft", expert_capacity=2
)
U = 2.0**-53


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_logits_are_scaled_cosines() -> None:
    x, phi = normal(2, 5, 4), normal(6, 4, seed=1)
    soft = soft_route(x, phi, np.array(3.0))
    for b in range(2):
        for t in range(5):
            for s in range(6):
                n, m = np.linalg.norm(x[b, t]) + 1e-6, np.linalg.norm(phi[s]) + 1e-6
                expected = 3.0 * (x[b, t] @ phi[s]) / n / m
                assert abs(soft.router_logits[b, t, s] - expected) <= 40 * U
    np.testing.assert_allclose(soft.dispatch.sum(axis=1), 1.0, rtol=20 * U)
    np.testing.assert_allclose(soft.combine.sum(axis=2), 1.0, rtol=20 * U)


def test_without_scale_every_slot_is_the_mean_token() -> None:
    params = dataclasses.replace(npmoe.init_params(CFG, dtype="float64"), soft_scale=np.array(0.0))
    x = normal(2, 5, 4)
    output, saved = npmoe.moe_forward(x, params, CFG)
    assert saved is not None
    assert saved.soft is not None
    means = np.repeat(x.mean(axis=1), 6, axis=0)
    np.testing.assert_allclose(saved.soft.slots, means, rtol=1e-12)
    np.testing.assert_allclose(output, np.repeat(output[:, :1], 5, axis=1), rtol=1e-12)
    # The same through a dense mixture of equal weights on the means.
    dense = MoEConfig(hidden_size=4, intermediate_size=3, num_experts=3, routing="dense")
    flat = dataclasses.replace(params, soft_scale=None, router_weight=np.zeros((3, 4)))
    expected, _ = npmoe.moe_forward(x.mean(axis=1), flat, dense)
    np.testing.assert_allclose(output[:, 0], expected, rtol=1e-12)


def test_sequences_do_not_mix() -> None:
    params = npmoe.init_params(CFG, dtype="float64")
    x = normal(3, 5, 4)
    output, _ = npmoe.moe_forward(x, params, CFG)
    for b in range(3):
        alone, _ = npmoe.moe_forward(x[b], params, CFG)
        np.testing.assert_allclose(output[b], alone, rtol=1e-11, atol=1e-13)


def test_masked_tokens_neither_give_nor_take() -> None:
    params = npmoe.init_params(CFG, dtype="float64")
    x, mask = normal(2, 5, 4), np.ones((2, 5), bool)
    mask[0, 3:] = False
    mask[1] = False
    broken = x.copy()
    broken[~mask] = np.nan
    output, saved = npmoe.moe_forward(broken, params, CFG, token_mask=mask)
    alone, _ = npmoe.moe_forward(x[0, :3], params, CFG)
    np.testing.assert_allclose(output[0, :3], alone, rtol=1e-11, atol=1e-13)
    assert not output[~mask].any()
    grads = npmoe.moe_backward(broken, saved, params)
    assert not grads.hidden_states[~mask].any()
    assert np.isfinite(grads.router_weight).all()


def test_broken_tokens_follow_the_policy() -> None:
    params = npmoe.init_params(CFG, dtype="float64")
    x = normal(1, 5, 4)
    x[0, 2, 1] = np.nan
    with pytest.raises(RangeError, match="finite largest value in every row, got nan in token 2"):
        npmoe.moe_forward(x, params, CFG)
    drop = dataclasses.replace(CFG, nan_policy="drop")
    output, saved = npmoe.moe_forward(x, params, drop)
    rest = np.delete(x, 2, axis=1)
    np.testing.assert_allclose(
        np.delete(output, 2, axis=1), npmoe.moe_forward(rest, params, drop)[0], rtol=1e-11
    )
    assert not output[0, 2].any()
    assert np.isfinite(npmoe.moe_backward(np.ones_like(x), saved, params).hidden_states).all()


@pytest.mark.parametrize("length", [0, 1])
def test_short_sequences(length: int) -> None:
    params = npmoe.init_params(CFG, dtype="float64")
    x = normal(2, length, 4)
    output, saved = npmoe.moe_forward(x, params, CFG)
    assert output.shape == x.shape
    grads = npmoe.moe_backward(x, saved, params)
    assert grads.hidden_states.shape == x.shape
    assert np.isfinite(grads.router_weight).all()


def test_gradients_of_the_parts() -> None:
    x, phi, scale = normal(2, 3, 4), normal(6, 4, seed=1), np.array(1.7)
    gradcheck(
        lambda a, b, c: soft_route(a, b, c).router_logits,
        soft_route_backward,
        [x, phi, scale],
    )
    d = np.abs(normal(2, 3, 6, seed=2))
    gradcheck(soft_dispatch, soft_dispatch_backward, [x, d])
    gradcheck(soft_combine, soft_combine_backward, [normal(12, 4, seed=3), d])
    soft = soft_route(x, phi, scale)
    g, h = normal(2, 3, 6, seed=4), normal(2, 3, 6, seed=5)

    def both(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits)
        first = powers / powers.sum(axis=1, keepdims=True)
        second = powers / powers.sum(axis=2, keepdims=True)
        return np.array((first * g).sum() + (second * h).sum())

    gradcheck(both, lambda one, _: one * soft_weights_backward(g, h, soft), [soft.router_logits])


def test_a_token_of_zeros_has_a_gradient() -> None:
    x = normal(1, 3, 4)
    x[0, 1] = 0.0
    grad, _, _ = soft_route_backward(normal(1, 3, 6), x, normal(6, 4, seed=1), np.array(1.0))
    assert np.isfinite(grad).all()
    assert grad[0, 1].any()


# Assignments to be replayed.


def test_sinkhorn_balances() -> None:
    logits = normal(64, 4) + np.array([3.0, 0.0, 0.0, -1.0])
    got = sinkhorn(logits)
    # The last step made the columns exact, but for eps; the rows had moved by the tolerance.
    np.testing.assert_allclose(got.sum(axis=0), 1 / 4, rtol=1e-6)
    np.testing.assert_allclose(got.sum(axis=1), 1 / 64, rtol=1e-3)
    plain = np.bincount(stable_topk(logits, 1)[:, 0], minlength=4)
    balanced = np.bincount(stable_topk(got, 1)[:, 0], minlength=4)
    assert balanced.max() < plain.max()
    # Rows keep the order of x plus a constant per column.
    ratio = np.log(got) - logits
    shift = ratio - ratio[:, :1]
    np.testing.assert_allclose(shift, np.tile(shift[0], (64, 1)), atol=1e-10)
    assert sinkhorn(np.zeros((0, 4))).shape == (0, 4)
    with pytest.raises(RangeError) as caught:
        sinkhorn(logits, tolerance=0.0)
    assert str(caught.value) == "sinkhorn: tolerance must be positive, got 0.0."
    with pytest.raises(RangeError, match=r"within 3 iterations, got a change of .*e-.* Raise the"):
        sinkhorn(logits, tolerance=1e-12, max_iterations=3)


def test_quantile_balancing_step() -> None:
    probs = np.random.default_rng(0).random((12, 4)) + np.array([0.5, 0.0, 0.0, 0.0])
    thresholds = None
    for _ in range(30):
        ids, thresholds = quantile_balance(probs, 2, thresholds=thresholds)
    plain = np.bincount(stable_topk(probs, 2).ravel(), minlength=4)
    balanced = np.bincount(ids.ravel(), minlength=4)
    assert plain.max() == 11
    assert balanced.max() <= 8
    assert ids.dtype == np.int32
    ids, first = quantile_balance(probs, 2)
    alpha = np.sort(probs, axis=1)[:, 1]  # the third largest of four
    np.testing.assert_array_equal(first, np.sort(probs - alpha[:, None], axis=0)[12 - 7])
    np.testing.assert_array_equal(ids, stable_topk(probs - first, 2))
    for top_k, text in (
        (4, "top_k must lie in 1..3, got 4."),
        (1, "num_experts must divide tokens * top_k = 11, got 4. Every expert takes the same "),
    ):
        with pytest.raises(RangeError) as caught:
            quantile_balance(probs[: 11 if top_k == 1 else 12], top_k)
        assert str(caught.value).startswith(f"quantile_balance: {text}")
