"""Soft routing in balls: unit vectors, both softmaxes, slots and their mixtures, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.balls import Ball, softmax
from npmoe.testing.problems import MoEProblem

EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftBalls:
    """The assignments; N is the number of slots of a sequence, B that of sequences."""

    unit_x: Ball  # (T, H)
    unit_phi: Ball  # (N, H)
    logits: Ball  # (T, N)
    dispatch: Ball  # (T, N)
    combine: Ball  # (T, N)
    slots: Ball  # (B*N, H)
    groups: list[HostArray]  # the valid tokens of each sequence


def soft_balls(problem: MoEProblem, x: Ball) -> SoftBalls:
    """Mix the tokens x (T, H), 0 where masked."""
    params, model = problem.params, x.model
    phi = Ball.exact(params.router_weight, model)
    unit_x, unit_phi = unit(x), unit(phi)
    near = unit_x.matmul(unit_phi.T, problem.cfg.hidden_size + 2)
    logits = near * Ball.exact(np.asarray(params.soft_scale), model)
    rows = problem.valid[:, None]
    length = problem.sequence_length
    groups = [
        start + np.flatnonzero(problem.valid[start : start + length])
        for start in (np.arange(problem.num_sequences) * length).tolist()
    ]
    dispatch = Ball(np.zeros(logits.mid.shape), np.zeros(logits.mid.shape), model)
    for group in groups:
        shares = softmax(logits[group].T).T
        dispatch.mid[group], dispatch.rad[group] = shares.mid, shares.rad
    return SoftBalls(
        unit_x=unit_x,
        unit_phi=unit_phi,
        logits=logits,
        dispatch=dispatch,
        combine=softmax(logits).where(rows),
        slots=_stack([dispatch[g].T.matmul(x[g], len(g) + 2) for g in groups]),
        groups=groups,
    )


def soft_combine(balls: SoftBalls, y: Ball) -> Ball:
    """Return the output (T, H) from slot outputs y (B*N, H)."""
    return _mix(balls, balls.combine, y)


def soft_combine_backward(balls: SoftBalls, grad: Ball) -> Ball:
    """Return the gradient of y (B*N, H)."""
    return _stack([balls.combine[g].T.matmul(grad[g], len(g) + 2) for g in balls.groups])


def soft_dispatch_backward(balls: SoftBalls, grad_slots: Ball) -> Ball:
    """Return the gradient of x (T, H) through the slots."""
    return _mix(balls, balls.dispatch, grad_slots)


def soft_backward(
    problem: MoEProblem, balls: SoftBalls, x: Ball, y: Ball, grad: Ball, grad_slots: Ball
) -> tuple[Ball, Ball, Ball]:
    """Return the gradients of x (through the logits), router_weight and soft_scale."""
    H, (T, N) = problem.cfg.hidden_size, balls.logits.mid.shape
    grad_logits = _like(balls.logits)
    for n, group in enumerate(balls.groups):
        own = _slots(balls, n)
        by_token = _softmax_backward(
            grad[group].matmul(y[own].T, H + 2), balls.combine[group], axis=1
        )
        by_slot = _softmax_backward(
            x[group].matmul(grad_slots[own].T, H + 2), balls.dispatch[group], axis=0
        )
        total = by_token + by_slot
        if problem.grad_router_logits is not None:
            total = total + Ball.exact(problem.grad_router_logits[group], x.model)
        grad_logits.mid[group], grad_logits.rad[group] = total.mid, total.rad
    scale = Ball.exact(np.asarray(problem.params.soft_scale), x.model)
    phi = Ball.exact(problem.params.router_weight, x.model)
    # The derivative of the unit vectors may be taken before the sum over slots or tokens.
    grad_unit_x = (grad_logits * scale).matmul(balls.unit_phi, N + H + 6)
    weighted = grad_logits.T.matmul(balls.unit_x, T + H + 6)  # (N, H)
    grad_phi = unit_backward(weighted * scale, phi)
    products = weighted * balls.unit_phi
    # Those of all tokens or of all hidden units come first; the rest may be one sum.
    error = x.model.rounding(products.size.sum(), N * max(T, H))
    grad_scale = Ball(products.mid.sum(), products.rad.sum() + error, x.model)
    return unit_backward(grad_unit_x, x), grad_phi, grad_scale


def unit(v: Ball) -> Ball:
    """Return the ball of v / (|v| + eps)."""
    return v / (norm(v) + Ball.drawn(EPS, v.model))


def unit_backward(grad: Ball, v: Ball) -> Ball:
    """Return the ball of (grad - v <grad, v> / (|v| (|v| + eps))) / (|v| + eps)."""
    size = norm(v)
    wide = size + Ball.drawn(EPS, v.model)
    inner = (grad * (v / wide)).sum(axis=1, keepdims=True) / size
    return grad / wide - v * (inner / wide)


def norm(v: Ball) -> Ball:
    """Return the ball of |v| (N, 1)."""
    return (v * v).sum(axis=1, keepdims=True).sqrt()


def _mix(balls: SoftBalls, shares: Ball, rows: Ball) -> Ball:
    """Return (T, H), to every valid token its shares (T, N) of the slots' rows (B*N, H)."""
    mixed = _like(balls.unit_x)
    for n, group in enumerate(balls.groups):
        # Shared output, bias and the router's path may follow in the same sum.
        part = shares[group].matmul(rows[_slots(balls, n)], shares.mid.shape[1] + 5)
        mixed.mid[group], mixed.rad[group] = part.mid, part.rad
    return mixed


def _softmax_backward(grad: Ball, shares: Ball, axis: int) -> Ball:
    weighted = shares * grad
    return weighted - shares * weighted.sum(axis=axis, keepdims=True)


def _slots(balls: SoftBalls, n: int) -> slice:
    size = balls.logits.mid.shape[1]
    return slice(n * size, (n + 1) * size)


def _like(ball: Ball) -> Ball:
    return Ball(np.zeros(ball.mid.shape), np.zeros(ball.mid.shape), ball.model)


def _stack(parts: list[Ball]) -> Ball:
    mid, rad = np.concatenate([p.mid for p in parts]), np.concatenate([p.rad for p in parts])
    return Ball(mid, rad, parts[0].model)
