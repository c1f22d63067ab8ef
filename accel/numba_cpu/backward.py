"""The products of the backward pass: rows times a matrix as it is, and weight gradients.

Both are outer products with the weights, or a gradient's columns, along the lanes. Tasks are cut
as in `forward`. A sum over rows or depth runs in ascending order, whatever the blocks.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from .compiling import inner, kernel
from .curves import activate_backward
from .host import LINE_BYTES, ROWS
from .products import copy_row, dot, tile_columns, tile_rows
from .tickets import take_ticket
from .tiles import copy_panels

# Depth of the weights that are copied side by side at once, for a whole range of outputs.
BACK_DEPTH = 128
# Rows that go through a tile of a weight gradient at once.
GRADIENT_DEPTH = 1024
# Rows of a matrix read side by side when only a few tokens meet it.
_STREAMS = 16


@inner
def _copy_rows(x, token_ids, first, rows, depth, out):
    for r in range(rows):
        row = token_ids[first + r] if token_ids.size else first + r
        source = x[row * depth : (row + 1) * depth]
        goal = out[r * depth : (r + 1) * depth]
        for k in range(depth):
            goal[k] = source[k]


def _stream_product(
    a, a_start, a_stride, rows, w, start, depth, outputs,
    width, panel, c, c_stride,
):  # fmt: skip
    """Do the same for whole panels of weights where they lie, a few long rows at a time."""


@overload(_stream_product)
def _choose_stream(
    a, a_start, a_stride, rows, w, start, depth, outputs,
    width, panel, c, c_stride,
):  # fmt: skip
    def full(
        a, a_start, a_stride, rows, w, start, depth,
        outputs, width, panel, c, c_stride,
    ):  # fmt: skip
        line = LINE_BYTES // w.itemsize
        for k in range(0, depth, _STREAMS):
            count = min(_STREAMS, depth - k)
            for n in range(0, width, panel):
                here = start + k * outputs + n
                # The first tile asks for what the next rows hold below these.
                later, asked = here + _STREAMS * outputs, min(_STREAMS, depth - k - count)
                for m in range(0, rows, ROWS):
                    tile_rows(a, a_start + m * a_stride + k, a_stride, w, here, outputs, c,
                              m * c_stride + n, c_stride, count, min(ROWS, rows - m), k > 0,
                              w, later, 0, asked, outputs, panel // line)  # fmt: skip
                    asked = 0

    def never(
        a, a_start, a_stride, rows, w, start, depth,
        outputs, width, panel, c, c_stride,
    ):  # fmt: skip
        """Weights of half precision go through panels."""

    return never if w.dtype == types.uint16 else full


@inner
def _back_product(
    a, a_start, a_stride, rows, w, start, depth, outputs, width, half, skinny, panel, lanes, c,
    c_stride, at, starts,
):  # fmt: skip
    """Write ``c[r, n] = sum over k of a[r, k] * w[start + k*outputs + n]`` for n < width.

    `c_stride` is a multiple of the panel, and columns beyond `width` are zeros. Weights go through
    ``c[at:]``, BACK_DEPTH * c_stride numbers: while some are multiplied, the next are asked for.
    """
    done = 0
    if skinny and half == 0:
        done = width - width % panel
        _stream_product(
            a, a_start, a_stride, rows, w, start, depth, outputs, done, panel, c, c_stride
        )
    line = LINE_BYTES // w.itemsize
    tiles = -(-rows // ROWS)
    for k in range(0, depth, BACK_DEPTH):
        count = min(BACK_DEPTH, depth - k)
        following = min(BACK_DEPTH, depth - k - count)
        blocks = -(-count * c.itemsize // LINE_BYTES)
        for i in range(count):
            starts[i] = start + (k + i) * outputs
        full = width - width % panel
        copy_panels(w, starts, done, count, half, c, 0, False, c, at + done * BACK_DEPTH,
                    (full - done) // panel, panel * BACK_DEPTH)  # fmt: skip
        if full < width:
            to = at + full * BACK_DEPTH
            for i in range(count):
                copy_row(w, starts[i] + full, width - full, half, lanes, c, to + i * panel)
                for j in range(to + i * panel + width - full, to + (i + 1) * panel):
                    c[j] = 0.0
        for n in range(done, width, panel):
            # Every tile asks for its share: a few rows for each line of its depth.
            share, asked = -(-following // (tiles * blocks)), 0
            for m in range(0, rows, ROWS):
                later = start + (k + count + asked) * outputs + n
                share = share if asked < following else 0
                tile_rows(a, a_start + m * a_stride + k, a_stride, c, at + n * BACK_DEPTH, panel,
                          c, m * c_stride + n, c_stride, count, min(ROWS, rows - m), k > 0,
                          w, later, share * outputs, share, outputs, panel // line)  # fmt: skip
                asked += share * blocks


@kernel
def project_back(
    tickets, thread, scratch, places, tasks, panel, lanes,
    room, a, base, depth, w, outputs, half, y,
):  # fmt: skip
    """Write ``y[r] = a[r - base] @ w[e]`` for rows a of `depth` and w (E, depth, outputs)."""
    mine, starts = scratch[thread], places[thread]
    while True:
        ticket = take_ticket(tickets)
        if ticket >= len(tasks):
            return
        e, first, rows, n0, width, _, wide_rows = tasks[ticket]
        stride = -(-width // panel) * panel
        _back_product(a, (first - base) * depth, depth, rows, w, e * depth * outputs + n0, depth,
                      outputs, width, half, wide_rows == 0, panel, lanes, mine, stride, room,
                      starts)  # fmt: skip
        for r in range(rows):
            goal = y[(first + r) * outputs + n0 : (first + r) * outputs + n0 + width]
            source = mine[r * stride : r * stride + width]
            for n in range(width):
                goal[n] = source[n]


@kernel
def project_back_and_activate(
    tickets, thread, scratch, places, tasks, panel, lanes,
    room, grad, depth, token_ids, w, inner, half,
    row_weights, dropout, gate_up, kind, gated, settings, base,
    step, act, grad_gate_up, partial,
):  # fmt: skip
    """Go from the output's gradient to those of the pre-activations, eq. (6), (4), (7) and (9).

    `act` and `grad_gate_up` begin at row `base`; ``partial[range, r]`` gets each range's share of
    the gradient of a row's weight. Scratch holds products, the panel in preparation and the
    gathered rows.
    """
    mine, starts = scratch[thread], places[thread]
    wide_size = 2 * inner if gated else inner
    gathered = mine[room + BACK_DEPTH * step :]
    ready, zero = -1, np.int64(0)  # a plain 0 would be another type, and compile things twice
    while True:
        ticket = take_ticket(tickets)
        if ticket >= len(tasks):
            return
        e, first, rows, n0, width, _, wide_rows = tasks[ticket]
        if ready != first:
            _copy_rows(grad, token_ids, first, rows, depth, gathered)
            ready = first
        stride = -(-width // panel) * panel
        _back_product(gathered, zero, depth, rows, w, e * depth * inner + n0, depth, inner, width,
                      half, wide_rows == 0, panel, lanes, mine, stride, room,
                      starts)  # fmt: skip
        for r in range(rows):
            row = first + r
            unweighted = mine[r * stride : r * stride + width]
            g_at = row * wide_size + n0
            g = gate_up[g_at : g_at + width]
            out = (row - base) * wide_size + n0
            grad_g = grad_gate_up[out : out + width]
            u, grad_u = g, grad_g
            if gated:
                u = gate_up[g_at + inner : g_at + inner + width]
                grad_u = grad_gate_up[out + inner : out + inner + width]
            here = act[(row - base) * inner + n0 : (row - base) * inner + n0 + width]
            factor = row_weights[row] if row_weights.size else unweighted.dtype.type(1.0)
            activate_backward(kind, gated, settings, factor, unweighted, g, u, here, grad_g, grad_u)
            if dropout.size:
                kept = dropout[row * inner + n0 : row * inner + n0 + width]
                for i in range(width):
                    here[i] *= kept[i]
                    grad_g[i] *= kept[i]
                    if gated:
                        grad_u[i] *= kept[i]
            partial[n0 // step, row] = dot(unweighted, here)


@inner
def _row_starts(width, token_ids, base, first, count, starts):
    for i in range(count):
        row = token_ids[first + i] if token_ids.size else first + i - base
        starts[i] = row * width


@inner
def _pack_columns(
    x, starts, scales, first, count, column, here, stride,
    panel, out, at,
):  # fmt: skip
    """Copy columns of some rows, times ``scales[first + i]``; zeros up to `stride`."""
    if here == panel and stride == panel:
        copy_panels(x, starts, column, count, np.int64(0), scales, first, scales.size > 0, out, at,
                    1, 0)  # fmt: skip
        return
    for i in range(count):
        source = x[starts[i] + column : starts[i] + column + here]
        goal = out[at + i * stride : at + (i + 1) * stride]
        if scales.size:
            for n in range(here):
                goal[n] = source[n] * scales[first + i]
        else:
            for n in range(here):
                goal[n] = source[n]
        for n in range(here, stride):
            goal[n] = 0.0


@kernel
def weight_gradient(
    tickets, thread, scratch, places, tasks, panel, lanes,
    room, a, a_width, a_tokens, a_scale, b, b_width,
    b_tokens, b_scale, base, accumulate, stream, out,
):  # fmt: skip
    """Write ``out[e, m, n] (+)= sum over rows r of e of a[r, m] * b[r, n]``.

    Either side may be gathered by token and scaled by row; else its first row is `base`. Experts
    without rows get zeros. `stream` writes past the caches, if rows of `out` are whole lines.
    Scratch holds a strip of a, one tile, then panels of b: `room` for the strip and the tile.
    """
    mine, starts = scratch[thread], places[thread]
    panels = mine[room:]
    tile = room - ROWS * panel
    # What the strip and the panels hold: of which first row, and from which output or column.
    strip, strip_at, ready, ready_at = -1, -1, -1, -1
    zero = np.int64(0)  # a plain 0 is another type: compiled twice
    while True:
        ticket = take_ticket(tickets)
        if ticket >= len(tasks):
            return
        e, first, rows, m0, width, n0, columns = tasks[ticket]
        corner = (e * a_width + m0) * b_width + n0
        if rows == 0 and not accumulate:
            for m in range(width):
                empty = out[corner + m * b_width : corner + m * b_width + columns]
                for n in range(columns):
                    empty[n] = 0.0
        for k in range(0, rows, GRADIENT_DEPTH):
            count = min(GRADIENT_DEPTH, rows - k)
            add = accumulate or k > 0
            if strip != first + k or strip_at != m0:
                _row_starts(a_width, a_tokens, base, first + k, count, starts)
                _pack_columns(a, starts, a_scale, first + k, count, m0, width, width, panel, mine,
                              zero)  # fmt: skip
                strip, strip_at = first + k, m0
            _row_starts(b_width, b_tokens, base, first + k, count, starts)
            # Few rows: all panels of b once, then long rows of the gradient one after another.
            padded = -(-columns // panel) * panel
            few = rows * padded <= panels.size and rows <= GRADIENT_DEPTH
            if few and (ready != first or ready_at != n0):
                for n in range(0, columns, panel):
                    _pack_columns(b, starts, b_scale, first, count, n0 + n,
                                  min(panel, columns - n), panel, panel, panels,
                                  n * count)  # fmt: skip
                ready, ready_at = first, n0
            if few:
                for m in range(0, width, ROWS):
                    for n in range(0, columns, panel):
                        _gradient_tile(mine, m, width, panels, n * count, panel, tile, count,
                                       min(ROWS, width - m), add, stream, out,
                                       corner + m * b_width + n, b_width,
                                       min(panel, columns - n))  # fmt: skip
                continue
            for n in range(0, columns, panel):
                here = min(panel, columns - n)
                _pack_columns(b, starts, b_scale, first + k, count, n0 + n, here, panel, panel,
                              panels, zero)  # fmt: skip
                for m in range(0, width, ROWS):
                    _gradient_tile(mine, m, width, panels, zero, panel, tile, count,
                                   min(ROWS, width - m), add, stream, out,
                                   corner + m * b_width + n, b_width, here)  # fmt: skip


@inner
def _gradient_tile(
    strip, m, stride, panels, at, panel, tile, count,
    rows, add, stream, out, goal, out_stride, here,
):  # fmt: skip
    """Run one tile into the gradient; through ``strip[tile:]`` where the panel is not full."""
    if here == panel:
        tile_columns(strip, m, stride, panels, at, panel, out, goal, out_stride, count, rows, add,
                     out, 0, 0, stream, 0, 0)  # fmt: skip
        return
    tile_columns(strip, m, stride, panels, at, panel, strip, tile, panel, count, rows, False,
                 out, 0, 0, 0, 0, 0)  # fmt: skip
    for i in range(rows):
        for n in range(here):
            value = strip[tile + i * panel + n]
            place = goal + i * out_stride + n
            out[place] = out[place] + value if add else value
