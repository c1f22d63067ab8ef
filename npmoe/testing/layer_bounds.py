"""How far any correct floating-point layer may be from the exact one, element by element.

The layer is run once more, in balls (`npmoe.testing.balls`): each product in absolute values
besides its value, each activation with the largest slope it has. The choice of experts and the
dropped routes are constants, taken from a forward pass. What is promised to hold:

- every sum may be taken in any order, weights may be applied before or after a product, and
  <g, W2 a> may be computed as <W2^T g, a>;
- every operation rounds to nearest in `dtype` or a wider one (the router in its own), exp, tanh,
  log1p and erf are within `ELEMENTARY` unit roundoffs, underflow may flush to zero, and nothing
  overflows; the squares in the unit vectors of soft routing do not underflow;
- random numbers are float64 and rounded to that dtype once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npmoe._typing import HostArray
from npmoe.naive import Draws, NaiveForward
from npmoe.params import MoEGrads
from npmoe.testing.balls import Ball, Model
from npmoe.testing.expert_bounds import ExpertBalls, SharedBalls, expert_balls, shared_balls
from npmoe.testing.problems import MoEProblem
from npmoe.testing.router_bounds import RouterBalls, router_backward, router_balls
from npmoe.testing.soft_bounds import (
    soft_backward,
    soft_balls,
    soft_combine,
    soft_combine_backward,
    soft_dispatch_backward,
)

NO_DRAWS = Draws()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBounds:
    """Bounds of everything the layer computes, each of the shape of what it bounds.

    Soft routing has no topk_weights; its probs are `combine`. `router` has the balls that the
    decisions rest on.
    """

    router_logits: HostArray
    clean_logits: HostArray
    probs: HostArray
    topk_weights: HostArray
    output: HostArray
    grads: MoEGrads
    router: RouterBalls | None


def layer_bounds(
    problem: MoEProblem,
    forward: NaiveForward,
    draws: Draws = NO_DRAWS,
    dtype: npt.DTypeLike | None = None,
    operands: str | None = None,
) -> LayerBounds:
    """Bound the difference between a layer that computes in `dtype` and `npmoe.naive`.

    Parameters
    ----------
    problem : MoEProblem
        Finite inputs, masked rows aside.
    forward : NaiveForward
        Its ids and kept routes are taken for granted.
    draws : Draws
        What `forward` drew.
    dtype : dtype, optional
        In which the layer computes; the problem's own if omitted.
    operands : {"tf32", "bfloat16", "float16"}, optional
        What may be rounded where it enters a product of the routed experts: on tensor cores.

    Returns
    -------
    LayerBounds
        Float64 arrays, new. A bound may be infinite where cancellation leaves nothing.
    """
    model = Model.of(problem.dtype if dtype is None else dtype)
    rows = problem.valid[:, None]
    x = Ball.exact(np.where(rows, problem.hidden_states, 0), model)
    grad = Ball.exact(np.where(rows, problem.grad_output, 0), model)
    shared = None
    inner = grad
    if problem.cfg.shared_combine == "average":
        inner = grad * Ball.exact(np.array(0.5), model)
    if problem.cfg.shared_intermediate_size:
        shared = shared_balls(x, inner, problem.params, problem.cfg)
    path = _soft if problem.cfg.routing == "soft" else _routed
    return path(problem, forward, draws, x, grad, inner, shared, operands)


def _routed(
    problem: MoEProblem,
    forward: NaiveForward,
    draws: Draws,
    x: Ball,
    grad: Ball,
    inner: Ball,
    shared: SharedBalls | None,
    operands: str | None,
) -> LayerBounds:
    cfg, model = problem.cfg, x.model
    router = router_balls(problem, forward, draws, model)
    weights = router.topk_weights
    if cfg.router_dtype is not None:
        weights = weights.cast(model)
    t, k = np.nonzero(forward.kept)
    experts = expert_balls(
        x[t],
        weights[t, k],
        inner[t],
        forward.topk_ids[t, k],
        problem.params,
        cfg,
        None if draws.dropout is None else draws.dropout[t, k],
        # Each of its terms may be followed by those of the router's path.
        num_sums=cfg.router_size,
        operands=operands,
    )
    grad_weights = _spread(experts.grad_weights, (t, k), forward.kept.shape)
    grad_router_x, grad_router, grad_bias = router_backward(
        problem, forward, draws, router, grad_weights
    )
    H = cfg.hidden_size
    routed = _spread(experts.rows, (t, k), (*forward.kept.shape, H))
    grad_x = _spread(experts.grad_inputs, (t, k), (*forward.kept.shape, H))
    return LayerBounds(
        router_logits=router.logits.rad,
        clean_logits=router.clean_logits.rad,
        probs=router.probs.rad,
        topk_weights=router.topk_weights.rad,
        output=_finish(problem, routed, shared),
        grads=_grads(
            problem,
            experts,
            shared,
            grad,
            [grad_x, grad_router_x],
            grad_router,
            grad_bias=grad_bias,
        ),
        router=router,
    )


def _soft(
    problem: MoEProblem,
    forward: NaiveForward,
    draws: Draws,
    x: Ball,
    grad: Ball,
    inner: Ball,
    shared: SharedBalls | None,
    operands: str | None,
) -> LayerBounds:
    cfg, model = problem.cfg, x.model
    soft = soft_balls(problem, x)
    grad_y = soft_combine_backward(soft, inner)
    owners = np.arange(cfg.router_size) // (cfg.expert_capacity or 1)
    ones = Ball.exact(np.ones(len(grad_y.mid)), model)
    dropout = draws.dropout
    experts = expert_balls(
        soft.slots,
        ones,
        grad_y,
        np.tile(owners, problem.num_sequences),
        problem.params,
        cfg,
        None if dropout is None else dropout.reshape(-1, cfg.intermediate_size),
        num_sums=0,
        operands=operands,
    )
    grad_router_x, grad_phi, grad_scale = soft_backward(
        problem, soft, x, experts.rows, inner, experts.grad_inputs
    )
    grad_x = [soft_dispatch_backward(soft, experts.grad_inputs), grad_router_x]
    return LayerBounds(
        router_logits=soft.logits.rad,
        clean_logits=soft.logits.rad,
        probs=soft.combine.rad,
        topk_weights=np.zeros(forward.topk_weights.shape),
        output=_finish(problem, soft_combine(soft, experts.rows), shared),
        grads=_grads(problem, experts, shared, grad, grad_x, grad_phi, grad_scale=grad_scale),
        router=None,
    )


def _finish(problem: MoEProblem, routed: Ball, shared: SharedBalls | None) -> HostArray:
    """Return the radius of the output (T, H); `routed` is that or (T, K, H)."""
    cfg, terms = problem.cfg, [routed] if shared is None else [routed, shared.rows]
    if cfg.shared_combine == "average":
        half = Ball.exact(np.array(0.5), routed.model)
        terms = [term * half for term in terms]
    if problem.params.output_bias is not None:
        bias = np.broadcast_to(problem.params.output_bias, problem.hidden_states.shape)
        terms.append(Ball.exact(bias, routed.model))
    return _sum(terms).where(problem.valid[:, None]).rad


def _grads(
    problem: MoEProblem,
    experts: ExpertBalls,
    shared: SharedBalls | None,
    grad: Ball,
    grad_x: list[Ball],
    grad_router: Ball,
    *,
    grad_bias: Ball | None = None,
    grad_scale: Ball | None = None,
) -> MoEGrads:
    """Return the radii of all gradients, None where there is no parameter."""
    params = problem.params
    if shared is not None:
        grad_x = [*grad_x, shared.grad_inputs]
    return MoEGrads(
        hidden_states=_sum(grad_x).where(problem.valid[:, None]).rad,
        router_weight=grad_router.rad,
        router_bias=None if params.router_bias is None or grad_bias is None else grad_bias.rad,
        gate_up_proj=experts.gate_up_proj,
        down_proj=experts.down_proj,
        gate_up_bias=None if params.gate_up_bias is None else experts.gate_up_bias,
        down_bias=None if params.down_bias is None else experts.down_bias,
        shared_gate_up_proj=None if shared is None else shared.shared_gate_up_proj,
        shared_down_proj=None if shared is None else shared.shared_down_proj,
        shared_gate_weight=None if shared is None else shared.shared_gate_weight,
        output_bias=None if params.output_bias is None else grad.sum(axis=0).rad,
        soft_scale=None if grad_scale is None else grad_scale.rad,
    )


def _spread(values: Ball, at: tuple[HostArray, ...], shape: tuple[int, ...]) -> Ball:
    """Return zeros of a shape with the values put at their places."""
    spread = Ball(np.zeros(shape), np.zeros(shape), values.model)
    spread.mid[at], spread.rad[at] = values.mid, values.rad
    return spread


def _sum(terms: list[Ball]) -> Ball:
    """Return the sum (T, H) of terms (T, H) and (T, K, H), all in one go and in any order."""
    wide = [t if t.mid.ndim == 3 else t[:, None] for t in terms]
    mid, rad = (np.concatenate([getattr(t, n) for t in wide], axis=1) for n in ("mid", "rad"))
    return Ball(mid, rad, terms[0].model).sum(axis=1)
