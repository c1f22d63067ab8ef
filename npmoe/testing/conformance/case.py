"""A case: the arguments of one call of a subject, and what is expected of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._half import HALF_DTYPES
from npmoe._typing import HostArray

FLOATS = ("float32", "float64")
# Of checks that expert weights take part in: half precision means theirs, beside float32.
WITH_HALVES = (*FLOATS, *HALF_DTYPES)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One call.

    Attributes
    ----------
    arguments : dict of str to array or scalar
        In the order of the subject's signature.
    note : str
        Its structure in one line, for example "T=3 E=4 K=2, expert 1 empty".
    options : dict
        What the reference needs to know besides, for example a dialect.
    """

    arguments: dict[str, Any]
    note: str
    options: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """Return one argument."""
        return self.arguments[name]

    def replace(self, **arguments: Any) -> Case:
        """Return the case with some arguments changed."""
        return Case(
            arguments=self.arguments | arguments, note=self.note, options=dict(self.options)
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Expected:
    """What one output must be: `value`, within `bound` element by element.

    A bound of None means equality, bit for bit but for the sign of zero. Entries where `free` is
    True may hold anything. `dtype` is that of the output; None allows any of the same kind. With
    `any_shape` the judge looks at the shape, and gets None as an array of None.
    """

    value: HostArray
    bound: HostArray | None = None
    free: HostArray | None = None
    dtype: str | None = None
    any_shape: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much to try: cases per check, the largest size, and the dtype of floats.

    `half` is the dtype of expert weights where that is another one, `operands` what may be
    rounded where it enters a product of the experts.
    """

    cases: int
    quick: bool
    dtype: str
    half: str | None = None
    operands: str | None = None


# Calls the subject: case -> outputs as NumPy arrays. Raises Finding for what is wrong with them.
Call = Callable[[Case], tuple[HostArray, ...]]


class Finding(Exception):
    """What a subject did wrong, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One named property.

    Attributes
    ----------
    name : str
        Lower case, hyphens; names the mistake or the property: "empty-experts-are-zero".
    about : str
        One line: what must hold, and what usually breaks it.
    cases : callable
        ``cases(rng, effort)`` yields cases, small ones first.
    judge : callable
        ``judge(call, case)`` raises Finding if the property does not hold.
    script : callable, optional
        As in `Kind`, where the kind's does not show this property. `target` and `arguments` are
        at hand too.
    dtypes : tuple of str
        For which it says something of its own.
    """

    name: str
    about: str
    cases: Callable[[np.random.Generator, Effort], Iterable[Case]]
    judge: Callable[[Call, Case], None]
    script: Callable[[Case], str] | None = None
    dtypes: tuple[str, ...] = FLOATS


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What all subjects of one signature share.

    Attributes
    ----------
    name : str
        As in ``check_<name>``.
    signature : str
        For people: the arguments and results, with shapes.
    expected : callable
        ``expected(case)`` returns the truth for every output.
    checks : tuple of Check
    reductions : callable
        ``reductions(case)`` yields smaller cases of the same structure, biggest step first.
    script : callable, optional
        ``script(case)`` returns the lines with which a reproducer judges `got`, a tuple; by
        default it compares with what is expected.
    """

    name: str
    signature: str
    expected: Callable[[Case], tuple[Expected, ...]]
    checks: tuple[Check, ...]
    reductions: Callable[[Case], Iterator[Case]]
    script: Callable[[Case], str] | None = None


def compare(outputs: tuple[HostArray, ...], expected: tuple[Expected, ...]) -> None:
    """Raise Finding at the first output that is not as expected.

    Shapes and dtypes have been checked; NaN never passes.
    """
    for index, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        where = "output" if len(expected) == 1 else f"output {index}"
        ok = got == want.value
        if want.bound is not None:
            with np.errstate(invalid="ignore", over="ignore"):
                distance = np.abs(got.astype(np.float64) - want.value)
            ok = ok | (distance <= want.bound)
        if want.free is not None:
            ok = ok | want.free
        if bool(np.all(ok)):
            continue
        wrong = np.argwhere(~np.asarray(ok))
        at = tuple(int(i) for i in wrong[0])
        bound = "" if want.bound is None else f" within {np.asarray(want.bound)[at]:.2g}"
        place = f"[{', '.join(map(str, at))}]" if at else ""
        raise Finding(
            f"{where}{place} must be {np.asarray(want.value)[at]!s}{bound}, got {got[at]!s}; "
            f"{len(wrong)} of {got.size} entries are wrong."
        )
