"""The register tiles: exact on integers, and not one number beside what they should write."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from needs import need_numba

need_numba()

import ml_dtypes
import numba
from numba_problems import CANARY

from accel.numba_cpu import products, tiles
from accel.numba_cpu.host import DOT, ROWS, VECTORS, lanes
from accel.numba_cpu.products import DEPTH
from accel.numba_cpu.team import aligned_empty

DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
DEPTHS = [*range(18), DEPTH - 1, DEPTH, DEPTH + 1]
floats = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def lanes_of(dtype: Any) -> int:
    return lanes(numba.from_dtype(np.dtype(dtype)))


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-4, 4, shape, endpoint=True).astype(float)


def placed(values: np.ndarray, dtype: Any, stride: int, start: int) -> np.ndarray:
    """Lay rows out at a stride, among NaN; a read beside them spoils a sum."""
    room = np.full(start + stride * max(len(values), 1) + values.size + 96, np.nan, dtype)
    for i, row in enumerate(values):
        room[start + i * stride : start + i * stride + len(row)] = row
    return room


def guarded(size: int, dtype: Any) -> np.ndarray:
    """Return a buffer full of canaries that begins at a cache line."""
    room = aligned_empty((size,), dtype)
    room[...] = CANARY
    return room


def assert_written(buffer: np.ndarray, places: np.ndarray, want: np.ndarray) -> None:
    """Check the numbers at some places, and the canaries at all others."""
    np.testing.assert_array_equal(buffer[places], want)
    rest = np.ones(buffer.size, bool)
    rest[places] = False
    assert (buffer[rest] == CANARY).all(), np.flatnonzero(rest & (buffer != CANARY))


@functools.cache
def outer_tile(vectors: int, by_column: bool) -> Any:
    """Return a tile as Python can call it; never from a cache, which does not see its parts."""
    tile = products.tile_columns if by_column else getattr(products, f"_tile_{vectors}")

    @numba.njit
    def run(a, at, a_stride, b, b_at, b_stride, c, c_at, c_stride, depth, rows, add, later_rows):
        # What is asked for in advance may lie anywhere.
        tile(a, at, a_stride, b, b_at, b_stride, c, c_at, c_stride, depth, rows, add,
             a, 10**9, -(2**40), later_rows, 10**7, 2)  # fmt: skip

    return run


def check_outer(
    dtype: Any, vectors: int, rows: int, depth: int, *, by_column: bool, add: bool, later_rows: int
) -> None:
    rng = np.random.default_rng((rows, depth, vectors))
    n = lanes_of(dtype)
    width = vectors * n
    a, b, c = (integers(rng, *s) for s in ((rows, depth), (depth, width), (rows, width)))
    laid = a.T if by_column else a
    a_stride, b_stride, c_stride = laid.shape[1] + 3, width + 5, width + 2 * n
    a_room = placed(laid, dtype, a_stride, 7)
    b_room = placed(b, dtype, b_stride, 11)
    c_room = guarded(2 * n + rows * c_stride + 64, dtype)
    places = 2 * n + c_stride * np.arange(rows)[:, None] + np.arange(width)
    if add:
        c_room[places] = c
    copies = a_room.copy(), b_room.copy()
    outer_tile(vectors, by_column)(
        a_room,
        7,
        a_stride,
        b_room,
        11,
        b_stride,
        c_room,
        2 * n,
        c_stride,
        depth,
        rows,
        add,
        later_rows,
    )
    assert_written(c_room, places, a @ b + (c if add else 0.0))
    assert (a_room.tobytes(), b_room.tobytes()) == tuple(m.tobytes() for m in copies)


@floats
@pytest.mark.parametrize("vectors", range(1, VECTORS + 1))
def test_outer_tile_by_row(vectors: int, dtype: Any) -> None:
    for rows in range(1, ROWS + 1):
        for depth in DEPTHS:
            for add in (False, True):
                check_outer(dtype, vectors, rows, depth, by_column=False, add=add, later_rows=3)


@floats
@pytest.mark.parametrize("past_caches", [False, True])
def test_outer_tile_by_column(past_caches: bool, dtype: Any) -> None:
    for rows in range(1, ROWS + 1):
        for depth in DEPTHS:
            for add in (False, True):
                check_outer(
                    dtype,
                    VECTORS,
                    rows,
                    depth,
                    by_column=True,
                    add=add,
                    later_rows=int(past_caches),
                )


def stored(values: np.ndarray, half: str | None) -> np.ndarray:
    """Return weights as kernels take them: half precision as its bits."""
    return values if half is None else values.astype(HALVES[half]).view(np.uint16)


@numba.njit
def run_dots(x, x_at, x_stride, m, w, w_at, depth, n, half, c, c_at, c_stride, whole, ahead):
    products._dots(x, x_at, x_stride, m, w, w_at, depth, n, half, c, c_at, c_stride, whole, ahead)


@pytest.mark.parametrize(
    ("dtype", "half"), [("float32", None), ("float64", None), *(("float32", h) for h in HALVES)]
)
def test_dot_tile(dtype: str, half: str | None) -> None:
    n = lanes_of(dtype)
    rng = np.random.default_rng(5)
    code = 0 if half is None else list(HALVES).index(half) + 1
    for whole in (0, n, 2 * n, 512):
        depth = whole + 3  # the rows' stride; what is beyond `whole` is not the tile's
        x, w = integers(rng, DOT, depth), integers(rng, DOT, depth)
        for rows in range(1, DOT + 1):
            for columns in range(1, DOT + 1):
                x_room = placed(x[:rows], dtype, depth + 2, 5)
                w_room = stored(placed(w[:columns].reshape(1, -1), dtype, depth, 9), half)
                c_room = guarded(200, dtype)
                run_dots(
                    x_room, 5, depth + 2, rows, w_room, 9, depth, columns, code, c_room, 3, 11,
                    whole, 4 * depth,
                )  # fmt: skip
                places = 3 + 11 * np.arange(rows)[:, None] + np.arange(columns)
                want = x[:rows, :whole] @ w[:columns, :whole].T
                assert_written(c_room, places, want)


@numba.njit
def run_transpose(source, starts, first, column, target, to, to_stride, stream):
    tiles.transpose_tile(source, starts, first, column, target, to, to_stride, stream)


@floats
@pytest.mark.parametrize("stream", [False, True])
def test_transpose_tile(stream: bool, dtype: Any) -> None:
    n = lanes_of(dtype)
    source = np.arange(2000).astype(dtype)
    starts = np.random.default_rng(1).integers(0, 1900, n + 4)
    for column in (0, 1, 5):
        for to, stride in ((0, n), (n, 3 * n), (3, n + 1)):
            if stream and (to % n or stride % n):
                continue
            room = guarded(to + stride * n + 40, dtype)
            run_transpose(source, starts, 2, column, room, to, stride, stream)
            places = to + stride * np.arange(n)[:, None] + np.arange(n)
            want = source[starts[2 : n + 2] + column + np.arange(n)[:, None]]
            assert_written(room, places, want)


@numba.njit
def run_copy(source, starts, column, count, half, scales, first, scaled, target, to, panels, apart):
    tiles.copy_panels(
        source, starts, column, count, half, scales, first, scaled, target, to, panels, apart
    )


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "half"), [("float32", None), ("float64", None), *(("float32", h) for h in HALVES)]
)
def test_copy_panels(dtype: str, half: str | None, scaled: bool) -> None:
    """Half weights are never scaled; the flag is then without meaning."""
    width = VECTORS * lanes_of(dtype)
    rng = np.random.default_rng(2)
    values = integers(rng, 1500)
    source = stored(values.astype(dtype), half)
    scales = integers(rng, 64).astype(dtype)
    code = 0 if half is None else list(HALVES).index(half) + 1
    for count in (0, 1, 2, 17, 40):
        for panels in (0, 1, 3):
            starts = np.full(count + 32, -(2**40))  # what is beyond is asked for, never used
            starts[:count] = rng.integers(0, 1500 - panels * width - 3, count)
            apart = width * count + 5
            room = guarded(7 + apart * panels + 30, dtype)
            run_copy(source, starts, 3, count, code, scales, 4, scaled, room, 7, panels, apart)
            row, panel, n = np.ogrid[:count, :panels, :width]
            want = values[starts[row] + 3 + panel * width + n]
            if scaled and half is None:
                want = want * scales[4 + row]
            assert_written(room, 7 + panel * apart + row * width + n, want)


@numba.njit
def run_widen(w, start, count, half, lanes, out, at):
    products.widen_row(w, start, count, half, lanes, out, at)


@pytest.mark.parametrize("half", HALVES)
def test_every_half_number_is_widened_exactly(half: str) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaN
        want = patterns.view(HALVES[half]).astype(np.float32)
    n, code = lanes_of("float32"), list(HALVES).index(half) + 1
    for start, count in ((0, 2**16), (1, 2**16 - 2), (5, n - 1), (2**16 - 1, 1), (9, 0)):
        room = guarded(count + 2 * n, np.float32)
        run_widen(patterns, start, count, code, n, room, n - 3)
        got, expected = room[n - 3 : n - 3 + count], want[start : start + count]
        nan = np.isnan(expected)
        assert (np.isnan(got) == nan).all()
        np.testing.assert_array_equal(got.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
        assert (room[: n - 3] == CANARY).all()
        assert (room[n - 3 + count :] == CANARY).all()
