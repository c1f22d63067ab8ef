"""One expert on one token, its weight in one of three places, and the loop over all routes."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive.activations import activate, activate_backward
from npmoe.naive.draws import Draws, row_of
from npmoe.naive.results import ExpertGrads, NaiveForward, f64


def hidden_layer(
    h: HostArray, params: Any, e: int, cfg: MoEConfig, keep: HostArray | None
) -> tuple[HostArray, HostArray]:
    """Return (gate_up, act) of an expert; `keep` (I,) is its dropout."""
    gate_up = f64(params.gate_up_proj)[e] @ h
    if params.gate_up_bias is not None:
        gate_up = gate_up + params.gate_up_bias[e]
    act = activate(gate_up, cfg.activation, cfg.activation_alpha, cfg.activation_limit)
    if keep is not None:
        act = np.where(keep, act / (1.0 - cfg.expert_dropout), 0.0)
    return gate_up, act


def run_expert(
    h: HostArray, w: float, params: Any, e: int, cfg: MoEConfig, keep: HostArray | None = None
) -> HostArray:
    """Return what expert e adds to the output of a token h with weight w.

    "output": w (W2 a + b2). "mid": W2 (w a) + w b2. "input": the whole expert on w h. Ids from
    num_experts on are identity experts, w h.
    """
    if e >= cfg.num_experts:
        return f64(w * h)
    entering = w * h if cfg.weight_position == "input" else h
    act = hidden_layer(entering, params, e, cfg, keep)[1]
    if cfg.weight_position == "mid":
        act = w * act
    y = f64(params.down_proj)[e] @ act
    if params.down_bias is not None:
        y = y + f64(params.down_bias)[e] * (w if cfg.weight_position == "mid" else 1.0)
    return f64(w * y if cfg.weight_position == "output" else y)


def run_expert_backward(
    g: HostArray,
    h: HostArray,
    w: float,
    params: Any,
    e: int,
    cfg: MoEConfig,
    grads: ExpertGrads,
    keep: HostArray | None = None,
) -> tuple[HostArray, float]:
    """Return the gradients of h and w, and add those of the parameters to `grads`."""
    if e >= cfg.num_experts:
        return w * g, float(g @ h)
    # With the weight on the input the expert itself runs on `entering`, with weight 1.
    on_input = cfg.weight_position == "input"
    entering, after = (w * h, 1.0) if on_input else (h, w)
    gate_up, act = hidden_layer(entering, params, e, cfg, keep)
    grad_act = g @ f64(params.down_proj)[e]
    grad_w = float(grad_act @ act)
    if params.down_bias is not None:
        grad_w += float(g @ f64(params.down_bias)[e])
    grads.down_proj[e] += np.outer(after * g, act)
    grads.down_bias[e] += after * g
    grad_act = after * grad_act
    if keep is not None:
        grad_act = np.where(keep, grad_act / (1.0 - cfg.expert_dropout), 0.0)
    grad_gate_up = activate_backward(
        grad_act, gate_up, cfg.activation, cfg.activation_alpha, cfg.activation_limit
    )
    grads.gate_up_proj[e] += np.outer(grad_gate_up, entering)
    grads.gate_up_bias[e] += grad_gate_up
    grad_entering = grad_gate_up @ f64(params.gate_up_proj)[e]
    if on_input:
        return w * grad_entering, float(grad_entering @ h)
    return grad_entering, grad_w


def run_routes(
    x: HostArray,
    forward: NaiveForward,
    params: Any,
    cfg: MoEConfig,
    sequence_length: int | None,  # noqa: ARG001  # matters to the dense form
    draws: Draws,
) -> HostArray:
    """Return the sum over the kept routes of every token, (T, H)."""
    output = np.zeros(x.shape)
    for t, k in np.argwhere(forward.kept):
        e, w = int(forward.topk_ids[t, k]), forward.topk_weights[t, k]
        output[t] += run_expert(f64(x)[t], w, params, e, cfg, row_of(draws.dropout, t, k))
    return output


def run_routes_backward(
    grad_output: HostArray,
    x: HostArray,
    forward: NaiveForward,
    params: Any,
    cfg: MoEConfig,
    sequence_length: int | None,  # noqa: ARG001  # matters to the dense form
    draws: Draws,
) -> tuple[HostArray, HostArray, ExpertGrads]:
    """Return the gradients of x, of topk_weights (0 where dropped) and of the parameters."""
    grads = ExpertGrads.zeros(params)
    grad_x, grad_weights = np.zeros(x.shape), np.zeros(forward.topk_ids.shape)
    for t, k in np.argwhere(forward.kept):
        e, w, keep = (
            int(forward.topk_ids[t, k]),
            forward.topk_weights[t, k],
            row_of(draws.dropout, t, k),
        )
        grad_h, grad_weights[t, k] = run_expert_backward(
            f64(grad_output)[t], f64(x)[t], w, params, e, cfg, grads, keep
        )
        grad_x[t] += grad_h
    return grad_x, grad_weights, grads
