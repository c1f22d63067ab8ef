"""Products of backends that round their operands: once, to the type they name, and no more."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.testing.balls import OPERANDS
from npmoe.testing.conformance.backend_cases import verb_case, verb_truth
from npmoe.testing.conformance.case import Call, Case, Check, Effort, Finding
from npmoe.testing.conformance.common import Truth, judge_values

OPERANDS_NOTE = (
    "rows and matrices may be rounded to {} where they enter a product of the experts, sums not: "
    "the bounds of the layer count that, and single products have checks of their own."
)
# Checks of single products, whose truth is without rounding.
_NOTHING_IS_ROUNDED = frozenset(
    {
        *("verb-grouped-gemm", "verb-grouped-gemm-wgrad", "experts-composed", "experts-fused"),
        *("square-matrices-are-not-transposed", "activations-are-not-rounded"),
        *("half-weights-are-read-exactly", "sums-are-float32", "gradients-are-float32"),
    }
)
# Integers of eight bits are numbers of every operand type.
_LARGEST = 127


def operand_checks(checks: list[Check], operands: str, expected: Truth) -> list[Check]:
    """Return the checks of a backend that rounds operands, from those of one that does not."""

    def rounded(check: Check) -> Check:
        def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
            yield from check.cases(rng, replace(effort, operands=operands))

        return replace(check, cases=generate)

    return [
        *(rounded(check) for check in checks if check.name not in _NOTHING_IS_ROUNDED),
        Check(
            name="products-of-small-integers-are-exact",
            about="integers of eight bits are operands as they are, and sums are float32",
            cases=exact_products,
            judge=judge_values(expected),
        ),
        Check(
            name="operands-keep-their-bits",
            about="rows that meet a matrix of ones and zeros come out rounded once, as is said",
            cases=selected_rows,
            judge=functools.partial(judge_selected, operands),
        ),
    ]


def exact_products(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """Yield products of small integers, whose sums need more bits than any operand type has."""
    for rows, columns, depth in _sizes(effort):
        numbers = [rng.integers(-_LARGEST, _LARGEST + 1, (rows, n)) for n in (depth, columns)]
        weight = rng.integers(-_LARGEST, _LARGEST + 1, (rows, columns, depth))
        yield _gemm([n.astype(effort.dtype) for n in numbers], weight.astype(effort.dtype), True)


def selected_rows(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """Yield products with matrices that select: what comes out is what was made of the rows."""
    for rows, columns, depth in _sizes(effort):
        numbers = [rng.standard_normal((rows, n)).astype(effort.dtype) for n in (depth, columns)]
        signs = rng.choice([-1.0, 1.0], (rows, 1, 1)) * np.eye(columns, depth)
        yield _gemm(numbers, signs.astype(effort.dtype), False)


def judge_selected(operands: str, call: Call, case: Case) -> None:
    """Raise unless every number is that of the row, rounded once to the type of operands."""
    unit, tiny = OPERANDS[operands]
    for got, want in zip(call(case), verb_truth(case), strict=True):
        error, allowed = np.abs(got - want.value), unit * np.abs(want.value) + tiny
        if not (error <= allowed).all():
            at = tuple(int(i) for i in np.argwhere(~(error <= allowed))[0])
            raise Finding(
                f"a row's number {want.value[at]!r} must enter a product with a relative error of "
                f"at most {unit:.1e} ({operands}), got {got[at]!r} at {at}."
            )


def _sizes(effort: Effort) -> Iterator[tuple[int, int, int]]:
    """Yield rows (each of an expert of its own), columns and depth."""
    yield from ((1, 1, 2), (2, 3, 5), (3, 17, 33), (2, 40, 130))[: 3 if effort.quick else 4]


def _gemm(rows: list[HostArray], weight: HostArray, exact: bool) -> Case:
    """Return the case of a grouped product, and of the transposed one."""
    E, I, H = weight.shape
    cfg = MoEConfig(hidden_size=H, intermediate_size=I, num_experts=E, top_k=1)
    given = {"rows0": rows[0], "rows1": rows[1], "weight": weight}
    given |= {"bias": np.zeros((E, I), weight.dtype)}
    given |= {"topk_ids": np.arange(E, dtype=np.int32)[:, None]}
    return verb_case("grouped_gemm", cfg, given, exact=exact)
