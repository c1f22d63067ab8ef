"""Activations: ``check_activation`` and ``check_activation_backward``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from npmoe._checks import require
from npmoe._typing import HostArray
from npmoe.activations import ACTIVATIONS, bind_activation
from npmoe.naive.activations import GATED
from npmoe.testing import activation_bounds
from npmoe.testing.balls import Ball, Model
from npmoe.testing.conformance.activation_cases import ActivationCases, describe
from npmoe.testing.conformance.case import Call, Case, Check, Expected, Kind
from npmoe.testing.conformance.common import Truth, hygiene_checks, judge_values
from npmoe.testing.conformance.report import Report
from npmoe.testing.conformance.runner import Settings, run_checks

_CURVES = {
    "silu": ("curve-is-x-sigmoid-x", "x sigmoid(x), no piecewise or other approximation"),
    "gelu": ("erf-not-tanh", "GELU by erf; its tanh form differs by up to 5e-4"),
    "gelu_tanh": ("tanh-not-erf", "GELU by tanh; its erf form differs by up to 5e-4"),
    "relu": ("curve-is-relu", "max(x, 0), without a leak"),
    "relu2": ("curve-is-relu-squared", "max(x, 0) squared"),
}


@dataclass(frozen=True, slots=True)
class _Rule:
    """One activation with its parameters, and its truth in balls."""

    name: str
    alpha: float | None
    limit: float | None
    backward: bool

    def expected(self, case: Case) -> tuple[Expected]:
        """Return the output; free where a NaN goes in."""
        given = [np.asarray(a) for a in case.arguments.values()]
        dtype = given[0].dtype
        balls = [Ball.exact(np.nan_to_num(a, nan=0.0), Model.of(dtype)) for a in given]
        how = (self.name, self.alpha, self.limit)
        if self.backward:
            ball = activation_bounds.activation_backward(balls[0], balls[1], *how)
        else:
            ball = activation_bounds.activation(balls[0], *how)
        broken = np.isnan(given[-1])
        if ACTIVATIONS[self.name].gated:
            half = broken.shape[1] // 2
            broken = broken[:, :half] | broken[:, half:]
            if self.backward:
                broken = np.concatenate([broken, broken], axis=1)
        bound = None if case.options["exact"] else ball.rad
        return (Expected(value=ball.mid, bound=bound, free=broken, dtype=str(dtype)),)

    def reductions(self, case: Case) -> Iterator[Case]:
        """Fewer rows, then fewer columns of both halves, then rounder values."""
        arrays = {n: np.asarray(a) for n, a in case.arguments.items()}
        rows, columns = arrays["gate_up"].shape
        parts = 2 if ACTIVATIONS[self.name].gated else 1
        width = columns // parts

        def rebuild(changed: dict[str, HostArray]) -> Case:
            gate_up = changed["gate_up"]
            note = describe(gate_up.shape[1] // parts, gate_up, case.options["what"])
            arguments = {n: np.ascontiguousarray(a) for n, a in changed.items()}
            return Case(arguments=arguments, note=note, options=dict(case.options))

        def take(at: HostArray) -> Case:
            gate_up = np.concatenate([at + i * width for i in range(parts)])
            return rebuild({n: a[:, gate_up if n == "gate_up" else at] for n, a in arrays.items()})

        for kept in _halves_and_ones(rows):
            yield rebuild({n: a[kept] for n, a in arrays.items()})
        for kept in _halves_and_ones(width):
            yield take(kept)
        rounder = {n: np.round(a) for n, a in arrays.items()}
        if any(not np.array_equal(rounder[n], a, equal_nan=True) for n, a in arrays.items()):
            yield rebuild(rounder)

    def checks(self, expected: Truth) -> tuple[Check, ...]:
        """Return the checks; which there are depends on the activation."""
        family = ACTIVATIONS[self.name]
        cases = ActivationCases(
            name=self.name,
            alpha=(family.default_alpha or 1.0) if self.alpha is None else self.alpha,
            limit=(family.default_limit or 0.0) if self.limit is None else self.limit,
            backward=self.backward,
        )
        curve = GATED.get(self.name, self.name)
        named, about = _CURVES[curve]
        if family.default_alpha is not None:
            named, about = "sigmoid-is-scaled-by-alpha", "x sigmoid(alpha x)"
        every: list[tuple[str, str, Any]] = [
            ("within-rounding", "results keep the precision of the inputs", cases.normal),
            (named, about, cases.grid),
        ]
        if curve in ("relu", "relu2"):
            every += [
                ("integers-are-exact", "integers have one right answer", cases.integers),
                ("zero-is-flat", "at 0 and -0 the value is 0, and so is the slope", cases.zeros),
            ]
        if family.gated:
            every += [
                (
                    "gate-is-the-first-half",
                    "the curve applies to the first half, not to the second",
                    cases.halves_differ,
                ),
                (
                    "halves-are-contiguous",
                    "gate and up are halves, not every other column",
                    cases.halves_agree,
                ),
            ]
        if family.default_limit is not None:
            every += self._limit_checks(cases)
        if self.name == "swiglu_oai":
            every.append(("up-is-shifted-by-one", "the factor is u + 1", cases.small_up))
        if self.backward:
            every.append(("zero-gradient-gives-zero", "a gradient of 0 stays 0", cases.no_gradient))
        every += [
            (
                "large-inputs-stay-finite",
                "exp, tanh and cubes overflow at 88.8, 710 or 1e13; results do not",
                cases.large,
            ),
            ("nan-stays-in-its-place", "a NaN reaches its own pair alone", cases.with_nan),
            ("edges-of-tiles", "rows and widths around 16, 32, 64, 128", cases.edges_of_tiles),
            ("no-rows", "zero rows give an empty result", cases.no_rows),
        ]
        judge = judge_values(expected)
        own = [Check(name=n, about=a, cases=c, judge=judge) for n, a, c in every]
        calls = (
            ("output-has-the-dtype-of-the-input", "no dtype is widened or narrowed"),
            ("input-is-not-written", "the inputs come back unchanged: backward needs them"),
        )
        own += [Check(name=n, about=a, cases=cases.normal, judge=_judge_call) for n, a in calls]
        return (*own, *hygiene_checks(cases.normal, expected))

    def _limit_checks(self, cases: ActivationCases) -> list[tuple[str, str, Any]]:
        after = self.name == "swiglu_clamp_post"
        order = "after" if after else "before"
        beyond = (
            ("no-gradient-beyond-the-limit", "where a half is cut off its gradient is 0")
            if self.backward
            else ("both-halves-are-limited", "u is cut off on both sides, the gate above")
        )
        checks: list[tuple[str, str, Any]] = [
            (*beyond, cases.beyond),
            (
                "gate-is-limited-from-above-only",
                "a gate below minus the limit keeps its value and slope",
                cases.below,
            ),
            (
                f"limit-comes-{order}-the-curve",
                "min(silu(g), limit), not silu(min(g, limit))"
                if after
                else "silu(min(g, limit)), not min(silu(g), limit)",
                cases.between,
            ),
        ]
        if self.backward:
            about = "at the limit itself a half still has its gradient"
            checks.append(("limit-itself-has-a-gradient", about, cases.at_limit))
        return checks


def _judge_call(call: Call, case: Case) -> None:
    call(case)


def _halves_and_ones(size: int) -> Iterator[HostArray]:
    """Yield what to keep of so many places: either half, then all but one."""
    places = np.arange(size)
    if size > 1:
        yield from (places[: size // 2], places[size // 2 :])
    if size > 2:
        yield from (np.delete(places, i) for i in range(size))


@functools.cache
def activation_kind(
    activation: str, alpha: float | None = None, limit: float | None = None, *, backward: bool
) -> Kind:
    """Return the kind of activations, or of their backward passes.

    Raises
    ------
    RangeError
        For an unknown name, or a parameter that it does not have or that is out of range.
    """
    name = "activation_backward" if backward else "activation"
    require(
        activation in ACTIVATIONS,
        f"check_{name}: activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got "
        f"{activation!r}.",
    )
    bind_activation(activation, alpha, limit)
    rule = _Rule(activation, alpha, limit, backward)
    expected = functools.lru_cache(maxsize=4)(rule.expected)
    wide = "2I" if ACTIVATIONS[activation].gated else "I"
    signature = f"fn(gate_up (R,{wide})) -> act (R,I)"
    if backward:
        signature = f"fn(grad_act (R,I), gate_up (R,{wide})) -> grad_gate_up (R,{wide})"
    return Kind(
        name=name,
        signature=signature,
        expected=expected,
        checks=rule.checks(expected),
        reductions=rule.reductions,
    )


def check_activation(
    fn: Callable[..., Any],
    activation: str = "swiglu",
    *,
    alpha: float | None = None,
    limit: float | None = None,
    **settings: Unpack[Settings],
) -> Report:
    """Check ``fn(gate_up (R,2I)) -> act (R,I)``; (R,I) -> (R,I) for plain activations.

    Parameters
    ----------
    fn : callable
    activation, alpha, limit
        As for `npmoe.activations.bind_activation`.
    **settings
        Keywords of `run_checks`.

    Returns
    -------
    Report

    Raises
    ------
    RangeError
        As `bind_activation` and `run_checks`.
    """
    return run_checks(activation_kind(activation, alpha, limit, backward=False), fn, **settings)


def check_activation_backward(
    fn: Callable[..., Any],
    activation: str = "swiglu",
    *,
    alpha: float | None = None,
    limit: float | None = None,
    **settings: Unpack[Settings],
) -> Report:
    """Check ``fn(grad_act (R,I), gate_up (R,2I)) -> grad_gate_up (R,2I)``.

    At a limit the slope is that of the inside, at the kink of a ReLU it is 0. Parameters are those
    of `check_activation`.
    """
    return run_checks(activation_kind(activation, alpha, limit, backward=True), fn, **settings)
