"""From logits to scores: soft-cap, softmax, sigmoid and sqrt(softplus), with their slopes."""

from __future__ import annotations

from npmoe._typing import Array, array_namespace
from npmoe.errors import RangeError


def softcap(x: Array, limit: float) -> Array:
    """Return ``limit * tanh(x / limit)``, as Gemma 2 and Grok cap their logits."""
    xp = array_namespace(x)
    return xp.tanh(x / limit) * limit


def softcap_backward(grad: Array, capped: Array, limit: float) -> Array:
    """Return the gradient of x, from the capped values: ``grad * (1 - (capped / limit)**2)``."""
    xp = array_namespace(capped)
    # A broken row has no gradient, and no slope that could be multiplied by 0.
    ratio = xp.where(xp.isfinite(capped), capped, limit) / limit
    # (1 - r)(1 + r) keeps the small slopes near the cap.
    return grad * ((1.0 - ratio) * (1.0 + ratio))


def score(logits: Array, score_fn: str) -> Array:
    """Return the scores (T, N) of usable logits; -inf scores 0 in each function."""
    xp = array_namespace(logits)
    if score_fn == "softmax":
        return softmax_rows(logits)
    if score_fn == "sigmoid":
        return sigmoid(logits)
    small, ratio = _softplus_parts(logits)
    above = xp.maximum(logits, 0.0)
    y = xp.sqrt(above + small * ratio)
    return xp.where(logits < 0, xp.exp(xp.minimum(logits, 0.0) * 0.5) * xp.sqrt(ratio), y)


def score_slope(logits: Array, scores: Array, score_fn: str) -> Array:
    """Return the elementwise slope of sigmoid or sqrt(softplus), given their values.

    ``s (1 - s)``, and ``sigmoid(x) / (2 s)``, which tends to s/2 for x to -inf.
    """
    xp = array_namespace(logits)
    if score_fn == "sigmoid":
        return scores * sigmoid(-logits)
    small, ratio = _softplus_parts(logits)
    left = scores / (2.0 * ratio * (1.0 + small))
    safe = xp.where(scores > 0, scores, 1.0)
    return xp.where(logits < 0, left, sigmoid(logits) / (safe * 2.0))


def _softplus_parts(logits: Array) -> tuple[Array, Array]:
    """Return e = exp(-abs(x)) and log1p(e) / e, so that sqrt(softplus) keeps its small values.

    For negative x, sqrt(log1p(exp(x))) = exp(x/2) sqrt(ratio) long after exp(x) is 0.
    """
    xp = array_namespace(logits)
    small = xp.exp(-xp.abs(logits))
    safe = xp.where(small > 0, small, 1.0)
    return small, xp.where(small > 0, xp.log1p(safe) / safe, 1.0)


def softmax_rows(x: Array) -> Array:
    """Return softmax over the last axis; the largest of each row must be finite."""
    xp = array_namespace(x)
    y = x - x.max(axis=-1, keepdims=True)
    xp.exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)
    return y


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)) with full relative accuracy, also for large negative x."""
    xp = array_namespace(x)
    y = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1.0, y) / (y + 1.0)


def screen_rows(
    router_logits: Array, nan_policy: str, token_mask: Array | None
) -> tuple[Array, Array | None]:
    """Replace unusable rows by zeros; return the logits and which rows are usable (None = all).

    A row is unusable if it is masked or its largest logit is not finite; a single -inf is legal
    and means "never". Under "raise" a valid unusable row is a RangeError.
    """
    xp = array_namespace(router_logits)
    usable = xp.isfinite(router_logits.max(axis=1))
    valid = usable if token_mask is None else usable & token_mask
    if bool(valid.all()):
        return router_logits, None
    if nan_policy == "raise":
        broken = ~usable if token_mask is None else token_mask & ~usable
        if bool(broken.any()):
            token = int(broken.argmax())
            value = float(router_logits[token].max())
            raise RangeError(
                f"moe_forward: router_logits must have a finite largest value in every row, "
                f"got {value} in token {token}. Look for NaN or overflow in hidden_states and "
                "router_weight, or choose nan_policy='drop'."
            )
    return xp.where(valid[:, None], router_logits, xp.zeros_like(router_logits)), valid
