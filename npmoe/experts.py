"""The expert core composed from single verbs: eq. (3) to (11) of `npmoe.layer`.

Backends that offer the fused pair (`npmoe.backends.FusedExperts`) are held to these two functions.
The combine weight multiplies the output (5), the activation (the same function), or the input:
then x_r = w_tk h_t replaces h_t in (3) and (10), the weight is absent from (5), (8) and (9), and
with v_r = W1_e^T grad_z_r the gradients are ``grad_w_tk = <v_r, h_t>`` and ``grad_h_t = w_tk v_r``.
"""

from __future__ import annotations

from npmoe._typing import Array
from npmoe.backends import Backend, ExpertGrads
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan
from npmoe.params import MoEParams


def compose_forward(
    run: Backend,
    x: Array,
    params: MoEParams,
    plan: DispatchPlan,
    topk_weights: Array,
    cfg: MoEConfig,
    *,
    dropout: Array | None = None,
    save: bool = True,
) -> tuple[Array, Array | None]:
    """Return the output (T, H) and, if it is saved, gate_up (R, 2I); eq. (3) to (5)."""
    rows = run.gather_rows(x, plan)  # (R, H)
    if cfg.weight_position == "input":
        rows = run.scale_rows(rows, plan, topk_weights)
    gate_up = run.grouped_gemm(rows, params.gate_up_proj, plan, bias=params.gate_up_bias)
    act = _activate(run, gate_up, cfg, dropout)  # (R, I)
    if cfg.weight_position == "mid":
        act = run.scale_rows(act, plan, topk_weights)
        y_sorted = run.grouped_gemm(act, params.down_proj, plan)
        if params.down_bias is not None:
            bias_rows = run.spread_experts(params.down_bias, plan)
            y_sorted = run.add(y_sorted, run.scale_rows(bias_rows, plan, topk_weights))
        return run.combine_rows(y_sorted, plan), gate_up if save else None
    y_sorted = run.grouped_gemm(act, params.down_proj, plan, bias=params.down_bias)
    weights = topk_weights if cfg.weight_position == "output" else None
    return run.combine_rows(y_sorted, plan, topk_weights=weights), gate_up if save else None


def compose_backward(
    run: Backend,
    grad_output: Array,
    x: Array,
    gate_up: Array,
    params: MoEParams,
    plan: DispatchPlan,
    topk_weights: Array,
    cfg: MoEConfig,
    *,
    dropout: Array | None = None,
    out: MoEParams | None = None,
    accumulate: bool = False,
) -> ExpertGrads:
    """Return the gradients of the expert core; eq. (6) to (11), without the router's share."""
    on_input = cfg.weight_position == "input"
    tokens = run.gather_rows(x, plan)
    rows = run.scale_rows(tokens, plan, topk_weights) if on_input else tokens
    grad_rows = run.gather_rows(grad_output, plan)
    weighted = grad_rows if on_input else run.scale_rows(grad_rows, plan, topk_weights)
    act = _activate(run, gate_up, cfg, dropout)  # recomputed, eq. (4)
    unweighted = run.grouped_gemm(grad_rows, params.down_proj, plan, transposed=True)  # eq. (6)
    grad_act = unweighted if on_input else run.scale_rows(unweighted, plan, topk_weights)
    if dropout is not None:
        grad_act = run.multiply(grad_act, dropout)
    grad_gate_up = run.activation_backward(grad_act, gate_up, cfg)  # eq. (9)
    grad_x = run.grouped_gemm(grad_gate_up, params.gate_up_proj, plan, transposed=True)
    if on_input:
        grad_weights = run.row_dot(grad_x, tokens, plan)
        grad_x = run.scale_rows(grad_x, plan, topk_weights)
    else:
        grad_weights = run.row_dot(unweighted, act, plan)  # eq. (7)
    grad_down_bias = None
    if params.down_bias is not None:
        if not on_input:
            bias_rows = run.spread_experts(params.down_bias, plan)
            grad_weights = run.add(grad_weights, run.row_dot(grad_rows, bias_rows, plan))
        grad_down_bias = run.store(
            run.segment_sum(weighted, plan), target(out, "down_bias"), accumulate
        )
    grad_down = run.grouped_gemm_wgrad(
        act, weighted, plan, out=target(out, "down_proj"), accumulate=accumulate
    )  # eq. (8)
    grad_gate_up_bias = None
    if params.gate_up_bias is not None:
        grad_gate_up_bias = run.store(
            run.segment_sum(grad_gate_up, plan), target(out, "gate_up_bias"), accumulate
        )
    grad_gate_up_proj = run.grouped_gemm_wgrad(
        rows, grad_gate_up, plan, out=target(out, "gate_up_proj"), accumulate=accumulate
    )  # eq. (10)
    return ExpertGrads(
        hidden_states=run.combine_rows(grad_x, plan),  # eq. (11)
        topk_weights=grad_weights,
        gate_up_proj=grad_gate_up_proj,
        down_proj=grad_down,
        gate_up_bias=grad_gate_up_bias,
        down_bias=grad_down_bias,
    )


def _activate(run: Backend, gate_up: Array, cfg: MoEConfig, dropout: Array | None) -> Array:
    act = run.activation(gate_up, cfg)
    return act if dropout is None else run.multiply(act, dropout)


def target(out: MoEParams | None, field: str) -> Array | None:
    """Return the caller's array for one gradient, if there is one."""
    return None if out is None else getattr(out, field)
