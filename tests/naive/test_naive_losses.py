"""naive losses against closed forms and central differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npmoe.naive import entropy_loss, load_balancing_loss, z_loss


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (4, 2), (6, 6)])
def test_uniform_routing(num_experts: int, top_k: int) -> None:
    logits = np.zeros((num_experts, num_experts))
    ids = (np.arange(num_experts)[:, None] + np.arange(top_k)) % num_experts
    assert load_balancing_loss(logits, ids)[0] == pytest.approx(1.0, rel=1e-14)
    assert z_loss(logits)[0] == pytest.approx(math.log(num_experts) ** 2, rel=1e-14)
    assert entropy_loss(logits)[0] == pytest.approx(math.log(num_experts), rel=1e-14)


def test_everything_on_one_expert() -> None:
    logits = np.tile([0.0, -2000.0, -2000.0], (5, 1))
    assert load_balancing_loss(logits, np.zeros((5, 1), int))[0] == 3.0
    # Half of the choices go to an expert without any probability.
    assert load_balancing_loss(logits, np.tile([0, 1], (5, 1)))[0] == 1.5
    assert load_balancing_loss(logits, np.tile([0, -1], (5, 1)))[0] == 1.5
    assert entropy_loss(logits)[0] == 0.0
    assert not entropy_loss(logits)[1].any()
    assert z_loss(logits + 3.0)[0] == 9.0


def test_load_balance_depends_on_the_routing() -> None:
    logits = np.log([[0.5, 0.3, 0.2]])
    values = [load_balancing_loss(logits, np.array([[e]]))[0] for e in range(3)]
    np.testing.assert_allclose(values, [1.5, 0.9, 0.6], rtol=1e-15)
    # An id of -1 is nobody's, not the last expert's.
    value = load_balancing_loss(logits, np.array([[0, -1]]))[0]
    np.testing.assert_allclose(value, 0.75, rtol=1e-15)


def test_a_never_chosen_expert_still_has_a_gradient() -> None:
    grad = load_balancing_loss(np.array([[1.0, 0.0, -1.0]]), np.array([[0]]))[1]
    assert grad[0, 2] < 0.0 < grad[0, 0]


LOSSES = {
    "load": load_balancing_loss,
    "z": lambda x, ids, mask: z_loss(x, mask),
    "entropy": lambda x, ids, mask: entropy_loss(x, mask),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradient(loss: str, masked: bool, assert_gradient) -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((5, 4))
    ids = np.array([[0, 1], [0, 3], [2, 0], [-1, 1], [3, -1]])
    mask = np.array([True, False, True, True, False]) if masked else None
    assert_gradient(
        lambda x: LOSSES[loss](x, ids, mask)[0], logits, LOSSES[loss](logits, ids, mask)[1]
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_rows_change_nothing(loss: str) -> None:
    rng = np.random.default_rng(4)
    logits, ids = rng.standard_normal((3, 4)), np.array([[0, 1], [1, 2], [1, 0]])
    value, grad = LOSSES[loss](logits, ids, None)
    padded = np.vstack([np.full((2, 4), np.nan), logits])
    padded_ids = np.vstack([np.zeros((2, 2), int), ids])
    found, padded_grad = LOSSES[loss](
        padded, padded_ids, np.array([False, False, True, True, True])
    )
    assert found == value
    assert (padded_grad[2:] == grad).all()
    assert not padded_grad[:2].any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_tokens", [0, 2])
def test_without_tokens_the_loss_is_zero(loss: str, num_tokens: int) -> None:
    ids, mask = np.full((num_tokens, 2), -1), np.zeros(num_tokens, bool)
    value, grad = LOSSES[loss](np.ones((num_tokens, 3)), ids, mask)
    assert value == 0.0
    assert grad.shape == (num_tokens, 3)
    assert not grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_one_infinitely_low_logit_is_legal(loss: str) -> None:
    ids = np.array([[0]])
    value, grad = LOSSES[loss](np.array([[0.5, -np.inf, 0.0]]), ids, None)
    assert grad[0, 1] == 0.0
    smaller = LOSSES[loss](np.array([[0.5, 0.0]]), ids, None)
    # The number of experts enters the load loss as a factor, and nothing else does.
    factor = 1.5 if loss == "load" else 1.0
    assert value == pytest.approx(factor * smaller[0], rel=1e-15)
    np.testing.assert_allclose(grad[0, [0, 2]], factor * smaller[1][0], rtol=1e-15)
