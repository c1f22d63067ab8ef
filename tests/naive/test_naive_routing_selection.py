"""Who is chosen in naive.route: bias, groups, second expert, the experts' choice; by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.naive import Draws, route, route_backward

INF = math.inf


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def test_selection_bias_chooses_and_does_not_weigh() -> None:
    logits = np.array([[0.0, 1.0, 2.0, 3.0]])
    bias = np.array([4096.0, -4096.0, 0.0, 0.25])
    cfg = MoEConfig(num_experts=4, top_k=2, score_fn="sigmoid", selection_bias=True)
    ids, weights, probs, _ = route(logits, cfg, selection_bias=bias)
    assert ids.tolist() == [[0, 3]]
    # Bit for bit the unbiased scores: (s + b) - b would have lost them.
    assert weights.tolist() == [[0.5, probs[0, 3]]]
    assert probs[0, 3] == sigmoid(3.0)


def test_selection_bias_on_scores_or_on_logits() -> None:
    # Probabilities .8 .1 .1 (nearly): a bias of 0.5 does little to logits and much to scores.
    logits = np.log([[0.8, 0.12, 0.08]])
    bias = np.array([0.0, 0.0, 0.75])
    fields = {"num_experts": 3, "top_k": 1, "selection_bias": True}
    assert route(logits, MoEConfig(**fields), selection_bias=bias)[0].tolist() == [[2]]
    for order in ("score_topk", "topk_score"):
        cfg = MoEConfig(selection_bias_on="logits", router_order=order, **fields)
        ids, weights, _, _ = route(logits, cfg, selection_bias=bias)
        assert ids.tolist() == [[0]]
        assert weights[0, 0] == pytest.approx(0.8 if order == "score_topk" else 1.0, rel=1e-15)
    cfg = MoEConfig(selection_bias_on="logits", **(fields | {"top_k": 2}))
    assert route(logits, cfg, selection_bias=bias)[0].tolist() == [[0, 2]]


KEY = np.array([[9.0, 0.0, 0.5, 5.0, 4.0, 0.0, 6.0, 1.0, 1.0]])  # groups of three


@pytest.mark.parametrize(
    ("group_score", "topk_group", "top_k", "expected"),
    [
        ("max", 2, 3, [0, 6, 7]),  # 9, 5, 6
        ("top2_sum", 2, 3, [0, 3, 4]),  # 9.5, 9, 7
        ("top2_sum", 1, 3, [0, 2, 1]),
        ("topk_div", 2, 3, [0, 6, 7]),  # 3 // 2 = 1 is the maximum
        ("topk_div", 2, 4, [0, 3, 4, 2]),  # 4 // 2 = 2
        ("topk_div", 1, 3, [0, 2, 1]),  # 9.5, 9, 8
        ("max", 3, 3, [0, 6, 3]),
    ],
)
def test_groups(group_score: str, topk_group: int, top_k: int, expected: list) -> None:
    cfg = MoEConfig(
        num_experts=9,
        top_k=top_k,
        num_groups=3,
        topk_group=topk_group,
        group_score=group_score,
        router_order="topk_score",
    )
    assert route(KEY, cfg)[0].tolist() == [expected]


def test_equal_groups_stay_from_the_lowest() -> None:
    cfg = MoEConfig(num_experts=6, top_k=2, num_groups=3, topk_group=1)
    assert route(np.zeros((1, 6)), cfg)[0].tolist() == [[0, 1]]
    assert route(np.array([[0.0, 0.0, 1.0, 0.0, 0.0, 1.0]]), cfg)[0].tolist() == [[2, 3]]


def test_groups_of_one_expert() -> None:
    cfg = MoEConfig(num_experts=3, top_k=1, num_groups=3, topk_group=2)
    assert route(np.array([[1.0, 3.0, 2.0]]), cfg)[0].tolist() == [[1]]


@pytest.mark.parametrize("bias", [-2.0, 0.0])
def test_excluded_groups_never_win_unless_filled_with_zero(bias: float) -> None:
    logits = np.array([[3.0, 2.0, 0.0, 1.0]])
    fields = {"num_experts": 4, "top_k": 2, "num_groups": 2, "topk_group": 1}
    fields |= {"score_fn": "sigmoid", "selection_bias": True}
    biases = np.full(4, bias)
    assert route(logits, MoEConfig(**fields), selection_bias=biases)[0].tolist() == [[0, 1]]
    # Zeros stand above every negative biased score: experts 2 and 3, which were excluded, win.
    zero = MoEConfig(group_fill="zero", **fields)
    expected = [[2, 3]] if bias < 0 else [[0, 1]]
    assert route(logits, zero, selection_bias=biases)[0].tolist() == expected


def test_the_group_score_sees_the_bias() -> None:
    cfg = MoEConfig(num_experts=4, top_k=1, num_groups=2, topk_group=1, selection_bias=True)
    logits, bias = np.array([[3.0, 2.0, 0.0, 1.0]]), np.array([0.0, 0.0, 0.0, 2.0])
    assert route(logits, cfg, selection_bias=bias)[0].tolist() == [[3]]


def test_second_expert_by_gumbel_noise() -> None:
    cfg = MoEConfig(num_experts=4, top_k=2, second_expert_policy="sampling", renormalize=True)
    probs = np.array([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]])
    # The first expert may have the largest noisy logit; it is not drawn twice.
    gumbel = np.array([[50.0, 0.0, 0.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    ids, weights, _, summed = route(np.log(probs), cfg, draws=Draws(gumbel=gumbel))
    assert ids.tolist() == summed.tolist() == [[0, 3], [0, 1]]
    np.testing.assert_allclose(weights, [[0.8, 0.2], [4 / 7, 3 / 7]], rtol=1e-15)
    with pytest.raises(RangeError, match=r"^route: draws.gumbel must be given with second_expert"):
        route(np.log(probs), cfg)
    # Replayed ids draw nothing.
    assert route(np.log(probs), cfg, topk_ids=ids)[1].tolist() == weights.tolist()


def test_gumbel_noise_draws_by_the_softmax_of_the_rest() -> None:
    cfg = MoEConfig(num_experts=3, top_k=2, second_expert_policy="sampling")
    n = 4000
    logits = np.tile(np.log([0.6, 0.3, 0.1]), (n, 1))
    gumbel = np.random.default_rng(0).gumbel(size=(n, 3))
    ids = route(logits, cfg, draws=Draws(gumbel=gumbel))[0]
    assert (ids[:, 0] == 0).all()
    # 3 to 1: a binomial of standard deviation 27.
    assert abs((ids[:, 1] == 1).sum() - 3000) < 4 * 28


@pytest.mark.parametrize("uniform", [0.9, 0.7, 0.45, 0.35, 0.1])
@pytest.mark.parametrize("rule", ["plain", "before", "after", "topk_score"])
def test_second_expert_kept_at_random(uniform: float, rule: str) -> None:
    fields = {
        "plain": {},
        "before": {"renormalize": True},
        "after": {"renormalize": True, "renormalize_drop": "after", "expert_capacity": 9},
        "topk_score": {"router_order": "topk_score"},
    }[rule]
    scale = 3.0
    cfg = MoEConfig(
        num_experts=3,
        top_k=2,
        second_expert_policy="random",
        routed_scaling_factor=scale,
        **fields,
    )
    # The second weight is .2, and .2 / .8 = .25 once normalised: kept below .4, or below .5.
    logits = np.log([[0.6, 0.2, 0.2]])
    draws = Draws(second=np.array([uniform]))
    ids, weights, _, summed = route(logits, cfg, draws=draws)
    pair = {
        "plain": [0.6 * scale, 0.2 * scale],
        "before": [0.75 * scale, 0.25 * scale],
        "after": [0.6, 0.2],
        "topk_score": [0.75 * scale, 0.25 * scale],
    }[rule]
    kept = uniform < (0.4 if rule in ("plain", "after") else 0.5)
    assert summed.tolist() == [[0, 1]]
    assert ids.tolist() == [[0, 1 if kept else -1]]
    # The first weight was normalised over both, whatever came of the second.
    np.testing.assert_allclose(weights, [[pair[0], pair[1] * kept]], rtol=1e-15)
    with pytest.raises(RangeError, match=r"^route: draws.second must be given with second_expert"):
        route(logits, cfg)
    # Replayed ids draw nothing and lose nothing.
    replayed = route(logits, cfg, topk_ids=np.array([[0, 1]]))
    assert replayed.topk_ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(replayed.topk_weights, [pair], rtol=1e-15)


@pytest.mark.parametrize("order", ["score_topk", "topk_score"])
def test_gradient_reaches_a_second_expert_dropped_at_random(order: str, assert_gradient) -> None:
    fields = {"renormalize": True} if order == "score_topk" else {}
    cfg = MoEConfig(
        num_experts=3, top_k=2, second_expert_policy="random", router_order=order, **fields
    )
    logits, draws = np.log([[0.6, 0.3, 0.1]]), Draws(second=np.array([0.99]))
    ids, _, _, summed = route(logits, cfg, draws=draws)
    grad = np.array([[1.0, 7.0]])
    found = route_backward(grad, logits, ids, cfg, ids >= 0, summed)
    # w = p0 / (p0 + p1) is a logistic unit of x0 - x1: slope 2/3 * 1/3.
    np.testing.assert_allclose(found, [[2 / 9, -2 / 9, 0.0]], rtol=1e-14, atol=1e-16)
    assert_gradient(lambda x: float(route(x, cfg, draws=draws)[1][0, 0]), logits, found)


def test_experts_choose_their_best_tokens() -> None:
    probs = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.5, 0.1, 0.4], [0.2, 0.1, 0.7]])
    cfg = MoEConfig(num_experts=3, routing="expert_choice", expert_capacity=2)
    ids, weights, _, _ = route(np.log(probs), cfg)
    # Expert 0: tokens 0, 2 (equal). Expert 1: 1, 0. Expert 2: 3, 2.
    assert ids.tolist() == [[0, 1], [1, -1], [0, 2], [2, -1]]
    np.testing.assert_allclose(weights, [[0.5, 0.3], [0.6, 0], [0.5, 0.4], [0.7, 0]], rtol=1e-15)
    one = MoEConfig(num_experts=3, routing="expert_choice", expert_capacity=1)
    assert route(np.log(probs), one)[0].tolist() == [[0], [1], [-1], [2]]
    normal = MoEConfig(
        num_experts=3,
        routing="expert_choice",
        expert_capacity=2,
        renormalize=True,
        routed_scaling_factor=2.0,
    )
    expected = [[10 / 8, 6 / 8], [2, 0], [10 / 9, 8 / 9], [2, 0]]
    np.testing.assert_allclose(route(np.log(probs), normal)[1], expected, rtol=1e-15)


def test_expert_choice_by_sequence_mask_and_factor() -> None:
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    fields = {"num_experts": 2, "top_k": 1, "routing": "expert_choice", "capacity_factor": "1"}
    batch, each = MoEConfig(**fields), MoEConfig(capacity_scope="sequence", **fields)
    x = np.log(probs)
    assert route(x, batch, sequence_length=2)[0].tolist() == [[0], [0], [1], [1]]
    assert route(x, each, sequence_length=2)[0].tolist() == [[0], [1], [0], [1]]
    mask = np.array([False, True, True, True])
    # Three valid tokens: two rows for each expert.
    assert route(x, batch, mask)[0].tolist() == [[-1, -1], [0, -1], [0, 1], [1, -1]]
    # Two valid tokens: one row. And rows to spare never go to a masked token.
    mask = np.array([False, False, True, True])
    assert route(x, batch, mask)[0].tolist() == [[-1], [-1], [0], [1]]
    spare = MoEConfig(num_experts=2, routing="expert_choice", expert_capacity=3)
    assert route(x, spare, mask)[0].tolist() == [[-1, -1], [-1, -1], [0, 1], [0, 1]]
    # More rows than tokens, and none at all.
    many = MoEConfig(num_experts=2, routing="expert_choice", expert_capacity=9)
    assert route(x, many)[0].tolist() == [[0, 1]] * 4
    none = MoEConfig(num_experts=2, routing="expert_choice", expert_capacity=0)
    assert route(x, none)[0].tolist() == [[-1]] * 4
    assert route(np.zeros((0, 2)), many)[0].shape == (0, 1)


def test_dense_takes_all_experts() -> None:
    logits = np.log([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    cfg = MoEConfig(num_experts=3, routing="dense")
    ids, weights, probs, _ = route(logits, cfg, np.array([True, False]))
    assert ids.tolist() == [[0, 1, 2], [-1, -1, -1]]
    assert weights.tolist() == probs.tolist()
    np.testing.assert_allclose(weights, [[0.2, 0.5, 0.3], [0, 0, 0]], rtol=1e-15)
    normal = MoEConfig(num_experts=3, routing="dense", score_fn="sigmoid", renormalize=True)
    weights = route(np.zeros((1, 3)), normal)[1]
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-15)


def test_hash_routing_takes_ids_from_the_caller() -> None:
    logits, cfg = np.log([[0.2, 0.5, 0.3]]), MoEConfig(num_experts=3, routing="hash", top_k=2)
    with pytest.raises(RangeError, match=r"^route: topk_ids must be given with routing='hash'"):
        route(logits, cfg)
    ids, weights, _, _ = route(logits, cfg, topk_ids=np.array([[2, 0]]))
    assert ids.tolist() == [[2, 0]]
    np.testing.assert_allclose(weights, [[0.3, 0.2]], rtol=1e-15)


@pytest.mark.parametrize("kind", ["expert_choice", "dense", "sampling", "random", "groups"])
def test_clamped_rows_have_the_first_ids_and_weight_zero(kind: str) -> None:
    fields = {
        "expert_choice": {"routing": "expert_choice", "expert_capacity": 2},
        "dense": {"routing": "dense"},
        "sampling": {"second_expert_policy": "sampling"},
        "random": {"second_expert_policy": "random"},
        "groups": {"num_groups": 2, "selection_bias": True},
    }[kind]
    cfg = MoEConfig(num_experts=4, top_k=2, nan_policy="clamp", **fields)
    logits = np.array([[math.nan, 0.0, 1.0, 2.0], [0.0, 1.0, 3.0, 2.0]])
    drawn = np.array([[0.0, 0.0, 0.0, 9.0], [9.0, 0.0, 0.0, 0.0]])
    bias = np.array([0.0, 0.0, 9.0, 9.0]) if cfg.selection_bias else None
    ids, weights, probs, _ = route(
        logits, cfg, selection_bias=bias, draws=Draws(gumbel=drawn, second=np.array([0.0, 0.1]))
    )
    assert not weights[0].any()
    assert not probs[0].any()
    # No weight beats even a uniform of 0; an expert that has rows left takes any token.
    first = {"dense": [0, 1, 2, 3], "random": [0, -1], "expert_choice": [0, 1, 2, 3]}
    assert ids[0].tolist() == first.get(kind, [0, 1])
    assert weights[1].any()
    assert not route_backward(np.ones(ids.shape), logits, ids, cfg)[0].any()
