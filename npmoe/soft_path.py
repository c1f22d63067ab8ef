"""Soft MoE as a path of the layer: eq. (S1) to (S3) of `npmoe.routing.soft` around the experts."""

from __future__ import annotations

import math

import numpy as np

from npmoe._typing import Array
from npmoe.backends import Backend
from npmoe.config import MoEConfig
from npmoe.params import MoEParams
from npmoe.routed_path import PathGrads, backward_experts, draw_dropout, forward_experts
from npmoe.routing import Routing
from npmoe.saved import SavedTensors, SoftSaved


def soft_forward(
    run: Backend,
    x: Array,
    params: MoEParams,
    cfg: MoEConfig,
    *,
    shape: tuple[int, ...],
    token_mask: Array | None,
    rng: np.random.Generator | None,
) -> tuple[Array, SavedTensors]:
    """Return the mixed output (T, H) and what the backward pass needs.

    The slots run through the expert core like tokens: one id each, weight 1.
    """
    batch, length = math.prod(shape[:-2]), shape[-2]
    inputs = x if token_mask is None else run.mask_rows(x, token_mask)
    assignments = run.soft_route(
        inputs.reshape(batch, length, shape[-1]),
        params.router_weight,
        params.soft_scale,
        token_mask=None if token_mask is None else token_mask.reshape(batch, length),
        nan_policy=cfg.nan_policy,
    )
    valid = assignments.token_mask
    mask = None if valid is None else valid.reshape(batch * length)
    if mask is not None:
        inputs = run.mask_rows(x, mask)
    sequences = inputs.reshape(batch, length, shape[-1])
    slots = run.soft_dispatch(sequences, assignments.dispatch)  # (B*E*C, H)
    owners = np.repeat(
        np.arange(cfg.num_experts, dtype=np.int32), cfg.router_size // cfg.num_experts
    )
    ids = run.asarray(np.tile(owners, batch)[:, None])
    ones = run.asarray(np.ones((len(owners) * batch, 1), str(x.dtype)))
    plan = run.plan_dispatch(ids, num_experts=cfg.num_experts)
    dropout = draw_dropout(run, plan, cfg, rng, str(x.dtype))
    y, gate_up = forward_experts(run)(slots, params, plan, ones, cfg, dropout=dropout)
    output = run.soft_combine(y, assignments.combine).reshape(x.shape)
    size = (batch * length, cfg.router_size)
    routing = Routing(
        topk_ids=ids,
        topk_weights=ones,
        probs=assignments.combine.reshape(size),
        router_logits=assignments.router_logits.reshape(size),
        token_mask=mask,
        sequence_length=length,
        score_fn="soft",
    )
    return output, SavedTensors(
        hidden_states=x,
        routing=routing,
        plan=plan,
        gate_up=gate_up,
        shape=shape,
        cfg=cfg,
        backend=run,
        dropout=dropout,
        soft=SoftSaved(assignments=assignments, slots=slots, slot_outputs=y),
    )


def soft_backward(
    run: Backend,
    grad: Array,
    saved: SavedTensors,
    soft: SoftSaved,
    params: MoEParams,
    grad_router_logits: Array | None,
    *,
    out: MoEParams | None,
    accumulate: bool,
) -> PathGrads:
    """Return the gradients of the soft path; `grad` (T, H) must be zero where masked."""
    assignments, mask = soft.assignments, saved.routing.token_mask
    shape = (*assignments.combine.shape[:2], saved.shape[-1])
    x = saved.hidden_states if mask is None else run.mask_rows(saved.hidden_states, mask)
    x = x.reshape(shape)
    grad_y, grad_combine = run.soft_combine_backward(
        grad.reshape(shape), soft.slot_outputs, assignments.combine
    )
    experts = backward_experts(run)(
        grad_y,
        soft.slots,
        saved.gate_up,
        params,
        saved.plan,
        saved.routing.topk_weights,
        saved.cfg,
        dropout=saved.dropout,
        out=out,
        accumulate=accumulate,
    )
    grad_x, grad_dispatch = run.soft_dispatch_backward(
        experts.hidden_states, x, assignments.dispatch
    )
    grad_logits = run.soft_weights_backward(grad_dispatch, grad_combine, assignments)
    if grad_router_logits is not None:
        auxiliary = grad_router_logits
        if mask is not None:
            auxiliary = run.mask_rows(auxiliary, mask)
        grad_logits = run.add(grad_logits, auxiliary.reshape(grad_logits.shape))
    grad_unit, grad_weight, grad_scale = run.soft_route_backward(
        grad_logits, x, params.router_weight, params.soft_scale
    )
    return PathGrads(
        hidden_states=run.add(grad_x, grad_unit).reshape(saved.hidden_states.shape),
        router_weight=grad_weight,
        gate_up_proj=experts.gate_up_proj,
        down_proj=experts.down_proj,
        gate_up_bias=experts.gate_up_bias,
        down_bias=experts.down_bias,
        soft_scale=grad_scale,
    )
