"""naive score functions and normalisations against closed forms and central differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from npmoe.config import MoEConfig
from npmoe.naive import renormalize, renormalize_backward
from npmoe.naive.scoring import score, score_backward, sqrtsoftplus, sqrtsoftplus_slope

POINTS = [-1000.0, -745.5, -45.0, -40.0, -39.9, -5.0, -1.0, 0.0, 0.3, 5.0, 40.0, 1000.0]


def test_scores_in_closed_form() -> None:
    row = [math.log(2.0), 0.0, -math.log(4.0)]
    np.testing.assert_allclose(score(row, "softmax"), [8 / 13, 4 / 13, 1 / 13], rtol=4e-16)
    np.testing.assert_allclose(score(row, "sigmoid"), [2 / 3, 1 / 2, 1 / 5], rtol=4e-16)
    roots = [math.sqrt(math.log(3.0)), math.sqrt(math.log(2.0)), math.sqrt(math.log(1.25))]
    np.testing.assert_allclose(score(row, "sqrtsoftplus"), roots, rtol=4e-16)


def test_scores_far_out() -> None:
    assert score([-math.inf], "sqrtsoftplus") == [0.0]
    assert score([-math.inf], "sigmoid") == [0.0]
    assert score_backward([1.0], [-math.inf], "sqrtsoftplus") == [0.0]
    assert score_backward([1.0], [-math.inf], "sigmoid") == [0.0]
    assert score([-1e4, 1e4], "sigmoid") == [0.0, 1.0]
    assert score([-1e4, 1e4], "sqrtsoftplus") == [0.0, 100.0]
    # softplus(-1000) underflows, its root is e^-500.
    assert sqrtsoftplus(-1000.0) == math.exp(-500.0)
    for x in POINTS:
        assert math.isfinite(sqrtsoftplus_slope(x))
        if x < -38.0:
            # The function is e^(x/2) to within a factor of 1 - e^x/4 here.
            assert sqrtsoftplus(x) == pytest.approx(math.exp(0.5 * x), rel=1e-15)
            assert sqrtsoftplus_slope(x) == pytest.approx(0.5 * math.exp(0.5 * x), rel=1e-15)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_score_gradients(name: str, assert_gradient) -> None:
    row, grad = np.array([-30.0, -2.0, -0.1, 0.0, 0.7, 3.0, 6.0]), np.linspace(-1.0, 2.0, 7)

    def f(x: np.ndarray) -> float:
        return float(np.dot(score(x.tolist(), name), grad))

    assert_gradient(f, row, np.array(score_backward(grad.tolist(), row.tolist(), name)))


def config(**fields: object) -> MoEConfig:
    return MoEConfig(score_fn="sigmoid", num_experts=8, renormalize=True, **fields)


ALL = np.array([[True, True]])


@pytest.mark.parametrize(
    ("fields", "weights", "expected"),
    [
        ({}, [0.52, 0.31], [52 / 83, 31 / 83]),
        ({"renorm_p": 2}, [0.3, 0.4], [0.6, 0.8]),
        ({"renorm_eps": 0.17}, [0.52, 0.31], [0.52, 0.31]),
        ({"renorm_eps": 0.5, "renorm_p": 2}, [0.3, 0.4], [0.3, 0.4]),
        ({"renorm_eps": 0.5, "renorm_eps_mode": "max"}, [0.52, 0.31], [52 / 83, 31 / 83]),
        ({"renorm_eps": 2.0, "renorm_eps_mode": "max"}, [0.52, 0.31], [0.26, 0.155]),
        ({}, [0.0, 0.0], [0.0, 0.0]),
        ({"renorm_eps": 1e-20}, [0.0, 0.0], [0.0, 0.0]),
        ({"renorm_eps": 1e-20, "renorm_eps_mode": "max"}, [0.0, 0.0], [0.0, 0.0]),
        # Each weight alone is far below the eps, or squared below everything.
        ({"renorm_eps": 1e-20}, [1e-20, 1e-20], [1 / 3, 1 / 3]),
        ({"renorm_p": 2}, [3e-200, 4e-200], [0.6, 0.8]),
    ],
)
def test_normalisations(fields: dict, weights: list, expected: list) -> None:
    found = renormalize(np.array([weights]), ALL, config(**fields))
    np.testing.assert_allclose(found, [expected], rtol=4e-16)


def test_two_decimals_of_the_worked_row() -> None:
    found = renormalize(np.array([[0.52, 0.31]]), ALL, config())
    assert [f"{w:.2f}" for w in found[0]] == ["0.63", "0.37"]


def test_normalisation_over_the_kept() -> None:
    weights = np.array([[0.5, 0.25, 0.125]] * 3)
    kept = np.array([[True, True, False], [False, True, False], [False, False, False]])
    found = renormalize(weights, kept, config(top_k=3))
    assert found.tolist() == [[0.5 / 0.75, 0.25 / 0.75, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    # A lone survivor weighs 1 whatever its weight is, so its gradient is exactly 0.
    assert not renormalize_backward(np.ones((3, 3)), weights, kept, config(top_k=3))[1:].any()


def test_a_single_choice_may_stay_as_it_is() -> None:
    weight, kept, grad = np.array([[0.25]]), np.array([[True]]), np.array([[3.0]])
    one, other = config(top_k=1), config(top_k=1, renorm_single=False)
    assert renormalize(weight, kept, one).tolist() == [[1.0]]
    assert renormalize(weight, kept, other).tolist() == [[0.25]]
    assert renormalize_backward(grad, weight, kept, one).tolist() == [[0.0]]
    assert renormalize_backward(grad, weight, kept, other).tolist() == [[3.0]]


def test_without_normalisation_only_the_sum_of_routes_changes() -> None:
    cfg, kept = MoEConfig(), np.array([[True, False]])
    assert renormalize(np.array([[0.2, 0.3]]), kept, cfg).tolist() == [[0.2, 0.0]]
    assert renormalize_backward(np.array([[5.0, 7.0]]), ALL, kept, cfg).tolist() == [[5.0, 0.0]]


def test_gradient_where_everything_underflowed() -> None:
    grad, zeros = np.array([[1.0, 2.0]]), np.zeros((1, 2))
    assert not renormalize_backward(grad, zeros, ALL, config()).any()
    for mode in ("add", "max"):
        # w / (0 + eps) and w / eps have the slope 1 / eps at 0.
        cfg = config(renorm_eps=0.25, renorm_eps_mode=mode)
        assert renormalize_backward(grad, zeros, ALL, cfg).tolist() == [[4.0, 8.0]]


@pytest.mark.parametrize(("eps", "mode"), [(0.0, "add"), (0.3, "add"), (0.01, "max"), (9.0, "max")])
@pytest.mark.parametrize("p", [1, 2])
def test_gradient_of_the_normalisation(eps: float, mode: str, p: int, assert_gradient) -> None:
    fields = {"renorm_eps_mode": mode} if eps else {}
    cfg = config(top_k=4, renorm_p=p, renorm_eps=eps, **fields)
    rng = np.random.default_rng(1)
    weights, grad = rng.uniform(0.1, 1.0, (3, 4)), rng.standard_normal((3, 4))
    kept = np.array([[True] * 4, [True, False, True, False], [False] * 4])

    def f(w: np.ndarray) -> float:
        return float((renormalize(w, kept, cfg) * grad).sum())

    assert_gradient(f, weights, renormalize_backward(grad, weights, kept, cfg))


def test_normalised_weights_have_norm_one() -> None:
    rng = np.random.default_rng(3)
    weights, kept = rng.uniform(0.1, 1.0, (5, 4)), np.ones((5, 4), bool)
    for p, power in itertools.product([1, 2], [1.0, 2.0]):
        total = (renormalize(weights, kept, config(top_k=4, renorm_p=p)) ** power).sum(axis=1)
        assert (np.abs(total - 1.0) < 1e-14).all() == (p == power)
