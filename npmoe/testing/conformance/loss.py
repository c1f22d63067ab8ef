"""Auxiliary losses: ``check_loss``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Unpack

import numpy as np

from npmoe._checks import require
from npmoe._typing import HostArray
from npmoe.testing.conformance.case import Call, Case, Check, Finding, Kind, compare
from npmoe.testing.conformance.common import Truth, hygiene_checks, judge_values
from npmoe.testing.conformance.loss_cases import LossCases, make
from npmoe.testing.conformance.loss_rule import LOSSES, OTHERS, LossRule
from npmoe.testing.conformance.report import Report
from npmoe.testing.conformance.runner import Settings, run_checks

_STEP = 2.0**-5
_COUNTS = {
    "ids": ("counts-follow-the-ids", "n counts topk_ids, not a fresh top-k of the logits"),
    "fresh": ("counts-are-of-a-fresh-top-k", "n counts the top-k of the logits, not topk_ids"),
    "first": ("counts-are-of-first-choices", "n counts the first column of topk_ids alone"),
}


def _judge_call(call: Call, case: Case) -> None:
    call(case)


def _judge_value(expected: Truth) -> Callable[[Call, Case], None]:
    def judge(call: Call, case: Case) -> None:
        compare(call(case)[:1], expected(case)[:1])

    return judge


def _judge_unchosen(expected: Truth) -> Callable[[Call, Case], None]:
    """Compare the gradients of experts that no token chose."""

    def judge(call: Call, case: Case) -> None:
        got, want = call(case)[1], expected(case)[1]
        experts = np.setdiff1d(np.arange(got.shape[1]), case.arguments["topk_ids"])
        for t, e in np.ndindex(len(got), len(experts)):
            at = (t, int(experts[e]))
            value, bound = want.value[at], np.asarray(want.bound)[at]
            if not abs(float(got[at]) - value) <= bound:
                raise Finding(
                    f"the gradient of logit {at}, of an expert without tokens, must be "
                    f"{value:.7g} within {bound:.2g}, got {got[at]:.7g}."
                )

    return judge


def _judge_mean(expected: Truth) -> Callable[[Call, Case], None]:
    """Require that the batch twice over costs the same, every token then weighing half."""

    def judge(call: Call, case: Case) -> None:
        if len(case.arguments["topk_ids"]) < 2:
            return  # the sum of one is its mean: nothing to see in a reproducer
        twice = case.replace(**{n: np.concatenate([a, a]) for n, a in case.arguments.items()})
        (value, grad), (value_2, grad_2) = call(case), call(twice)
        bounds = [np.asarray(w.bound) for c in (case, twice) for w in expected(c)]
        if not abs(float(value) - float(value_2)) <= bounds[0] + bounds[2]:
            raise Finding(
                f"the value must stay when every token comes twice, got {float(value):.7g} and "
                f"{float(value_2):.7g}."
            )
        half = 2.0 * grad_2[: len(grad)].astype(np.float64)
        if not (np.abs(half - grad) <= bounds[1] + 2.0 * bounds[3][: len(grad)]).all():
            raise Finding("gradients must halve when every token comes twice, they do not.")

    return judge


def _judge_slope(expected: Truth) -> Callable[[Call, Case], None]:
    """Compare the gradient with differences of the subject's own value.

    What a central difference misses by the curvature is known from the truth.
    """

    def judge(call: Call, case: Case) -> None:
        x, grad, truth = case.arguments["router_logits"], call(case)[1], expected(case)[1]
        signs = np.where(truth.value < 0, -1.0, 1.0)
        largest = np.zeros(x.shape)
        largest.flat[int(np.abs(truth.value).argmax())] = 1.0
        chequered = np.where(np.indices(x.shape).sum(axis=0) % 2, 1.0, -1.0)
        for direction in (largest, signs, chequered):
            ends = [
                case.replace(router_logits=(x + s * direction).astype(x.dtype))
                for s in (_STEP, -_STEP)
            ]
            values = [float(call(end)[0]) for end in ends]
            true = [expected(end)[0] for end in ends]
            rise = (values[0] - values[1]) / (2 * _STEP)
            true_rise = float(true[0].value - true[1].value) / (2 * _STEP)
            slope = float((grad * direction).sum(dtype=np.float64))
            true_slope = float((truth.value * direction).sum())
            bound = abs(true_rise - true_slope) + float(
                (np.asarray(truth.bound) * np.abs(direction)).sum()
            )
            bound += sum(float(np.asarray(t.bound)) for t in true) / (2 * _STEP)
            if not abs(rise - slope) <= bound:
                raise Finding(
                    f"the gradient must be the slope of the value: along a line the value rises "
                    f"by {rise:.7g} per unit, the gradient says {slope:.7g}, bound {bound:.2g}."
                )

    return judge


def _reductions(case: Case) -> Iterator[Case]:
    """Fewer tokens, then fewer choices, then fewer experts, then rounder logits."""
    x, ids = (np.asarray(a) for a in case.arguments.values())
    (tokens, experts), top_k = x.shape, ids.shape[1]

    def rebuild(logits: HostArray, topk_ids: HostArray) -> Case:
        return make(logits, topk_ids, case.options["what"])

    if tokens > 1:
        for part in (slice(tokens // 2), slice(tokens // 2, None)):
            yield rebuild(x[part], ids[part])
        for t in range(tokens):
            yield rebuild(np.delete(x, t, axis=0), np.delete(ids, t, axis=0))
    for fewer in sorted({1, top_k // 2, top_k - 1} - {0, top_k}):
        yield rebuild(x, ids[:, :fewer])
    unused = np.setdiff1d(np.arange(experts), ids)
    for gone in (unused, *(unused[i : i + 1] for i in range(len(unused)))):
        if 0 < len(gone) < experts:
            kept = np.setdiff1d(np.arange(experts), gone)
            yield rebuild(x[:, kept], np.searchsorted(kept, ids))
    rounder = np.round(4.0 * x) / x.dtype.type(4.0)
    distinct = all(len(set(row)) == experts for row in rounder.tolist())
    if distinct and not np.array_equal(rounder, x):
        yield rebuild(rounder, ids)


def _checks(rule: LossRule, expected: Truth) -> tuple[Check, ...]:
    cases = LossCases(rule.counts)
    everything, value = judge_values(expected), _judge_value(expected)
    every: list[tuple[str, str, Any, Callable[[Call, Case], None]]] = [
        (
            "uniform-value-of-the-convention",
            "the published value where all is uniform: factors of E and k, sums and means",
            cases.uniform,
            value,
        ),
        (
            "within-rounding",
            "value and gradient keep the precision of the logits",
            cases.normal,
            everything,
        ),
        (
            "gradient-is-the-slope-of-the-value",
            "the gradient agrees with differences of the subject's own value: sign, scale, "
            "all terms of the softmax",
            cases.grid,
            _judge_slope(expected),
        ),
        (
            "unchosen-experts-have-gradients",
            "the softmax is over all experts, so that logits of others count too",
            cases.unchosen,
            _judge_unchosen(expected),
        ),
        (
            "probabilities-matter",
            "with the same choices the value follows the probabilities",
            cases.same_counts,
            value,
        ),
        (
            "softmax-is-taken-once",
            "logits are logits: a second softmax flattens steep probabilities",
            cases.steep,
            everything,
        ),
        (
            "tokens-are-averaged",
            "the batch twice over has the same value and half the gradients",
            cases.normal,
            _judge_mean(expected),
        ),
        (
            "huge-logits-do-not-overflow",
            "logits of 89, 710 and 1e4 give finite numbers, and 0 log 0 is 0",
            cases.huge,
            everything,
        ),
        (
            "masked-experts-cost-nothing",
            "a logit of -inf has probability 0 and gradient 0",
            cases.masked,
            everything,
        ),
        ("one-expert", "with E = 1 nothing can be learned", cases.one_expert, everything),
        ("no-tokens-cost-nothing", "no tokens cost 0, not 0/0", cases.no_tokens, everything),
        (
            "many-experts-and-tokens",
            "257 and 1,025 experts, tokens around 16, 32, 64, 128",
            cases.many,
            everything,
        ),
        (
            "gradient-has-the-dtype-of-the-logits",
            "one value, and one gradient per logit in its dtype",
            cases.normal,
            _judge_call,
        ),
        (
            "inputs-are-not-written",
            "logits and ids come back unchanged",
            cases.normal,
            _judge_call,
        ),
    ]
    if rule.counts is not None:
        every += [
            (
                "imbalance-costs",
                "every token at the same experts costs more than balance",
                cases.collapsed,
                value,
            ),
            (*_COUNTS[rule.counts], cases.contrary, everything),
            (
                "counts-are-constants",
                "balanced counts leave no gradient, since none flows through the counts",
                cases.balanced,
                everything,
            ),
        ]
    if rule.loss == "importance":
        about = "a collapse costs E - 1: the variance is over E, not E - 1"
        every.append(("variance-is-over-all-experts", about, cases.collapsed, value))
    own = tuple(Check(name=n, about=a, cases=c, judge=j) for n, a, c, j in every)
    return (*own, *hygiene_checks(cases.normal, expected))


@functools.cache
def loss_kind(loss: str) -> Kind:
    """Return the kind of losses of one name.

    Raises
    ------
    RangeError
        If it is unknown.
    """
    require(
        loss in LOSSES,
        f"check_loss: loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}. "
        f"{', '.join(OTHERS)} count nothing; the others are npmoe.losses.BALANCE_CONVENTIONS.",
    )
    rule = LossRule(loss)
    expected = functools.lru_cache(maxsize=4)(rule.expected)
    return Kind(
        name="loss",
        signature="fn(router_logits (T,E), topk_ids (T,K)) -> (value, grad_router_logits (T,E))",
        expected=expected,
        checks=_checks(rule, expected),
        reductions=_reductions,
    )


def check_loss(
    fn: Callable[..., Any], loss: str = "switch", **settings: Unpack[Settings]
) -> Report:
    """Check ``fn(router_logits (T,E), topk_ids (T,K)) -> (value, grad_router_logits (T,E))``.

    The coefficient is 1, scores are softmax(router_logits), and the batch is one sequence.

    Parameters
    ----------
    fn : callable
    loss : str
        A key of `npmoe.losses.BALANCE_CONVENTIONS`, "z_loss", "entropy" or "importance"
        (population variance).
    **settings
        Keywords of `run_checks`.

    Returns
    -------
    Report

    Raises
    ------
    RangeError
        For other losses, and as `run_checks`.
    """
    return run_checks(loss_kind(loss), fn, **settings)
