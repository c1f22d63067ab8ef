"""How far any correct floating-point layer may be from the exact one, element by element.

The layer is run once more, in balls (`npmoe.testing.balls`): each product in absolute values
besides its value, each activation with the largest slope it has. The choice of experts and the
dropped routes are constants, taken from a forward pass. What is promised to hold:

- every sum may be taken in any order, weights may be applied before or after a product, and
  <g, W2 a> may be computed as <W2^T g, a>;
- every operation rounds to nearest in `dtype` or a wider one, exp and erf are within
  `ELEMENTARY` unit roundoffs, underflow may flush to zero, and nothing overflows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive import NaiveForward
from npmoe.params import MoEGrads
from npmoe.testing.activation_bounds import activation, activation_backward
from npmoe.testing.balls import Ball, Model, softmax
from npmoe.testing.problems import MoEProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBounds:
    """Bounds of everything the layer computes, each of the shape of what it bounds."""

    router_logits: HostArray
    probs: HostArray
    topk_weights: HostArray
    output: HostArray
    grads: MoEGrads


def layer_bounds(
    problem: MoEProblem, forward: NaiveForward, dtype: npt.DTypeLike | None = None
) -> LayerBounds:
    """Bound the difference between a layer that computes in `dtype` and `npmoe.naive`.

    Parameters
    ----------
    problem : MoEProblem
        Finite inputs, masked rows aside.
    forward : NaiveForward
        Its ids and kept routes are taken for granted.
    dtype : dtype, optional
        In which the layer computes; the problem's own if omitted.

    Returns
    -------
    LayerBounds
        Float64 arrays, new. A bound may be infinite where cancellation leaves nothing.
    """
    cfg, params = problem.cfg, problem.params
    model = Model.of(problem.dtype if dtype is None else dtype)
    mask = np.ones(len(problem.hidden_states), bool)
    if problem.token_mask is not None:
        mask = problem.token_mask
    rows = mask[:, None]

    def given(array: HostArray) -> Ball:
        return Ball.exact(array, model)

    x = given(np.where(rows, problem.hidden_states, 0))  # (T, H)
    g = given(np.where(rows, problem.grad_output, 0))  # (T, H)
    ids, kept = forward.topk_ids, forward.kept
    H, I = cfg.hidden_size, cfg.intermediate_size

    logits = x.matmul(given(params.router_weight).T, H + 2)  # (T, E)
    if params.router_bias is not None:
        logits = logits + given(params.router_bias)
    probs = softmax(logits).where(rows)
    summed = kept if cfg.renormalize_drop == "after" else ids >= 0
    raw, unscaled = _weights(logits, probs, ids, summed, cfg)
    scale = given(np.array(cfg.routed_scaling_factor))
    weights = unscaled * scale

    y = _empty((*ids.shape, H), model)
    grad_weights = _empty(ids.shape, model)
    grad_rows = _empty((*ids.shape, H), model)
    w1, w2 = params.gate_up_proj, params.down_proj
    grad_w1, grad_w2 = np.zeros(w1.shape), np.zeros(w2.shape)
    grad_b1, grad_b2 = np.zeros(w1.shape[:2]), np.zeros(w2.shape[:2])
    for e in range(cfg.num_experts):
        t, k = np.nonzero(kept & (ids == e))
        if not len(t):
            continue
        z = x[t].matmul(given(w1[e]).T, H + 2)  # (n, 2I)
        if params.gate_up_bias is not None:
            z = z + given(params.gate_up_bias[e])
        act = activation(z, cfg.activation)  # (n, I)
        out = act.matmul(given(w2[e]).T, I + 2)  # (n, H)
        # All roundings on the way of each term, so that <g, W2 a> and <W2^T g, a> are both held.
        grad_act = g[t].matmul(given(w2[e]), H + I + 2)
        grad_w = (grad_act * act).sum(axis=1)
        if params.down_bias is not None:
            out = out + given(params.down_bias[e])
            grad_w = grad_w + (g[t] * given(params.down_bias[e])).sum(axis=1)
        _put(y, (t, k), out)
        _put(grad_weights, (t, k), grad_w)
        weight = weights[t, k][:, None]
        weighted = weight * g[t]
        grad_w2[e] = weighted.T.matmul(act, len(t) + 2).rad
        grad_b2[e] = weighted.sum(axis=0).rad
        grad_z = activation_backward(weight * grad_act, z, cfg.activation)
        grad_w1[e] = grad_z.T.matmul(x[t], len(t) + 2).rad
        grad_b1[e] = grad_z.sum(axis=0).rad
        # Each of these terms may be followed by the E terms of the router's path.
        n = w1.shape[1] + cfg.num_experts + 2
        _put(grad_rows, (t, k), grad_z.matmul(given(w1[e]), n))

    output = (weights.where(kept)[:, :, None] * y).sum(axis=1)
    grad_logits = _route_backward(
        grad_weights * scale,
        raw=raw,
        weights=unscaled,
        probs=probs,
        ids=ids,
        summed=summed,
        cfg=cfg,
    )
    if problem.grad_router_logits is not None:
        grad_logits = grad_logits + given(problem.grad_router_logits)
    grad_logits = grad_logits.where(rows)
    router_path = grad_logits.matmul(given(params.router_weight), cfg.num_experts + 2)
    return LayerBounds(
        router_logits=logits.rad,
        probs=probs.rad,
        topk_weights=weights.rad,
        output=output.where(rows).rad,
        grads=MoEGrads(
            hidden_states=(grad_rows.sum(axis=1) + router_path).where(rows).rad,
            router_weight=grad_logits.T.matmul(x, len(rows) + 2).rad,
            router_bias=None if params.router_bias is None else grad_logits.sum(axis=0).rad,
            gate_up_proj=grad_w1,
            down_proj=grad_w2,
            gate_up_bias=None if params.gate_up_bias is None else grad_b1,
            down_bias=None if params.down_bias is None else grad_b2,
        ),
    )


def _weights(
    logits: Ball, probs: Ball, ids: HostArray, summed: HostArray, cfg: MoEConfig
) -> tuple[Ball, Ball]:
    """Return the weights before and after normalisation, (T, K); 0 without an expert."""
    at = (np.arange(len(ids))[:, None], np.maximum(ids, 0))
    if cfg.router_order == "topk_score":
        mid = np.where(ids >= 0, logits[at].mid, -np.inf)
        weights = softmax(Ball(mid, logits[at].where(ids >= 0).rad, logits.model))
        return weights, weights
    raw = probs[at].where(summed)
    if not cfg.renormalize:
        return raw, raw
    return raw, (raw / raw.sum(axis=1, keepdims=True)).where(summed)


def _route_backward(
    grad_weights: Ball,
    *,
    raw: Ball,
    weights: Ball,
    probs: Ball,
    ids: HostArray,
    summed: HostArray,
    cfg: MoEConfig,
) -> Ball:
    """Return the gradient of the logits (T, E)."""
    rows = np.arange(len(ids))
    grad_logits = _empty(probs.mid.shape, probs.model)
    # Products are kept apart, w*g - w*mean, since either form may be computed.
    mean = (grad_weights * weights).sum(axis=1, keepdims=True)
    if cfg.router_order == "topk_score":
        grad_chosen = weights * grad_weights - weights * mean
    elif cfg.renormalize:
        total = raw.sum(axis=1, keepdims=True)
        grad_raw = (grad_weights / total - mean / total).where(summed)
        grad_chosen = raw * grad_raw
    else:
        grad_chosen = raw * grad_weights
    for k in range(ids.shape[1]):
        has = ids[:, k] >= 0
        at = (rows[has], ids[has, k])
        grad_logits.mid[at] += grad_chosen.mid[has, k]
        grad_logits.rad[at] += grad_chosen.rad[has, k]
    if cfg.router_order == "topk_score":
        return grad_logits
    return grad_logits - probs * grad_chosen.sum(axis=1, keepdims=True)


def _empty(shape: tuple[int, ...], model: Model) -> Ball:
    return Ball(np.zeros(shape), np.zeros(shape), model)


def _put(target: Ball, index: tuple[HostArray, ...], value: Ball) -> None:
    target.mid[index] = value.mid
    target.rad[index] = value.rad
