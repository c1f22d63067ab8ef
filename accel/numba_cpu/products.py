"""Blocks of a product: a few rows of one expert's matrix times a few tokens.

Two forms. *Skinny*: inner products along the depth, for a handful of tokens; every weight is read
once, straight from where it lies. *Wide*: outer products, weights as broadcasts, tokens along the
lanes; tokens lie in panels [depth][columns], `columns` a multiple of the lanes.
"""

from __future__ import annotations

from numba import types
from numba.extending import overload

from .compiling import inner, reassociated
from .host import DOT, LINE_BYTES, ROWS, VECTORS
from .tiles import (
    make_dot_tile,
    make_outer_tile,
    transpose_tile,
    widen_number,
    widen_tile,
)

# Depth that goes through a tile at once: a panel of it stays in the second-level cache.
DEPTH = 128

_tile_1, _tile_2, _tile_3, _tile_4 = (make_outer_tile(min(v, VECTORS)) for v in (1, 2, 3, 4))
tile_rows = make_outer_tile(VECTORS, ask_next=True)
tile_columns = make_outer_tile(VECTORS, by_column=True)
_dot, _dot_float16, _dot_bfloat16 = (make_dot_tile(half) for half in (None, "float16", "bfloat16"))


@inner
def _outer(
    w, w_start, w_stride, xt, xt_start, columns, lanes, c, c_start, depth, rows, add, ahead
):  # fmt: skip
    """Run the tile as wide as the panel; the next rows of w are `ahead` of these."""
    vectors, later, line = columns // lanes, w_start + ahead, LINE_BYTES // c.itemsize
    if vectors == 4:
        _tile_4(w, w_start, w_stride, xt, xt_start, columns, c, c_start, columns, depth, rows, add,
                w, later, line, ROWS, w_stride, 1)  # fmt: skip
    elif vectors == 3:
        _tile_3(w, w_start, w_stride, xt, xt_start, columns, c, c_start, columns, depth, rows, add,
                w, later, line, ROWS, w_stride, 1)  # fmt: skip
    elif vectors == 2:
        _tile_2(w, w_start, w_stride, xt, xt_start, columns, c, c_start, columns, depth, rows, add,
                w, later, line, ROWS, w_stride, 1)  # fmt: skip
    else:
        _tile_1(w, w_start, w_stride, xt, xt_start, columns, c, c_start, columns, depth, rows, add,
                w, later, line, ROWS, w_stride, 1)  # fmt: skip


def wide_product(
    w, start, depth, width, half, xt, xt_start, columns,
    lanes, c, c_start, buffer, at,
):  # fmt: skip
    """Write ``c[n, t] = sum over k of w[start + n*depth + k] * xt[k, t]`` for n < width.

    Half-precision weights go through ``buffer[at:]``, ROWS * DEPTH numbers.
    """


@overload(wide_product)
def _choose_wide(
    w, start, depth, width, half, xt, xt_start, columns,
    lanes, c, c_start, buffer, at,
):  # fmt: skip
    if w.dtype != types.uint16:

        def full(
            w, start, depth, width, half, xt, xt_start,
            columns, lanes, c, c_start, buffer, at,
        ):  # fmt: skip
            for k in range(0, depth, DEPTH):
                here = min(DEPTH, depth - k)
                for n in range(0, width, ROWS):
                    _outer(w, start + n * depth + k, depth, xt, xt_start + k * columns, columns,
                           lanes, c, c_start + n * columns, here, min(ROWS, width - n), k > 0,
                           ROWS * depth)  # fmt: skip

        return full

    def converted(
        w, start, depth, width, half, xt, xt_start,
        columns, lanes, c, c_start, buffer, at,
    ):  # fmt: skip
        for k in range(0, depth, DEPTH):
            here = min(DEPTH, depth - k)
            for n in range(0, width, ROWS):
                rows = min(ROWS, width - n)
                for m in range(rows):
                    widen_row(
                        w, start + (n + m) * depth + k, here, half, lanes, buffer, at + m * DEPTH
                    )
                _outer(buffer, at, DEPTH, xt, xt_start + k * columns, columns, lanes, c,
                       c_start + n * columns, here, rows, k > 0, 0)  # fmt: skip

    return converted


@inner
def widen_row(w, start, count, half, lanes, out, at):
    """Convert a stretch of half-precision numbers."""
    whole = count - count % lanes
    for k in range(0, whole, lanes):
        widen_tile(w, start + k, out, at + k, half)
    for k in range(whole, count):
        out[at + k] = widen_number(w[start + k], half)


def copy_row(w, start, count, half, lanes, out, at):
    """Copy a stretch of weights, converting those of half precision."""


@overload(copy_row)
def _choose_copy(w, start, count, half, lanes, out, at):
    if w.dtype == types.uint16:

        def converted(w, start, count, half, lanes, out, at):
            widen_row(w, start, count, half, lanes, out, at)

        return converted

    def full(w, start, count, half, lanes, out, at):
        goal, source = out[at : at + count], w[start : start + count]
        for n in range(count):
            goal[n] = source[n]

    return full


def weight(w, at, half):
    """Return one weight."""


@overload(weight)
def _choose_weight(w, at, half):
    if w.dtype == types.uint16:

        def converted(w, at, half):
            return widen_number(w[at], half)

        return converted

    def full(w, at, half):
        return w[at]

    return full


def _dots(
    x, x_start, x_stride, rows, w, start, depth, width,
    half, c, c_start, c_stride, whole, ahead,
):  # fmt: skip
    """Run the tile of the weights' type."""


@overload(_dots)
def _choose_dots(
    x, x_start, x_stride, rows, w, start, depth, width,
    half, c, c_start, c_stride, whole, ahead,
):  # fmt: skip
    if w.dtype != types.uint16:

        def full(
            x, x_start, x_stride, rows, w, start, depth,
            width, half, c, c_start, c_stride, whole, ahead,
        ):  # fmt: skip
            _dot(x, x_start, x_stride, rows, w, start, depth, width, c, c_start, c_stride, whole,
                 ahead)  # fmt: skip

        return full

    def converted(
        x, x_start, x_stride, rows, w, start, depth,
        width, half, c, c_start, c_stride, whole, ahead,
    ):  # fmt: skip
        if half > 1:
            _dot_bfloat16(x, x_start, x_stride, rows, w, start, depth, width, c, c_start, c_stride,
                          whole, ahead)  # fmt: skip
        else:
            _dot_float16(x, x_start, x_stride, rows, w, start, depth, width, c, c_start, c_stride,
                         whole, ahead)  # fmt: skip

    return converted


@inner
def skinny_product(
    x, x_start, x_stride, rows, w, start, depth, width,
    half, lanes, c, c_start, c_stride,
):  # fmt: skip
    """Write ``c[r, n] = sum over k of x[r, k] * w[start + n*depth + k]`` for n < width."""
    whole = depth - depth % lanes
    for n in range(0, width, DOT):
        columns = min(DOT, width - n)
        for r in range(0, rows, DOT):
            # The next weights are asked for once, while the first tokens meet these.
            ahead = DOT * depth if r == 0 else 0
            _dots(x, x_start + r * x_stride, x_stride, min(DOT, rows - r), w, start + n * depth,
                  depth, columns, half, c, c_start + r * c_stride + n, c_stride, whole, ahead,
                  )  # fmt: skip
    for k in range(whole, depth):
        for n in range(width):
            factor = weight(w, start + n * depth + k, half)
            for r in range(rows):
                c[c_start + r * c_stride + n] += factor * x[x_start + r * x_stride + k]


@inner
def panel_columns(rows, panel, lanes):
    """Return how many columns the next panel of so many rows has: panels are nearly equal."""
    vectors = -(-rows // lanes)
    panels = -(-vectors * lanes // panel)
    return -(-vectors // panels) * lanes


@inner
def pack_panels(x, starts, rows, depth, panel, lanes, scales, first, out):
    """Lay rows ``x[starts[r]:][:depth]`` out as panels [depth][columns].

    Columns without a row repeat the last row. Rows are multiplied by ``scales[first + r]`` if
    there are any.
    """
    whole = depth - depth % lanes
    begin = 0
    while begin < rows:
        columns = panel_columns(rows - begin, panel, lanes)
        base = begin * depth
        for t in range(0, columns, lanes):
            for k in range(0, whole, lanes):
                transpose_tile(x, starts, begin + t, k, out, base + k * columns + t, columns,
                               False)  # fmt: skip
        for k in range(whole, depth):
            for t in range(columns):
                out[base + k * columns + t] = x[starts[begin + t] + k]
        if scales.size:
            for k in range(depth):
                for t in range(min(columns, rows - begin)):
                    out[base + k * columns + t] *= scales[first + begin + t]
        begin += columns


@inner
def spread_panel(
    c, c_start, columns, rows, width, lanes, places, y,
    y_start, y_stride, stream,
):  # fmt: skip
    """Write the transposed block: ``y[y_start + t*y_stride + n] = c[n, t]`` for t < rows.

    `stream`: past the caches where rows begin at whole registers; y must begin at a cache line.
    """
    stream = stream and y_start % lanes == 0 and y_stride % lanes == 0
    whole_n, whole_t = width - width % lanes, rows - rows % lanes
    for n in range(0, whole_n, lanes):
        for i in range(lanes):
            places[i] = c_start + (n + i) * columns
        for t in range(0, whole_t, lanes):
            transpose_tile(c, places, 0, t, y, y_start + t * y_stride + n, y_stride, stream)
    for t in range(rows):
        begin = 0 if t >= whole_t else whole_n
        for n in range(begin, width):
            y[y_start + t * y_stride + n] = c[c_start + n * columns + t]


@reassociated
def dot(a, b):
    """Return the inner product of two stretches."""
    total = a.dtype.type(0.0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total
