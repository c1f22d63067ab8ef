"""The router in balls: from hidden states to logits, scores and weights, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive import Draws, NaiveForward
from npmoe.testing import score_bounds
from npmoe.testing.balls import Ball, Model, softmax
from npmoe.testing.problems import MoEProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterBalls:
    """Everything between hidden states and combine weights, in the router's dtype."""

    inputs: Ball  # (T, H), jittered
    clean_logits: Ball  # (T, N), without noise
    logits: Ball  # (T, N)
    probs: Ball  # (T, N)
    raw: Ball  # (T, K), the scores of summed_ids
    normalized: score_bounds.Normalized
    topk_weights: Ball  # (T, K), as used
    drop_weights: Ball  # (T, K), as they stand at the drop
    second_weights: Ball  # (T, K), as they stand when the second expert may be refused


def router_balls(
    problem: MoEProblem, forward: NaiveForward, draws: Draws, model: Model
) -> RouterBalls:
    """Run the router; ids and kept routes are those of `forward`."""
    cfg, params = problem.cfg, problem.params
    rows = problem.valid[:, None]
    model = _router_model(cfg, model)
    h = _given(np.where(rows, problem.hidden_states, 0), cfg, model)
    if draws.jitter is not None:
        h = h * Ball.drawn(draws.jitter, model)
    clean = h.matmul(_given(params.router_weight, cfg, model).T, cfg.hidden_size + 2)
    if params.router_bias is not None:
        clean = clean + _given(params.router_bias, cfg, model)
    if cfg.logit_softcap is not None:
        clean = score_bounds.softcap(clean, cfg.logit_softcap)
    logits = clean if draws.noise is None else clean + Ball.drawn(draws.noise, model)
    probs = score_bounds.score(logits, cfg.score_fn).where(rows)
    raw = chosen_scores(logits, probs, forward.summed_ids, cfg)
    after = cfg.renormalize_drop == "after"
    normalized = score_bounds.normalize(raw, _summed(forward, cfg), cfg)
    scale = Ball.drawn(cfg.routed_scaling_factor, model)
    weights = normalized.weights.where(forward.topk_ids >= 0) * scale
    return RouterBalls(
        inputs=h,
        clean_logits=clean,
        logits=logits,
        probs=probs,
        raw=raw,
        normalized=normalized,
        topk_weights=weights,
        drop_weights=raw.where(forward.topk_ids >= 0) if after else weights,
        second_weights=raw if after else normalized.weights,
    )


def router_backward(
    problem: MoEProblem,
    forward: NaiveForward,
    draws: Draws,
    balls: RouterBalls,
    grad_weights: Ball,
) -> tuple[Ball, Ball, Ball]:
    """Return the gradients of hidden states, router_weight and router_bias.

    `grad_weights` (T, K) is that of the weights in use, 0 where a route is not kept.
    """
    cfg, model = problem.cfg, grad_weights.model
    router_model = balls.logits.model
    grad = grad_weights.where(forward.kept)
    if cfg.router_dtype is not None:
        grad = grad.cast(router_model)
    grad = grad * Ball.drawn(cfg.routed_scaling_factor, router_model)
    grad = score_bounds.normalize_backward(
        grad, balls.raw, balls.normalized, _summed(forward, cfg), cfg
    )
    grad_logits = _scores_backward(grad, balls, forward.summed_ids, cfg)
    if problem.grad_router_logits is not None:
        grad_logits = grad_logits + Ball.exact(
            np.where(problem.valid[:, None], problem.grad_router_logits, 0), router_model
        )
    grad_logits = grad_logits.where(problem.valid[:, None])
    if cfg.logit_softcap is not None:
        grad_logits = grad_logits * score_bounds.softcap_slope(
            balls.clean_logits, cfg.logit_softcap
        )
    weight = _given(problem.params.router_weight, cfg, router_model)
    grad_x = grad_logits.matmul(weight, cfg.router_size + 2)
    if draws.jitter is not None:
        grad_x = grad_x * Ball.drawn(draws.jitter, router_model)
    grad_router = grad_logits.T.matmul(balls.inputs, len(grad.mid) + 2)
    results = (grad_x, grad_router, grad_logits.sum(axis=0))
    if cfg.router_dtype is None:
        return results
    return results[0].cast(model), results[1].cast(model), results[2].cast(model)


def chosen_scores(logits: Ball, probs: Ball, ids: HostArray, cfg: MoEConfig) -> Ball:
    """Return the scores of the chosen (T, K), among all or among themselves; 0 without an id."""
    at = (np.arange(len(ids))[:, None], np.maximum(ids, 0))
    if cfg.router_order == "score_topk":
        return probs[at].where(ids >= 0)
    chosen = logits[at].where(ids >= 0)
    if cfg.score_fn != "softmax":
        return score_bounds.score(chosen, cfg.score_fn).where(ids >= 0)
    return softmax(Ball(np.where(ids >= 0, chosen.mid, -np.inf), chosen.rad, logits.model))


def _scores_backward(grad: Ball, balls: RouterBalls, ids: HostArray, cfg: MoEConfig) -> Ball:
    """Return the gradient of the logits (T, N), given that of the chosen scores (T, K)."""
    raw, probs = balls.raw, balls.probs
    if cfg.score_fn != "softmax":
        at = (np.arange(len(ids))[:, None], np.maximum(ids, 0))
        chosen = balls.logits[at].where(ids >= 0)
        slope = score_bounds.score_slope(chosen, cfg.score_fn)
        return _scatter((grad * slope).where(ids >= 0), ids, probs)
    weighted = raw * grad
    mean = weighted.sum(axis=1, keepdims=True)
    if cfg.router_order == "topk_score":
        return _scatter(weighted - raw * mean, ids, probs)
    return _scatter(weighted, ids, probs) - probs * mean


def _scatter(values: Ball, ids: HostArray, like: Ball) -> Ball:
    """Return zeros of the shape of `like` plus the values (T, K) at their ids."""
    mid, rad = np.zeros(like.mid.shape), np.zeros(like.mid.shape)
    for k in range(ids.shape[1]):
        rows = np.flatnonzero(ids[:, k] >= 0)
        mid[rows, ids[rows, k]] = values.mid[rows, k]
        rad[rows, ids[rows, k]] = values.rad[rows, k]
    return Ball(mid, rad, values.model)


def _summed(forward: NaiveForward, cfg: MoEConfig) -> HostArray:
    """Return which routes' weights were normalised together (T, K)."""
    return forward.kept if cfg.renormalize_drop == "after" else forward.summed_ids >= 0


def _router_model(cfg: MoEConfig, model: Model) -> Model:
    return model if cfg.router_dtype is None else Model.of(cfg.router_dtype)


def _given(array: HostArray, cfg: MoEConfig, model: Model) -> Ball:
    """Return the ball of data, which a router of its own dtype rounds to that."""
    return Ball.exact(array, model) if cfg.router_dtype is None else Ball.drawn(array, model)
