"""Auxiliary losses of a batch in balls: value and gradient of the logits.

Every balance loss is ``factor * sum over e of n_e P_e`` with counts n that are constants and mean
probabilities P, or a function of P alone. Programs may keep the constant part of a gradient by p
or leave it out, since it vanishes behind the softmax; the radius covers both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npmoe._typing import HostArray
from npmoe.losses import BALANCE_CONVENTIONS, BalanceConvention
from npmoe.testing.balls import ELEMENTARY, Ball, Model, softmax
from npmoe.testing.conformance.case import Case, Expected

OTHERS = ("z_loss", "entropy", "importance")
BALANCE: dict[str, BalanceConvention] = {str(n): entry for n, entry in BALANCE_CONVENTIONS.items()}
LOSSES = (*BALANCE, *OTHERS)


@dataclass(frozen=True, slots=True)
class LossRule:
    """One loss by name; the batch counts as one sequence."""

    loss: str

    @property
    def counts(self) -> str | None:
        """Return what is counted: "ids", "first" choices, "fresh" top-k, or nothing."""
        if self.loss in OTHERS:
            return None
        source = BALANCE[self.loss].counts
        names = {"top1": "first", "unbiased_topk": "fresh"}
        return None if source is None else names.get(source, "ids")

    def expected(self, case: Case) -> tuple[Expected, Expected]:
        """Return value and gradient; the value of no tokens is 0."""
        x, ids = (np.asarray(a) for a in case.arguments.values())
        dtype = str(x.dtype)
        if len(x) == 0:
            zero = np.zeros(())
            return Expected(value=zero, bound=zero), Expected(value=x * 1.0, dtype=dtype)
        value, grad = self.balls(x, ids)
        return (
            Expected(value=np.asarray(value.mid), bound=np.asarray(value.rad)),
            Expected(value=grad.mid, bound=grad.rad, dtype=dtype),
        )

    def balls(self, x: HostArray, ids: HostArray) -> tuple[Ball, Ball]:
        """Return value () and gradient (T, E) of at least one token."""
        model = Model.of(x.dtype)
        logits = Ball.exact(x, model)
        probs = softmax(logits)
        if self.loss == "z_loss":
            return _z_loss(logits, probs)
        if self.loss == "entropy":
            return _entropy(probs)
        sums = probs.sum(axis=0)
        tokens = Ball.exact(np.array(float(len(x))), model)
        if self.loss == "importance":
            return _importance(probs, sums, tokens)
        mean = sums / tokens
        if self.loss == "prob_entropy":
            size = Ball.exact(np.array(float(x.shape[1])), model)
            log = _log(mean)
            # The 1 in d(P ln P)/dP = ln P + 1 may be kept.
            slope = _padded(size * log, x.shape[1]) / tokens
            return (size * mean * log).sum(axis=0), _through_softmax(slope, probs)
        slope = Ball.drawn(self.factor(x, ids) * self.count(x, ids), model)
        return (slope * mean).sum(axis=0), _through_softmax(slope / tokens, probs)

    def factor(self, x: HostArray, ids: HostArray) -> float:
        """Return what n_e P_e is multiplied by."""
        entry = BALANCE[self.loss]
        per_token = 1 if entry.counts_over == "tokens" or self.counts == "first" else ids.shape[1]
        return (x.shape[1] if entry.times_experts else 1.0) / (len(x) * per_token)

    def count(self, x: HostArray, ids: HostArray) -> HostArray:
        """Return n (E,)."""
        if self.counts == "first":
            ids = ids[:, :1]
        elif self.counts == "fresh":
            ids = np.argsort(-x, axis=1, kind="stable")[:, : ids.shape[1]]
        counted: HostArray = np.bincount(ids.reshape(-1), minlength=x.shape[1])
        return counted


def _through_softmax(slope: Ball, probs: Ball) -> Ball:
    """Return p (slope - sum p slope)."""
    inner = (probs * slope).sum(axis=1, keepdims=True)
    grad = probs * (slope - inner)
    # As p slope - p inner, too.
    return grad.rounded(grad.mid, grad.rad + grad.model.gamma(2) * (probs.size * inner.size))


def _padded(ball: Ball, by: float) -> Ball:
    """Return the ball as computed with a constant added and taken off later."""
    return ball.rounded(ball.mid, ball.rad + ball.model.gamma(2) * (ball.size + by))


def _log(p: Ball) -> Ball:
    """Return ln p, and 0 where p is 0."""
    tiny, u = p.model.tiny, p.model.u
    lost = p.mid <= 2.0 * tiny
    safe = np.where(lost, 1.0, p.mid)
    relative = np.where(lost, 0.0, p.rad) / safe
    mid = np.log(np.where(p.mid > 0.0, p.mid, 1.0))
    rad = relative / (1.0 - relative) + ELEMENTARY * u * (1.0 + np.abs(mid))
    # A p that may underflow has the logarithm of a number as small, or 0.
    rad = np.where(lost, 2.0 * np.abs(mid) - 2.0 * np.log(tiny), rad)
    return Ball(mid, np.where(p.mid > 0.0, rad, 0.0), p.model)


def _z_loss(logits: Ball, probs: Ball) -> tuple[Ball, Ball]:
    """Return the mean of logsumexp(x)^2."""
    model, x = logits.model, logits.mid
    top = x.max(axis=1)
    powers = np.exp(x - top[:, None])
    log = np.log(powers.sum(axis=1))
    # Terms err by u times their depth and by exp; m and ln err on their own, and so does the sum.
    depth = (probs.mid * np.where(probs.mid > 0, top[:, None] - x, 0.0)).sum(axis=1)
    size = ELEMENTARY * (2.0 + log) + depth + 2.0 * np.abs(top)
    rad = model.u * size + model.gamma(x.shape[1])
    lse = Ball(top + log, rad, model)
    tokens = Ball.exact(np.array(float(len(x))), model)
    value = (lse * lse).sum(axis=0) / tokens
    two = Ball.exact(np.array(2.0), model)
    return value, probs * (two * lse[:, None] / tokens)


def _entropy(probs: Ball) -> tuple[Ball, Ball]:
    """Return the mean of -sum p ln p."""
    tokens = Ball.exact(np.array(float(len(probs.mid))), probs.model)
    minus = Ball.exact(np.array(-1.0), probs.model)
    log = _log(probs)
    value = (probs * log).sum(axis=1).sum(axis=0) / tokens
    slope = _padded(minus * log, 1.0) / tokens
    return minus * value, _through_softmax(slope, probs)


def _importance(probs: Ball, sums: Ball, tokens: Ball) -> tuple[Ball, Ball]:
    """Return Var(I) / mean(I)^2; the mean of I is T / E."""
    model, experts = probs.model, Ball.exact(np.array(float(probs.mid.shape[1])), probs.model)
    mean = tokens / experts
    share = sums / mean
    relative = share - Ball.exact(np.ones(share.mid.shape), model)
    value = (relative * relative).sum(axis=0) / experts
    # As mean(I^2) / mean(I)^2 - 1, too.
    other = (share * share).sum(axis=0) / experts
    value = value.rounded(value.mid, value.rad + other.rad)
    two = Ball.exact(np.array(2.0), model)
    return value, _through_softmax(two * share / (mean * experts), probs)
