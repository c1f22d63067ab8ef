"""naive.route and its backward against closed forms and central differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.naive import renormalize, route, route_backward

SCORINGS = {
    "softmax_topk": {},
    "softmax_topk_renorm": {"renormalize": True},
    "softmax_topk_renorm_after": {
        "renormalize": True,
        "renormalize_drop": "after",
        "expert_capacity": 2,
    },
    "topk_softmax": {"router_order": "topk_score"},
    "sigmoid_topk": {"score_fn": "sigmoid"},
    "sigmoid_topk_renorm": {"score_fn": "sigmoid", "renormalize": True, "renorm_eps": 1e-20},
    "topk_sigmoid": {"score_fn": "sigmoid", "router_order": "topk_score"},
    "sqrtsoftplus_renorm": {"score_fn": "sqrtsoftplus", "renormalize": True},
    "softmax_topk_norm2": {"renormalize": True, "renorm_p": 2},
}
# Whose probabilities sum to 1, and whose weights do.
SOFTMAX = [name for name, fields in SCORINGS.items() if "score_fn" not in fields]
SUMS_TO_ONE = ("softmax_topk_renorm", "topk_softmax", "sigmoid_topk_renorm", "sqrtsoftplus_renorm")
NAN, INF = math.nan, math.inf


def config(num_experts: int, top_k: int, **fields: object) -> MoEConfig:
    return MoEConfig(num_experts=num_experts, top_k=top_k, **fields)


@pytest.mark.parametrize("scoring", ["softmax_topk", "softmax_topk_renorm", "topk_softmax"])
def test_worked_row(scoring: str) -> None:
    probs = [0.17, 0.52, 0.31]
    ids, weights, all_probs, _ = route(np.log([probs]), config(3, 2, **SCORINGS[scoring]))
    assert ids.tolist() == [[1, 2]]
    np.testing.assert_allclose(all_probs, [probs], rtol=4e-16)
    if scoring == "softmax_topk":
        np.testing.assert_allclose(weights, [[0.52, 0.31]], rtol=4e-16)
    else:
        np.testing.assert_allclose(weights, [[52 / 83, 31 / 83]], rtol=4e-16)
        assert [f"{w:.2f}" for w in weights[0]] == ["0.63", "0.37"]


def test_worked_row_of_sigmoids() -> None:
    logits = np.log([[1 / 3, 4.0, 1.0]])
    for scoring, expected in (
        ("sigmoid_topk", [4 / 5, 1 / 2]),
        ("topk_sigmoid", [4 / 5, 1 / 2]),
        ("sigmoid_topk_renorm", [8 / 13, 5 / 13]),
    ):
        ids, weights, probs, _ = route(logits, config(3, 2, **SCORINGS[scoring]))
        assert ids.tolist() == [[1, 2]]
        np.testing.assert_allclose(probs, [[1 / 4, 4 / 5, 1 / 2]], rtol=4e-16)
        np.testing.assert_allclose(weights, [expected], rtol=4e-16)


def test_two_experts_are_a_logistic_unit() -> None:
    _, weights, _, _ = route(np.array([[0.75, 0.0]]), config(2, 1))
    assert weights[0, 0] == pytest.approx(1.0 / (1.0 + math.exp(-0.75)), rel=4e-16)
    grad = route_backward(np.ones((1, 1)), np.array([[0.75, 0.0]]), np.array([[0]]), config(2, 1))
    slope = 1.0 / (2.0 + 2.0 * math.cosh(0.75))
    np.testing.assert_allclose(grad, [[slope, -slope]], rtol=1e-15)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_equal_logits_give_the_lowest_ids_and_equal_weights(scoring: str, top_k: int) -> None:
    ids, weights, _, _ = route(np.full((2, 5), 7.0), config(5, top_k, **SCORINGS[scoring]))
    assert ids.tolist() == [list(range(top_k))] * 2
    if scoring in SUMS_TO_ONE:
        np.testing.assert_allclose(weights, 1.0 / top_k, rtol=4e-16)
    elif scoring == "softmax_topk_norm2":
        np.testing.assert_allclose(weights, 1.0 / math.sqrt(top_k), rtol=4e-16)
    elif scoring in SOFTMAX:
        np.testing.assert_allclose(weights, 0.2, rtol=4e-16)
    elif "sigmoid" in scoring:
        np.testing.assert_allclose(weights, 1.0 / (1.0 + math.exp(-7.0)), rtol=4e-16)
    else:
        np.testing.assert_allclose(weights, math.sqrt(math.log1p(math.exp(7.0))), rtol=4e-16)


def test_columns_fall_by_key_and_ties_rise_by_id() -> None:
    logits = np.array([[1.0, 3.0, 2.0, 3.0, 2.0]])
    for scoring in SCORINGS.values():
        assert route(logits, config(5, 4, **scoring))[0].tolist() == [[1, 3, 2, 4]]


def test_key_is_the_probability_where_it_underflows() -> None:
    logits = np.array([[0.0, -2000.0, -1000.0]])
    assert route(logits, config(3, 2))[0].tolist() == [[0, 1]]
    assert route(logits, config(3, 2, router_order="topk_score"))[0].tolist() == [[0, 2]]


@pytest.mark.parametrize("scoring", SCORINGS)
def test_one_infinitely_low_logit_is_legal(scoring: str) -> None:
    cfg = config(3, 3, **SCORINGS[scoring])
    logits = np.array([[0.0, -INF, 0.0]])
    ids, weights, probs, _ = route(logits, cfg)
    assert ids.tolist() == [[0, 2, 1]]
    assert weights[0, 0] == weights[0, 1] > 0.0
    assert weights[0, 2] == probs[0, 1] == 0.0
    if scoring in SOFTMAX:
        assert probs.tolist() == [[0.5, 0.0, 0.5]]
    if scoring in SUMS_TO_ONE:
        assert weights.tolist() == [[0.5, 0.5, 0.0]]
    assert route_backward(np.array([[1.0, 3.0, 9.0]]), logits, ids, cfg)[0, 1] == 0.0


BROKEN = {"nan": [0.0, NAN, 1.0], "inf": [0.0, INF, 1.0], "low": [-INF] * 3, "both": [INF, NAN, 0]}


@pytest.mark.parametrize("row", BROKEN)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_rows_without_a_finite_largest_logit(row: str, scoring: str) -> None:
    logits = np.array([[1.0, 2.0, 0.0], BROKEN[row], [2.0, 1.0, 0.0]])
    fields = SCORINGS[scoring]
    with pytest.raises(RangeError, match=r"^route: logits must have a finite .* for token 1\. "):
        route(logits, config(3, 2, **fields))
    clean = route(logits[[0, 2]], config(3, 2, **fields))
    for policy, broken_ids in (("clamp", [0, 1]), ("drop", [-1, -1])):
        cfg = config(3, 2, nan_policy=policy, **fields)
        ids, weights, probs, _ = route(logits, cfg)
        assert ids[1].tolist() == broken_ids
        assert not weights[1].any()
        assert not probs[1].any()
        for found, expected in zip((ids, weights, probs), clean[:3], strict=True):
            assert (found[[0, 2]] == expected).all()
        grad = route_backward(np.array([[1.0, 2.0]] * 3), logits, ids, cfg)
        assert not grad[1].any()
        assert np.isfinite(grad).all()
        replayed = route(logits, cfg, topk_ids=np.array([[2, 1]] * 3))
        assert replayed[0][1].tolist() == ([2, 1] if policy == "clamp" else [-1, -1])
        assert not replayed[1][1].any()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_masked_rows_are_never_looked_at(scoring: str) -> None:
    cfg = config(3, 2, **SCORINGS[scoring])
    logits = np.array([[NAN] * 3, [1.0, 2.0, 0.0], [INF, 0.0, 0.0]])
    mask = np.array([False, True, False])
    ids, weights, probs, _ = route(logits, cfg, mask)
    alone = route(logits[1:2], cfg)
    for found, expected, empty in zip((ids, weights, probs), alone[:3], (-1, 0, 0), strict=True):
        assert (found[1:2] == expected).all()
        assert (found[[0, 2]] == empty).all()
    assert not route_backward(np.ones((3, 2)), logits, ids, cfg)[[0, 2]].any()


def test_replayed_ids_take_weights_from_the_current_logits() -> None:
    logits = np.log([[0.1, 0.2, 0.3, 0.4]])
    replay = np.array([[1, -1, 3]])
    cases = (
        ("softmax_topk", [0.2, 0.0, 0.4]),
        ("softmax_topk_renorm", [1 / 3, 0.0, 2 / 3]),
        ("softmax_topk_renorm_after", [0.2, 0.0, 0.4]),
        ("topk_softmax", [1 / 3, 0.0, 2 / 3]),
    )
    for scoring, expected in cases:
        ids, weights, _, _ = route(logits, config(4, 2, **SCORINGS[scoring]), topk_ids=replay)
        assert ids.tolist() == replay.tolist()
        np.testing.assert_allclose(weights, [expected], rtol=4e-16)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_no_replayed_expert_at_all(scoring: str) -> None:
    cfg = config(3, 2, **SCORINGS[scoring])
    ids, weights, _, _ = route(np.zeros((1, 3)), cfg, topk_ids=np.array([[-1, -1]]))
    assert ids.tolist() == [[-1, -1]]
    assert weights.tolist() == [[0.0, 0.0]]
    assert not route_backward(np.ones((1, 2)), np.zeros((1, 3)), ids, cfg).any()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_sum_that_underflows_gives_zero_and_not_nan(scoring: str) -> None:
    cfg = config(3, 2, **SCORINGS[scoring])
    logits, replay = np.array([[0.0, -2000.0, 0.0]]), np.array([[1]])
    _, weights, _, _ = route(logits, cfg, topk_ids=replay)
    assert weights.tolist() == [[1.0 if scoring == "topk_softmax" else 0.0]]
    assert not route_backward(np.ones((1, 1)), logits, replay, cfg, np.array([[True]])).any()


def test_sigmoids_that_underflow_under_an_eps() -> None:
    # sigmoid(-200) is e^-200: nothing beside an eps of 1e-20, everything without one.
    logits = np.full((1, 3), -200.0)
    fields = {"score_fn": "sigmoid", "renormalize": True}
    assert route(logits, config(3, 2, **fields))[1].tolist() == [[0.5, 0.5]]
    _, weights, _, _ = route(logits, config(3, 2, renorm_eps=1e-20, **fields))
    np.testing.assert_allclose(weights, math.exp(-200.0) / 1e-20, rtol=1e-15)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_renormalised_softmax_is_the_softmax_of_the_chosen(top_k: int) -> None:
    logits = np.random.default_rng(top_k).standard_normal((4, 3))
    _, one, _, _ = route(logits, config(3, top_k, renormalize=True))
    _, other, _, _ = route(logits, config(3, top_k, router_order="topk_score"))
    np.testing.assert_allclose(one, other, rtol=2e-15)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_the_scaling_factor_multiplies_the_last_weights(scoring: str) -> None:
    logits = np.random.default_rng(6).standard_normal((3, 4))
    plain = config(4, 2, **SCORINGS[scoring])
    scaled = config(4, 2, routed_scaling_factor=2.5, **SCORINGS[scoring])
    ids, weights, _, _ = route(logits, plain)
    assert (route(logits, scaled)[0] == ids).all()
    factor = 1.0 if scoring == "softmax_topk_renorm_after" else 2.5
    assert (route(logits, scaled)[1] == factor * weights).all()
    grad, everything = np.ones((3, 2)) * [1.0, -2.0], ids >= 0
    for kept, expected in ((None, factor), (everything, 2.5)):
        np.testing.assert_allclose(
            route_backward(grad, logits, ids, scaled, kept),
            expected * route_backward(grad, logits, ids, plain, kept),
            rtol=1e-14,
            atol=1e-15,
        )


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("ids", [[[2, 0, 3]], [[1, -1, 0]], [[-1, 3, -1]]])
@pytest.mark.parametrize("drops", [None, [[True, True, False]], [[False, False, True]]])
def test_gradient(scoring: str, ids: list, drops: list | None, assert_gradient) -> None:
    cfg = config(4, 3, **SCORINGS[scoring])
    rng = np.random.default_rng(5)
    logits, grad_weights = rng.standard_normal((1, 4)), rng.standard_normal((1, 3))
    topk_ids = np.array(ids)
    kept = None if drops is None else np.array(drops) & (topk_ids >= 0)

    def f(x: np.ndarray) -> float:
        weights = route(x, cfg, topk_ids=topk_ids)[1]
        if kept is not None:
            weights = weights * kept
            if cfg.renormalize_drop == "after":
                weights = renormalize(weights, kept, cfg)
        return float((weights * grad_weights).sum())

    assert_gradient(f, logits, route_backward(grad_weights, logits, topk_ids, cfg, kept))
