"""The layer itself: y_t = sum_k w_tk (W2_e act(W1_e x_t + b1_e) + b2_e), e the k-th choice of t."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive.activations import activate, activate_backward
from npmoe.naive.capacity import expert_capacity, keep_routes, renormalize_kept
from npmoe.naive.routing import route, route_backward, valid_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveForward:
    """What the forward pass computed; topk_weights are those it combined with, 0 if dropped."""

    output: HostArray  # (T, H)
    topk_ids: HostArray  # (T, K)
    topk_weights: HostArray  # (T, K)
    kept: HostArray  # (T, K) bool
    probs: HostArray  # (T, E)
    logits: HostArray  # (T, E), 0 where masked


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveGrads:
    """Gradients, None where there is no parameter."""

    hidden_states: HostArray
    router_weight: HostArray
    gate_up_proj: HostArray
    down_proj: HostArray
    router_bias: HostArray | None
    gate_up_bias: HostArray | None
    down_bias: HostArray | None


def moe_forward(
    x: HostArray,
    params: Any,
    cfg: MoEConfig,
    *,
    token_mask: HostArray | None = None,
    topk_ids: HostArray | None = None,
) -> NaiveForward:
    """Run the layer on x (T, H), without router noise; `params` has the fields of MoEParams."""
    num_tokens = x.shape[0]
    logits = np.zeros((num_tokens, cfg.num_experts))
    for t in range(num_tokens):
        if token_mask is None or token_mask[t]:
            for e in range(cfg.num_experts):
                logits[t, e] = _f64(params.router_weight)[e] @ _f64(x)[t]
                if params.router_bias is not None:
                    logits[t, e] += params.router_bias[e]
    ids, weights, probs = route(logits, cfg, token_mask, topk_ids)
    num_valid = sum(valid_tokens(logits, cfg, token_mask))
    kept = keep_routes(ids, weights, expert_capacity(num_valid, cfg), cfg)
    if cfg.renormalize_drop == "after":
        weights = renormalize_kept(weights, kept) * cfg.routed_scaling_factor
    weights = weights * kept
    output = np.zeros(x.shape)
    for t in range(num_tokens):
        for k in range(ids.shape[1]):
            if kept[t, k]:
                output[t] += weights[t, k] * _expert(_f64(x)[t], params, int(ids[t, k]), cfg)[2]
    return NaiveForward(
        output=output, topk_ids=ids, topk_weights=weights, kept=kept, probs=probs, logits=logits
    )


def moe_backward(
    grad_output: HostArray,
    x: HostArray,
    params: Any,
    cfg: MoEConfig,
    *,
    token_mask: HostArray | None = None,
    topk_ids: HostArray | None = None,
    grad_router_logits: HostArray | None = None,
) -> NaiveGrads:
    """Return the gradients of sum(output * grad_output) + sum(logits * grad_router_logits)."""
    forward = moe_forward(x, params, cfg, token_mask=token_mask, topk_ids=topk_ids)
    x, grad_output = _f64(x), _f64(grad_output)
    w1, w2, router = _f64(params.gate_up_proj), _f64(params.down_proj), _f64(params.router_weight)
    grad_x, grad_router = np.zeros(x.shape), np.zeros(router.shape)
    grad_w1, grad_w2 = np.zeros(w1.shape), np.zeros(w2.shape)
    grad_b1, grad_b2 = np.zeros(w1.shape[:2]), np.zeros(w2.shape[:2])
    grad_router_bias = np.zeros(cfg.num_experts)
    grad_weights = np.zeros(forward.topk_weights.shape)
    for t in range(x.shape[0]):
        for k in range(forward.topk_ids.shape[1]):
            if not forward.kept[t, k]:
                continue
            e, w, g = int(forward.topk_ids[t, k]), forward.topk_weights[t, k], grad_output[t]
            gate_up, act, y = _expert(x[t], params, e, cfg)
            grad_weights[t, k] = g @ y
            grad_w2[e] += np.outer(w * g, act)
            grad_b2[e] += w * g
            grad_gate_up = activate_backward(w * (g @ w2[e]), gate_up, cfg.activation)
            grad_w1[e] += np.outer(grad_gate_up, x[t])
            grad_b1[e] += grad_gate_up
            grad_x[t] += grad_gate_up @ w1[e]
    grad_logits = route_backward(grad_weights, forward.logits, forward.topk_ids, cfg, forward.kept)
    for t, valid in enumerate(valid_tokens(forward.logits, cfg, token_mask)):
        if not valid:
            continue
        if grad_router_logits is not None:
            grad_logits[t] += grad_router_logits[t]
        for e in range(cfg.num_experts):
            grad_router[e] += grad_logits[t, e] * x[t]
            grad_router_bias[e] += grad_logits[t, e]
            grad_x[t] += grad_logits[t, e] * router[e]
    return NaiveGrads(
        hidden_states=grad_x,
        router_weight=grad_router,
        gate_up_proj=grad_w1,
        down_proj=grad_w2,
        router_bias=None if params.router_bias is None else grad_router_bias,
        gate_up_bias=None if params.gate_up_bias is None else grad_b1,
        down_bias=None if params.down_bias is None else grad_b2,
    )


def _expert(x: HostArray, params: Any, e: int, cfg: MoEConfig) -> tuple[HostArray, ...]:
    """Return (gate_up, act, y) of one token in expert e."""
    gate_up = _f64(params.gate_up_proj)[e] @ x
    if params.gate_up_bias is not None:
        gate_up = gate_up + params.gate_up_bias[e]
    act = activate(gate_up, cfg.activation)
    y = _f64(params.down_proj)[e] @ act
    if params.down_bias is not None:
        y = y + params.down_bias[e]
    return gate_up, act, y


def _f64(array: HostArray) -> HostArray:
    return np.asarray(array, dtype=np.float64)
