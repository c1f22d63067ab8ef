"""From hidden states to router logits: jitter, linear, bias, soft-cap, noise; and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive.draws import Draws
from npmoe.naive.results import f64
from npmoe.naive.scoring import is_finite_row


def router_logits(
    x: HostArray, params: Any, cfg: MoEConfig, token_mask: HostArray | None, draws: Draws
) -> tuple[HostArray, HostArray]:
    """Return the logits (T, E) with and without noise, 0 where masked.

    z_e = W_e . (h * jitter) + b_e, then c tanh(z / c), then z + noise.
    """
    num_experts = params.router_weight.shape[0]
    logits = np.zeros((x.shape[0], num_experts))
    clean = np.zeros(logits.shape)
    for t in range(x.shape[0]):
        if token_mask is not None and not token_mask[t]:
            continue
        h = f64(x)[t] if draws.jitter is None else f64(x)[t] * draws.jitter[t]
        for e in range(num_experts):
            z = float(f64(params.router_weight)[e] @ h)
            if params.router_bias is not None:
                z += float(params.router_bias[e])
            if cfg.logit_softcap is not None:
                z = cfg.logit_softcap * math.tanh(z / cfg.logit_softcap)
            clean[t, e] = z
            logits[t, e] = z if draws.noise is None else z + draws.noise[t, e]
    return logits, clean


def router_logits_backward(
    grad_logits: HostArray,
    x: HostArray,
    params: Any,
    cfg: MoEConfig,
    clean_logits: HostArray,
    valid: list[bool],
    draws: Draws,
) -> tuple[HostArray, HostArray, HostArray]:
    """Return the gradients of x, router_weight and router_bias.

    Rows that are not valid, or not finite, have none. The slope of the soft-cap is 1 - (z / c)^2.
    """
    weight = f64(params.router_weight)
    grad_x, grad_weight = np.zeros(x.shape), np.zeros(weight.shape)
    grad_bias = np.zeros(weight.shape[0])
    for t in range(x.shape[0]):
        if not valid[t] or not is_finite_row(clean_logits[t]):
            continue
        jitter = np.ones(x.shape[1]) if draws.jitter is None else draws.jitter[t]
        for e in range(weight.shape[0]):
            g = grad_logits[t, e]
            if cfg.logit_softcap is not None:
                g = g * (1.0 - (clean_logits[t, e] / cfg.logit_softcap) ** 2)
            grad_weight[e] += g * (f64(x)[t] * jitter)
            grad_bias[e] += g
            grad_x[t] += g * weight[e] * jitter
    return grad_x, grad_weight, grad_bias
