"""Checks that make sense for every kind, and the judges they use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.conformance.case import Call, Case, Check, Effort, Expected, Finding, compare
from npmoe.testing.conformance.draw import lay_out

Cases = Callable[[np.random.Generator, Effort], Iterable[Case]]
_REPEAT = """\
again = target(*arguments)
again = again if isinstance(again, (tuple, list)) else (again,)
for one, two in zip(got, again):
    assert np.asarray(one).tobytes() == np.asarray(two).tobytes(), f"{one}\\nis not\\n{two}"
"""
Truth = Callable[[Case], tuple[Expected, ...]]


def judge_values(expected: Truth) -> Callable[[Call, Case], None]:
    """Return the judge that compares outputs with the truth."""

    def judge(call: Call, case: Case) -> None:
        compare(call(case), expected(case))

    return judge


def judge_repeats(call: Call, case: Case) -> None:
    """Raise unless a second call gives the same bits."""
    for index, (one, two) in enumerate(zip(call(case), call(case), strict=True)):
        if one.tobytes() != two.tobytes():
            raise Finding(
                f"output {index} must be the same bits in a second call with the same arguments, "
                f"got {int((one != two).sum())} other entries."
            )


def hygiene_checks(cases: Cases, expected: Truth, *, arrays: bool = True) -> tuple[Check, ...]:
    """Return the checks of everything but the mathematics: calls, layouts, repetition.

    `arrays=False` leaves out memory layouts, for kinds without floating arrays.
    """
    judge = judge_values(expected)

    def laid_out(layout: str) -> Cases:
        def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
            for case in cases(rng, effort):
                yield lay_out(case, "strided" if layout == "strided" else "read_only")

        return generate

    checks = [
        Check(
            name="same-bits-twice",
            about="two calls with the same arguments agree bit for bit: no races, no atomics, no "
            "uninitialised memory",
            cases=cases,
            judge=judge_repeats,
            script=lambda _: _REPEAT,
        ),
        Check(
            name="read-only-inputs",
            about="arguments that must not be written to are only read",
            cases=laid_out("read_only"),
            judge=judge,
        ),
    ]
    if arrays:
        checks.append(
            Check(
                name="strided-inputs",
                about="arguments with gaps between their elements are read by their strides",
                cases=laid_out("strided"),
                judge=judge,
            )
        )
    return tuple(checks)


def float_expected(
    value: HostArray, bound: HostArray, case: Case, *, dtype: str | None = None
) -> Expected:
    """Return the truth of a floating output: exact for integer cases, else within the bound."""
    exact = bool(case.options.get("exact"))
    return Expected(value=value, bound=None if exact else bound, dtype=dtype)
