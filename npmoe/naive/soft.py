"""Soft MoE: every slot holds a mixture of a sequence's tokens, every token takes all slots.

Per sequence, with n(v) = v / (|v| + 1e-6), S slots per expert, slot s of expert s // S:
x_ts = soft_scale n(h_t) . n(Phi_s), D = softmax over t, C = softmax over s,
y_t = sum_s C_ts f_s(sum_u D_us h_u).  Puigcerver et al. 2023, arXiv 2308.00951, algorithms 1 and 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive.draws import Draws, row_of
from npmoe.naive.experts import run_expert, run_expert_backward
from npmoe.naive.results import ExpertGrads, NaiveForward, NaiveGrads, collect_grads, f64
from npmoe.naive.routing import valid_tokens
from npmoe.naive.scoring import softmax_backward
from npmoe.naive.shared import finish, finish_backward
from npmoe.naive.soft_router import mix, mix_backward


def moe_forward(
    x: HostArray,
    params: Any,
    cfg: MoEConfig,
    token_mask: HostArray | None,
    sequence_length: int | None,
    draws: Draws,
) -> NaiveForward:
    """Run the layer with routing="soft"; see `npmoe.naive.moe_forward`."""
    logits, dispatch, combine, groups = mix(x, params, cfg, token_mask, sequence_length)
    routed = np.zeros(x.shape)
    for n, group in enumerate(groups):
        for s in range(logits.shape[1]):
            slot = _slot(x, dispatch, group, s)
            y = run_expert(slot, 1.0, params, _expert(s, cfg), cfg, row_of(draws.dropout, n, s))
            for t in group:
                routed[t] += combine[t, s] * y
    none = np.zeros((x.shape[0], 0))
    return NaiveForward(
        output=finish(routed, x, params, cfg, valid_tokens(logits, cfg, token_mask)),
        topk_ids=none.astype(int),
        topk_weights=none,
        kept=none.astype(bool),
        probs=combine,
        logits=logits,
        clean_logits=logits,
        summed_ids=none.astype(int),
        dispatch=dispatch,
    )


def moe_backward(
    grad_output: HostArray,
    x: HostArray,
    params: Any,
    cfg: MoEConfig,
    token_mask: HostArray | None,
    sequence_length: int | None,
    draws: Draws,
    grad_router_logits: HostArray | None,
) -> NaiveGrads:
    """Return all gradients; see `npmoe.naive.moe_backward`."""
    logits, dispatch, combine, groups = mix(x, params, cfg, token_mask, sequence_length)
    valid = valid_tokens(logits, cfg, token_mask)
    grad_routed, grad_x, shared = finish_backward(grad_output, x, params, cfg, valid)
    grads = ExpertGrads.zeros(params)
    grad_logits = np.zeros(logits.shape)
    for n, group in enumerate(groups):
        grad_combine, grad_dispatch = np.zeros(logits.shape), np.zeros(logits.shape)
        for s in range(logits.shape[1]):
            slot, e, keep = (
                _slot(x, dispatch, group, s),
                _expert(s, cfg),
                row_of(draws.dropout, n, s),
            )
            y = run_expert(slot, 1.0, params, e, cfg, keep)
            grad_y = np.zeros(x.shape[1])
            for t in group:
                grad_combine[t, s] = grad_routed[t] @ y
                grad_y += combine[t, s] * grad_routed[t]
            grad_slot, _ = run_expert_backward(grad_y, slot, 1.0, params, e, cfg, grads, keep)
            for t in group:
                grad_dispatch[t, s] = grad_slot @ f64(x)[t]
                grad_x[t] += dispatch[t, s] * grad_slot
            column = softmax_backward(grad_dispatch[group, s].tolist(), dispatch[group, s].tolist())
            grad_logits[group, s] += column
        for t in group:
            grad_logits[t] += softmax_backward(grad_combine[t].tolist(), combine[t].tolist())
            if grad_router_logits is not None:
                grad_logits[t] += grad_router_logits[t]
    grad_x_router, grad_phi, grad_scale = mix_backward(grad_logits, x, params, valid)
    return collect_grads(
        params,
        grads,
        shared,
        hidden_states=grad_x + grad_x_router,
        router_weight=grad_phi,
        soft_scale=grad_scale,
    )


def _slot(x: HostArray, dispatch: HostArray, group: list[int], s: int) -> HostArray:
    """Return the mixture of the group's tokens in slot s, (H,)."""
    slot = np.zeros(x.shape[1])
    for t in group:
        slot += dispatch[t, s] * f64(x)[t]
    return slot


def _expert(s: int, cfg: MoEConfig) -> int:
    """Return whose slot s is."""
    return s // (cfg.expert_capacity or 1)
