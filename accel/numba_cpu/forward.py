"""The forward pass: one kernel, from tokens to their outputs.

A task is one expert, a block of its rows and a range of outputs; or some tokens to be summed.
Tasks are cut by size alone, never by the number of threads, and no two write the same number: any
thread may take any task. They come in stages: the first products of a group of experts, or the
second ones. A stage waits for what it reads and overwrites, and while the last tasks of one are
under way, the free threads go on with the next.
"""

from __future__ import annotations

import numpy as np

from .compiling import inner, kernel
from .curves import activate
from .products import pack_panels, panel_columns, skinny_product, spread_panel, wide_product
from .rows import ACTIVATE, BEGIN, KIND, NEEDS, PROJECT, SLOT, combine_token
from .tickets import finish_task, take_ticket, wait_for_stage


@kernel
def run_forward(
    tickets, thread, scratch, places, tasks, stages, panel, lanes, room, x, hidden, token_ids,
    row_scale, w1, wide_size, half1, bias1, kind, gated, settings, dropout, act_scale, save,
    gate_up, act, slot, packed, w2, inner, outputs, half2, bias2, bias_scale, y, row_ids, top_k,
    weights, out,
):  # fmt: skip
    """Run tasks of three kinds, each rows of `tasks` in one of the `stages`.

    ACTIVATE: ``gate_up = row_scale x w1.T + bias1`` (R, 2I) and its activation, by padded rows,
    times `dropout` (R, I) and `act_scale` (R,), to a slot of `act` and laid out for the next:
    panels [I][columns] for the wide form, rows for the skinny one. Without `save`, `gate_up` is
    not written.

    PROJECT: ``y[r, n] = w2[e, n] . act[r] + bias_scale[r] bias2[e, n]``; without `packed` of the
    rows ``row_scale[r] x[token_ids[r]]`` instead.

    SUM: ``out[t] = sum over k of weights[t, k] y[row_ids[t, k]]``.

    Empty arrays mean: rows as they are, no scale, no bias. `room` numbers of a thread's scratch
    are for rows, then come products and converted weights.
    """
    mine, starts = scratch[thread], places[thread]
    halves = 2 if gated else 1
    source = act if packed else mine
    ready, stage, clear = -1, np.int64(0), np.int64(0)
    while True:
        ticket = take_ticket(tickets)
        if ticket >= len(tasks):
            return
        while ticket >= stages[stage + 1, BEGIN]:
            stage += 1
        while clear < stages[stage, NEEDS]:
            wait_for_stage(tickets, clear, stages[clear + 1, BEGIN] - stages[clear, BEGIN])
            clear += 1
        what, slot_at = stages[stage, KIND], stages[stage, SLOT] * slot
        e, first, rows, n0, width, padded_first, wide_rows = tasks[ticket]
        gathers = what == ACTIVATE or (what == PROJECT and not packed)
        if gathers and ready != first:
            _take_rows(x, token_ids, first, rows, wide_rows, hidden, panel, lanes, row_scale,
                       starts, mine)  # fmt: skip
            ready = first
        if what == ACTIVATE:
            begin = 0
            while begin < wide_rows:
                columns = panel_columns(wide_rows - begin, panel, lanes)
                here = min(columns, wide_rows - begin)
                size = width * columns
                for h in range(halves):  # the outputs of the gate half, then those of the up half
                    n = h * inner + n0
                    c = room + h * size
                    wide_product(w1, (e * wide_size + n) * hidden, hidden, width, half1, mine,
                                 begin * hidden, columns, lanes, mine, c, mine,
                                 room + halves * size)  # fmt: skip
                    if bias1.size:
                        for i in range(width):
                            b = bias1[e * wide_size + n + i]
                            row = mine[c + i * columns : c + (i + 1) * columns]
                            for t in range(columns):
                                row[t] += b
                    if save:
                        spread_panel(mine, c, columns, here, width, lanes, starts, gate_up,
                                     (first + begin) * wide_size + n, wide_size,
                                     what == ACTIVATE)  # fmt: skip
                goal = slot_at + (padded_first + begin) * inner + n0 * columns
                done = act[goal : goal + size]
                second = room + (halves - 1) * size
                activate(kind, gated, settings, mine[room : room + size],
                         mine[second : second + size], done)  # fmt: skip
                if dropout.size or act_scale.size:
                    for t in range(here):
                        _scale_act(done, t, columns, dropout, (first + begin + t) * inner + n0,
                                   act_scale, first + begin + t)  # fmt: skip
                begin += columns
            few = rows - wide_rows
            goal = slot_at + (padded_first + wide_rows) * inner + n0
            if few and save:
                _activate_few(
                    mine, wide_rows * hidden, hidden, few, w1, e, n0, width, wide_size, half1,
                    bias1, lanes, kind, gated, settings, dropout, act_scale, first + wide_rows,
                    gate_up, (first + wide_rows) * wide_size + n0, wide_size, inner, act, goal,
                    inner,
                )  # fmt: skip
            elif few:
                _activate_few(
                    mine, wide_rows * hidden, hidden, few, w1, e, n0, width, wide_size, half1,
                    bias1, lanes, kind, gated, settings, dropout, act_scale, first + wide_rows,
                    mine, room, halves * width, width, act, goal, inner,
                )  # fmt: skip
        elif what == PROJECT:
            at = slot_at + padded_first * inner if packed else 0
            start = (e * outputs + n0) * inner
            to = first * outputs + n0
            begin = 0
            while begin < wide_rows:
                columns = panel_columns(wide_rows - begin, panel, lanes)
                wide_product(w2, start, inner, width, half2, source, at + begin * inner, columns,
                             lanes, mine, room, mine, room + width * panel)  # fmt: skip
                spread_panel(mine, room, columns, min(columns, wide_rows - begin), width, lanes,
                             starts, y, to + begin * outputs, outputs,
                             what == ACTIVATE)  # fmt: skip
                begin += columns
            if wide_rows < rows:
                skinny_product(source, at + wide_rows * inner, inner, rows - wide_rows, w2, start,
                               inner, width, half2, lanes, y, to + wide_rows * outputs, outputs,
                               )  # fmt: skip
            if bias2.size:
                _add_bias(bias2, e * outputs + n0, width, bias_scale, first, rows, y, to, outputs)
        else:
            for t in range(first, first + rows):
                combine_token(y, outputs, row_ids, top_k, weights, t, out)
        finish_task(tickets, stage)


@inner
def _activate_few(
    x, x_start, depth, rows, w, e, n0, width, wide_size, half, bias, lanes, kind, gated, settings,
    dropout, act_scale, first, c, c_start, c_stride, apart, act, act_start, inner,
):  # fmt: skip
    """Do ACTIVATE for rows of the skinny form; pre-activations go to c, its halves `apart`."""
    for h in range(2 if gated else 1):
        n = e * wide_size + h * inner + n0
        to = c_start + h * apart
        skinny_product(x, x_start, depth, rows, w, n * depth, depth, width, half, lanes, c, to,
                       c_stride)  # fmt: skip
        if bias.size:
            _add_bias(bias, n, width, bias[:0], first, rows, c, to, c_stride)
    for r in range(rows):
        g = c_start + r * c_stride
        u = g + apart if gated else g
        out = act[act_start + r * inner : act_start + r * inner + width]
        activate(kind, gated, settings, c[g : g + width], c[u : u + width], out)
        _scale_act(out, np.int64(0), np.int64(1), dropout, (first + r) * inner + n0, act_scale,
                   first + r)  # fmt: skip


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
