"""What cases are drawn from: sizes, loads, values, layouts. Small ones come first."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from typing import Literal

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.conformance.case import Case, Effort

# Python names it since 3.13.
NO_RESERVE = 0x4000 if sys.platform.startswith("linux") else 0
Values = Literal["integers", "normal"]
LOADS = ("spread", "one-expert", "empty-first", "empty-last", "every-other", "skewed")
# Around the tile sizes of real kernels, and not multiples of them.
WIDTHS = (1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 65)
EXPERTS = (1, 2, 3, 4, 5, 7, 8, 16, 33)


def sizes(rng: np.random.Generator, effort: Effort) -> Iterator[tuple[int, int, int, int]]:
    """Yield (rows, experts, width, other width), growing from 1 to beyond a tile."""
    for i in range(effort.cases):
        reach = (i + 1) / effort.cases
        rows = int(rng.integers(1, 2 + int(60 * reach)))
        experts = EXPERTS[int(rng.integers(0, max(2, int(len(EXPERTS) * reach))))]
        widths = WIDTHS[: max(3, int(len(WIDTHS) * reach))]
        yield rows, experts, int(rng.choice(widths)), int(rng.choice(widths))


def route_sizes(rng: np.random.Generator, effort: Effort) -> Iterator[tuple[int, int, int]]:
    """Yield (T, E, K), growing, K up to 32; small crafted ones first."""
    yield from ((1, 1, 1), (1, 3, 2), (2, 4, 2), (3, 3, 1), (2, 3, 3))
    for i in range(effort.cases):
        reach = (i + 1) / effort.cases
        experts = EXPERTS[int(rng.integers(1, max(3, int(len(EXPERTS) * reach))))]
        tokens = int(rng.integers(1, 2 + int(30 * reach)))
        yield tokens, experts, int(rng.integers(1, min(experts, 32) + 1))


def draw_counts(rng: np.random.Generator, rows: int, experts: int, load: str) -> HostArray:
    """Return how many rows every expert has (E,), `rows` in total."""
    share: HostArray = np.ones(experts)
    if load == "one-expert":
        share = np.eye(experts)[int(rng.integers(experts))]
    elif load == "empty-first" and experts > 1:
        share[: (experts + 1) // 2] = 0
    elif load == "empty-last" and experts > 1:
        share[experts // 2 :] = 0
    elif load == "every-other":
        share[1::2] = 0
    elif load == "skewed":
        share = 0.5 ** np.arange(experts)
    counts: HostArray = rng.multinomial(rows, share / share.sum())
    return counts


def offsets_of(counts: HostArray) -> HostArray:
    """Return expert_offsets (E+1,) int32 with a leading 0."""
    offsets = np.zeros(len(counts) + 1, np.int32)
    offsets[1:] = np.cumsum(counts)
    return offsets


def draw_ids(
    rng: np.random.Generator, tokens: int, experts: int, top_k: int, load: str = "spread"
) -> HostArray:
    """Return topk_ids (T, K) int32, distinct within a token; "one-expert" puts expert 0 first."""
    if tokens > 1024:  # one call of the generator for each would take long
        ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    else:
        ids = np.array([rng.permutation(experts)[:top_k] for _ in range(tokens)], np.int32)
    ids = ids.reshape(tokens, top_k)
    if load == "one-expert":
        for row in ids:
            other = row != 0
            row[:] = np.concatenate([[0], row[other]])[:top_k]
    return ids


def draw_values(
    rng: np.random.Generator, shape: tuple[int, ...], values: Values, dtype: str
) -> HostArray:
    """Return integers from -2 to 2, or normal numbers, in `dtype`."""
    if values == "integers":
        return rng.integers(-2, 3, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def draw_separated(
    rng: np.random.Generator, shape: tuple[int, int], dtype: str, gap: float = 1 / 64
) -> HostArray:
    """Return normal numbers times 2 with at least `gap` between any two of a row."""
    values = np.sort(2.0 * rng.standard_normal(shape), axis=1)
    ramp = gap * np.arange(shape[1])
    spread = ramp + np.maximum.accumulate(values - ramp, axis=1)
    return rng.permuted(spread, axis=1).astype(dtype)


def strided(x: HostArray) -> HostArray:
    """Return the same values with gaps between them along the last axis; the gaps hold NaN."""
    room = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan if x.dtype.kind == "f" else 2**30)
    wide = room.astype(x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def far_apart(x: HostArray, y: HostArray) -> tuple[HostArray, HostArray] | None:
    """Return two arrays of up to three entries with 2**30 elements between entries, read-only.

    Memory is reserved, not used; None where that is not possible.
    """
    step = 2**30 * x.itemsize
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        room = mmap.mmap(-1, 2 * step + 2**16, flags=flags)
    except (AttributeError, OSError, ValueError, OverflowError):
        return None
    views = []
    for array, start in ((x, 0), (y, 2**15)):
        view: HostArray = np.ndarray(
            array.shape, array.dtype, room, start, (step, *array.strides[1:])
        )
        view[...] = array
        view.flags.writeable = False
        views.append(view)
    return views[0], views[1]


def read_only(x: HostArray) -> HostArray:
    """Return a copy that must not be written to."""
    copy = x.copy()
    copy.flags.writeable = False
    return copy


def lay_out(case: Case, layout: Literal["strided", "read_only"]) -> Case:
    """Return the case with all floating arrays strided, or all arrays read-only."""
    changed = {}
    for name, value in case.arguments.items():
        if isinstance(value, np.ndarray) and value.ndim:
            if layout == "read_only":
                changed[name] = read_only(value)
            elif value.dtype.kind == "f" and value.shape[-1]:
                changed[name] = strided(value)
    return case.replace(**changed)


def kept_parts(n: int) -> Iterator[HostArray]:
    """Yield which of n things a smaller case keeps: a half, all but some, all but one."""
    for parts in dict.fromkeys((2, 4, 8, n) if n <= 64 else (2, 8) if n <= 1024 else (2,)):
        if 1 < parts <= n:
            for gone in np.array_split(np.arange(n), parts):
                yield np.delete(np.arange(n), gone)
