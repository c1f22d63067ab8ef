"""naive losses against closed forms and central differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npmoe.naive.losses import entropy_loss, load_balancing_loss, z_loss
from npmoe.naive.variation import importance_loss, load_loss


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


CONVENTIONS = {
    # name: value for P = (0.7, 0.2, 0.1) and choices 0 and 1 by every token, times 1/E
    "switch": 0.45,
    "gshard": 0.45,
    "hf": 0.9,
    "flaxformer": 0.9,
    "megatron": 0.45,
    "megablocks": 0.45,
    "deepspeed_topk": 0.45,
    "deepseek_v3": 0.45,
    "sonic": 0.45,
    "unscaled": 0.15,
    "prob_entropy": 0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1),
}
SCORES = ["softmax", "sigmoid", "sqrtsoftplus"]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_one_sided_value_of_every_convention(convention: str) -> None:
    logits, ids = np.log(np.tile([0.7, 0.2, 0.1], (4, 1))), np.tile([0, 1], (4, 1))
    value, _ = load_balancing_loss(logits, ids, convention=convention)
    assert value == pytest.approx(3 * CONVENTIONS[convention], rel=1e-14)
    # First choices only: a single choice per token, always expert 0.
    if convention != "prob_entropy":
        value, _ = load_balancing_loss(logits, ids, convention=convention, counts="top1")
        factor = 1 if convention == "unscaled" else 3
        assert value == pytest.approx(factor * 0.7, rel=1e-14)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("score_fn", SCORES)
@pytest.mark.parametrize("sequence_length", [None, 2])
def test_gradient_of_every_convention(
    convention: str, score_fn: str, sequence_length: int | None, assert_gradient
) -> None:
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((6, 4))
    ids = np.array([[0, 1], [0, 3], [2, 0], [-1, 1], [3, -1], [1, 2]])
    mask = np.array([True, False, True, True, False, False])
    kept = rng.random((6, 2)) < 0.7

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        return load_balancing_loss(
            x,
            ids,
            mask,
            convention=convention,
            counts="post_drop",
            score_fn=score_fn,
            kept=kept,
            sequence_length=sequence_length,
        )

    assert_gradient(lambda x: loss(x)[0], logits, loss(logits)[1])
    assert loss(logits)[1].any()


def test_where_counts_come_from() -> None:
    # P = (1/2, 1/3, 1/6) for both tokens, so a fresh top-2 is 0 and 1 twice.
    logits = np.log([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    ids, kept = np.array([[2, 1], [0, 2]]), np.array([[True, False], [True, True]])
    expected = {
        "pre_drop": (1 / 2 + 1 / 3 + 2 / 6) * 3 / 4,
        "post_drop": (1 / 2 + 2 / 6) * 3 / 4,
        "executed": (1 / 2 + 2 / 6) * 3 / 4,
        "unbiased_topk": (2 / 2 + 2 / 3) * 3 / 4,
        "top1": (1 / 2 + 1 / 6) * 3 / 2,
    }
    for counts, value in expected.items():
        found, _ = load_balancing_loss(logits, ids, counts=counts, kept=kept)
        assert found == pytest.approx(value, rel=1e-14), counts
    found, _ = load_balancing_loss(logits, ids, counts="executed")
    assert found == pytest.approx(expected["pre_drop"], rel=1e-14)
    window = np.array([4, 0, 2]), 4, 8
    found, _ = load_balancing_loss(logits, ids, window=window)
    assert found == pytest.approx(3 * (4 / 8 / 2 + 2 / 8 / 6), rel=1e-14)
    found, _ = load_balancing_loss(logits, ids, convention="hf", window=window)
    assert found == pytest.approx(3 * (4 / 4 / 2 + 2 / 4 / 6), rel=1e-14)


def test_hf_ignores_the_score_function() -> None:
    logits, ids = np.log([[3.0, 2.0, 1.0]]), np.array([[0]])
    for score_fn in SCORES:
        value, _ = load_balancing_loss(logits, ids, convention="hf", score_fn=score_fn)
        assert value == pytest.approx(1.5, rel=1e-14)
    # Sigmoids 3/4, 2/3 and 1/2 are divided by their sum, 23/12.
    value, _ = load_balancing_loss(logits, ids, score_fn="sigmoid")
    assert value == pytest.approx(3 * 9 / 23, rel=1e-14)


def test_sequences_are_averaged_and_empty_ones_left_out() -> None:
    logits = np.log([[0.5, 0.5], [0.75, 0.25], [1.0, 1.0], [1.0, 1.0]])
    ids, mask = np.array([[0], [1], [0], [0]]), np.array([True, True, False, False])
    value, _ = load_balancing_loss(logits, ids, mask, sequence_length=1)
    assert value == pytest.approx((2 * 0.5 + 2 * 0.25) / 2, rel=1e-14)
    value, _ = load_balancing_loss(logits, ids, mask, sequence_length=2)
    assert value == pytest.approx(1.0, rel=1e-14)


def test_a_certain_probability_has_no_entropy() -> None:
    logits = np.array([[0.0, -2000.0]])
    value, grad = load_balancing_loss(logits, np.array([[0]]), convention="prob_entropy")
    assert value == 0.0
    assert not grad.any()


def test_importance_by_hand() -> None:
    logits = np.log([[0.6, 0.4], [0.5, 0.5], [0.1, 0.9]])
    mask = np.array([True, True, False])
    # I = (1.1, 0.9)
    assert importance_loss(logits, mask)[0] == pytest.approx(0.01, rel=1e-13)
    assert importance_loss(logits, mask, variance="bessel")[0] == pytest.approx(0.02, rel=1e-13)
    assert importance_loss(logits, np.zeros(3, bool))[0] == 0.0


def test_load_by_hand() -> None:
    def chance(u: float) -> float:
        return 0.5 * math.erfc(u / math.sqrt(2.0))

    logits, clean = np.array([[1.0, -1.0, -2.0]]), np.array([[0.5, -1.0, -1.5]])
    load = np.array([chance(-1.5 / 0.5), 0.5, chance(0.5 / 0.5)])
    value, _ = load_loss(logits, clean, 2, 0.5)
    assert value == pytest.approx(load.var() / load.mean() ** 2, rel=1e-14)
    value, _ = load_loss(logits, clean, 2, 0.5, variance="bessel")
    assert value == pytest.approx(load.var(ddof=1) / load.mean() ** 2, rel=1e-14)
    assert load_loss(logits, clean, 2, 0.5, np.array([False]))[0] == 0.0


@pytest.mark.parametrize("variance", ["population", "bessel"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_importance_and_load(variance: str, masked: bool, assert_gradient) -> None:
    rng = np.random.default_rng(6)
    logits, noise = rng.standard_normal((5, 4)), rng.standard_normal((5, 4))
    mask = np.array([True, False, True, True, False]) if masked else None

    def load(x: np.ndarray) -> tuple[float, np.ndarray]:
        return load_loss(x + noise, x, 2, 1.0, mask, variance=variance)

    assert_gradient(lambda x: load(x)[0], logits, load(logits)[1])
    for score_fn in SCORES:

        def importance(x: np.ndarray) -> tuple[float, np.ndarray]:
            return importance_loss(x, mask, variance=variance, score_fn=score_fn)  # noqa: B023

        assert_gradient(lambda x: importance(x)[0], logits, importance(logits)[1])
