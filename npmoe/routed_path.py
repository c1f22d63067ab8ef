"""The routed part of the layer: eq. (1) to (14) of `npmoe.layer`, composed from verbs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from npmoe._typing import Array
from npmoe.backends import Backend, ExpertGrads
from npmoe.capacity import stretch_capacities
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan
from npmoe.experts import compose_backward, compose_forward
from npmoe.params import MoEParams
from npmoe.routing import Routing
from npmoe.saved import SavedTensors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PathGrads:
    """Gradients of a path: its input's and its parameters', None where there is none."""

    hidden_states: Array
    router_weight: Array
    gate_up_proj: Array
    down_proj: Array
    router_bias: Array | None = None
    gate_up_bias: Array | None = None
    down_bias: Array | None = None
    soft_scale: Array | None = None


def routed_forward(
    run: Backend,
    x: Array,
    params: MoEParams,
    cfg: MoEConfig,
    *,
    shape: tuple[int, ...],
    token_mask: Array | None,
    topk_ids: Array | None,
    rng: np.random.Generator | None,
    save: bool,
) -> tuple[Array, SavedTensors]:
    """Return the routed output (T, H) and what the backward pass needs; eq. (1) to (5)."""
    dtype = str(x.dtype)
    jitter = None
    if cfg.router_jitter and rng is not None:
        factors = rng.uniform(1.0 - cfg.router_jitter, 1.0 + cfg.router_jitter, x.shape)
        jitter = run.asarray(factors.astype(cfg.router_dtype or dtype))
    router_input = _router_input(run, x, cfg, token_mask, jitter)
    router_weight, router_bias = _router_params(run, params, cfg)
    router_logits = run.linear(router_input, router_weight, router_bias)  # eq. (1)
    if cfg.logit_softcap is not None:
        router_logits = run.softcap(router_logits, cfg.logit_softcap)
    routing = run.route(
        router_logits,
        cfg,
        selection_bias=params.selection_bias,
        token_mask=token_mask,
        topk_ids=topk_ids,
        rng=rng,
        sequence_length=shape[-2],
    )  # eq. (2)
    plan = run.plan_dispatch(
        routing.topk_ids,
        num_experts=cfg.num_experts,
        num_identity_experts=cfg.num_identity_experts,
        capacity=_capacities(run, routing, cfg),
        drop_policy=cfg.drop_policy,
        slot_order=cfg.slot_order,
        topk_weights=routing.topk_weights,
        rng=rng,
    )
    if cfg.renormalize_drop == "after":
        weights = run.renormalize_kept(routing, plan, cfg)
        routing = replace(routing, topk_weights=weights)
    weights = run.cast(routing.topk_weights, dtype)
    dropout = draw_dropout(run, plan, cfg, rng, dtype)
    output, gate_up = forward_experts(run)(
        x, params, plan, weights, cfg, dropout=dropout, save=save
    )
    if cfg.num_identity_experts:
        identity = run.combine_identity(x, routing.topk_ids, weights, cfg.num_experts)
        output = run.add(output, identity)
    return output, SavedTensors(
        hidden_states=x,
        routing=routing,
        plan=plan,
        gate_up=gate_up,
        shape=shape,
        cfg=cfg,
        backend=run,
        jitter=jitter,
        dropout=dropout,
    )


def routed_backward(
    run: Backend,
    grad: Array,
    saved: SavedTensors,
    params: MoEParams,
    grad_router_logits: Array | None,
    *,
    out: MoEParams | None,
    accumulate: bool,
) -> PathGrads:
    """Return the gradients of the routed part; eq. (6) to (14)."""
    cfg, plan, routing, x = saved.cfg, saved.plan, saved.routing, saved.hidden_states
    dtype = str(x.dtype)
    weights = run.cast(routing.topk_weights, dtype)
    experts = backward_experts(run)(
        grad,
        x,
        saved.gate_up,
        params,
        plan,
        weights,
        cfg,
        dropout=saved.dropout,
        out=out,
        accumulate=accumulate,
    )  # eq. (6) to (11)
    grad_hidden, grad_weights = experts.hidden_states, experts.topk_weights
    if cfg.num_identity_experts:
        grad_x, grad_identity = run.combine_identity_backward(
            grad, x, routing.topk_ids, weights, cfg.num_experts
        )
        grad_hidden = run.add(grad_hidden, grad_x)
        grad_weights = run.add(grad_weights, grad_identity)
    router_dtype = str(routing.router_logits.dtype)
    grad_weights = run.cast(grad_weights, router_dtype)
    grad_logits = run.route_backward(grad_weights, routing, cfg, plan)  # eq. (12), (13)
    if grad_router_logits is not None:
        grad_logits = run.add(grad_logits, grad_router_logits)
    if routing.token_mask is not None:
        grad_logits = run.mask_rows(grad_logits, routing.token_mask)
    if cfg.logit_softcap is not None:
        clean = routing.router_logits if routing.clean_logits is None else routing.clean_logits
        if routing.token_mask is not None:
            clean = run.mask_rows(clean, routing.token_mask)
        grad_logits = run.softcap_backward(grad_logits, clean, cfg.logit_softcap)
    router_input = _router_input(run, x, cfg, routing.token_mask, saved.jitter)
    router_weight, router_bias = _router_params(run, params, cfg)
    grad_x, grad_router_weight, grad_router_bias = run.linear_backward(
        grad_logits, router_input, router_weight, router_bias
    )  # eq. (11), second half, and (14)
    if saved.jitter is not None:
        grad_x = run.multiply(grad_x, saved.jitter)
    return PathGrads(
        hidden_states=run.add(grad_hidden, run.cast(grad_x, dtype)),
        router_weight=run.cast(grad_router_weight, dtype),
        router_bias=None if grad_router_bias is None else run.cast(grad_router_bias, dtype),
        gate_up_proj=experts.gate_up_proj,
        down_proj=experts.down_proj,
        gate_up_bias=experts.gate_up_bias,
        down_bias=experts.down_bias,
    )


def forward_experts(run: Backend) -> partial[tuple[Array, Array | None]]:
    """Return the backend's fused expert core, or the one composed from its verbs."""
    if hasattr(run, "experts_forward"):  # isinstance of a protocol takes longer than a token
        return partial(run.experts_forward)
    return partial(compose_forward, run)


def backward_experts(run: Backend) -> partial[ExpertGrads]:
    """Return the backward of `forward_experts`."""
    if hasattr(run, "experts_backward"):
        return partial(run.experts_backward)
    return partial(compose_backward, run)


def draw_dropout(
    run: Backend, plan: DispatchPlan, cfg: MoEConfig, rng: np.random.Generator | None, dtype: str
) -> Array | None:
    """Return the dropout factors (R, I) of the activations, or None without dropout."""
    if not cfg.expert_dropout or rng is None:
        return None
    return run.draw_dropout(plan, cfg, rng, dtype)


def _router_input(
    run: Backend, x: Array, cfg: MoEConfig, token_mask: Array | None, jitter: Array | None
) -> Array:
    """Return what the router alone sees: masked, in its dtype, jittered. Never x changed."""
    if token_mask is not None:
        x = run.mask_rows(x, token_mask)
    if cfg.router_dtype is not None:
        x = run.cast(x, cfg.router_dtype)
    return x if jitter is None else run.multiply(x, jitter)


def _router_params(run: Backend, params: MoEParams, cfg: MoEConfig) -> tuple[Array, Array | None]:
    weight, bias = params.router_weight, params.router_bias
    if cfg.router_dtype is None:
        return weight, bias
    cast = run.cast(weight, cfg.router_dtype)
    return cast, None if bias is None else run.cast(bias, cfg.router_dtype)


def _capacities(run: Backend, routing: Routing, cfg: MoEConfig) -> list[int] | None:
    """Return the rows per expert of every stretch of tokens, or None if dropless."""
    if not cfg.has_capacity:
        return None
    if routing.token_mask is None:
        valid = np.ones(routing.topk_ids.shape[0], bool)
    else:
        valid = run.asnumpy(routing.token_mask)
    return stretch_capacities(valid, routing.sequence_length, cfg)
