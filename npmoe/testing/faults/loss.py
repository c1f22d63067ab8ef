"""Mistakes in auxiliary losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.faults.fault import Fault

Loss = tuple[Any, HostArray]
_KEPT: list[float] = []


def _softmax(x: HostArray) -> HostArray:
    y = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(y / y.sum(axis=1, keepdims=True))


def _counts(ids: HostArray, num_experts: int) -> HostArray:
    return np.asarray(np.bincount(ids.reshape(-1), minlength=num_experts))


def _share(ids: HostArray, x: HostArray) -> HostArray:
    return np.asarray(_counts(ids, x.shape[1]) / max(1, ids.size), dtype=x.dtype)


def _through_softmax(slope: HostArray, probs: HostArray) -> HostArray:
    return np.asarray(probs * (slope - (probs * slope).sum(axis=1, keepdims=True)))


def _balance(x: HostArray, share: HostArray, probs: HostArray | None = None) -> Loss:
    """Return E sum f P and its gradient."""
    probs = _softmax(x) if probs is None else probs
    tokens, experts = x.shape
    slope = (experts * share / max(1, tokens)).astype(x.dtype)[None]
    return float((slope * probs).sum()), _through_softmax(slope, probs)


def _switch(x: HostArray, ids: HostArray) -> Loss:
    return _balance(x, _share(ids, x))


def forgets_to_divide_by_k(x: HostArray, ids: HostArray) -> Loss:
    """Let f sum to k."""
    return _balance(x, ids.shape[1] * _share(ids, x))


def forgets_the_number_of_experts(x: HostArray, ids: HostArray) -> Loss:
    """Take the mean over experts for the sum."""
    value, grad = _switch(x, ids)
    return value / x.shape[1], grad / x.dtype.type(x.shape[1])


def averages_the_chosen_alone(x: HostArray, ids: HostArray) -> Loss:
    """Take the softmax over the chosen logits, so that no other has a gradient."""
    inside = np.zeros(x.shape, bool)
    np.put_along_axis(inside, ids.astype(np.int64), True, axis=1)
    low = x.min(axis=1, keepdims=True, initial=0) - 1e4
    probs = np.where(inside, _softmax(np.where(inside, x, low)), 0).astype(x.dtype)
    return _balance(x, _share(ids, x), probs)


def counts_positive_probabilities(x: HostArray, ids: HostArray) -> Loss:  # noqa: ARG001
    """Take mean(p > 0) for f, which is 1 for every expert."""
    probs = _softmax(x)
    return _balance(x, (probs > 0).mean(axis=0, dtype=x.dtype) if len(x) else probs.sum(axis=0))


def differentiates_the_counts(x: HostArray, ids: HostArray) -> Loss:
    """Let gradients through f as if it were P (straight through)."""
    value, grad = _switch(x, ids)
    probs = _softmax(x)
    slope = x.shape[1] * probs.sum(axis=0, keepdims=True) / max(1, len(x)) ** 2
    return value, grad + _through_softmax(slope.astype(x.dtype), probs)


def detaches_the_probabilities(x: HostArray, ids: HostArray) -> Loss:
    """Return the right value and no gradient."""
    return _switch(x, ids)[0], np.zeros_like(x)


def multiplies_counts_with_counts(x: HostArray, ids: HostArray) -> Loss:
    """Compute E sum f f, which depends on no parameter."""
    share = _share(ids, x).astype(np.float64)
    return x.shape[1] * float((share * share).sum()), np.zeros_like(x)


def takes_the_softmax_twice(x: HostArray, ids: HostArray) -> Loss:
    """Take probabilities for logits."""
    probs = _softmax(x)
    value, grad = _balance(probs, _share(ids, x))
    return value, _through_softmax(grad, probs)


def turns_the_gradient(x: HostArray, ids: HostArray) -> Loss:
    """Return the gradient with the other sign."""
    value, grad = _switch(x, ids)
    return value, -grad


def doubles_the_gradient(x: HostArray, ids: HostArray) -> Loss:
    """Add up the gradients of two ranks that each had the whole batch."""
    value, grad = _switch(x, ids)
    return value, grad * x.dtype.type(2)


def forgets_the_mean_in_the_softmax(x: HostArray, ids: HostArray) -> Loss:
    """Take p * slope for the gradient of a softmax."""
    value, _ = _switch(x, ids)
    slope = x.shape[1] * _share(ids, x) / x.dtype.type(max(1, len(x)))
    return value, np.asarray(_softmax(x) * slope[None])


def sums_over_tokens(x: HostArray, ids: HostArray) -> Loss:
    """Take the sum of probabilities for their mean."""
    value, grad = _switch(x, ids)
    return value * len(x), grad * x.dtype.type(len(x))


def counts_afresh(x: HostArray, ids: HostArray) -> Loss:
    """Count a top-k of the logits instead of the choices that were made."""
    fresh = np.argsort(-x, axis=1, kind="stable")[:, : ids.shape[1]]
    return _switch(x, fresh)


def counts_every_choice(x: HostArray, ids: HostArray) -> Loss:
    """Count all choices where the first is meant."""
    return _switch(x, ids)


def keeps_old_losses(x: HostArray, ids: HostArray) -> Loss:
    """Append to a global list that nobody empties, and return its sum."""
    value, grad = _switch(x, ids)
    _KEPT.append(value)
    return sum(_KEPT), grad


def z_loss_of_probabilities(x: HostArray, ids: HostArray) -> Loss:
    """Take probabilities for logits."""
    probs = _softmax(x)
    value, grad = _z_loss(probs, ids)
    return value, _through_softmax(grad, probs)


def _z_loss(x: HostArray, ids: HostArray) -> Loss:  # noqa: ARG001
    top = x.max(axis=1)
    lse = top + np.log(np.exp(x - top[:, None]).sum(axis=1))
    count = max(1, len(x))
    return float((lse * lse).sum()) / count, _softmax(x) * (2 * lse / count)[:, None]


def z_loss_that_overflows(x: HostArray, ids: HostArray) -> Loss:
    """Take log(sum(exp(x))) as it stands."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        power = np.exp(x)
        total = power.sum(axis=1, keepdims=True)
        lse = np.log(total)
        count = x.dtype.type(max(1, len(x)))
        return float((lse * lse).sum()) / len(ids) if len(ids) else 0.0, (
            2 * lse * (power / total) / count
        )


def z_loss_forgets_the_two(x: HostArray, ids: HostArray) -> Loss:
    """Differentiate the square without its factor."""
    value, grad = _z_loss(x, ids)
    return value, grad / x.dtype.type(2)


def entropy_of_zero(x: HostArray, ids: HostArray) -> Loss:  # noqa: ARG001
    """Multiply 0 by the logarithm of 0."""
    probs, count = _softmax(x), x.dtype.type(max(1, len(x)))
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log(probs)
        return -float((probs * log).sum() / count), _through_softmax(-log / count, probs)


def importance_by_bessel(x: HostArray, ids: HostArray) -> Loss:  # noqa: ARG001
    """Divide the variance by E - 1."""
    probs, experts = _softmax(x), x.shape[1]
    mean = max(1, len(x)) / experts
    relative = probs.sum(axis=0) / mean - (1.0 if len(x) else 0.0)
    divisor = max(1, experts - 1)
    slope = (2.0 / mean * relative / divisor).astype(x.dtype)[None]
    return float((relative * relative).sum()) / divisor, _through_softmax(slope, probs)


def _fault(
    name: str, check: str, seen: str, subject: Callable[..., Any], loss: str = "switch"
) -> Fault:
    return Fault(
        name=f"loss-{name}",
        kind="loss",
        check=check,
        seen=seen,
        subject=subject,
        options=(("loss", loss),),
    )


FAULTS = (
    _fault(
        "not-divided-by-k",
        "uniform-value-of-the-convention",
        "transformers#43688",
        forgets_to_divide_by_k,
    ),
    _fault(
        "mean-over-experts",
        "uniform-value-of-the-convention",
        "Switch without its factor E",
        forgets_the_number_of_experts,
    ),
    _fault(
        "probabilities-of-chosen-alone",
        "unchosen-experts-have-gradients",
        "maxtext#1433, transformers#28021",
        averages_the_chosen_alone,
    ),
    _fault(
        "counts-are-positive-probabilities",
        "imbalance-costs",
        "f = mean(p > 0), which is always 1",
        counts_positive_probabilities,
    ),
    _fault(
        "gradient-through-counts",
        "counts-are-constants",
        "counts that are not detached",
        differentiates_the_counts,
    ),
    _fault(
        "no-gradient",
        "gradient-is-the-slope-of-the-value",
        "NeMo Automodel#1408: the scaled loss is thrown away",
        detaches_the_probabilities,
    ),
    _fault(
        "constant",
        "probabilities-matter",
        "hyper-parallel#752: constant in all parameters",
        multiplies_counts_with_counts,
    ),
    _fault(
        "softmax-twice",
        "softmax-is-taken-once",
        "transformers#45120, #39055",
        takes_the_softmax_twice,
    ),
    _fault(
        "wrong-sign",
        "gradient-is-the-slope-of-the-value",
        "a reward taken for a loss",
        turns_the_gradient,
    ),
    _fault(
        "gradient-scaled",
        "gradient-is-the-slope-of-the-value",
        "Megatron-LM#1652, #5047",
        doubles_the_gradient,
    ),
    _fault(
        "softmax-term-missing",
        "gradient-is-the-slope-of-the-value",
        "the diagonal taken for the Jacobian",
        forgets_the_mean_in_the_softmax,
    ),
    _fault(
        "sum-over-tokens",
        "tokens-are-averaged",
        "Megatron-LM#3672: scale depends on the batch",
        sums_over_tokens,
    ),
    _fault(
        "fresh-counts",
        "counts-follow-the-ids",
        "Megatron-LM's compute_routing_scores_for_aux_loss, where choices that ran are meant",
        counts_afresh,
    ),
    _fault(
        "ids-counted",
        "counts-are-of-a-fresh-top-k",
        "the reverse: choices with bias counted in Megatron-LM's loss",
        counts_every_choice,
        "megatron",
    ),
    _fault(
        "all-choices-counted",
        "counts-are-of-first-choices",
        "GShard counts first choices",
        counts_every_choice,
        "gshard",
    ),
    _fault("kept-between-calls", "same-bits-twice", "megablocks#113", keeps_old_losses),
    _fault(
        "z-of-probabilities",
        "uniform-value-of-the-convention",
        "transformers#48293",
        z_loss_of_probabilities,
        "z_loss",
    ),
    _fault(
        "z-overflows",
        "huge-logits-do-not-overflow",
        "log(sum(exp(x))) written out",
        z_loss_that_overflows,
        "z_loss",
    ),
    _fault(
        "z-gradient-halved",
        "gradient-is-the-slope-of-the-value",
        "the derivative of a square",
        z_loss_forgets_the_two,
        "z_loss",
    ),
    _fault(
        "zero-log-zero",
        "huge-logits-do-not-overflow",
        "p * log(p) written out",
        entropy_of_zero,
        "entropy",
    ),
    _fault(
        "bessel",
        "variance-is-over-all-experts",
        "Tutel divides by E - 1, V-MoE by E",
        importance_by_bessel,
        "importance",
    ),
)
