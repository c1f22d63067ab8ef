"""From router logits to the experts and weights of every token, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npmoe._typing import Array, array_namespace
from npmoe.capacity import divide_by_sum, divide_by_sum_backward
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan
from npmoe.errors import RangeError

# Up to this K repeated argmax beats sorting whole rows.
_ARGMAX_TOP_K = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """What the router decided.

    Attributes
    ----------
    topk_ids : (T, K) int32 array
        Chosen experts, by selection key descending; -1 where there is none. Before any drop.
    topk_weights : (T, K) float array
        Combine weights as used; 0 where the id is -1.
    probs : (T, E) float array
        Softmax over all experts; rows of masked tokens are 0.
    router_logits : (T, E) float array
        What entered the softmax: after router bias and noise.
    token_mask : (T,) bool array or None
        True = valid. Under nan_policy "drop" it excludes the dropped rows as well.
    sequence_length : int
        Tokens per sequence.
    """

    topk_ids: Array
    topk_weights: Array
    probs: Array
    router_logits: Array
    token_mask: Array | None = None
    sequence_length: int


def route(
    router_logits: Array,
    cfg: MoEConfig,
    *,
    token_mask: Array | None = None,
    topk_ids: Array | None = None,
    rng: np.random.Generator | None = None,
    sequence_length: int | None = None,
) -> Routing:
    """Choose experts and weights for every token.

    Parameters
    ----------
    router_logits : (T, E) float array
        After the router bias.
    cfg : MoEConfig
        Its routing fields.
    token_mask : (T,) bool array, optional
        True = valid. Masked rows may hold anything.
    topk_ids : (T, K) int array, optional
        Replayed choices; weights come from the current logits.
    rng : numpy Generator, optional
        Source of the router noise; None means no noise.
    sequence_length : int, optional
        Tokens per sequence; T if omitted.

    Returns
    -------
    Routing
        New arrays; `router_logits` is the input itself when no noise was added.

    Raises
    ------
    RangeError
        Under nan_policy "raise", if a valid row has no finite largest logit.

    Notes
    -----
    **Order**: ties go to the lowest expert id. A single -inf logit is legal and means "never";
    a row is non-finite when its largest logit is NaN or infinite.

    References
    ----------
    "score_topk" without renormalisation: Fedus et al. 2021; with: Mixtral in transformers;
    "topk_score": Shazeer et al. 2017, eq. 3-5, and gpt-oss. "clamp": vLLM ``topk_softmax``.
    """
    xp = array_namespace(router_logits)
    if cfg.router_noise_std and rng is not None:
        noise = rng.standard_normal(router_logits.shape) * cfg.router_noise_std
        router_logits = router_logits + xp.asarray(noise.astype(str(router_logits.dtype)))
    logits, valid = _screen(router_logits, cfg, token_mask)
    largest = logits.max(axis=1, keepdims=True)
    probs = _softmax_rows(logits, largest)
    if valid is not None:
        probs = xp.where(valid[:, None], probs, xp.zeros_like(probs))
    keep = valid if cfg.nan_policy != "clamp" else token_mask
    if topk_ids is None:
        # A clamped row has zero probability everywhere, so its tie gives ids 0..K-1.
        key = logits if cfg.router_order == "topk_score" else probs
        ids = stable_topk(key, cfg.top_k)
    else:
        ids = topk_ids
    ids = ids.astype(xp.int32)
    if keep is not None:
        ids = xp.where(keep[:, None], ids, -1)
    chosen_by = keep if topk_ids is None else ids
    weights = _weights(logits, probs, ids, cfg, valid, padded=chosen_by is not None)
    return Routing(
        topk_ids=ids,
        topk_weights=weights,
        probs=probs,
        router_logits=router_logits,
        token_mask=keep,
        sequence_length=router_logits.shape[0] if sequence_length is None else sequence_length,
    )


def _screen(
    router_logits: Array, cfg: MoEConfig, token_mask: Array | None
) -> tuple[Array, Array | None]:
    """Replace unusable rows by zeros; return the logits and which rows are usable (None = all)."""
    xp = array_namespace(router_logits)
    usable = xp.isfinite(router_logits.max(axis=1))
    valid = usable if token_mask is None else usable & token_mask
    if bool(valid.all()):
        return router_logits, None
    if cfg.nan_policy == "raise":
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


def _softmax_rows(x: Array, largest: Array) -> Array:
    """Return softmax over the last axis, given the row maxima."""
    xp = array_namespace(x)
    y = x - largest
    xp.exp(y, out=y)
    y /= y.sum(axis=1, keepdims=True)
    return y


def stable_topk(key: Array, top_k: int) -> Array:
    """Return the columns of the `top_k` largest entries of each row, ties to the lowest column.

    Parameters
    ----------
    key : (T, E) float array
        No NaN; -inf is allowed.
    top_k : int
        K.

    Returns
    -------
    (T, K) integer array
        By key, descending.

    Notes
    -----
    **Cost**: O(T*E*K) for K <= 8 and finite keys, else O(T*E*log E).

    Examples
    --------
    >>> import numpy as np
    >>> stable_topk(np.array([[1.0, 2.0, 2.0, 0.0]]), 3)
    array([[1, 2, 0]])
    """
    xp = array_namespace(key)
    if top_k > _ARGMAX_TOP_K or not bool(xp.isfinite(key).all()):
        return xp.argsort(-key, axis=1, kind="stable")[:, :top_k]
    rest = key.copy()
    rows = xp.arange(key.shape[0])
    ids = xp.empty((key.shape[0], top_k), dtype=xp.int64)
    for k in range(top_k):
        best = rest.argmax(axis=1)
        ids[:, k] = best
        rest[rows, best] = -xp.inf
    return ids


def _weights(
    logits: Array, probs: Array, ids: Array, cfg: MoEConfig, valid: Array | None, *, padded: bool
) -> Array:
    """Return the combine weights (T, K) of the chosen ids."""
    xp = array_namespace(probs)
    if cfg.router_order == "topk_score":
        chosen = _take(logits, ids)
        if padded:
            chosen = xp.where(ids >= 0, chosen, -xp.inf)
        largest = chosen.max(axis=1, keepdims=True)
        chosen = xp.exp(chosen - xp.where(xp.isfinite(largest), largest, 0.0))
        weights = divide_by_sum(chosen)
        weights *= cfg.routed_scaling_factor
        return weights if valid is None else xp.where(valid[:, None], weights, 0.0)
    weights = _take(probs, ids)
    if padded:
        weights = xp.where(ids >= 0, weights, xp.zeros_like(weights))
    if cfg.renormalize_drop == "after":
        return weights  # normalised and scaled once it is known what was kept
    if cfg.renormalize:
        weights = divide_by_sum(weights)
    weights *= cfg.routed_scaling_factor
    return weights


def _take(values: Array, ids: Array) -> Array:
    """Return values[t, ids[t, k]] (T, K); entries of id -1 are arbitrary."""
    xp = array_namespace(values)
    return xp.take_along_axis(values, xp.maximum(ids, 0), axis=1)


def route_backward(
    grad_topk_weights: Array, routing: Routing, cfg: MoEConfig, plan: DispatchPlan | None = None
) -> Array:
    """Return the gradient of the router logits.

    With p = softmax(x) and w = s * p_chosen / D: ``grad_p = (grad_w - <grad_w, w> / s) * s / D``
    on the chosen, ``grad_x = p * (grad_p - <grad_p, p>)``; eq. (12) and (13) of `npmoe.layer`.

    Parameters
    ----------
    grad_topk_weights : (T, K) float array
        Gradient of `routing.topk_weights`.
    routing : Routing
        As returned by the forward pass.
    cfg : MoEConfig
        The same as in the forward pass.
    plan : DispatchPlan, optional
        Needed with renormalize_drop="after": says which routes were summed.

    Returns
    -------
    (T, E) float array
        New; exactly zero in rows of masked tokens.
    """
    xp = array_namespace(grad_topk_weights)
    ids, probs = routing.topk_ids, routing.probs
    if cfg.router_order == "topk_score":
        weights = routing.topk_weights
        inner = (grad_topk_weights * weights).sum(axis=1, keepdims=True)
        inner /= cfg.routed_scaling_factor
        return _scatter(xp.zeros_like(probs), ids, weights * (grad_topk_weights - inner))
    chosen = xp.where(ids >= 0, _take(probs, ids), xp.zeros_like(grad_topk_weights))
    grad = grad_topk_weights * cfg.routed_scaling_factor
    if cfg.renormalize:
        if cfg.renormalize_drop == "after":
            if plan is None:
                raise RangeError(
                    "route_backward: plan must be given with renormalize_drop='after', got None. "
                    "Only the kept routes were normalised."
                )
            kept = plan.row_ids >= 0
            grad = xp.where(kept, grad, xp.zeros_like(grad))
            raw = xp.where(kept, chosen, xp.zeros_like(chosen))
            grad = xp.where(kept, divide_by_sum_backward(grad, raw), xp.zeros_like(grad))
        else:
            grad = divide_by_sum_backward(grad, chosen)
    weighted = grad * chosen
    return _scatter(probs * -weighted.sum(axis=1, keepdims=True), ids, weighted)


def _scatter(out: Array, ids: Array, values: Array) -> Array:
    """Add values[t, k] to out[t, ids[t, k]] in place; values of id -1 must be 0."""
    xp = array_namespace(out)
    rows = xp.arange(out.shape[0])
    # Column by column, since a -1 clipped to 0 may meet a true 0 of the same row.
    for k in range(ids.shape[1]):
        out[rows, xp.maximum(ids[:, k], 0)] += values[:, k]
    return out
