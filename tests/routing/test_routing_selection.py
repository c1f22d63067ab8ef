"""Choices: groups, biases, second experts, expert choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from npmoe import MoEConfig, RangeError
from npmoe.routing import limit_groups, route, stable_topk

INF = np.inf


def config(num_experts: int = 8, top_k: int = 2, **fields: Any) -> MoEConfig:
    return MoEConfig(
        hidden_size=1, intermediate_size=1, num_experts=num_experts, top_k=top_k, **fields
    )


def logits_of(probs: list[list[float]]) -> np.ndarray:
    return np.log(np.array(probs))


# Groups (traps K01, K02).

KEY = np.array([[0.9, 0.0, 0.6, 0.5, 0.55, 0.56, 0.1, 0.2]])


@pytest.mark.parametrize(
    ("group_score", "top_k", "kept"),
    [
        ("max", 2, [0]),  # 0.9 is the best single expert
        ("top2_sum", 2, [2]),  # 0.55 + 0.56 beats 0.6 + 0.5 and 0.9 + 0.0
        ("topk_div", 1, [0]),  # top_k // topk_group = 1 is the maximum
        ("topk_div", 2, [2]),
    ],
)
def test_scores_of_groups(group_score: str, top_k: int, kept: list[int]) -> None:
    cfg = config(top_k=top_k, num_groups=4, group_score=group_score)
    got = limit_groups(KEY, cfg)
    expected = np.full((1, 8), -INF)
    for g in kept:
        expected[0, 2 * g : 2 * g + 2] = KEY[0, 2 * g : 2 * g + 2]
    np.testing.assert_array_equal(got, expected)


def test_groups_of_one_expert_have_one_score() -> None:
    cfg = config(num_groups=8, topk_group=3, top_k=3)
    got = limit_groups(KEY, cfg)
    assert np.flatnonzero(got[0] > -INF).tolist() == [0, 2, 5]


def test_tied_groups_go_to_the_lower_one() -> None:
    cfg = config(num_groups=4, topk_group=2, top_k=4)
    routing = route(np.zeros((1, 8)), cfg)
    assert routing.topk_ids.tolist() == [[0, 1, 2, 3]]


def test_a_zero_fill_lets_masked_experts_win_over_negative_keys() -> None:
    fields = {"score_fn": "sigmoid", "selection_bias": True, "num_groups": 4, "top_k": 2}
    logits = np.random.default_rng(0).standard_normal((50, 8))
    bias = np.full(8, -2.0)
    inside = route(logits, config(**fields), selection_bias=bias).topk_ids // 2
    assert (inside[:, 0] == inside[:, 1]).all()
    # With 0 in place of -inf every key of another group beats every biased score.
    zero = route(logits, config(**fields, group_fill="zero"), selection_bias=bias).topk_ids // 2
    assert (zero != inside[:, :1]).all()


@pytest.mark.parametrize("bias", [0.0, 4096.0, -4096.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_never_see_the_bias(bias: float, dtype: type) -> None:
    logits = np.random.default_rng(1).standard_normal((9, 6)).astype(dtype) - 8
    cfg = config(6, 6, score_fn="sigmoid", selection_bias=True)
    routing = route(logits, cfg, selection_bias=np.full(6, bias, dtype))
    expected = np.take_along_axis(routing.probs, routing.topk_ids.astype(np.int64), 1)
    assert routing.topk_weights.tobytes() == expected.tobytes()
    assert (routing.topk_weights > 0).all()


@pytest.mark.parametrize("on", ["scores", "logits"])
def test_the_bias_moves_the_choice_alone(on: str) -> None:
    logits = np.array([[2.0, 1.0, 0.0, -1.0]])
    cfg = config(4, 2, selection_bias=True, selection_bias_on=on)
    bias = np.array([0.0, 0.0, 0.0, 10.0])
    routing = route(logits, cfg, selection_bias=bias)
    assert routing.topk_ids.tolist() == [[3, 0]]
    np.testing.assert_array_equal(routing.probs, route(logits, config(4)).probs)


def test_a_bias_on_logits_differs_from_one_on_scores() -> None:
    # 1.5 lifts a logit of -1 below that of 2, but any score above any other.
    logits, bias = np.array([[2.0, -1.0]]), np.array([0.0, 1.5])
    chosen = {}
    for on in ("scores", "logits"):
        cfg = config(2, 1, selection_bias=True, selection_bias_on=on)
        chosen[on] = route(logits, cfg, selection_bias=bias).topk_ids.tolist()
    assert chosen == {"scores": [[1]], "logits": [[0]]}


def test_a_missing_bias_is_an_error() -> None:
    with pytest.raises(RangeError) as caught:
        route(np.zeros((1, 8)), config(selection_bias=True))
    assert str(caught.value) == (
        "route: selection_bias must be given with cfg.selection_bias=True, got None."
    )


# Second experts.


def test_a_sampled_second_expert_follows_the_softmax() -> None:
    probs = [0.5, 0.3, 0.15, 0.05]
    n = 20_000
    logits = np.repeat(logits_of([probs]), n, axis=0)
    before = logits.copy()
    cfg = config(4, 2, second_expert_policy="sampling")
    routing = route(logits, cfg, rng=np.random.default_rng(3))
    np.testing.assert_array_equal(logits, before)
    assert (routing.topk_ids[:, 0] == 0).all()
    counts = np.bincount(routing.topk_ids[:, 1], minlength=4)
    assert counts[0] == 0
    for e, p in ((1, 0.6), (2, 0.3), (3, 0.1)):
        # Five standard deviations of a binomial count.
        assert abs(counts[e] - n * p) < 5 * np.sqrt(n * p * (1 - p))
    second = np.take_along_axis(routing.probs, routing.topk_ids.astype(np.int64), 1)
    np.testing.assert_array_equal(routing.topk_weights, second)


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_random_second_expert_is_kept_with_twice_its_weight(renormalize: bool) -> None:
    probs = [[0.6, 0.3, 0.1], [0.5, 0.5, 1e-9], [0.9, 0.06, 0.04]]
    n = 4000
    logits = np.repeat(logits_of(probs), n, axis=0)
    cfg = config(
        3,
        2,
        second_expert_policy="random",
        renormalize=renormalize,
        routed_scaling_factor=3.0,
    )
    routing = route(logits, cfg, rng=np.random.default_rng(4))
    draws = np.random.default_rng(4).random(3 * n)
    pair = routing.probs[:, :2]
    weights = pair / pair.sum(axis=1, keepdims=True) if renormalize else pair
    kept = 2 * weights[:, 1] > draws
    np.testing.assert_array_equal(routing.topk_ids[:, 1], np.where(kept, 1, -1))
    # The first expert's weight was divided by both, whatever became of the second.
    np.testing.assert_array_equal(routing.topk_weights[:, 0], 3.0 * weights[:, 0])
    np.testing.assert_array_equal(routing.topk_weights[:, 1], 3.0 * weights[:, 1] * kept)
    assert routing.summed_ids is not None
    np.testing.assert_array_equal(routing.summed_ids[:, 1], 1)
    assert kept[n : 2 * n].all()
    assert 0 < kept[:n].mean() < 1


@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_random_second_experts_need_a_generator(policy: str) -> None:
    cfg = config(second_expert_policy=policy)
    with pytest.raises(RangeError) as caught:
        route(np.zeros((2, 8)), cfg)
    assert str(caught.value) == (
        f"moe_forward: rng must be given with second_expert_policy={policy!r}, got None. Pass a "
        "numpy Generator, or use cfg.for_evaluation()."
    )
    assert route(np.zeros((2, 8)), cfg.for_evaluation()).topk_ids.tolist() == [[0, 1]] * 2


# Expert choice, dense, hash.


def test_experts_choose_their_best_tokens() -> None:
    probs = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.6, 0.3]]
    cfg = config(3, routing="expert_choice", expert_capacity=2)
    routing = route(logits_of(probs), cfg)
    # Expert 0 takes tokens 1, 0; expert 1 takes 3 and, of the tied 0 and 1, the lower; expert 2
    # takes 2, 3.
    assert routing.topk_ids.tolist() == [[0, 1], [0, -1], [2, -1], [1, 2]]
    assert routing.topk_ids.dtype == np.int32
    np.testing.assert_allclose(
        routing.topk_weights, [[0.5, 0.3], [0.6, 0], [0.6, 0], [0.6, 0.3]], rtol=1e-15
    )


def test_experts_choose_among_valid_tokens_of_each_sequence() -> None:
    logits = np.zeros((6, 2))
    mask = np.array([False, True, True, True, False, True])
    fields = {"routing": "expert_choice", "expert_capacity": 1}
    batch = route(logits, config(2, **fields), token_mask=mask, sequence_length=3)
    assert batch.topk_ids.tolist() == [[-1, -1], [0, 1], *[[-1, -1]] * 4]
    own = config(2, **fields, capacity_scope="sequence")
    each = route(logits, own, token_mask=mask, sequence_length=3)
    assert each.topk_ids.tolist() == [[-1, -1], [0, 1], [-1, -1], [0, 1], [-1, -1], [-1, -1]]
    many = config(2, **{**fields, "expert_capacity": 100})
    ids = route(logits, many, token_mask=mask).topk_ids
    np.testing.assert_array_equal(ids, np.where(mask[:, None], [[0, 1]], -1))
    nobody = route(logits, config(2, **{**fields, "expert_capacity": 0}))
    assert nobody.topk_ids.tolist() == [[-1]] * 6
    assert not nobody.topk_weights.any()


@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid"])
def test_dense_is_every_expert(score_fn: str) -> None:
    logits = np.random.default_rng(0).standard_normal((5, 4))
    routing = route(logits, config(4, routing="dense", score_fn=score_fn))
    np.testing.assert_array_equal(routing.topk_ids, np.tile(np.arange(4), (5, 1)))
    np.testing.assert_array_equal(routing.topk_weights, routing.probs)


def test_hash_takes_ids_and_gives_them_the_routers_weights() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 4))
    cfg = config(4, 2, routing="hash", renormalize=True, routed_scaling_factor=2.0)
    ids = np.array([[3, 1], [0, 2], [1, 0]])
    routing = route(logits, cfg, topk_ids=ids)
    raw = np.take_along_axis(routing.probs, ids, 1)
    np.testing.assert_allclose(
        routing.topk_weights, 2 * raw / raw.sum(axis=1, keepdims=True), rtol=4e-16
    )
    with pytest.raises(RangeError) as caught:
        route(logits, cfg)
    assert str(caught.value) == (
        "moe_forward: topk_ids must be given with routing='hash', got None. Look them up in the "
        "table of token ids."
    )


def test_topk_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    key = np.random.default_rng(0).integers(0, 5, (101, 7)).astype(float)
    expected = stable_topk(key, 3)
    monkeypatch.setattr("npmoe.routing.selection._BLOCK_ENTRIES", 70)
    np.testing.assert_array_equal(stable_topk(key, 3), expected)
