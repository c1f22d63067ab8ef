"""The layer itself: y_t = sum_k w_tk (W2_e act(W1_e x_t + b1_e) + b2_e), e the k-th choice of t.

Around that sum stand the router, the drop for capacity, the shared expert and the output bias.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive import dense as dense_form
from npmoe.naive import experts, soft
from npmoe.naive.capacity import keep_routes
from npmoe.naive.draws import NO_DRAWS, Draws
from npmoe.naive.results import NaiveForward, NaiveGrads, collect_grads
from npmoe.naive.router import router_logits, router_logits_backward
from npmoe.naive.routing import route, route_backward, valid_tokens
from npmoe.naive.shared import finish, finish_backward
from npmoe.naive.weights import renormalize


def moe_forward(
    x: HostArray,
    params: Any,
    cfg: MoEConfig,
    *,
    token_mask: HostArray | None = None,
    topk_ids: HostArray | None = None,
    sequence_length: int | None = None,
    draws: Draws = NO_DRAWS,
    dense: bool = False,
) -> NaiveForward:
    """Run the layer on x (T, H); `params` has the fields of MoEParams.

    Parameters
    ----------
    token_mask : (T,) bool array, optional
        False rows are never looked at; their output is 0.
    topk_ids : (T, K) int array, optional
        Choices to replay; -1 is no expert.
    sequence_length : int, optional
        Tokens per sequence; T if omitted.
    draws : Draws
        Everything random.
    dense : bool
        Run the experts on buffers of C rows, by einsum, instead of route by route.
    """
    if cfg.routing == "soft":
        return soft.moe_forward(x, params, cfg, token_mask, sequence_length, draws)
    logits, clean = router_logits(x, params, cfg, token_mask, draws)
    ids, weights, probs, summed_ids = route(
        logits,
        cfg,
        token_mask,
        topk_ids,
        selection_bias=params.selection_bias,
        sequence_length=sequence_length,
        draws=draws,
    )
    valid = valid_tokens(logits, cfg, token_mask)
    kept, slot_ids = keep_routes(ids, weights, valid, cfg, sequence_length, draws.drop)
    if cfg.renormalize_drop == "after":
        weights = renormalize(weights, kept, cfg) * cfg.routed_scaling_factor
    forward = NaiveForward(
        output=np.zeros(x.shape),
        topk_ids=ids,
        topk_weights=np.where(kept, weights, 0.0),
        kept=kept,
        probs=probs,
        logits=logits,
        clean_logits=clean,
        summed_ids=summed_ids,
        slot_ids=slot_ids,
    )
    routed = _core(dense).run_routes(x, forward, params, cfg, sequence_length, draws)
    return dataclasses.replace(forward, output=finish(routed, x, params, cfg, valid))


def moe_backward(
    grad_output: HostArray,
    x: HostArray,
    params: Any,
    cfg: MoEConfig,
    *,
    token_mask: HostArray | None = None,
    topk_ids: HostArray | None = None,
    sequence_length: int | None = None,
    draws: Draws = NO_DRAWS,
    grad_router_logits: HostArray | None = None,
    dense: bool = False,
) -> NaiveGrads:
    """Return the gradients of sum(output * grad_output) + sum(logits * grad_router_logits)."""
    if cfg.routing == "soft":
        return soft.moe_backward(
            grad_output, x, params, cfg, token_mask, sequence_length, draws, grad_router_logits
        )
    forward = moe_forward(
        x,
        params,
        cfg,
        token_mask=token_mask,
        topk_ids=topk_ids,
        sequence_length=sequence_length,
        draws=draws,
    )
    valid = valid_tokens(forward.logits, cfg, token_mask)
    grad_routed, grad_x_shared, shared = finish_backward(grad_output, x, params, cfg, valid)
    grad_x_experts, grad_weights, grads = _core(dense).run_routes_backward(
        grad_routed, x, forward, params, cfg, sequence_length, draws
    )
    grad_logits = route_backward(
        grad_weights, forward.logits, forward.topk_ids, cfg, forward.kept, forward.summed_ids
    )
    if grad_router_logits is not None:
        grad_logits = grad_logits + grad_router_logits
    grad_x_router, grad_router, grad_router_bias = router_logits_backward(
        grad_logits, x, params, cfg, forward.clean_logits, valid, draws
    )
    return collect_grads(
        params,
        grads,
        shared,
        hidden_states=grad_x_shared + grad_x_experts + grad_x_router,
        router_weight=grad_router,
        router_bias=grad_router_bias,
    )


def _core(dense: bool) -> ModuleType:
    """Return who runs the experts; both modules have the same two functions."""
    return dense_form if dense else experts
