"""Grouped products: ``check_grouped_gemm`` and ``check_grouped_gemm_wgrad``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Unpack

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.bounds import gamma
from npmoe.testing.conformance.case import Case, Check, Effort, Expected, Kind
from npmoe.testing.conformance.common import float_expected, hygiene_checks, judge_values
from npmoe.testing.conformance.draw import (
    LOADS,
    Values,
    draw_counts,
    draw_values,
    offsets_of,
    sizes,
)
from npmoe.testing.conformance.report import Report
from npmoe.testing.conformance.runner import Settings, run_checks


def _make(
    rng: np.random.Generator,
    size: tuple[int, int, int, int],
    load: str,
    values: Values,
    dtype: str,
    *,
    wgrad: bool,
) -> Case:
    rows, experts, n, m = size
    counts = draw_counts(rng, rows, experts, load)
    x = draw_values(rng, (rows, n), values, dtype)
    if wgrad:
        other = {"grad_y": draw_values(rng, (rows, m), values, dtype)}
    else:
        other = {"w": draw_values(rng, (experts, m, n), values, dtype)}
    return Case(
        arguments={"x_sorted": x, **other, "expert_offsets": offsets_of(counts)},
        note=f"R={rows} E={experts} N={n} M={m}, rows per expert {_some(counts)}",
        options={"exact": values == "integers"},
    )


def _some(counts: HostArray) -> str:
    text = " ".join(map(str, counts[:12]))
    return text + (" ..." if len(counts) > 12 else "")


def _expected_gemm(case: Case) -> tuple[Expected, ...]:
    x, w, offsets = (np.asarray(a) for a in case.arguments.values())
    dtype = str(x.dtype)
    value, size = (np.zeros((len(x), w.shape[1])) for _ in range(2))
    for e in range(len(w)):
        rows = slice(offsets[e], offsets[e + 1])
        if rows.start == rows.stop:
            continue  # its weights may hold anything
        value[rows] = x[rows].astype(np.float64) @ w[e].T.astype(np.float64)
        size[rows] = np.abs(x[rows]).astype(np.float64) @ np.abs(w[e]).T.astype(np.float64)
    return (float_expected(value, _bound(size, x.shape[1], dtype), case, dtype=dtype),)


def _expected_wgrad(case: Case) -> tuple[Expected, ...]:
    x, grad_y, offsets = (np.asarray(a) for a in case.arguments.values())
    dtype = str(x.dtype)
    shape = (len(offsets) - 1, grad_y.shape[1], x.shape[1])
    value, bound = np.zeros(shape), np.zeros(shape)
    for e in range(shape[0]):
        rows = slice(offsets[e], offsets[e + 1])
        left, right = grad_y[rows].T.astype(np.float64), x[rows].astype(np.float64)
        value[e] = left @ right
        bound[e] = _bound(np.abs(left) @ np.abs(right), int(rows.stop - rows.start), dtype)
    return (float_expected(value, bound, case, dtype=dtype),)


def _bound(size: HostArray, n: int, dtype: str) -> HostArray:
    """Higham, ch. 3: gamma_n times the sum of absolute values, for the program and the truth."""
    return (gamma(max(n, 1), dtype) + gamma(max(n, 1), np.float64)) * size


def _reductions(case: Case) -> Iterator[Case]:
    """Fewer rows, then fewer experts, then narrower, then simpler values."""
    first, second, offsets = case.arguments.values()
    name = list(case.arguments)[1]
    counts = np.diff(offsets)
    per_row = name == "grad_y"

    def rebuild(x: HostArray, y: HostArray, new: HostArray) -> Case:
        e, m = len(new), y.shape[1]
        return Case(
            arguments={"x_sorted": x, name: y, "expert_offsets": offsets_of(new)},
            note=f"R={len(x)} E={e} N={x.shape[1]} M={m}, rows per expert {_some(new)}",
            options=dict(case.options),
        )

    for e in np.flatnonzero(counts):
        for take in {int(counts[e]), int(counts[e] + 1) // 2, 1}:
            new = counts.copy()
            new[e] -= take
            keep = np.ones(len(first), bool)
            keep[offsets[e] : offsets[e] + take] = False
            yield rebuild(first[keep], second[keep] if per_row else second, new)
    empty = np.flatnonzero(counts == 0)
    step = len(empty)
    while step >= 1:
        for start in range(0, len(empty), step):
            gone = empty[start : start + step]
            if len(gone) < len(counts):
                fewer = second if per_row else np.delete(second, gone, axis=0)
                yield rebuild(first, fewer, np.delete(counts, gone))
        step //= 2
    if first.shape[1] > 1:
        half = first.shape[1] // 2
        yield rebuild(first[:, :half], second if per_row else second[:, :, :half], counts)
    if second.shape[1] > 1:
        yield rebuild(first, second[:, : second.shape[1] // 2], counts)


def _checks(wgrad: bool) -> tuple[Check, ...]:
    expected = _expected_wgrad if wgrad else _expected_gemm
    judge = judge_values(expected)

    def drawn(values: Values, loads: tuple[str, ...]) -> Callable[..., Iterator[Case]]:
        def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
            for i, size in enumerate(sizes(rng, effort)):
                load = loads[i % len(loads)]
                yield _make(rng, size, load, values, effort.dtype, wgrad=wgrad)

        return generate

    def shaped(*wanted: tuple[int, int, int, int]) -> Callable[..., Iterator[Case]]:
        def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
            for size in wanted:
                yield _make(rng, size, "spread", "integers", effort.dtype, wgrad=wgrad)

        return generate

    def poisoned(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        """Weights of experts without rows are NaN: multiplied by nothing, they stay unseen."""
        for size in sizes(rng, effort):
            case = _make(rng, size, "every-other", "integers", effort.dtype, wgrad=False)
            empty = np.diff(case.arguments["expert_offsets"]) == 0
            w = case.arguments["w"].copy()
            w[empty] = np.nan
            yield case.replace(w=w)

    empty_about = (
        "experts without rows get a gradient of exactly 0, also in memory that was never zeroed"
        if wgrad
        else "experts without rows, at either end and between, shift nobody's rows"
    )
    checks = [
        Check(
            name="integers-are-exact",
            about="products of small integers have one right answer: every row meets its expert",
            cases=drawn("integers", ("spread", "skewed")),
            judge=judge,
        ),
        Check(
            name="within-rounding",
            about="normal values stay within gamma_n of the sum of absolute products: no reduced "
            "precision, no TF32",
            cases=drawn("normal", LOADS),
            judge=judge,
        ),
        Check(
            name="empty-experts-are-zero" if wgrad else "empty-experts-shift-nothing",
            about=empty_about,
            cases=drawn("integers", ("empty-first", "empty-last", "every-other", "one-expert")),
            judge=judge,
        ),
        Check(
            name="no-rows",
            about="zero rows give an empty result" if not wgrad else "zero rows give zeros",
            cases=shaped((0, 3, 4, 2), (0, 1, 1, 1)),
            judge=judge,
        ),
        Check(
            name="square-is-not-transposed",
            about="with M = N a transposed matrix still fits: it must not be used",
            cases=shaped((3, 2, 2, 2), (8, 3, 5, 5), (20, 4, 16, 16)),
            judge=judge,
        ),
        Check(
            name="more-experts-than-a-block",
            about="257 and 1,025 experts: no limit at 256 or 1,024, no power of two assumed",
            cases=shaped((9, 257, 2, 3), (40, 1025, 3, 2)),
            judge=judge,
        ),
        Check(
            name="edges-of-tiles",
            about="rows and widths one below, at and above 16, 32, 64 and 128",
            cases=shaped(
                *((r, 2, n, m) for r, n, m in ((15, 17, 1), (16, 16, 16), (17, 1, 33))),
                *((r, 3, n, m) for r, n, m in ((63, 65, 31), (64, 64, 64), (129, 127, 63))),
            ),
            judge=judge,
        ),
    ]
    if not wgrad:
        checks.append(
            Check(
                name="unused-weights-are-not-read",
                about="NaN in the weights of experts without rows reaches no output (0 x NaN)",
                cases=poisoned,
                judge=judge,
            )
        )
    return (*checks, *hygiene_checks(drawn("integers", LOADS), expected))


GROUPED_GEMM = Kind(
    name="grouped_gemm",
    signature="fn(x_sorted (R,N), w (E,M,N), expert_offsets (E+1,)) -> (R,M)",
    expected=_expected_gemm,
    checks=_checks(wgrad=False),
    reductions=_reductions,
)
GROUPED_GEMM_WGRAD = Kind(
    name="grouped_gemm_wgrad",
    signature="fn(x_sorted (R,N), grad_y (R,M), expert_offsets (E+1,)) -> (E,M,N)",
    expected=_expected_wgrad,
    checks=_checks(wgrad=True),
    reductions=_reductions,
)


def check_grouped_gemm(fn: Callable[..., Any], **settings: Unpack[Settings]) -> Report:
    """Check ``fn(x_sorted (R,N), w (E,M,N), expert_offsets (E+1,)) -> (R,M)``.

    Row r of expert e must be ``w[e] @ x_sorted[r]``; rows of e are
    ``expert_offsets[e]:expert_offsets[e+1]``. Keywords are those of `run_checks`.
    """
    return run_checks(GROUPED_GEMM, fn, **settings)


def check_grouped_gemm_wgrad(fn: Callable[..., Any], **settings: Unpack[Settings]) -> Report:
    """Check ``fn(x_sorted (R,N), grad_y (R,M), expert_offsets (E+1,)) -> (E,M,N)``.

    Expert e must get ``grad_y[rows of e].T @ x_sorted[rows of e]``, and exactly 0 without rows.
    Keywords are those of `run_checks`.
    """
    return run_checks(GROUPED_GEMM_WGRAD, fn, **settings)
