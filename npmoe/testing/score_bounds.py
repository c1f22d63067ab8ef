"""Score functions of balls, the soft-cap, and the normalisation of weights; with their slopes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive import scoring as naive
from npmoe.testing.balls import Ball, each, softmax


def softcap(z: Ball, limit: float) -> Ball:
    """Return the ball of limit * tanh(z / limit)."""
    # tanh errs relatively, and an error u of its argument t by t (1 - tanh^2) u < tanh(t) u.
    return z.apply(lambda v: limit * np.tanh(v / limit), 1.0, lambda size: np.minimum(size, limit))


def softcap_slope(capped: Ball, limit: float) -> Ball:
    """Return the ball of 1 - (c / limit)^2, also as (1 - r)(1 + r)."""
    # The error u r^2 of a square is below the second of the two roundings of the division.
    one = Ball.exact(np.ones(capped.mid.shape), capped.model)
    ratio = capped / Ball.drawn(np.full(capped.mid.shape, limit), capped.model)
    return (one - ratio) * (one + ratio)


def score(logits: Ball, name: str) -> Ball:
    """Return the ball of the scores of all logits of a row."""
    if name == "softmax":
        return softmax(logits)
    if name == "sigmoid":
        # The logarithm has the slope 1 - s.
        return logits.apply_positive(each(naive.sigmoid), 1.0, 1)
    # exp(x/2) sqrt(log(1 + y) / y) with y = exp(x) keeps small values; the logarithm has the
    # slope s / (2 softplus), at most 1/2.
    return logits.apply_positive(each(naive.sqrtsoftplus), 0.5, 1)


def score_slope(logits: Ball, name: str) -> Ball:
    """Return the ball of the derivative of sigmoid or sqrtsoftplus."""
    if name == "sigmoid":
        # s(x) s(-x): the logarithm has the slope 1 - 2 s.
        return logits.apply_positive(each(lambda x: naive.sigmoid(x) * naive.sigmoid(-x)), 1.0, 2)
    # The logarithm has the slope (1 - s) - s / (2 softplus).
    return logits.apply_positive(each(naive.sqrtsoftplus_slope), 1.0, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalized:
    """Weights (T, K), what they were divided by, and the norm (T, 1); None without a division."""

    weights: Ball
    divisor: Ball | None = None
    norm: Ball | None = None


def normalize(raw: Ball, summed: HostArray, cfg: MoEConfig) -> Normalized:
    """Return the balls of the weights of the `summed` routes, 0 elsewhere."""
    raw = raw.where(summed)
    if not (cfg.renormalize and (cfg.renorm_single or raw.mid.shape[1] > 1)):
        return Normalized(weights=raw)
    norm = raw.sum(axis=1, keepdims=True) if cfg.renorm_p == 1 else _euclidean(raw)
    divisor = norm
    if cfg.renorm_eps and cfg.renorm_eps_mode == "add":
        divisor = norm + Ball.drawn(cfg.renorm_eps, raw.model)
    elif cfg.renorm_eps:
        divisor = norm.maximum(cfg.renorm_eps)
    return Normalized(weights=(raw / divisor).where(summed), divisor=divisor, norm=norm)


def normalize_backward(
    grad: Ball, raw: Ball, normalized: Normalized, summed: HostArray, cfg: MoEConfig
) -> Ball:
    """Return the ball of the gradient of `raw`; `grad` is that of the weights."""
    divisor, norm = normalized.divisor, normalized.norm
    if divisor is None or norm is None:
        return grad.where(summed)
    # Products are kept apart, g/D - mean/D, since either form may be computed.
    mean = (grad * normalized.weights).sum(axis=1, keepdims=True)
    if cfg.renorm_eps_mode == "max":
        # The second term is absent where eps stands in for the norm; perhaps, where it may.
        active = norm.mid >= cfg.renorm_eps
        unsure = np.abs(norm.mid - cfg.renorm_eps) <= norm.rad + norm.model.u * cfg.renorm_eps
        mean = Ball(
            np.where(active, mean.mid, 0.0),
            np.where(unsure, mean.size, np.where(active, mean.rad, 0.0)),
            mean.model,
        )
    second = mean / divisor
    if cfg.renorm_p == 2:
        second = second * (raw.where(summed) / norm)
    return (grad / divisor - second).where(summed)


def _euclidean(raw: Ball) -> Ball:
    """Return the norms (T, 1), of weights divided by the largest, whose squares underflow less."""
    top = raw.mid.max(axis=1, keepdims=True)
    # A power of two near the largest stands for it; the division and the product round once each.
    scale = np.exp2(np.floor(np.log2(np.where(top > 0.0, top, 1.0))))
    ratio = raw.rounded(raw.mid / scale, raw.rad / scale, 1)
    norm = (ratio * ratio).sum(axis=1, keepdims=True).sqrt()
    return norm.rounded(norm.mid * scale, norm.rad * scale, 1)
