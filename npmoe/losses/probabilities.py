"""Probabilities that sum to 1 per token, from any score function, and the way back to logits."""

from __future__ import annotations

from npmoe._typing import Array, array_namespace
from npmoe.errors import ShapeError
from npmoe.routing import Routing
from npmoe.routing.scoring import score, sigmoid


def check_routing(function: str, routing: Routing) -> None:
    """Raise ShapeError for soft routing, whose choices are no choices of tokens."""
    rows, tokens = routing.topk_ids.shape[0], routing.probs.shape[0]
    if rows != tokens or routing.score_fn == "soft":
        raise ShapeError(
            f"{function}: routing.topk_ids must have shape (T, K) with T = {tokens}, got "
            f"{tuple(routing.topk_ids.shape)}. T is bound by routing.probs. Soft routing sends "
            "every token everywhere and needs no such loss."
        )


def num_valid_tokens(routing: Routing) -> int:
    """Return how many tokens count."""
    mask = routing.token_mask
    return int(routing.probs.shape[0]) if mask is None else int(mask.sum())


def usable_logits(routing: Routing, logits: Array) -> tuple[Array, Array]:
    """Return the logits with 0 in rows that do not count or are not finite; and those that do."""
    xp = array_namespace(logits)
    usable = xp.isfinite(logits.max(axis=1))
    if routing.token_mask is not None:
        usable = usable & routing.token_mask
    return xp.where(usable[:, None], logits, xp.zeros_like(logits)), usable


def normalized_probs(routing: Routing, *, softmax: bool = False, clean: bool = False) -> Array:
    """Return the scores of every token divided by their sum (T, E); 0 in rows that do not count.

    With `softmax`, of softmax(logits) whatever the score function; with `clean`, without noise.
    """
    probs, score_fn = routing.probs, "softmax" if softmax else routing.score_fn
    xp = array_namespace(probs)
    noisy = clean and routing.clean_logits is not None
    if score_fn == routing.score_fn == "softmax" and not noisy:
        mask = routing.token_mask
        return probs if mask is None else xp.where(mask[:, None], probs, xp.zeros_like(probs))
    logits, usable = usable_logits(
        routing, routing.clean_logits if noisy else routing.router_logits
    )
    if noisy or score_fn != routing.score_fn:
        probs = score(logits, score_fn)
    probs = xp.where(usable[:, None], probs, xp.zeros_like(probs))
    total = probs.sum(axis=1, keepdims=True)
    return probs / xp.where(total > 0, total, xp.ones_like(total))


def normalized_probs_backward(
    grad_probs: Array, probs: Array, routing: Routing, *, softmax: bool = False, clean: bool = False
) -> Array:
    """Return the gradient of the logits (T, E); `grad_probs` may be (1, E) for all tokens.

    With p = s/D: ``grad_x = p * (grad_p - <grad_p, p>) * s'(x)/s``; s'/s is 1 for the softmax.
    """
    inner = (probs * grad_probs).sum(axis=1, keepdims=True)
    grad = probs * (grad_probs - inner)
    score_fn = "softmax" if softmax else routing.score_fn
    if score_fn == "softmax":
        return grad
    noisy = clean and routing.clean_logits is not None
    logits, _ = usable_logits(routing, routing.clean_logits if noisy else routing.router_logits)
    return grad * _relative_slope(logits, score_fn)


def _relative_slope(logits: Array, score_fn: str) -> Array:
    """Return s'(x) / s(x): 1 - sigmoid(x), or sigmoid(x) / (2 softplus(x))."""
    xp = array_namespace(logits)
    if score_fn == "sigmoid":
        return sigmoid(-logits)
    softplus = xp.maximum(logits, 0.0) + xp.log1p(xp.exp(-xp.abs(logits)))
    # Where it underflows, so does the score that the slope is multiplied by.
    return 0.5 * sigmoid(logits) / xp.where(softplus > 0, softplus, xp.ones_like(softplus))
