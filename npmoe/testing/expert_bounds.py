"""The experts in balls: the routed ones, one row per route or slot, and the shared one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.params import MoEParams
from npmoe.testing.activation_bounds import activation, activation_backward
from npmoe.testing.balls import Ball, Model
from npmoe.testing.score_bounds import score, score_slope


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBalls:
    """What the routed experts return for R rows; the parameters' gradients are radii alone."""

    rows: Ball  # (R, H), what is added to the output
    grad_inputs: Ball  # (R, H)
    grad_weights: Ball  # (R,)
    gate_up_proj: HostArray
    down_proj: HostArray
    gate_up_bias: HostArray
    down_bias: HostArray


def expert_balls(
    x: Ball,
    weights: Ball,
    grad: Ball,
    owners: HostArray,
    params: MoEParams,
    cfg: MoEConfig,
    dropout: HostArray | None,
    num_sums: int,
    operands: str | None = None,
) -> ExpertBalls:
    """Run expert owners[r] on x[r] with weights[r], forward and backward.

    Parameters
    ----------
    x, grad : (R, H) ball
        Inputs, and the gradient of what each row adds to.
    weights : (R,) ball
    owners : (R,) int array
        Ids from num_experts on return their input, weighted.
    dropout : (R, I) bool array or None
        What stays.
    num_sums : int
        How many more terms may be summed in one go with those of grad_inputs.
    operands : {"tf32", "bfloat16", "float16"}, optional
        What rows and matrices may be rounded to, once, where they enter a product.

    Notes
    -----
    "mid" is not told apart from "output": the same products in another order. W2 (w a) + w b2
    rounds the bias by u |w b2| <= u |w (W2 a + b2)| + u |w W2 a|, one rounding of either kind,
    which the two of the last product and the spare one of the first sum pay for.
    """
    model, on_input = x.model, cfg.weight_position == "input"
    H, I = cfg.hidden_size, cfg.intermediate_size
    w1, w2 = params.gate_up_proj, params.down_proj
    rows, grad_inputs = _empty(x.mid.shape, model), _empty(x.mid.shape, model)
    grad_weights = _empty(owners.shape, model)
    grad_w1, grad_w2 = np.zeros(w1.shape), np.zeros(w2.shape)
    grad_b1, grad_b2 = np.zeros(w1.shape[:2]), np.zeros(w2.shape[:2])
    call = cfg.activation_call()
    keep = None

    def entering_product(ball: Ball) -> Ball:
        return ball if operands is None else ball.cast(Model.of_operands(operands))

    if dropout is not None:
        keep = Ball.drawn(np.where(dropout, 1.0 / (1.0 - cfg.expert_dropout), 0.0), model)
    for e in np.unique(owners):
        r = np.flatnonzero(owners == e)
        weight, g = weights[r][:, None], grad[r]
        if e >= cfg.num_experts:
            _put(rows, r, weight * x[r])
            _put(grad_inputs, r, weight * g)
            _put(grad_weights, r, _dot(x[r], g))
            continue
        w1_e = entering_product(Ball.exact(w1[e], model))
        w2_e = entering_product(Ball.exact(w2[e], model))
        entering = entering_product(weight * x[r] if on_input else x[r])
        z = entering.matmul(w1_e.T, H + 2)  # (n, 2I)
        if params.gate_up_bias is not None:
            z = z + Ball.exact(params.gate_up_bias[e], model)
        act = activation(z, *call)  # (n, I)
        # All roundings on the way of each term, so that <g, W2 a> and <W2^T g, a> are both held.
        grad_act = entering_product(g).matmul(w2_e, H + I + 2)
        weighted = g if on_input else weight * g
        grad_pre = grad_act if on_input else weight * grad_act
        if keep is not None:
            act, grad_pre = act * keep[r], grad_pre * keep[r]
        act = entering_product(act)
        out = act.matmul(w2_e.T, I + 2)  # (n, H)
        grad_w = _dot(grad_act, act)
        if params.down_bias is not None:
            bias = Ball.exact(params.down_bias[e], model)
            out, grad_w = out + bias, grad_w + (g * bias).sum(axis=1)
        grad_w2[e] = entering_product(weighted).T.matmul(act, len(r) + 2).rad
        grad_b2[e] = weighted.sum(axis=0).rad
        grad_z = entering_product(activation_backward(grad_pre, z, *call))
        grad_w1[e] = grad_z.T.matmul(entering, len(r) + 2).rad
        grad_b1[e] = grad_z.sum(axis=0).rad
        grad_entering = grad_z.matmul(w1_e, w1.shape[1] + num_sums + 2)
        _put(rows, r, out if on_input else weight * out)
        _put(grad_inputs, r, weight * grad_entering if on_input else grad_entering)
        _put(grad_weights, r, _dot(grad_entering, x[r]) if on_input else grad_w)
    return ExpertBalls(
        rows=rows,
        grad_inputs=grad_inputs,
        grad_weights=grad_weights,
        gate_up_proj=grad_w1,
        down_proj=grad_w2,
        gate_up_bias=grad_b1,
        down_bias=grad_b2,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBalls:
    """What the shared expert returns; the parameters' gradients are radii alone."""

    rows: Ball  # (T, H)
    grad_inputs: Ball  # (T, H)
    shared_gate_up_proj: HostArray
    shared_down_proj: HostArray
    shared_gate_weight: HostArray | None


def shared_balls(x: Ball, grad: Ball, params: MoEParams, cfg: MoEConfig) -> SharedBalls:
    """Run the shared expert on x (T, H), forward and backward."""
    model, H, S = x.model, cfg.hidden_size, cfg.shared_intermediate_size
    w1 = Ball.exact(np.asarray(params.shared_gate_up_proj), model)
    w2 = Ball.exact(np.asarray(params.shared_down_proj), model)
    call = cfg.activation_call(shared=True)
    z = x.matmul(w1.T, H + 2)
    act = activation(z, *call)
    rows, grad_x_gate, grad_gate = act.matmul(w2.T, S + 2), None, None
    if params.shared_gate_weight is not None:
        gate = Ball.exact(params.shared_gate_weight, model)
        logit = x.matmul(gate.T, H + 2)  # (T, 1)
        # As for the routed weights: <g, W2 a> or <W2^T g, a>.
        inner = _dot(grad.matmul(w2, H + S + 2), act)[:, None]
        grad_logit = inner * score_slope(logit, "sigmoid")
        grad_gate = grad_logit.T.matmul(x, len(x.mid) + 2).rad
        grad_x_gate = grad_logit * gate
        opening = score(logit, "sigmoid")
        rows, grad = opening * rows, opening * grad
    grad_z = activation_backward(grad.matmul(w2, H + 2), z, *call)
    grad_x = grad_z.matmul(w1, len(w1.mid) + 2)
    return SharedBalls(
        rows=rows,
        grad_inputs=grad_x if grad_x_gate is None else grad_x + grad_x_gate,
        shared_gate_up_proj=grad_z.T.matmul(x, len(x.mid) + 2).rad,
        shared_down_proj=grad.T.matmul(act, len(x.mid) + 2).rad,
        shared_gate_weight=grad_gate,
    )


def _dot(a: Ball, b: Ball) -> Ball:
    return (a * b).sum(axis=1)


def _empty(shape: tuple[int, ...], model: Model) -> Ball:
    return Ball(np.zeros(shape), np.zeros(shape), model)


def _put(target: Ball, rows: HostArray, value: Ball) -> None:
    target.mid[rows] = value.mid
    target.rad[rows] = value.rad
