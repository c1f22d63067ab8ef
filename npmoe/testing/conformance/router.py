"""Routers: ``check_router``. Choices are judged by rules, so that near ties may fall either way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Unpack

import numpy as np

from npmoe._typing import HostArray
from npmoe.conventions import ROUTING_CONVENTIONS, routing_convention
from npmoe.errors import RangeError
from npmoe.testing.conformance.case import Call, Case, Check, Kind
from npmoe.testing.conformance.common import hygiene_checks
from npmoe.testing.conformance.report import Report
from npmoe.testing.conformance.router_cases import RouterCases, describe
from npmoe.testing.conformance.router_rule import RouterRule
from npmoe.testing.conformance.runner import Settings, run_checks

_LAWFUL = """\
weights, ids = (np.asarray(a) for a in got)
x, want, value, bound = d["arg0"], d["expected1"], d["expected0"], d["bound0"]
assert weights.shape == ids.shape == value.shape, (weights.shape, ids.shape)
assert weights.dtype == x.dtype and ids.dtype.kind in "iu", (weights.dtype, ids.dtype)
assert ((ids >= 0) & (ids < x.shape[1])).all(), f"experts out of range:\\n{ids}"
assert all(len(set(row)) == len(row) for row in ids.tolist()), f"an expert twice:\\n{ids}"
assert np.isfinite(weights).all(), f"weights: got\\n{weights}"
"""
_IN_ORDER = """\
ok = (ids == want) | np.isinf(d["bound1"])
assert ok.all(), f"experts: got\\n{ids}\\nexpected\\n{want}"
ok = (weights == value) | (np.abs(weights - value) <= bound)
assert ok.all(), f"weights: got\\n{weights}\\nexpected\\n{value}"
"""
_BY_ID = """\
at = np.argsort(ids, axis=1)
weights, ids = (np.take_along_axis(a, at, axis=1) for a in (weights, ids))
at = np.argsort(want, axis=1)
value, bound, want = (np.take_along_axis(a, at, axis=1) for a in (value, bound, want))
"""
_TIES = """\
for row, z in zip(ids.tolist(), x):
    for e in row:
        equal, listed = np.flatnonzero(z == z[e]), [i for i in row if z[i] == z[e]]
        assert listed == equal[: len(listed)].tolist(), f"of {equal} got {listed}"
"""
_SCRIPTS = {"ids-by-falling-weight": _IN_ORDER, "ties-take-the-lowest-id": _TIES}


def _reductions(case: Case) -> Iterator[Case]:
    """Fewer tokens, then fewer choices, then fewer experts, then rounder logits."""
    x, top_k = case.arguments["router_logits"], case.arguments["top_k"]
    tokens, experts = x.shape

    def rebuild(logits: HostArray, choices: int) -> Case:
        note = describe(logits, choices, case.options["what"])
        arguments = {"router_logits": np.ascontiguousarray(logits), "top_k": choices}
        return Case(arguments=arguments, note=note, options=dict(case.options))

    if tokens > 1:
        yield from (rebuild(x[: tokens // 2], top_k), rebuild(x[tokens // 2 :], top_k))
        yield from (rebuild(np.delete(x, t, axis=0), top_k) for t in range(tokens))
    for fewer in sorted({1, top_k // 2, top_k - 1} - {0, top_k}):
        yield rebuild(x, fewer)
    if experts > top_k:
        half = max(top_k, experts // 2)
        yield from (rebuild(x[:, :half], top_k), rebuild(x[:, -half:], top_k))
        yield from (rebuild(np.delete(x, e, axis=1), top_k) for e in range(experts))
    rounder = np.round(x)
    if not np.array_equal(rounder, x, equal_nan=True):
        yield rebuild(rounder, top_k)


def _script(check: str) -> Callable[[Case], str]:
    """Return what a reproducer compares: choices by id, but where their order matters."""
    return lambda _: _LAWFUL + _SCRIPTS.get(check, _BY_ID + _IN_ORDER)


def _checks(rule: RouterRule) -> tuple[Check, ...]:
    cfg = routing_convention(rule.convention, 8, 2)
    cases = RouterCases(softmax=cfg.score_fn == "softmax")
    every: list[tuple[str, str, Any, Callable[[Call, Case], None]]] = [
        (
            "largest-logits-are-chosen",
            "every token takes its K largest logits",
            cases.separated,
            rule.judge_ids,
        ),
        (
            "weights-follow-their-ids",
            "weight k belongs to the expert in place k, whatever the order",
            cases.separated,
            rule.judge_all,
        ),
        (
            "normalised-as-the-convention-says",
            "weights sum to 1, or to less, as the convention has it",
            cases.several_of_more,
            rule.judge_sum,
        ),
        (
            "within-rounding",
            "weights keep the precision of the logits: no half precision anywhere",
            cases.normal,
            rule.judge_all,
        ),
        (
            "close-logits-are-told-apart",
            "logits that a narrower dtype would make equal are still ordered",
            cases.close,
            rule.judge_ids,
        ),
        (
            "ids-by-falling-weight",
            "the first choice comes first: capacity and top-1 counts depend on it",
            cases.separated,
            rule.judge_order,
        ),
        (
            "ties-take-the-lowest-id",
            "equal logits are chosen from the lowest id on, and listed so",
            cases.tied,
            rule.judge_ties,
        ),
        (
            "experts-are-chosen-once",
            "no expert twice in a token, also where all logits are negative or K = E",
            cases.one_sign,
            rule.judge_ids,
        ),
        (
            "a-single-choice",
            "with K = 1 the weight is what the convention says, which need not be 1",
            cases.single,
            rule.judge_all,
        ),
        (
            "tokens-do-not-see-each-other",
            "scores are over experts, per token: no wrong axis with T = E, no common maximum",
            cases.square,
            rule.judge_all,
        ),
        (
            "huge-logits-do-not-overflow",
            "logits of 100, 1e4 and 1e30 give finite weights",
            cases.huge,
            rule.judge_all,
        ),
        (
            "underflow-is-zero-not-nan",
            "scores too small for the dtype are weights of 0, also where all chosen are",
            cases.underflow,
            rule.judge_all,
        ),
        (
            "masked-experts-come-last",
            "a logit of -inf is chosen only where nothing else is left, with weight 0",
            cases.masked,
            rule.judge_all,
        ),
        (
            "broken-rows-have-distinct-ids",
            "rows with NaN or infinity choose distinct experts in range, or kernels read beyond",
            cases.broken,
            rule.judge_broken_ids,
        ),
        (
            "broken-rows-have-finite-weights",
            "rows with NaN or infinity have finite weights, or they spread",
            cases.broken,
            rule.judge_broken_weights,
        ),
        (
            "broken-rows-leave-others-alone",
            "a row with NaN or infinity changes no bit of another",
            cases.broken,
            rule.judge_neighbours,
        ),
        (
            "more-experts-than-a-block",
            "257 and 1,025 experts, the last ones chosen: no limit at 256 or 1,024",
            cases.many_experts,
            rule.judge_all,
        ),
        (
            "many-choices",
            "K up to 32 and up to E: no limit at 8, no power of two",
            cases.many_choices,
            rule.judge_all,
        ),
        (
            "edges-of-tiles",
            "tokens one below, at and above 16, 32, 64, 128 and 256 are all routed",
            cases.edges_of_tiles,
            rule.judge_all,
        ),
        ("no-tokens", "zero tokens give empty arrays (0, K)", cases.no_tokens, rule.judge_call),
        (
            "weights-and-ids-have-their-dtypes",
            "weights in the dtype of the logits, ids integers",
            cases.separated,
            rule.judge_call,
        ),
        (
            "logits-are-not-written",
            "the logits come back unchanged: they are still needed for losses",
            cases.one_sign,
            rule.judge_call,
        ),
    ]
    if cfg.renorm_eps:
        every.append(
            (
                "eps-of-the-convention",
                f"{cfg.renorm_eps:g} is added to the sum: seen where all scores are as small",
                cases.near_eps,
                rule.judge_all,
            )
        )
    own = tuple(Check(name=n, about=a, cases=c, judge=j, script=_script(n)) for n, a, c, j in every)
    hygiene = hygiene_checks(cases.separated, rule.expected)
    return own + tuple(
        c if c.name == "same-bits-twice" else replace(c, judge=rule.judge_all) for c in hygiene
    )


def router_conventions() -> tuple[str, ...]:
    """Return the conventions that are functions of logits and top_k alone."""
    names = []
    for name in ROUTING_CONVENTIONS:
        cfg = routing_convention(name, 8, 2)
        random = cfg.router_noise_std > 0.0 or cfg.second_expert_policy != "all"
        if cfg.routing == "token_choice" and not (cfg.selection_bias or cfg.has_capacity or random):
            names.append(name)
    return tuple(names)


@functools.cache
def router_kind(convention: str) -> Kind:
    """Return the kind of routers of one convention.

    Raises
    ------
    RangeError
        If it is unknown, or needs more than logits and top_k.
    """
    known = router_conventions()
    if convention not in known:
        more = " That one needs more than (router_logits, top_k)."
        raise RangeError(
            f"check_router: convention must be one of {', '.join(map(repr, known))}, got "
            f"{convention!r}.{more if convention in ROUTING_CONVENTIONS else ''}"
        )
    rule = RouterRule(convention)
    return Kind(
        name="router",
        signature="fn(router_logits (T,E), top_k) -> (topk_weights (T,K), topk_ids (T,K))",
        expected=rule.expected,
        checks=_checks(rule),
        reductions=_reductions,
        script=_script(""),
    )


def check_router(
    fn: Callable[..., Any],
    convention: str = "softmax_topk_renorm",
    **settings: Unpack[Settings],
) -> Report:
    """Check ``fn(router_logits (T,E), top_k) -> (topk_weights (T,K), topk_ids (T,K))``.

    Weights are compared with those of the experts beside them, so any order passes but in
    "ids-by-falling-weight". Where two keys differ by less than rounding either may be chosen.
    What a row with NaN or infinity holds is free, but for distinct ids in range and finite
    weights.

    Parameters
    ----------
    fn : callable
    convention : str
        A key of `npmoe.conventions.ROUTING_CONVENTIONS` that needs nothing but logits and top_k.
    **settings
        Keywords of `run_checks`.

    Returns
    -------
    Report

    Raises
    ------
    RangeError
        For other conventions, and as `run_checks`.
    """
    return run_checks(router_kind(convention), fn, **settings)
