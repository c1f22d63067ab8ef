"""The vectorised losses against the definition in npmoe.naive, within bounds.

Scores: exp and log1p are within 1 ulp of their argument's value, which is rounded once; a logit
that is R below the largest of its row gives its softmax a relative error of (R + 2) u, and the sum
of E scores adds (E - 1) u. So each p is right within (2 R + E + 10) u on either side, and a sum of
non-negative products over T tokens adds T + 6 more. With A_e the gradient of p_te,
``grad_te = p_te (A_e - sum A p) s'/s``, and s'/s <= 1, so errors are relative to 2 p_te max|A|.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmoe import MoEConfig, naive
from npmoe.balancing import LoadCounter
from npmoe.dispatch import plan_dispatch
from npmoe.losses import (
    BALANCE_CONVENTIONS,
    entropy_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    z_loss,
)
from npmoe.losses.conventions import COUNT_SOURCES, SCOPES
from npmoe.naive import variation
from npmoe.routing import Routing, route
from npmoe.testing.bounds import assert_within, gamma

RANGE = 8.0  # logits lie in -8..8


@st.composite
def problems(draw: st.DrawFn, least_experts: int = 1) -> dict[str, Any]:
    num_experts = draw(st.integers(least_experts, 6), label="E")
    length = draw(st.integers(1, 4), label="sequence_length")
    num_tokens = length * draw(st.integers(1, 3), label="sequences")
    top_k = draw(st.integers(1, num_experts), label="K")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    # Quarters: ties are exact in both dtypes, and others differ by more than any rounding.
    logits = rng.integers(-4 * RANGE, 4 * RANGE + 1, (num_tokens, num_experts)) / 4.0
    ids = np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :top_k]
    ids[rng.random(ids.shape) < 0.2] = -1
    return {
        "logits": logits.astype(draw(st.sampled_from(["float32", "float64"]), label="dtype")),
        "ids": ids,
        "mask": rng.random(num_tokens) < 0.7 if draw(st.booleans(), label="masked") else None,
        "sequence_length": length,
        "score_fn": draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
        "rng": rng,
    }


def routing_of(p: dict[str, Any], logits: np.ndarray | None = None, **fields: Any) -> Routing:
    cfg = MoEConfig(
        hidden_size=1,
        intermediate_size=1,
        num_experts=p["logits"].shape[1],
        top_k=p["ids"].shape[1],
        score_fn=p["score_fn"],
        **fields,
    )
    return route(
        p["logits"] if logits is None else logits,
        cfg,
        token_mask=p["mask"],
        topk_ids=p["ids"],
        sequence_length=p["sequence_length"],
        rng=p["rng"] if fields else None,
    )


def roundings(p: dict[str, Any]) -> int:
    num_tokens, num_experts = p["logits"].shape
    return int(2 * 2 * RANGE) + 2 * num_experts + num_tokens + 20


def p_of(p: dict[str, Any], softmax: bool = False) -> np.ndarray:
    """Return normalised scores in float64, 0 where masked: sizes for bounds only."""
    name = "softmax" if softmax else p["score_fn"]
    rows = [naive.losses.normalized_score(row, name) for row in p["logits"].tolist()]
    return np.array(rows) if p["mask"] is None else np.array(rows) * p["mask"][:, None]


@given(st.data())
def test_load_balancing(data: st.DataObject) -> None:
    p = data.draw(problems(), label="problem")
    name = data.draw(st.sampled_from(list(BALANCE_CONVENTIONS)), label="convention")
    counting = name != "prob_entropy"
    counts: Any = data.draw(st.sampled_from(COUNT_SOURCES), label="counts") if counting else None
    scope = data.draw(st.sampled_from(SCOPES if counting else SCOPES[:2]), label="scope")
    routing = routing_of(p)
    num_experts = p["logits"].shape[1]
    plan = plan_dispatch(
        routing.topk_ids, num_experts=num_experts, capacity=data.draw(st.integers(0, 4))
    )
    window = totals = None
    if scope == "global":
        window = LoadCounter(num_experts, counts=counts)
        window.add(routing_of(p, -p["logits"]), key=0, plan=plan)
        window.add(routing, key=1, plan=plan)
        if not window.num_tokens:
            return
        totals = window.tokens_per_expert, window.num_tokens, window.num_choices
    value, grad = load_balancing_loss(
        routing,
        plan=plan,
        convention=name,
        counts=counts,
        scope=scope,
        window=window,
        coefficient=0.75,
    )
    want, want_grad = naive.load_balancing_loss(
        p["logits"].astype(np.float64),
        routing.topk_ids,
        p["mask"],
        convention=name,
        counts=counts or "",
        score_fn=p["score_fn"],
        kept=plan.row_ids >= 0,
        sequence_length=p["sequence_length"] if scope == "sequence" else None,
        window=totals,
    )
    u = gamma(2 * roundings(p), p["logits"].dtype)
    probs = p_of(p, softmax=name == "hf")
    # Both sums of E terms P ln P have |ln P| <= 2 RANGE + ln E, and d(P ln P) = (1 + ln P) dP.
    log = 2 * RANGE + math.log(num_experts)
    size = abs(want) if counting else num_experts * (2 * log + 1)
    assert_within(np.float64(value), np.float64(0.75 * want), u * 0.75 * size, "value")
    # Ids of a token are distinct, so f <= 1.
    share = 1.0 if counting else log + 3.0
    lengths = _valid_lengths(p, scope)
    steepest = 0.75 * num_experts * share / (min(lengths) * len(lengths)) if lengths else 0.0
    bound = u * 2 * probs * steepest
    assert_within(grad, 0.75 * want_grad, bound, "grad_router_logits")


def _valid_lengths(p: dict[str, Any], scope: str) -> list[int]:
    """Return the valid tokens of each group that has any."""
    num_tokens = len(p["logits"])
    mask = np.ones(num_tokens, bool) if p["mask"] is None else p["mask"]
    groups = mask.reshape(-1, p["sequence_length"]) if scope == "sequence" else mask[None]
    return [int(n) for n in groups.sum(axis=1) if n]


@given(problems())
def test_per_token_losses(p: dict[str, Any]) -> None:
    routing = routing_of(p)
    logits = p["logits"].astype(np.float64)
    num_experts = logits.shape[1]
    u = gamma(2 * roundings(p), p["logits"].dtype)
    log = RANGE + math.log(num_experts)  # of logsumexp; and 2 RANGE + ln E of ln p
    value, grad = z_loss(routing)
    want, want_grad = naive.z_loss(logits, p["mask"])
    assert_within(np.float64(value), np.float64(want), u * log**2, "z_loss")
    bound = u * 2 * log * np.maximum(p_of(p, softmax=True), 0)
    assert_within(grad, want_grad, bound, "z_loss gradient")
    value, grad = entropy_loss(routing)
    want, want_grad = naive.entropy_loss(logits, p["mask"], score_fn=p["score_fn"])
    steep = log + RANGE + 1
    assert_within(np.float64(value), np.float64(want), u * num_experts * steep, "entropy_loss")
    bound = u * 2 * p_of(p) * steep
    assert_within(grad, want_grad, bound, "entropy_loss gradient")


@given(problems(least_experts=2), st.sampled_from(["population", "bessel"]))
def test_importance(p: dict[str, Any], variance: Any) -> None:
    routing = routing_of(p)
    logits = p["logits"].astype(np.float64)
    num_experts = logits.shape[1]
    value, grad = importance_loss(routing, variance=variance)
    want, want_grad = variation.importance_loss(
        logits, p["mask"], variance=variance, score_fn=p["score_fn"]
    )
    u = gamma(2 * roundings(p), p["logits"].dtype)
    # |I/mean - 1| <= E - 1, so CV^2 <= E(E-1) with derivative 2 sum|r|/(E-1) <= 4 E.
    size = 4.0 * num_experts**2
    assert_within(np.float64(value), np.float64(want), u * size, "importance")
    mean = p_of(p).sum() / num_experts
    bound = u * 2 * p_of(p) * (4 * size / mean if mean else 0.0)
    assert_within(grad, want_grad, bound, "importance gradient")


@given(problems(least_experts=2), st.sampled_from(["population", "bessel"]))
def test_load(p: dict[str, Any], variance: Any) -> None:
    std = 4.0
    routing = routing_of(p, router_noise_std=std)
    clean, logits = (x.astype(np.float64) for x in (p["logits"], routing.router_logits))
    top_k, num_experts = p["ids"].shape[1], logits.shape[1]
    value, grad = load_loss(routing, noise_std=std, variance=variance)
    want, want_grad = variation.load_loss(logits, clean, top_k, std, p["mask"], variance=variance)
    u = gamma(2 * roundings(p), p["logits"].dtype)
    # A chance has a slope below 1, hence an absolute error of a few u times its argument, and the
    # relative deviation r = L/mean - 1 one of that over the mean. The gradient is
    # density (2/mean)(r_e/E - CV^2/E) / T with |r| < E, summed over E in the threshold's column.
    valid = np.ones(len(logits), bool) if p["mask"] is None else p["mask"]
    if not valid.any():
        assert value == want == 0.0
        return
    last = np.sort(logits, axis=1)[:, ::-1][:, top_k - 1 : top_k]
    chance = 1.0 - np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))((last - clean) / std)
    mean = chance[valid].mean()
    assert_within(
        np.float64(value), np.float64(want), u * 16 * num_experts**2 / min(mean, 1.0), "load"
    )
    bound = np.where(valid[:, None], u * 64 * num_experts**3 / mean**2, 0.0) * np.ones_like(grad)
    assert_within(grad, want_grad, bound, "load gradient")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_the_bounds_are_tight_enough_to_fail(dtype: str, score_fn: str) -> None:
    rng = np.random.default_rng(0)
    p = {
        "logits": rng.standard_normal((12, 6)).astype(dtype),
        "ids": rng.integers(0, 3, (12, 1)),
        "mask": None,
        "sequence_length": 12,
        "score_fn": score_fn,
    }
    _, grad = load_balancing_loss(routing_of(p))
    bound = gamma(2 * roundings(p), dtype) * 2 * p_of(p) * 6 / 12
    assert bound.max() < 0.01 * np.abs(grad).max()
