"""Soft MoE: every slot takes a weighted mean of all tokens, every token of all slots.

With tokens X of one sequence, slots s, unit vectors x_t = h_t / (|h_t| + eps) and phi_s::

    l_ts = soft_scale <x_t, phi_s>                                                         (S1)
    D = softmax over t of l;   C = softmax over s of l                                     (S2)
    slot input = sum over t of D_ts h_t;   y_t = sum over s of C_ts f_e(s)(slot input)     (S3)

Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts", eq. 1-3 and Algorithms 1-2.
Not causal: a token's output depends on later tokens of its sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from npmoe._typing import Array, array_namespace
from npmoe.routing.scoring import screen_rows

_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SoftRouting:
    """The two soft assignments of a batch of B sequences.

    Attributes
    ----------
    router_logits : (B, T/B, E*C) float array
    dispatch : (B, T/B, E*C) float array
        Sums to 1 over the valid tokens of a sequence.
    combine : (B, T/B, E*C) float array
        Sums to 1 over the slots; rows of masked tokens are 0.
    token_mask : (B, T/B) bool array or None
        True = valid; under nan_policy "drop" without the dropped tokens.
    """

    router_logits: Array
    dispatch: Array
    combine: Array
    token_mask: Array | None = None


def soft_route(
    x: Array,
    router_weight: Array,
    soft_scale: Array,
    *,
    token_mask: Array | None = None,
    nan_policy: str = "raise",
) -> SoftRouting:
    """Return the logits and both assignments; eq. (S1) and (S2).

    Parameters
    ----------
    x : (B, L, H) float array
        Zero where masked.
    router_weight : (E*C, H) float array
    soft_scale : () float array
    token_mask : (B, L) bool array, optional
    nan_policy : {"raise", "drop"}
        As in MoEConfig.

    Returns
    -------
    SoftRouting
        New arrays. A sequence without valid tokens dispatches zeros.

    Raises
    ------
    RangeError
        Under "raise", if a valid token has no finite largest logit.
    """
    xp = array_namespace(x)
    raw = (_unit(x)[0] @ _unit(router_weight)[0].T) * soft_scale
    flat_mask = None if token_mask is None else token_mask.reshape(-1)
    logits, valid = screen_rows(raw.reshape(-1, raw.shape[2]), nan_policy, flat_mask)
    logits = logits.reshape(raw.shape)
    if valid is None:
        return SoftRouting(
            router_logits=logits, dispatch=_softmax(logits, 1), combine=_softmax(logits, 2)
        )
    valid = valid.reshape(raw.shape[:2])
    rows = valid[:, :, None]
    some = valid.any(axis=1)[:, None, None]
    inside = xp.where(rows, logits, -xp.inf)
    dispatch = _softmax(xp.where(some, inside, xp.zeros_like(logits)), 1)
    return SoftRouting(
        router_logits=logits,
        dispatch=xp.where(rows, dispatch, xp.zeros_like(dispatch)),
        combine=xp.where(rows, _softmax(logits, 2), xp.zeros_like(logits)),
        token_mask=valid,
    )


def soft_dispatch(x: Array, dispatch: Array) -> Array:
    """Return the slot inputs (B*E*C, H) from x (B, L, H); eq. (S3)."""
    xp = array_namespace(x)
    slots = xp.matmul(dispatch.transpose(0, 2, 1), x)
    return slots.reshape(-1, x.shape[2])


def soft_combine(y: Array, combine: Array) -> Array:
    """Return the output (B, L, H) from slot outputs y (B*E*C, H); eq. (S3)."""
    batch, _, slots = combine.shape
    return array_namespace(y).matmul(combine, y.reshape(batch, slots, y.shape[1]))


def soft_combine_backward(grad: Array, y: Array, combine: Array) -> tuple[Array, Array]:
    """Return the gradients of y (B*E*C, H) and of combine (B, L, E*C)."""
    xp = array_namespace(grad)
    batch, _, slots = combine.shape
    grad_y = xp.matmul(combine.transpose(0, 2, 1), grad).reshape(y.shape)
    rows = y.reshape(batch, slots, y.shape[1])
    return grad_y, xp.matmul(grad, rows.transpose(0, 2, 1))


def soft_dispatch_backward(grad_slots: Array, x: Array, dispatch: Array) -> tuple[Array, Array]:
    """Return the gradients of x (B, L, H) and of dispatch (B, L, E*C)."""
    xp = array_namespace(x)
    grad = grad_slots.reshape(x.shape[0], dispatch.shape[2], x.shape[2])
    return xp.matmul(dispatch, grad), xp.matmul(x, grad.transpose(0, 2, 1))


def soft_weights_backward(grad_dispatch: Array, grad_combine: Array, soft: SoftRouting) -> Array:
    """Return grad_router_logits (B, L, E*C) of both softmaxes."""
    grad = soft.dispatch * grad_dispatch
    grad -= soft.dispatch * grad.sum(axis=1, keepdims=True)
    part = soft.combine * grad_combine
    grad += part - soft.combine * part.sum(axis=2, keepdims=True)
    return grad


def soft_route_backward(
    grad_logits: Array, x: Array, router_weight: Array, soft_scale: Array
) -> tuple[Array, Array, Array]:
    """Return the gradients of x (B, L, H), router_weight (E*C, H) and soft_scale (); eq. (S1)."""
    xp = array_namespace(x)
    unit_x, norm_x = _unit(x)
    unit_phi, norm_phi = _unit(router_weight)
    slots = router_weight.shape[0]
    flat = grad_logits.reshape(-1, slots)
    cosine_grad = (flat * soft_scale) @ unit_phi  # (T, H), gradient of unit_x
    weighted = flat.T @ unit_x.reshape(-1, x.shape[2])  # (E*C, H)
    grad_scale = (weighted * unit_phi).sum()
    grad_x = _unit_backward(cosine_grad.reshape(x.shape), x, norm_x)
    grad_phi = _unit_backward(weighted * soft_scale, router_weight, norm_phi)
    return grad_x, grad_phi, xp.asarray(grad_scale).reshape(())


def _unit(x: Array) -> tuple[Array, Array]:
    """Return x / (|x| + eps) over the last axis, and |x|."""
    xp = array_namespace(x)
    norm = xp.sqrt((x * x).sum(axis=-1, keepdims=True))
    return x / (norm + _EPS), norm


def _unit_backward(grad: Array, x: Array, norm: Array) -> Array:
    """Return grad / (n + eps) - x <grad, x> / (n (n + eps)^2); a vector of 0 has no second term."""
    xp = array_namespace(x)
    wide = norm + _EPS
    safe = xp.where(norm > 0, norm, xp.ones_like(norm))
    inner = (grad * x).sum(axis=-1, keepdims=True) / safe / wide
    return (grad - x * inner) / wide


def _softmax(x: Array, axis: int) -> Array:
    """Return softmax over one axis, which may be empty; the largest must be finite."""
    xp = array_namespace(x)
    if not x.size:
        return x.copy()
    y = xp.exp(x - x.max(axis=axis, keepdims=True))
    return y / y.sum(axis=axis, keepdims=True)
