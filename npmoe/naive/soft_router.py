"""Where soft routing mixes: which share of every token each slot holds, and gives back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive.results import f64
from npmoe.naive.routing import valid_tokens
from npmoe.naive.scoring import softmax

EPS = 1e-6


def normalize(v: HostArray) -> HostArray:
    """Return v / (|v| + eps)."""
    return f64(v / (math.sqrt(v @ v) + EPS))


def normalize_backward(grad: HostArray, v: HostArray) -> HostArray:
    """Return (grad - v (v . grad) / (|v| (|v| + eps))) / (|v| + eps); at 0, grad / eps."""
    size = math.sqrt(v @ v)
    along = v * ((v @ grad) / (size * (size + EPS))) if size > 0 else 0.0
    return f64((grad - along) / (size + EPS))


def mix(
    x: HostArray,
    params: Any,
    cfg: MoEConfig,
    token_mask: HostArray | None,
    sequence_length: int | None,
) -> tuple[HostArray, HostArray, HostArray, list[list[int]]]:
    """Return logits, dispatch and combine (T, E * S), and the valid tokens of each sequence."""
    num_tokens, num_slots = x.shape[0], params.router_weight.shape[0]
    logits = np.zeros((num_tokens, num_slots))
    for t in range(num_tokens):
        if token_mask is None or token_mask[t]:
            for s in range(num_slots):
                near = normalize(f64(x)[t]) @ normalize(f64(params.router_weight)[s])
                logits[t, s] = float(params.soft_scale) * near
    valid = valid_tokens(logits, cfg, token_mask)
    length = num_tokens if sequence_length is None else sequence_length
    groups = [
        [t for t in range(start, start + length) if valid[t]]
        for start in range(0, num_tokens, max(1, length))
    ]
    dispatch, combine = np.zeros(logits.shape), np.zeros(logits.shape)
    for group in groups:
        for s in range(num_slots):
            dispatch[group, s] = softmax([float(logits[t, s]) for t in group])
        for t in group:
            combine[t] = softmax(logits[t].tolist())
    return logits, dispatch, combine, groups


def mix_backward(
    grad_logits: HostArray, x: HostArray, params: Any, valid: list[bool]
) -> tuple[HostArray, HostArray, HostArray]:
    """Return the gradients of x, router_weight and soft_scale."""
    phi, scale = f64(params.router_weight), float(params.soft_scale)
    grad_x, grad_phi, grad_scale = np.zeros(x.shape), np.zeros(phi.shape), np.zeros(())
    for t, s in np.ndindex(grad_logits.shape):
        if not valid[t]:
            continue
        g, token, row = grad_logits[t, s], normalize(f64(x)[t]), normalize(phi[s])
        grad_scale += g * (token @ row)
        grad_phi[s] += normalize_backward(g * scale * token, phi[s])
        grad_x[t] += normalize_backward(g * scale * row, f64(x)[t])
    return grad_x, grad_phi, grad_scale
