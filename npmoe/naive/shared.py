"""What every valid token gets besides its experts: the shared expert and the output bias."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive.activations import activate, activate_backward
from npmoe.naive.results import SharedGrads, f64, zeros_of
from npmoe.naive.scoring import sigmoid


def shared_expert(h: HostArray, params: Any, cfg: MoEConfig) -> tuple[HostArray, ...]:
    """Return (gate_up, act, y, s): y = W2 act(W1 h) and s = sigmoid(v . h), 1 without a gate."""
    gate_up = f64(params.shared_gate_up_proj) @ h
    act = activate(gate_up, *activation_of(cfg))
    y = f64(params.shared_down_proj) @ act
    opening = 1.0
    if params.shared_gate_weight is not None:
        opening = sigmoid(float(f64(params.shared_gate_weight)[0] @ h))
    return gate_up, act, y, np.array(opening)


def activation_of(cfg: MoEConfig) -> tuple[str, float | None, float | None]:
    """Return the shared expert's activation with its parameters."""
    name = cfg.activation if cfg.shared_activation is None else cfg.shared_activation
    return name, cfg.activation_alpha, cfg.activation_limit


def routed_share(params: Any, cfg: MoEConfig) -> float:
    """Return the factor of routed and of shared output: 1, or 1/2 for their average."""
    averaged = params.shared_gate_up_proj is not None and cfg.shared_combine == "average"
    return 0.5 if averaged else 1.0


def finish(
    routed: HostArray, x: HostArray, params: Any, cfg: MoEConfig, valid: list[bool]
) -> HostArray:
    """Return routed + s shared, or half of it, plus the output bias; 0 for tokens not valid."""
    output = np.zeros(routed.shape)
    for t in range(routed.shape[0]):
        if not valid[t]:
            continue
        output[t] = routed[t]
        if params.shared_gate_up_proj is not None:
            _, _, y, opening = shared_expert(f64(x)[t], params, cfg)
            output[t] += opening * y
        output[t] *= routed_share(params, cfg)
        if params.output_bias is not None:
            output[t] += params.output_bias
    return output


def finish_backward(
    grad_output: HostArray, x: HostArray, params: Any, cfg: MoEConfig, valid: list[bool]
) -> tuple[HostArray, HostArray, SharedGrads]:
    """Return the gradients of `routed`, of x through the shared expert, and of the parameters."""
    grad_routed, grad_x = np.zeros(x.shape), np.zeros(x.shape)
    grad_w1, grad_w2 = zeros_of(params.shared_gate_up_proj), zeros_of(params.shared_down_proj)
    grad_v, grad_bias = zeros_of(params.shared_gate_weight), zeros_of(params.output_bias)
    for t in range(x.shape[0]):
        if not valid[t]:
            continue
        if grad_bias is not None:
            grad_bias += f64(grad_output)[t]
        g = grad_routed[t] = routed_share(params, cfg) * f64(grad_output)[t]
        if grad_w1 is None or grad_w2 is None:
            continue
        h = f64(x)[t]
        gate_up, act, y, opening = shared_expert(h, params, cfg)
        if grad_v is not None:
            # Where the gate is nearly open, 1 - s loses everything; sigmoid(-x) does not.
            closing = sigmoid(-float(f64(params.shared_gate_weight)[0] @ h))
            grad_logit = (g @ y) * opening * closing
            grad_v[0] += grad_logit * h
            grad_x[t] += grad_logit * f64(params.shared_gate_weight)[0]
        grad_w2 += np.outer(opening * g, act)
        grad_act = (opening * g) @ f64(params.shared_down_proj)
        grad_gate_up = activate_backward(grad_act, gate_up, *activation_of(cfg))
        grad_w1 += np.outer(grad_gate_up, h)
        grad_x[t] += grad_gate_up @ f64(params.shared_gate_up_proj)
    return (
        grad_routed,
        grad_x,
        SharedGrads(
            shared_gate_up_proj=grad_w1,
            shared_down_proj=grad_w2,
            shared_gate_weight=grad_v,
            output_bias=grad_bias,
        ),
    )
