"""The products of the forward pass: rows times an expert's matrix, transposed (x @ w.T).

A task is one expert, a block of its rows and a range of outputs. Tasks are cut by size alone,
never by the number of threads, and no two write the same number: any thread may take any task.
"""

from __future__ import annotations

import numpy as np

from .compiling import inner, kernel
from .curves import activate
from .products import pack_panels, panel_columns, skinny_product, spread_panel, wide_product
from .tiles import borrow, take_ticket

# Columns of a task: expert, its first row of the block, rows, first output, outputs, first row of
# the block in padded buffers, whether the form is wide.
TASK = 7


@kernel
def project(
    tickets, thread, scratch, places, tasks, panel, lanes, room, x, packed, depth, token_ids,
    row_scale, w, outputs, half, bias, bias_scale, y,
):  # fmt: skip
    """Write ``y[r, n] = w[e, n] . (row_scale[r] x[token_ids[r]]) + bias_scale[r] bias[e, n]``.

    Empty arrays mean: rows as they are, no scale, no bias. With `packed`, x is laid out as
    `project_and_activate` leaves it. `room` numbers of a thread's scratch are for rows, then come
    products and converted weights.
    """
    tasks, x, token_ids, row_scale, w, bias, bias_scale, y = borrow(
        tasks, x, token_ids, row_scale, w, bias, bias_scale, y
    )
    mine, starts = borrow(scratch[thread], places[thread])
    source = x if packed else mine
    ready = -1
    while True:
        ticket = take_ticket(tickets)
        if ticket >= len(tasks):
            return
        e, first, rows, n0, width, padded_first, wide_rows = tasks[ticket]
        at = padded_first * depth if packed else 0
        if not packed and ready != first:
            _take_rows(x, token_ids, first, rows, wide_rows, depth, panel, lanes, row_scale,
                       starts, mine)  # fmt: skip
            ready = first
        start = (e * outputs + n0) * depth
        to = first * outputs + n0
        begin = 0
        while begin < wide_rows:
            columns = panel_columns(wide_rows - begin, panel, lanes)
            wide_product(w, start, depth, width, half, source, at + begin * depth, columns, lanes,
                         mine, room, mine, room + width * panel)  # fmt: skip
            spread_panel(mine, room, columns, min(columns, wide_rows - begin), width, lanes,
                         starts, y, to + begin * outputs, outputs, False)  # fmt: skip
            begin += columns
        if wide_rows < rows:
            skinny_product(source, at + wide_rows * depth, depth, rows - wide_rows, w, start,
                           depth, width, half, lanes, y, to + wide_rows * outputs, outputs,
                           )  # fmt: skip
        if bias.size:
            _add_bias(bias, e * outputs + n0, width, bias_scale, first, rows, y, to, outputs)


@inner
def _take_rows(
    x, token_ids, first, rows, wide_rows, depth, panel, lanes, scales, starts, out
):  # fmt: skip
    """Gather a block into scratch: panels for the wide form, then rows for the skinny one."""
    for r in range(max(rows, -(-wide_rows // lanes) * lanes)):
        row = first + min(r, rows - 1)
        starts[r] = (token_ids[row] if token_ids.size else row) * depth
    pack_panels(x, starts, wide_rows, depth, panel, lanes, scales, first, out)
    for r in range(wide_rows, rows):
        goal = out[r * depth : (r + 1) * depth]
        source = x[starts[r] : starts[r] + depth]
        for k in range(depth):
            goal[k] = source[k]
        if scales.size:
            for k in range(depth):
                goal[k] *= scales[first + r]


@inner
def _add_bias(bias, b_start, width, scales, first, rows, y, start, stride):
    """Add ``scales[first + r] * bias`` to a block of y."""
    added = bias[b_start : b_start + width]
    for r in range(rows):
        row = y[start + r * stride : start + r * stride + width]
        if scales.size:
            for n in range(width):
                row[n] += added[n] * scales[first + r]
        else:
            for n in range(width):
                row[n] += added[n]


@kernel
def project_and_activate(
    tickets, thread, scratch, places, tasks, panel, lanes, room, x, depth, token_ids, row_scale, w,
    wide_size, half, bias, kind, gated, settings, dropout, act_scale, save, base, gate_up, act,
):  # fmt: skip
    """Write ``gate_up = row_scale x w.T + bias`` (R, 2I) and its activation, by padded rows.

    The activation is multiplied by `dropout` (R, I) and `act_scale` (R,), if given, and laid out
    for `project`: panels [I][columns] for the wide form, rows for the skinny one. `gate_up` begins
    at row `base`; without `save` it is room for rows of the skinny form, and not a result.
    """
    (
        tasks, x, token_ids, row_scale, w, bias, settings, dropout, act_scale, gate_up, act
    ) = borrow(
        tasks, x, token_ids, row_scale, w, bias, settings, dropout, act_scale, gate_up, act
    )  # fmt: skip
    mine, starts = borrow(scratch[thread], places[thread])
    inner = wide_size // 2 if gated else wide_size
    halves = 2 if gated else 1
    ready = -1
    while True:
        ticket = take_ticket(tickets)
        if ticket >= len(tasks):
            return
        e, first, rows, n0, width, padded_first, wide_rows = tasks[ticket]
        if ready != first:
            _take_rows(x, token_ids, first, rows, wide_rows, depth, panel, lanes, row_scale,
                       starts, mine)  # fmt: skip
            ready = first
        begin = 0
        while begin < wide_rows:
            columns = panel_columns(wide_rows - begin, panel, lanes)
            here = min(columns, wide_rows - begin)
            size = width * columns
            for h in range(halves):  # the outputs of the gate half, then those of the up half
                n = h * inner + n0
                c = room + h * size
                wide_product(w, (e * wide_size + n) * depth, depth, width, half, mine,
                             begin * depth, columns, lanes, mine, c, mine,
                             room + halves * size)  # fmt: skip
                if bias.size:
                    for i in range(width):
                        b = bias[e * wide_size + n + i]
                        row = mine[c + i * columns : c + (i + 1) * columns]
                        for t in range(columns):
                            row[t] += b
                if save:
                    spread_panel(mine, c, columns, here, width, lanes, starts, gate_up,
                                 (first - base + begin) * wide_size + n, wide_size,
                                 True)  # fmt: skip
            goal = (padded_first + begin) * inner + n0 * columns
            out = act[goal : goal + size]
            second = room + (halves - 1) * size
            activate(kind, gated, settings, mine[room : room + size], mine[second : second + size],
                     out)  # fmt: skip
            if dropout.size or act_scale.size:
                for t in range(here):
                    _scale_act(out, t, columns, dropout, (first + begin + t) * inner + n0,
                               act_scale, first + begin + t)  # fmt: skip
            begin += columns
        if wide_rows == rows:
            continue
        for h in range(halves):
            n = h * inner + n0
            to = (first - base + wide_rows) * wide_size + n
            skinny_product(mine, wide_rows * depth, depth, rows - wide_rows, w,
                           (e * wide_size + n) * depth, depth, width, half, lanes, gate_up, to,
                           wide_size)  # fmt: skip
            if bias.size:
                _add_bias(bias, e * wide_size + n, width, bias[:0], first, rows - wide_rows,
                          gate_up, to, wide_size)  # fmt: skip
        for r in range(wide_rows, rows):
            at = (first - base + r) * wide_size + n0
            goal = (padded_first + r) * inner + n0
            second = at + (halves - 1) * inner
            out = act[goal : goal + width]
            activate(kind, gated, settings, gate_up[at : at + width],
                     gate_up[second : second + width], out)  # fmt: skip
            _scale_act(out, np.int64(0), np.int64(1), dropout, (first + r) * inner + n0, act_scale,
                       first + r)  # fmt: skip


@inner
def _scale_act(act, begin, stride, dropout, start, act_scale, row):
    """Multiply the activations of one row, ``act[begin::stride]``, by what there is."""
    count = act.size // stride
    if dropout.size:
        for i in range(count):
            act[begin + i * stride] *= dropout[start + i]
    if act_scale.size:
        for i in range(count):
            act[begin + i * stride] *= act_scale[row]
