"""Weighted sums of experts' rows: ``check_combine``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Unpack

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.bounds import gamma
from npmoe.testing.conformance.case import Call, Case, Check, Effort, Expected, Finding, Kind
from npmoe.testing.conformance.common import float_expected, hygiene_checks, judge_values
from npmoe.testing.conformance.draw import EXPERTS, WIDTHS, Values, draw_values, kept_parts
from npmoe.testing.conformance.report import Report
from npmoe.testing.conformance.runner import Settings, run_checks

Generator = Callable[[np.random.Generator, Effort], Iterator[Case]]


def _case(rows: HostArray, row_ids: HostArray, topk_weights: HostArray, *, exact: bool) -> Case:
    dropped = int((row_ids < 0).sum())
    (T, K), (R, H) = row_ids.shape, rows.shape
    return Case(
        arguments={"rows": rows, "row_ids": row_ids.astype(np.int32), "topk_weights": topk_weights},
        note=f"T={T} K={K} R={R} H={H}, {dropped} routes without a row",
        options={"exact": exact},
    )


def _make(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    values: Values,
    dtype: str,
    *,
    drop: float = 0.0,
    spare: int = 0,
) -> Case:
    """Return a case of (T, K, H): every kept route has a row of its own, `spare` rows nobody."""
    T, K, H = shape
    kept = rng.random((T, K)) >= drop
    R = int(kept.sum()) + spare
    row_ids = np.full((T, K), -1, np.int32)
    row_ids[kept] = rng.permutation(R)[: int(kept.sum())]
    weights = draw_values(rng, (T, K), values, dtype)
    if values == "integers":  # 0 would hide its row
        weights[weights == 0] = 3
    return _case(
        draw_values(rng, (R, H), values, dtype), row_ids, weights, exact=values == "integers"
    )


def _shapes(rng: np.random.Generator, effort: Effort) -> Iterator[tuple[int, int, int]]:
    """Yield (T, K, H), small first."""
    for i in range(effort.cases):
        reach = (i + 1) / effort.cases
        tokens = int(rng.integers(1, 2 + int(30 * reach)))
        slots = EXPERTS[int(rng.integers(0, max(3, int(len(EXPERTS) * reach))))]
        yield tokens, min(slots, 32), int(rng.choice(WIDTHS[: max(3, int(11 * reach))]))


def _expected(case: Case) -> tuple[Expected, ...]:
    rows, row_ids, weights = (np.asarray(a) for a in case.arguments.values())
    (T, K), H = row_ids.shape, rows.shape[1]
    value, size = np.zeros((T, H)), np.zeros((T, H))
    for k in range(K):
        kept = row_ids[:, k] >= 0
        part = rows[row_ids[kept, k]].astype(np.float64)
        part *= weights[kept, k].astype(np.float64)[:, None]
        value[kept] += part
        size[kept] += np.abs(part)
    # One rounding of every product and K-1 of sums, for the program and for the truth.
    bound = (gamma(K, rows.dtype) + gamma(K, np.float64)) * size
    return (float_expected(value, bound, case, dtype=str(rows.dtype)),)


def _reductions(case: Case) -> Iterator[Case]:
    """Fewer tokens, then fewer slots, then narrower, then without rows that nobody uses."""
    rows, row_ids, weights = (np.asarray(a) for a in case.arguments.values())
    T, K = row_ids.shape
    exact = bool(case.options["exact"])

    def without_rows(row_ids: HostArray, weights: HostArray) -> Case:
        """Also leave out the rows of the routes that are gone; spare rows stay."""
        gone = np.setdiff1d(case.arguments["row_ids"], row_ids)
        keep = np.setdiff1d(np.arange(len(rows)), gone)
        number = np.append(np.cumsum(np.isin(np.arange(len(rows)), keep)) - 1, -1)
        return _case(rows[keep], number[row_ids], weights, exact=exact)

    for kept in kept_parts(T):
        yield without_rows(row_ids[kept], weights[kept])
    for kept in kept_parts(K):
        yield without_rows(row_ids[:, kept], weights[:, kept])
    if rows.shape[1] > 1:
        for part in (slice(0, rows.shape[1] // 2), slice(rows.shape[1] // 2, None)):
            yield case.replace(rows=rows[:, part])
    spare = np.setdiff1d(np.arange(len(rows)), row_ids)
    for r in spare[:8]:
        fewer = np.where(row_ids > r, row_ids - 1, row_ids)
        yield _case(np.delete(rows, r, axis=0), fewer, weights, exact=exact)


def _drawn(values: Values, *, drop: float = 0.0, spare: int = 0) -> Generator:
    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        for shape in _shapes(rng, effort):
            yield _make(rng, shape, values, effort.dtype, drop=drop, spare=spare)

    return generate


def _shaped(*shapes: tuple[int, int, int], drop: float = 0.0, spare: int = 0) -> Generator:
    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        for shape in shapes:
            yield _make(rng, shape, "integers", effort.dtype, drop=drop, spare=spare)

    return generate


def _dropped_weights_are_nan(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    for case in _drawn("integers", drop=0.5)(rng, effort):
        weights = case.arguments["topk_weights"].copy()
        weights[case.arguments["row_ids"] < 0] = np.nan
        yield case.replace(topk_weights=weights)


def _spare_rows_are_nan(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """Rows that no route has, the first and the last ones, hold NaN or infinity."""
    for i, shape in enumerate(_shapes(rng, effort)):
        case = _make(rng, shape, "integers", effort.dtype, drop=0.4, spare=3)
        rows, row_ids, weights = (a.copy() for a in case.arguments.values())
        used = row_ids >= 0
        used[0, 0] = False
        row_ids[~used] = -1
        row_ids[used] = 1 + rng.permutation(int(used.sum()))
        rows[np.setdiff1d(np.arange(len(rows)), row_ids)] = (np.nan, np.inf)[i % 2]
        weights[~used] = 0
        yield _case(rows, row_ids, weights, exact=True)


def _last_row_is_used(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """All rows are finite and used: only their number tells that -1 is none of them."""
    for tokens, slots, width in _shapes(rng, effort):
        shape = (max(tokens, 2), slots, width)
        case = _make(rng, shape, "integers", effort.dtype, drop=0.3)
        rows, row_ids = case.arguments["rows"], case.arguments["row_ids"].copy()
        row_ids[0, :] = -1
        used = np.unique(row_ids[row_ids >= 0])
        if len(used):
            number = np.append(np.cumsum(np.isin(np.arange(len(rows)), used)) - 1, -1)
            rows = rows[used].copy()
            rows[rows == 0] = 1
            yield _case(rows, number[row_ids], case.arguments["topk_weights"], exact=True)


def _large_terms_cancel(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """Terms of alternating sign around 2^11 and 2^20, whose sums are exact in float32."""
    for slots in (2, 3, 4, 8, 16, 32):
        for exponent in (11, 20):
            width = 1 if slots == 2 else 5
            case = _make(rng, (2, slots, width), "integers", effort.dtype)
            rows, row_ids = case.arguments["rows"], case.arguments["row_ids"]
            sign = np.where(np.arange(slots) % 2, -1, 1)
            rows = rows.copy()
            rows[row_ids] += (sign * 2**exponent)[None, :, None]
            ones = np.ones(row_ids.shape, effort.dtype)
            yield _case(rows, row_ids, ones, exact=True)


def _extreme_scales(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """Rows times 2^60 with weights times 2^-70, and the other way round: exact, but in half."""
    for i, case in enumerate(_drawn("integers")(rng, effort)):
        scale = 2.0 ** (60 if i % 2 else -60)
        rows, weights = case.arguments["rows"], case.arguments["topk_weights"]
        yield case.replace(rows=rows * rows.dtype.type(scale), topk_weights=weights / scale / 1024)


def _kept_weights_below_one(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """Weights of 2^-j that sum to less than 1 once a slot is dropped."""
    for tokens, slots, width in _shapes(rng, effort):
        K = min(max(slots, 2), 8)
        case = _make(rng, (tokens, K, width), "integers", effort.dtype)
        rows, row_ids = case.arguments["rows"].copy(), case.arguments["row_ids"].copy()
        rows[rows == 0] = 1
        row_ids[::2, int(rng.integers(K))] = -1
        weights = np.tile(0.5 ** np.append(np.arange(1, K), K - 1), (tokens, 1))
        yield _case(rows, row_ids, weights.astype(effort.dtype), exact=True)


def _judge_order(call: Call, case: Case) -> None:
    """Raise unless the same rows in another order give the same bits."""
    rows, row_ids = np.asarray(case.arguments["rows"]), np.asarray(case.arguments["row_ids"])
    (first,) = call(case)
    for new in (np.arange(len(rows))[::-1], np.roll(np.arange(len(rows)), 1)):
        moved = np.empty_like(rows)
        moved[new] = rows
        (second,) = call(case.replace(rows=moved, row_ids=np.append(new, -1)[row_ids].astype("i4")))
        if bool((first != second).any()):
            t, h = (int(i) for i in np.argwhere(first != second)[0])
            raise Finding(
                f"output[{t}, {h}] must be the same bits wherever its rows lie, since slots are "
                f"added in ascending order, got {float(first[t, h])!r} and {float(second[t, h])!r}."
            )


_ORDER = """\
rows, row_ids, weights = arguments
for new in (np.arange(len(rows))[::-1], np.roll(np.arange(len(rows)), 1)):
    moved = np.empty_like(rows)
    moved[new] = rows
    again = target(moved, np.append(new, -1)[row_ids].astype(np.int32), weights)
    assert (np.asarray(again) == np.asarray(got[0])).all(), (got[0], again)
"""


_judge = judge_values(_expected)
_CHECKS = (
    ("integers-are-exact", "every token gets its own rows times its own weights",
     _drawn("integers"), _judge),
    ("within-rounding", "normal values stay within gamma_K of the sum of absolute terms",
     _drawn("normal", drop=0.2), _judge),
    ("minus-one-is-no-row", "-1 is not the last row, as an index would take it",
     _last_row_is_used, _judge),
    ("unused-rows-are-not-read", "NaN and infinity in rows of no route reach no token (0 x NaN)",
     _spare_rows_are_nan, _judge),
    ("dropped-weights-are-not-read", "NaN as the weight of a route without row reaches no token",
     _dropped_weights_are_nan, _judge),
    ("dropped-weights-are-lost", "the other slots of a token keep their weights when one is "
     "dropped", _kept_weights_below_one, _judge),
    ("all-dropped-is-zero", "tokens without any row are exactly 0, also without a row at all",
     lambda rng, effort: (
         case
         for spare in (2, 0)
         for case in _shaped((1, 1, 2), (4, 2, 3), (9, 8, 33), drop=1.0, spare=spare)(rng, effort)
     ), _judge),
    ("no-tokens", "zero tokens give an empty result, with and without rows",
     lambda rng, effort: (
         case
         for spare in (0, 3)
         for case in _shaped((0, 2, 4), (0, 1, 1), spare=spare)(rng, effort)
     ), _judge),
    ("sums-are-wide", "terms of about 2^11 and 2^20 cancel exactly: at least float32 adds them",
     _large_terms_cancel, _judge),
    ("range-is-kept", "rows of 2^60 with small weights, and the reverse: nothing passes through "
     "a format of less range", _extreme_scales, _judge),
    ("many-slots", "up to 32 slots, and none of the usual numbers",
     _shaped((1, 9, 2), (2, 11, 3), (2, 16, 1), (2, 17, 5), (3, 32, 4), drop=0.1), _judge),
    ("square-is-not-transposed", "with T = K = H arrays fit transposed: they must not be",
     _shaped((2, 2, 2), (3, 3, 3), (8, 8, 8), (17, 17, 17)), _judge),
    ("edges-of-tiles", "widths and numbers of tokens beside 16, 32, 64, 128 and 256",
     _shaped((15, 2, 17), (33, 1, 31), (63, 2, 65), (65, 3, 127), (129, 2, 129), (257, 1, 255)),
     _judge),
    ("rows-beyond-16-bits", "more than 65,536 rows: row numbers are not cut",
     _shaped((66_001, 1, 1), drop=0.001), _judge),
    ("order-follows-slots", "a token's sum is the same bits wherever its rows lie: slots are added "
     "in order, not rows", _drawn("normal", drop=0.1, spare=1), _judge_order),
)  # fmt: skip

COMBINE = Kind(
    name="combine",
    signature="fn(rows (R,H), row_ids (T,K), topk_weights (T,K)) -> (T,H)",
    expected=_expected,
    checks=(
        *(
            Check(
                name=name,
                about=about,
                cases=cases,
                judge=judge,
                script=(lambda _: _ORDER) if judge is _judge_order else None,
            )
            for name, about, cases, judge in _CHECKS
        ),
        *hygiene_checks(_drawn("integers", drop=0.2, spare=1), _expected),
    ),
    reductions=_reductions,
)


def check_combine(fn: Callable[..., Any], **settings: Unpack[Settings]) -> Report:
    """Check ``fn(rows (R,H), row_ids (T,K), topk_weights (T,K)) -> (T,H)``.

    Token t must be the sum of ``topk_weights[t, k] * rows[row_ids[t, k]]``, slots in ascending
    order, added in float32 at least. A slot with row -1 adds exactly 0, and nothing of it is
    read. Keywords are those of `run_checks`.
    """
    return run_checks(COMBINE, fn, **settings)
