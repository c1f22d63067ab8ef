"""The load-balancing loss, by every definition in circulation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from npmoe._checks import require
from npmoe._typing import Array, array_namespace
from npmoe.dispatch import DispatchPlan
from npmoe.errors import ShapeError
from npmoe.losses.conventions import (
    BALANCE_CONVENTIONS,
    SCOPES,
    BalanceName,
    CountSource,
    Scope,
    check_choice,
    check_coefficient,
)
from npmoe.losses.counts import count_choices
from npmoe.losses.probabilities import (
    check_routing,
    normalized_probs,
    normalized_probs_backward,
    num_valid_tokens,
)
from npmoe.routing import Routing

if TYPE_CHECKING:
    from npmoe.balancing import LoadCounter


def load_balancing_loss(
    routing: Routing,
    *,
    plan: DispatchPlan | None = None,
    convention: BalanceName = "switch",
    counts: CountSource | None = None,
    scope: Scope | None = None,
    coefficient: float = 1.0,
    window: LoadCounter | None = None,
) -> tuple[float, Array]:
    """Return the load-balancing loss and its gradient.

    ``coefficient * E * sum over e of f_e * P_e``: f_e is the share of choices that went to
    expert e, a constant; P_e is its mean probability, scores being divided by their sum per
    token. `BALANCE_CONVENTIONS` says how each convention differs, and its defaults.

    Parameters
    ----------
    routing : Routing
        Choices before any drop.
    plan : DispatchPlan, optional
        Of the same call; counts "post_drop" needs it and "executed" uses it.
    convention : str
        A name in `BALANCE_CONVENTIONS`.
    counts : {"executed", "pre_drop", "post_drop", "unbiased_topk", "top1"}, optional
        What is counted; the convention's own by default. "pre_drop": every id. "top1": first
        choices. "post_drop": what the plan kept. "executed": that, or every id without a plan.
        "unbiased_topk": a fresh top-k, K = topk_ids.shape[1], of the probabilities without bias
        and groups (of softmax(logits) for "hf").
    scope : {"batch", "sequence", "global"}, optional
        The convention's own by default. "sequence": mean over the sequences that have valid
        tokens. "global": f from `window`, P from this batch.
    coefficient : float
        Factor of value and gradient.
    window : LoadCounter, optional
        Counts of several micro-batches or ranks, of the same `counts`; scope "global" needs it.

    Returns
    -------
    value : float
    grad_router_logits : (T, E) float array
        New.

    Raises
    ------
    RangeError
        For unknown names, options that contradict each other, a coefficient that is not finite,
        an empty window, or a missing plan or window.
    ShapeError
        For soft routing, a foreign plan or window, or T not a multiple of the sequence length.

    Notes
    -----
    f divides by the choices that could be counted: T*K, or T for "top1", also after a drop. With
    the mean over M equal micro-batches, the losses of scope "global" are that of the full batch.

    **Accuracy**: sums over tokens are in float64.

    References
    ----------
    `BALANCE_CONVENTIONS[convention].source`.
    """
    function = "load_balancing_loss"
    check_choice(function, "convention", convention, tuple(BALANCE_CONVENTIONS))
    entry = BALANCE_CONVENTIONS[convention]
    scope = entry.scope if scope is None else scope
    check_choice(function, "scope", scope, SCOPES)
    check_coefficient(function, coefficient)
    check_routing(function, routing)
    source = entry.counts if counts is None else counts
    if entry.counts is None:
        require(
            counts is None and scope != "global",
            f"{function}: counts and scope='global' must not be given with "
            f"convention={convention!r}, got counts={counts!r}, scope={scope!r}. "
            "It counts nothing.",
        )
    _check_window(scope, source, window, routing.probs.shape[1])
    num_groups = _num_sequences(routing) if scope == "sequence" else 1
    probs = normalized_probs(routing, softmax=entry.softmax_probs)
    xp = array_namespace(probs)
    num_tokens, num_experts = probs.shape
    number, choices = None, 0
    if source is not None:
        fresh = probs if entry.softmax_probs else None
        number, choices = count_choices(
            function, routing, source, plan=plan, probs=fresh, num_groups=num_groups
        )
    if num_valid_tokens(routing) == 0:
        return 0.0, xp.zeros_like(probs)
    tokens = _tokens_per_group(routing, num_groups)
    factor = coefficient / int((tokens > 0).sum())
    if entry.times_experts:
        factor *= num_experts
    tokens = xp.maximum(tokens, 1)  # groups of 0 have no probabilities either
    sums = probs.reshape(num_groups, -1, num_experts).sum(axis=1, dtype=xp.float64)
    if number is None:
        mean = sums / tokens
        log = xp.log(xp.where(mean > 0, mean, xp.ones_like(mean)))
        value = factor * float((mean * log).sum())
        # The 1 in d(P ln P)/dP = ln P + 1 falls out, since every row sums to 1.
        slope = factor * log / tokens
    else:
        counted, offered = tokens, tokens * choices
        if window is not None:
            number, counted = window.tokens_per_expert[None], window.num_tokens
            offered = window.num_choices
        if entry.counts_over == "counted":
            # The sum of all probabilities is no variable: every row sums to 1, or to 0 for good.
            offered = xp.maximum(number.sum(axis=1, keepdims=True), 1)
            total = sums.sum(axis=1, keepdims=True)
            tokens = xp.where(total > 0, total, xp.ones_like(total))
        share = number / (counted if entry.counts_over == "tokens" else offered)
        slope = factor * share / tokens
        value = float((slope * sums).sum())
    slope = slope.astype(probs.dtype)  # d loss / d p_te, the same for every token of a group
    if num_groups > 1:
        slope = xp.repeat(slope, num_tokens // num_groups, axis=0)
    return value, normalized_probs_backward(slope, probs, routing, softmax=entry.softmax_probs)


def _check_window(
    scope: Scope, source: CountSource | None, window: LoadCounter | None, num_experts: int
) -> None:
    """Raise unless there is a window that fits exactly where there must be one."""
    function = "load_balancing_loss"
    require(
        (window is not None) == (scope == "global"),
        f"{function}: window must be a LoadCounter with scope='global' and None otherwise, got "
        f"{type(window).__name__} with scope={scope!r}.",
    )
    if window is None:
        return
    require(
        window.counts == source,
        f"{function}: window must count {source!r}, got {window.counts!r}. "
        f"Pass counts={window.counts!r}, or make the counter with counts={source!r}.",
    )
    if window.num_experts != num_experts:
        raise ShapeError(
            f"{function}: window must count E = {num_experts} experts, got {window.num_experts}. "
            "E is bound by routing.probs."
        )
    require(
        window.num_tokens > 0,
        f"{function}: window must hold counts, got none. Add this micro-batch before its loss.",
    )


def _num_sequences(routing: Routing) -> int:
    """Return how many sequences the tokens make; 1 without any token."""
    num_tokens, length = int(routing.probs.shape[0]), routing.sequence_length
    if num_tokens == 0:
        return 1
    if length < 1 or num_tokens % length:
        raise ShapeError(
            f"load_balancing_loss: routing.sequence_length must divide T = {num_tokens}, got "
            f"{length}. T is bound by routing.probs."
        )
    return num_tokens // length


def _tokens_per_group(routing: Routing, num_groups: int) -> Array:
    """Return how many tokens of each group count (groups, 1)."""
    mask = routing.token_mask
    xp = array_namespace(routing.probs)
    if mask is None:
        size = routing.probs.shape[0] // num_groups
        return xp.full((num_groups, 1), size, dtype=xp.int64)
    return mask.reshape(num_groups, -1).sum(axis=1, keepdims=True)
