"""Load balancing by every convention: uniform values, gradients, counts, scopes, messages."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import numpy as np
import pytest

from npmoe import MoEConfig, RangeError, gradcheck
from npmoe.balancing import LoadCounter
from npmoe.dispatch import DispatchPlan, plan_dispatch
from npmoe.losses import BALANCE_CONVENTIONS, load_balancing_loss
from npmoe.losses.conventions import COUNT_SOURCES, SCOPES, BalanceName
from npmoe.routing import Routing, route, stable_topk

U = 2.0**-53
NAMES = list(BALANCE_CONVENTIONS)
COUNTING = [name for name in NAMES if name != "prob_entropy"]
SCORES = ["softmax", "sigmoid", "sqrtsoftplus"]


def routing_of(
    logits: np.ndarray, top_k: int = 2, *, score_fn: str = "softmax", **arguments: Any
) -> Routing:
    cfg = MoEConfig(
        hidden_size=1,
        intermediate_size=1,
        num_experts=logits.shape[1],
        top_k=top_k,
        score_fn=score_fn,
        selection_bias="selection_bias" in arguments,
    )
    return route(logits, cfg, **arguments)


def plan_of(routing: Routing, capacity: int | None = None) -> DispatchPlan:
    return plan_dispatch(routing.topk_ids, num_experts=routing.probs.shape[1], capacity=capacity)


def window_of(routing: Routing, counts: Any, plan: DispatchPlan | None = None) -> LoadCounter:
    counter = LoadCounter(routing.probs.shape[1], counts=counts)
    counter.add(routing, key=0, plan=plan)
    return counter


def uniform_routing(score_fn: str) -> Routing:
    # T=16, E=8, k=2: every expert is chosen four times, and first twice.
    ids = np.stack([np.arange(16) % 8, (np.arange(16) + 3) % 8], axis=1)
    return routing_of(np.full((16, 8), 0.5), topk_ids=ids, score_fn=score_fn, sequence_length=8)


UNIFORM = {
    "switch": 1.0,
    "gshard": 1.0,
    "hf": 2.0,
    "flaxformer": 2.0,
    "megatron": 1.0,
    "megablocks": 1.0,
    "deepspeed_topk": 1.0,
    "deepseek_v3": 1.0,
    "sonic": 1.0,
    "unscaled": 0.125,
    "prob_entropy": -8 * math.log(8),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("score_fn", SCORES)
def test_uniform_value(name: BalanceName, score_fn: str) -> None:
    routing = uniform_routing(score_fn)
    entry = BALANCE_CONVENTIONS[name]
    assert entry.uniform_value(num_experts=8, top_k=2) == pytest.approx(UNIFORM[name], rel=4 * U)
    # A fresh top-k breaks 16 ties alike; P is uniform, so the value is the same all the same.
    value, grad = load_balancing_loss(routing, convention=name, coefficient=3.0)
    assert value == pytest.approx(3.0 * UNIFORM[name], rel=32 * U)
    if name != "prob_entropy":
        value, grad = load_balancing_loss(routing, convention=name, counts="pre_drop")
        assert value == pytest.approx(UNIFORM[name], rel=32 * U)
    assert np.abs(grad).max() <= 32 * U


def test_the_text_of_the_uniform_value_is_its_number() -> None:
    for entry in BALANCE_CONVENTIONS.values():
        text = {"1": 1.0, "k": 3.0, "1/E": 1 / 5, "-E ln E": -5 * math.log(5)}[entry.uniform]
        assert entry.uniform_value(num_experts=5, top_k=3) == text


def test_names_are_the_documented_ones() -> None:
    assert tuple(NAMES) == get_args(BalanceName)
    with pytest.raises(TypeError):
        BALANCE_CONVENTIONS["mine"] = BALANCE_CONVENTIONS["hf"]  # type: ignore[index]


# Everything on one expert, by hand: P = (0.7, 0.2, 0.1), each of 4 tokens chooses 0 then 1.

ONE_SIDED = {
    "switch": 3 * (0.5 * 0.7 + 0.5 * 0.2),
    "gshard": 3 * 0.7,
    "hf": 3 * (0.7 + 0.2),
    "flaxformer": 3 * (0.7 + 0.2),
    "megatron": 3 * (0.5 * 0.7 + 0.5 * 0.2),
    "megablocks": 3 * (0.5 * 0.7 + 0.5 * 0.2),
    "deepspeed_topk": 3 * (0.5 * 0.7 + 0.5 * 0.2),
    "deepseek_v3": 3 * (0.5 * 0.7 + 0.5 * 0.2),
    "sonic": 3 * (0.5 * 0.7 + 0.5 * 0.2),
    "unscaled": 0.5 * 0.7 + 0.5 * 0.2,
    "prob_entropy": 3 * (0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)),
}


@pytest.mark.parametrize("name", NAMES)
def test_one_sided_value(name: BalanceName) -> None:
    routing = routing_of(np.log(np.tile([0.7, 0.2, 0.1], (4, 1))))
    value, grad = load_balancing_loss(routing, convention=name)
    assert value == pytest.approx(ONE_SIDED[name], rel=32 * U)
    # Descending takes probability from expert 0, and every logit of a token takes part.
    assert (grad[:, 0] > 0).all()
    assert (grad != 0).all()


def biased() -> tuple[Routing, DispatchPlan]:
    """Return six tokens that like expert 0 and are pushed to 3 by the bias; capacity 2."""
    rng = np.random.default_rng(7)
    logits = rng.standard_normal((6, 4)) + np.array([2.0, 1.0, 0.0, 0.0])
    routing = routing_of(
        logits,
        score_fn="sigmoid",
        selection_bias=np.array([-0.5, 0.0, 0.0, 1.0]),
        sequence_length=3,
    )
    return routing, plan_of(routing, capacity=2)


def histogram(ids: np.ndarray) -> np.ndarray:
    return np.bincount(ids[ids >= 0], minlength=4)


def test_the_five_counts_differ_and_are_what_they_say() -> None:
    routing, plan = biased()
    probs = routing.probs / routing.probs.sum(axis=1, keepdims=True)
    mean = probs.mean(axis=0)
    n = {
        "executed": plan.tokens_per_expert,
        "post_drop": plan.tokens_per_expert,
        "pre_drop": histogram(routing.topk_ids),
        "unbiased_topk": histogram(np.argsort(-routing.probs, axis=1, kind="stable")[:, :2]),
        "top1": histogram(routing.topk_ids[:, 0]),
    }
    values = {}
    for counts in COUNT_SOURCES:
        choices = 6 if counts == "top1" else 12
        expected = 4 * float((n[counts] * mean).sum()) / choices
        values[counts], _ = load_balancing_loss(routing, plan=plan, counts=counts)
        assert values[counts] == pytest.approx(expected, rel=32 * U)
        counted = window_of(routing, counts, plan).tokens_per_expert
        np.testing.assert_array_equal(counted, n[counts])
    assert values["executed"] == values["post_drop"]
    assert len({round(v, 6) for v in values.values()}) == 4
    without_plan, _ = load_balancing_loss(routing, counts="executed")
    assert without_plan == values["pre_drop"]


def test_fresh_choices_of_saturated_scores() -> None:
    # All three sigmoids are 1 in float64, a tie; the softmax of the same logits has none.
    routing = routing_of(np.array([[40.0, 41.0, 42.0]]), score_fn="sigmoid")
    assert window_of(routing, "unbiased_topk").tokens_per_expert.tolist() == [1, 1, 0]
    p = np.exp([-2.0, -1.0, 0.0]) / np.exp([-2.0, -1.0, 0.0]).sum()
    value, _ = load_balancing_loss(routing, convention="hf")
    assert value == pytest.approx(3 * (p[1] + p[2]), rel=16 * U)


def test_executed_leaves_identity_experts_in() -> None:
    # Two experts with rows, of one row each, and expert 2 that computes nothing.
    ids = np.array([[0, 2], [0, 2], [1, 2]], np.int32)
    routing = routing_of(np.zeros((3, 3)), topk_ids=ids)
    plan = plan_dispatch(ids, num_experts=2, num_identity_experts=1, capacity=1)
    assert window_of(routing, "executed", plan).tokens_per_expert.tolist() == [1, 1, 3]


DEFAULTS = {
    "gshard": "top1",
    "hf": "unbiased_topk",
    "megatron": "unbiased_topk",
    "deepseek_v3": "unbiased_topk",
    "sonic": "executed",
    "prob_entropy": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_default_counts_and_scope(name: BalanceName) -> None:
    routing, plan = biased()
    counts: Any = DEFAULTS.get(name, "pre_drop")
    scope: Any = "sequence" if name == "deepseek_v3" else "batch"
    entry = BALANCE_CONVENTIONS[name]
    assert (entry.counts, entry.scope) == (counts, scope)
    value, _ = load_balancing_loss(routing, plan=plan, convention=name)
    named, _ = load_balancing_loss(routing, plan=plan, convention=name, counts=counts, scope=scope)
    assert value == named


def test_the_loss_depends_on_the_choices() -> None:
    # With f = mean(p > 0), which is 1 everywhere, it would not.
    logits = np.log([[0.5, 0.3, 0.2]])
    for name in COUNTING:
        values = {
            load_balancing_loss(
                routing_of(logits, 1, topk_ids=np.array([[e]])), convention=name, counts="pre_drop"
            )[0]
            for e in range(3)
        }
        assert len(values) == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("score_fn", SCORES)
def test_gradient(name: BalanceName, score_fn: str) -> None:
    rng = np.random.default_rng(len(name))
    logits = rng.standard_normal((4, 4))
    logits[:, 3] -= 6.0  # never chosen
    mask = np.array([True, True, False, True])
    bias = np.array([0.1, -0.1, 0.2, 0.0])

    def at(x: np.ndarray) -> Routing:
        return routing_of(
            x, score_fn=score_fn, token_mask=mask, selection_bias=bias, sequence_length=2
        )

    frozen = plan_of(at(logits), capacity=1)
    elsewhere = routing_of(np.eye(4)[[0, 0, 3]])
    cases = itertools.product((None, *COUNT_SOURCES) if name in COUNTING else (None,), SCOPES)
    for counts, scope in cases:
        window = None
        if scope == "global":
            if name == "prob_entropy":
                continue
            source: Any = counts or BALANCE_CONVENTIONS[name].counts
            window = window_of(elsewhere, source, plan_of(elsewhere))
            window.add(at(logits), key=1, plan=frozen)

        def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
            return load_balancing_loss(
                at(x),
                plan=frozen,
                convention=name,
                counts=counts,  # noqa: B023
                scope=scope,  # noqa: B023
                window=window,  # noqa: B023
                coefficient=1.5,
            )

        gradcheck(
            lambda x: np.float64(loss(x)[0]),
            lambda g, x: g * loss(x)[1],
            [logits],
            elementwise=counts is None and scope == "batch",
            directions=1,
            decisions=lambda x: (at(x).topk_ids, stable_topk(at(x).probs, 2)),
        )
        value, grad = loss(logits)
        assert type(value) is float
        dropped = counts in ("executed", "post_drop")  # possibly all of a sequence
        assert (grad[:1] if dropped else grad[mask]).all()  # of expert 3 too
        assert not grad[~mask].any()


@pytest.mark.parametrize("score_fn", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("size", [300.0, 1e4, -300.0, -1e4])
def test_far_logits_have_finite_gradients(score_fn: str, size: float) -> None:
    logits = np.array([[size, 0.0, -np.inf], [size, size, size - 1.0]])
    for name in NAMES:
        with np.errstate(under="ignore"):
            value, grad = load_balancing_loss(
                routing_of(logits, score_fn=score_fn), convention=name
            )
        assert math.isfinite(value)
        assert np.isfinite(grad).all()
        assert grad[0, 2] == 0.0


def test_small_scores_keep_their_gradient() -> None:
    # p = s / sum(s) of sigmoids far below zero is the softmax, and so is its gradient.
    logits = np.array([[-300.0, -301.0, -302.0], [-310.0, -308.0, -309.0]])
    ids = np.array([[0, 1], [1, 2]])
    want_value, want = load_balancing_loss(routing_of(logits, topk_ids=ids))
    value, grad = load_balancing_loss(routing_of(logits, topk_ids=ids, score_fn="sigmoid"))
    assert value == pytest.approx(want_value, rel=700 * U)
    np.testing.assert_allclose(grad, want, rtol=0, atol=1400 * U)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("score_fn", SCORES)
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_padding_changes_nothing(name: BalanceName, score_fn: str, scope: Any) -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((6, 4))
    padded = np.full((10, 4), np.nan)
    rows = np.array([0, 1, 2, 5, 6, 7])
    padded[rows] = logits
    mask = np.isin(np.arange(10), rows)
    want, want_grad = load_balancing_loss(
        routing_of(logits, score_fn=score_fn, sequence_length=3), convention=name, scope=scope
    )
    routing = routing_of(padded, score_fn=score_fn, token_mask=mask, sequence_length=5)
    value, grad = load_balancing_loss(routing, convention=name, scope=scope)
    assert value == pytest.approx(want, rel=32 * U)
    np.testing.assert_allclose(grad[rows], want_grad, rtol=64 * U, atol=4 * U)
    assert not grad[~mask].any()


def test_garbage_in_masked_rows_is_not_read() -> None:
    # What a backend leaves in masked rows of ids and probabilities is its own affair.
    clean = routing_of(np.eye(3)[[0, 1]])
    mask = np.array([True, True, False])
    garbage = Routing(
        topk_ids=np.vstack([clean.topk_ids, [[2, 1]]]).astype(np.int32),
        topk_weights=np.vstack([clean.topk_weights, [[np.nan, np.nan]]]),
        probs=np.vstack([clean.probs, np.full((1, 3), np.nan)]),
        router_logits=np.vstack([clean.router_logits, np.full((1, 3), np.nan)]),
        token_mask=mask,
        sequence_length=3,
    )
    for name in NAMES:
        value, grad = load_balancing_loss(garbage, convention=name)
        assert value == pytest.approx(load_balancing_loss(clean, convention=name)[0], rel=16 * U)
        assert not grad[2].any()


@pytest.mark.parametrize("name", NAMES)
def test_sequence_scope_is_the_mean_over_sequences(name: BalanceName) -> None:
    logits = np.random.default_rng(5).standard_normal((8, 4))
    mask = np.array([True, True, False, False, True, True, True, False])
    routing = routing_of(logits, token_mask=mask, sequence_length=2)
    value, grad = load_balancing_loss(routing, convention=name, scope="sequence")
    parts = [
        load_balancing_loss(
            routing_of(logits[s : s + 2], token_mask=mask[s : s + 2]),
            convention=name,
            scope="batch",
        )
        for s in (0, 4, 6)  # the second sequence is empty and does not count
    ]
    assert value == pytest.approx(sum(v for v, _ in parts) / 3, rel=32 * U)
    joined = np.zeros_like(grad)
    for s, (_, g) in zip((0, 4, 6), parts, strict=True):
        joined[s : s + 2] = g / 3
    np.testing.assert_allclose(grad, joined, rtol=64 * U, atol=4 * U)
    batch, _ = load_balancing_loss(routing, convention=name, scope="batch")
    assert abs(batch - value) > 1e-3


@pytest.mark.parametrize("name", COUNTING)
def test_micro_batches_with_a_window_add_up_to_the_full_batch(name: BalanceName) -> None:
    counts: Any = BALANCE_CONVENTIONS[name].counts
    logits = np.random.default_rng(6).standard_normal((12, 4))
    full, full_grad = load_balancing_loss(routing_of(logits), convention=name, scope="batch")
    parts = [routing_of(logits[s : s + 4]) for s in (0, 4, 8)]
    window = LoadCounter(4, counts=counts)
    for key, part in enumerate(parts):
        window.add(part, key=key)
    results = [
        load_balancing_loss(part, convention=name, scope="global", window=window) for part in parts
    ]
    assert sum(v for v, _ in results) / 3 == pytest.approx(full, rel=32 * U)
    joined = np.concatenate([g for _, g in results]) / 3
    np.testing.assert_allclose(joined, full_grad, rtol=64 * U, atol=4 * U)
    # Without the window they do not.
    local = [load_balancing_loss(part, convention=name, scope="batch")[0] for part in parts]
    assert abs(sum(local) / 3 - full) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_tokens", [0, 4])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("score_fn", SCORES)
def test_no_valid_token(name: BalanceName, num_tokens: int, scope: Any, score_fn: str) -> None:
    routing = routing_of(
        np.full((num_tokens, 4), np.nan),
        token_mask=np.zeros(num_tokens, bool),
        sequence_length=2,
        score_fn=score_fn,
    )
    value, grad = load_balancing_loss(routing, convention=name, scope=scope)
    assert value == 0.0
    assert grad.shape == (num_tokens, 4)
    assert not grad.any()


@pytest.mark.parametrize("name", COUNTING)
def test_nothing_kept(name: BalanceName) -> None:
    routing = routing_of(np.random.default_rng(0).standard_normal((3, 4)))
    value, grad = load_balancing_loss(
        routing, plan=plan_of(routing, capacity=0), convention=name, counts="post_drop"
    )
    assert value == 0.0
    assert not grad.any()


@pytest.mark.parametrize("score_fn", SCORES)
@pytest.mark.parametrize("name", NAMES)
def test_clamped_rows_give_no_gradient(score_fn: str, name: BalanceName) -> None:
    cfg = MoEConfig(
        hidden_size=1,
        intermediate_size=1,
        num_experts=3,
        top_k=2,
        nan_policy="clamp",
        score_fn=score_fn,
    )
    broken = np.array([[0.5, 0.0, 1.0], [np.nan, 0.0, 0.0]])
    value, grad = load_balancing_loss(route(broken, cfg), convention=name)
    assert math.isfinite(value)
    assert grad[0].all()
    assert not grad[1].any()
    if (name, score_fn) == ("sonic", "softmax"):
        # The clamped row chose 0 and 1 but has no probability: P is that of the other row.
        p = np.exp(broken[0]) / np.exp(broken[0]).sum()
        assert value == pytest.approx(3 * (2 * p[0] + p[1] + p[2]) / 4, rel=16 * U)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inputs_are_left_alone_and_dtype_kept(name: BalanceName, dtype: type) -> None:
    logits = np.random.default_rng(2).standard_normal((6, 4)).astype(dtype)
    for score_fn in SCORES:
        routing = routing_of(logits.copy(), score_fn=score_fn, sequence_length=3)
        before = routing.probs.copy()
        value, grad = load_balancing_loss(routing, convention=name)
        assert grad.dtype == dtype
        assert not np.shares_memory(grad, routing.probs)
        doubled = load_balancing_loss(routing, convention=name, coefficient=2.0)
        assert doubled[0] == 2 * value
        np.testing.assert_array_equal(doubled[1], 2 * grad)
        np.testing.assert_array_equal(routing.probs, before)
        np.testing.assert_array_equal(routing.router_logits, logits)


def test_one_layer_knows_nothing_of_another_that_failed() -> None:
    routing = routing_of(np.eye(3)[[0, 1]])
    before = load_balancing_loss(routing)
    load_balancing_loss(routing_of(np.zeros((5, 3))))
    with pytest.raises(RangeError):
        load_balancing_loss(routing, counts="post_drop")
    after = load_balancing_loss(routing)
    assert before[0] == after[0]
    np.testing.assert_array_equal(before[1], after[1])
