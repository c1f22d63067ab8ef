"""The expert that every token passes through: eq. (15) to (17) of `npmoe.layer`."""

from __future__ import annotations

from dataclasses import dataclass

from npmoe._typing import Array
from npmoe.backends import Backend
from npmoe.config import MoEConfig
from npmoe.params import MoEParams


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedGrads:
    """Gradients of the shared expert; shared_gate_weight is None if it has no gate."""

    hidden_states: Array  # (T, H)
    shared_gate_up_proj: Array
    shared_down_proj: Array
    shared_gate_weight: Array | None


def shared_forward(
    run: Backend, x: Array, params: MoEParams, cfg: MoEConfig
) -> tuple[Array, Array]:
    """Return the shared output (T, H) and its pre-activation (T, 2S); eq. (15).

    `x` must be zero where masked; the output is zero there, since every activation maps 0 to 0.
    """
    pre = run.linear(x, params.shared_gate_up_proj)
    act = run.activation(pre, cfg, shared=True)
    output = run.linear(act, params.shared_down_proj)
    if params.shared_gate_weight is not None:
        output = run.gate_rows(output, run.linear(x, params.shared_gate_weight))
    return output, pre


def shared_backward(
    run: Backend, grad: Array, x: Array, pre: Array, params: MoEParams, cfg: MoEConfig
) -> SharedGrads:
    """Return the gradients for the gradient (T, H) of the shared output; eq. (16) and (17)."""
    act = run.activation(pre, cfg, shared=True)
    gate_logit = None
    if params.shared_gate_weight is not None:
        gate_logit = run.linear(x, params.shared_gate_weight)
        grad = run.gate_rows(grad, gate_logit)
    grad_act, grad_down, _ = run.linear_backward(grad, act, params.shared_down_proj)
    grad_pre = run.activation_backward(grad_act, pre, cfg, shared=True)
    grad_x, grad_gate_up, _ = run.linear_backward(grad_pre, x, params.shared_gate_up_proj)
    grad_gate = None
    if gate_logit is not None:
        grad_logit = run.gate_rows_backward(grad_act, act, gate_logit)
        grad_x_gate, grad_gate, _ = run.linear_backward(grad_logit, x, params.shared_gate_weight)
        grad_x = run.add(grad_x, grad_x_gate)
    return SharedGrads(
        hidden_states=grad_x,
        shared_gate_up_proj=grad_gate_up,
        shared_down_proj=grad_down,
        shared_gate_weight=grad_gate,
    )
