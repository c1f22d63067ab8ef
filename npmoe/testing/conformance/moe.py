"""The whole layer as one function: ``check_moe`` and ``check_moe_backward``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Unpack

import numpy as np

from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.model_presets import PRESETS
from npmoe.model_presets import preset as config_of
from npmoe.params import param_axes
from npmoe.testing.conformance.case import Case, Check, Effort, Kind
from npmoe.testing.conformance.common import Cases, hygiene_checks, judge_values
from npmoe.testing.conformance.expert_cases import growing
from npmoe.testing.conformance.moe_cases import (
    PARAMS,
    PER_TOKEN,
    TOP_K,
    Change,
    expected_moe,
    make_moe,
    moe_config,
    moe_presets,
    near_ties,
    one_expert,
    poison_unused,
    reduce_moe,
    steep_router,
    tie,
)
from npmoe.testing.conformance.report import Report
from npmoe.testing.conformance.runner import Settings, run_checks

__all__ = ["check_moe", "check_moe_backward", "moe_kind", "moe_presets"]


def _with_turned(cases: Cases) -> Cases:
    """Add every case with its tokens in reverse order."""

    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        for case in cases(rng, effort):
            given = case.arguments
            yield case
            yield case.replace(**{n: given[n][::-1].copy() for n in PER_TOKEN if n in given})

    return generate


def _checks(name: str, backward: bool) -> tuple[Check, ...]:
    judge = judge_values(expected_moe)
    cfg = moe_config(name, 2, 2, 4, TOP_K.get(name, 2))

    def shaped(
        *wanted: tuple[int, int, int, int, int], change: Change | None = None, tied: bool = False
    ) -> Cases:
        def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
            for _ in range(1 if effort.quick else 3):
                for size in wanted:
                    yield make_moe(
                        rng,
                        name,
                        size,
                        effort.dtype,
                        backward=backward,
                        change=change,
                        tied=tied,
                    )

        return generate

    def drawn(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        for s in growing(rng, effort, widest=8):
            size = (s.T, s.E, s.K, s.H, s.I)
            yield make_moe(rng, name, size, effort.dtype, backward=backward)

    def check(title: str, about: str, cases: Cases) -> Check:
        return Check(name=title, about=about, cases=cases, judge=judge)

    summed = cfg.normalizes or cfg.router_order == "topk_score"
    choosing = ((1, 3, 1, 2, 1), (2, 4, 2, 3, 2), (3, 5, 3, 2, 2), (4, 8, 2, 3, 1))
    checks = [
        check(
            "within-rounding",
            "normal values stay within the error bound: no reduced precision, no TF32",
            drawn,
        ),
        check(
            "weights-sum-to-one" if summed else "weights-are-not-normalised",
            "the chosen weights are divided by their sum"
            if summed
            else "the chosen weights are the scores among all experts, whose sum is below 1",
            shaped((1, 2, 1, 1, 1), *choosing),
        ),
        check(
            "largest-logits-win",
            "the K largest logits choose the experts, and each expert gets its own weight",
            shaped(*choosing),
        ),
        check(
            "top-k-is-an-argument",
            "top_k from 1 to E, with the same shapes",
            shaped(*((2, 4, k, 2, 2) for k in (1, 2, 3, 4))),
        ),
        check(
            "one-expert",
            "E = K = 1: the weight is 1, or the score",
            shaped((1, 1, 1, 1, 1), (3, 1, 1, 2, 3)),
        ),
        check(
            "router-is-not-transposed",
            "with E = H a transposed router still fits: it must not be used",
            shaped((1, 2, 1, 2, 1), (2, 3, 2, 3, 1), (4, 8, 2, 8, 2)),
        ),
        check(
            "square-matrices-are-not-transposed",
            "with H = I or H = 2I a transposed matrix still fits: it must not be used",
            shaped((1, 1, 1, 2, 2), (1, 2, 1, 4, 2), (3, 3, 2, 8, 8)),
        ),
        check(
            "weights-multiply-the-output",
            "the weight multiplies what the expert returns, not what it gets",
            shaped((1, 2, 1, 1, 1), (2, 3, 2, 2, 2), (1, 4, 2, 3, 2)),
        ),
        check(
            "large-logits-stay-finite",
            "logits of several hundred: the softmax neither overflows nor becomes NaN",
            shaped((1, 4, 1, 1, 1), (2, 4, 2, 2, 1), (3, 6, 2, 2, 2), change=steep_router),
        ),
        check(
            "more-experts-than-tokens",
            "E = 16 and 257: most experts are empty, no limit at 256",
            shaped((1, 16, 2, 2, 1), (2, 16, 4, 3, 2), (4, 257, 2, 4, 1)),
        ),
        check(
            "no-tokens",
            "zero tokens give empty rows, and gradients of exactly 0",
            shaped((0, 3, 2, 4, 2), (0, 1, 1, 1, 1)),
        ),
        check(
            "edges-of-tiles",
            "tokens and widths one below, at and above 16 and 32",
            shaped((15, 2, 1, 17, 3), (16, 4, 2, 16, 16), (33, 3, 2, 3, 17), (65, 4, 1, 2, 2)),
        ),
    ]
    if cfg.gated:
        checks.append(
            check(
                "gate-is-the-first-half",
                "the activation goes over the first I rows of gate_up_proj: halves not swapped",
                shaped((1, 1, 1, 1, 1), (1, 1, 1, 2, 2), (2, 2, 1, 3, 3)),
            )
        )
    if cfg.routing != "expert_choice":
        checks.append(
            check(
                "ties-go-to-the-lowest-expert",
                "of equal logits the lowest id is chosen first",
                shaped(*((1, 3, 1, 1, 1), (1, 4, 2, 2, 1), (3, 5, 2, 2, 2)), change=tie, tied=True),
            )
        )
        checks.append(
            check(
                "unused-experts-are-not-read",
                "NaN in the matrices of experts that nobody chose reaches nothing (0 x NaN)",
                shaped((1, 4, 1, 2, 1), (2, 8, 1, 2, 2), change=poison_unused(name)),
            )
        )
        checks.append(
            check(
                "near-ties-are-told-apart",
                "logits that differ in their tenth bit: the router computes in full precision",
                shaped((1, 2, 1, 1, 1), (1, 4, 1, 2, 2), (3, 6, 2, 3, 1), change=near_ties),
            )
        )
    if not cfg.has_capacity:
        checks.append(
            check(
                "tokens-are-independent",
                "tokens may change places: nothing but top_k and the token decides its experts",
                _with_turned(shaped((2, 3, 1, 2, 1), (5, 4, 2, 2, 2))),
            )
        )
    if cfg.has_capacity:
        checks.append(
            check(
                "capacity-is-enforced",
                "routes beyond an expert's capacity contribute exactly 0, in the order of the rule",
                shaped(*((7, 4, 1, 2, 1), (12, 8, 2, 2, 2), (140, 3, 1, 2, 1)), change=one_expert),
            )
        )
    if backward:
        checks += _backward_checks(cfg, check, shaped)
    return (*checks, *hygiene_checks(drawn, expected_moe))


def _backward_checks(
    cfg: MoEConfig, check: Callable[..., Check], shaped: Callable[..., Cases]
) -> list[Check]:
    small = ((1, 3, 2, 1, 1), (2, 4, 2, 2, 2), (3, 5, 3, 3, 2))
    checks = [
        check(
            "router-gradient-exists",
            "the router is trained: grad_router_weight is that of the weights in use",
            shaped(*small),
        ),
        check(
            "hidden-gradient-includes-the-router",
            "hidden states act through the logits, too",
            shaped(*small),
        ),
        check(
            "empty-experts-have-zero-gradient",
            "experts without tokens get exactly 0, also in memory that was never zeroed",
            shaped((1, 4, 1, 2, 1), (2, 8, 2, 2, 2)),
        ),
    ]
    if cfg.normalizes or cfg.router_order == "topk_score":
        checks.append(
            check(
                "router-gradient-goes-through-the-norm",
                "the sum in the denominator is differentiated, too: no detached normalisation",
                shaped(*small, (1, 2, 1, 2, 1)),
            )
        )
    else:
        checks.append(
            check(
                "unchosen-experts-move-the-router",
                "a softmax over all experts gives the rows of unchosen ones a gradient",
                shaped(*small, (1, 4, 1, 2, 1)),
            )
        )
    return checks


@functools.cache
def moe_kind(name: str = "mixtral", *, backward: bool = False) -> Kind:
    """Return the kind of ``check_moe`` or ``check_moe_backward`` for a preset."""
    given = "grad_output (T,H), " if backward else ""
    returned = "(grad_hidden_states, " + ", ".join(f"grad_{n}" for n in PARAMS) + ")"
    return Kind(
        name="moe_backward" if backward else "moe",
        signature=(
            f"fn({given}hidden_states (T,H), router_weight (E,H), gate_up_proj (E,2I,H), "
            f"down_proj (E,H,I), top_k) -> {returned if backward else '(T,H)'}"
        ),
        expected=expected_moe,
        checks=_checks(name, backward),
        reductions=reduce_moe,
    )


def _check_preset(function: str, name: str) -> None:
    if name in moe_presets():
        return
    reason = ""
    if name in PRESETS:
        others = [n for n in param_axes(config_of(name)) if n not in PARAMS]
        reason = f" Its layer has more parameters: {', '.join(others)}."
    raise RangeError(
        f"{function}: preset must be one of {', '.join(moe_presets())}, got {name!r}.{reason}"
    )


def check_moe(
    fn: Callable[..., Any], preset: str = "mixtral", **settings: Unpack[Settings]
) -> Report:
    """Check ``fn(hidden_states, router_weight, gate_up_proj, down_proj, top_k) -> output``.

    The layer of a preset without further parameters, in evaluation: nothing random, its
    evaluation capacity. Keywords are those of `run_checks`.

    Raises
    ------
    RangeError
        For a preset with other parameters; `moe_presets` names those that fit.
    """
    _check_preset("check_moe", preset)
    return run_checks(moe_kind(preset), fn, **settings)


def check_moe_backward(
    fn: Callable[..., Any], preset: str = "mixtral", **settings: Unpack[Settings]
) -> Report:
    """Check ``fn(grad_output, hidden_states, router_weight, gate_up_proj, down_proj, top_k)``.

    It returns the gradients of ``sum(output * grad_output)`` with respect to hidden_states,
    router_weight, gate_up_proj and down_proj. Presets and keywords as for `check_moe`.
    """
    _check_preset("check_moe_backward", preset)
    return run_checks(moe_kind(preset, backward=True), fn, **settings)
