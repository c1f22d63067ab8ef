"""The verbs that move, scale, sum and compare rows; and the plan by counting."""

from __future__ import annotations

from .compiling import inner, kernel
from .curves import activate, activate_backward
from .host import ROWS
from .products import dot
from .tickets import take_ticket
from .tiles import ask_for

# Rows or tokens of one task.
STEP = 64
# Rows lie anywhere: they are asked for while so many numbers before them are in work.
AHEAD = 4096
# Columns of a table of tasks: expert, its first row of the block, rows, first output, outputs,
# first row of the block in padded buffers, how many of the rows are in the wide form.
TASK = 7
# Columns of a table of stages: kind of its tasks, the first one, how many stages must be complete
# before, slot of the activations. The last row has but the number of all tasks.
KIND, BEGIN, NEEDS, SLOT = range(4)
STAGE = 4
ACTIVATE, PROJECT, SUM = range(3)
# Groups of experts whose activations exist at once: one being read, one written, and one that
# is finished while others go on.
SLOTS = 3


@kernel
def count_routes(ids, num_experts, offsets):
    """Write the CSR offsets of flat ids; ids beyond the experts, and -1, have no row.

    Returns whether all ids lie in -1..num_experts - 1.
    """
    legal = True
    for e in range(num_experts + 1):
        offsets[e] = 0
    for p in range(ids.size):
        e = ids[p]
        if 0 <= e < num_experts:
            offsets[e + 1] += 1
        elif e != -1:
            legal = False
    for e in range(num_experts):
        offsets[e + 1] += offsets[e]
    return legal


@kernel
def place_routes(
    ids, top_k, num_experts, offsets, next_row, pair_ids,
    token_ids, row_ids,
):  # fmt: skip
    """Give every route its row: experts in order, inside an expert by route. O(T*K + E)."""
    for e in range(num_experts):
        next_row[e] = offsets[e]
    for p in range(ids.size):
        e = ids[p]
        if 0 <= e < num_experts:
            row = next_row[e]
            next_row[e] = row + 1
            pair_ids[row] = p
            token_ids[row] = p // top_k
            row_ids[p] = row
        else:
            row_ids[p] = -1


@kernel
def combine(
    tickets, thread, scratch, places, rows, width, row_ids, num_tokens, top_k, weights, out,
):  # fmt: skip
    """Write ``out[t] = sum over k of weights[t, k] * rows[row_ids[t, k]]``, k ascending."""
    while True:
        begin = take_ticket(tickets) * STEP
        if begin >= num_tokens:
            return
        for t in range(begin, min(begin + STEP, num_tokens)):
            combine_token(rows, width, row_ids, top_k, weights, t, out)


@inner
def combine_token(rows, width, row_ids, top_k, weights, t, out):
    """Write the sum of one token's rows."""
    goal = out[t * width : (t + 1) * width]
    later = (t + max(1, AHEAD // (top_k * width + 1))) * top_k
    for p in range(later, min(later + top_k, row_ids.size)):
        ask_for(rows, row_ids[p] * width, width)
    for n in range(width):
        goal[n] = 0.0
    for p in range(t * top_k, (t + 1) * top_k):
        if row_ids[p] < 0:
            continue
        source = rows[row_ids[p] * width : (row_ids[p] + 1) * width]
        if weights.size:
            for n in range(width):
                goal[n] += weights[p] * source[n]
        else:
            for n in range(width):
                goal[n] += source[n]


@kernel
def gather(
    tickets, thread, scratch, places, x, width, token_ids,
    out,
):  # fmt: skip
    """Write ``out[r] = x[token_ids[r]]``."""
    ahead = max(1, AHEAD // (width + 1))
    while True:
        begin = take_ticket(tickets) * STEP
        if begin >= token_ids.size:
            return
        for r in range(begin, min(begin + STEP, token_ids.size)):
            ask_for(x, token_ids[min(r + ahead, token_ids.size - 1)] * width, width)
            source = x[token_ids[r] * width : (token_ids[r] + 1) * width]
            goal = out[r * width : (r + 1) * width]
            for n in range(width):
                goal[n] = source[n]


@kernel
def scale(
    tickets, thread, scratch, places, rows, width, row_weights,
    out,
):  # fmt: skip
    """Write ``out[r] = row_weights[r] * rows[r]``; `out` may be `rows`."""
    while True:
        begin = take_ticket(tickets) * STEP
        if begin >= row_weights.size:
            return
        for r in range(begin, min(begin + STEP, row_weights.size)):
            source = rows[r * width : (r + 1) * width]
            goal = out[r * width : (r + 1) * width]
            for n in range(width):
                goal[n] = row_weights[r] * source[n]


@kernel
def dot_rows(
    tickets, thread, scratch, places, a, a_ids, b, b_ids,
    width, add, out,
):  # fmt: skip
    """Write or add ``out[r] = a[a_ids[r]] . b[b_ids[r]]``; no ids mean row r."""
    while True:
        begin = take_ticket(tickets) * STEP
        if begin >= out.size:
            return
        for r in range(begin, min(begin + STEP, out.size)):
            i = a_ids[r] if a_ids.size else r
            j = b_ids[r] if b_ids.size else r
            value = dot(a[i * width : (i + 1) * width], b[j * width : (j + 1) * width])
            out[r] = out[r] + value if add else value


@kernel
def sum_segments(
    tickets, thread, scratch, places, rows, width, token_ids,
    row_weights, first, last, base, offsets, accumulate, out,
):  # fmt: skip
    """Sum the rows of experts first..last, by token and weighted if given.

    `rows` begins at row `base`.
    """
    while True:
        e = first + take_ticket(tickets)
        if e >= last:
            return
        total = out[e * width : (e + 1) * width]
        if not accumulate:
            for n in range(width):
                total[n] = 0.0
        for r in range(offsets[e], offsets[e + 1]):
            at = (token_ids[r] if token_ids.size else r - base) * width
            row = rows[at : at + width]
            if row_weights.size:
                for n in range(width):
                    total[n] += row_weights[r] * row[n]
            else:
                for n in range(width):
                    total[n] += row[n]


@kernel
def activate_rows(
    tickets, thread, scratch, places, kind, gated, settings,
    gate_up, inner, out,
):  # fmt: skip
    """Write the activation of every row."""
    width = 2 * inner if gated else inner
    num_rows = out.size // max(inner, 1)
    while True:
        begin = take_ticket(tickets) * STEP
        if begin >= num_rows:
            return
        for r in range(begin, min(begin + STEP, num_rows)):
            g = gate_up[r * width : r * width + inner]
            u = gate_up[r * width + inner : (r + 1) * width] if gated else g
            activate(kind, gated, settings, g, u, out[r * inner : (r + 1) * inner])


@kernel
def activate_rows_backward(
    tickets, thread, scratch, places, kind, gated, settings,
    grad_act, gate_up, inner, grad_gate_up,
):  # fmt: skip
    """Write the gradient of every row; the activation itself goes to scratch."""
    width = 2 * inner if gated else inner
    num_rows = grad_act.size // max(inner, 1)
    act = scratch[thread, :inner]
    one = act.dtype.type(1.0)
    while True:
        begin = take_ticket(tickets) * STEP
        if begin >= num_rows:
            return
        for r in range(begin, min(begin + STEP, num_rows)):
            g = gate_up[r * width : r * width + inner]
            grad_g = grad_gate_up[r * width : r * width + inner]
            u = gate_up[r * width + inner : (r + 1) * width] if gated else g
            grad_u = grad_gate_up[r * width + inner : (r + 1) * width] if gated else grad_g
            grad = grad_act[r * inner : (r + 1) * inner]
            activate_backward(kind, gated, settings, one, grad, g, u, act, grad_g, grad_u)


@kernel
def cut_tasks(
    offsets, first, last, outputs, step, block, skinny_rows, skinny_rest, lanes, tasks
):  # fmt: skip
    """Write the tasks of experts first..last; return their number, also when `tasks` is short.

    One task: expert, first row, rows, first output, outputs, first padded row, rows in the wide
    form (the first ones). Blocks are nearly equal multiples of the lanes. All rows are skinny up
    to `skinny_rows`; beyond, what exceeds whole registers is if it is at most `skinny_rest` rows.
    Padded rows count from expert `first`; every expert's begin anew at a multiple of the lanes.
    """
    count, padded_first = 0, 0
    for e in range(first, last):
        begin, total = offsets[e], offsets[e + 1] - offsets[e]
        blocks = max(-(-total // block), 1)
        size = -(-total // (blocks * lanes)) * lanes
        for r in range(0, total, max(size, 1)):
            rows = min(size, total - r)
            rest = rows % lanes
            wide_rows = rows - rest if rest <= skinny_rest else rows
            if total <= skinny_rows:
                wide_rows = 0
            for n in range(0, outputs, step):
                if count < len(tasks):
                    task = tasks[count]
                    task[0], task[1], task[2] = e, begin + r, rows
                    task[3], task[4] = n, min(step, outputs - n)
                    task[5], task[6] = padded_first + r, wide_rows
                count += 1
        padded_first += -(-total // lanes) * lanes
    return count


@kernel
def cut_gradient_tasks(
    offsets, first, last, outputs, width, least, most, numbers, step, panel, panels, tasks
):  # fmt: skip
    """Write the tasks of weight gradients: experts first..last, empty ones too; count them.

    One task: expert, first row, rows, first output, outputs, first column, columns. Outputs are
    `least` to `most`, as many as have `numbers` in the expert's rows; columns at most `step`, but
    four times as many where these have no more than `panels` numbers in the rows. Both are nearly
    equal multiples of what a tile takes. Tasks with the same columns follow each other where
    these are few numbers, else tasks with the same outputs.
    """
    count = 0
    for e in range(first, last):
        rows = offsets[e + 1] - offsets[e]
        tallest = max(least, min(most, numbers // max(rows, 1)))
        size = -(-outputs // (-(-outputs // tallest) * ROWS)) * ROWS
        few = rows * 4 * step <= panels
        widest = 4 * step if few else step
        columns = -(-width // (-(-width // widest) * panel)) * panel
        across, down = -(-width // columns), -(-outputs // size)
        for i in range(across * down):
            if count < len(tasks):
                m = (i % down if few else i // across) * size
                n = (i // down if few else i % across) * columns
                task = tasks[count]
                task[0], task[1], task[2] = e, offsets[e], rows
                task[3], task[4] = m, min(size, outputs - m)
                task[5], task[6] = n, min(columns, width - n)
            count += 1
    return count


@kernel
def group_experts(offsets, least, share, lanes, ends):
    """Write the ends of groups of experts; return their number and the padded rows of the largest.

    A group has at most `least` rows, or those of the largest expert and one `share`-th of all; or
    it is one expert.
    """
    num_experts, largest = len(offsets) - 1, 0
    for e in range(num_experts):
        largest = max(largest, offsets[e + 1] - offsets[e])
    most = max(least, largest + offsets[-1] // share)
    count, first, padded, most_padded = 0, 0, 0, 0
    for e in range(num_experts):
        if e > first and offsets[e + 1] - offsets[first] > most:
            ends[count] = e
            count, first, padded = count + 1, e, 0
        padded += -(-(offsets[e + 1] - offsets[e]) // lanes) * lanes
        most_padded = max(most_padded, padded)
    ends[count] = num_experts
    return count + 1, most_padded


@kernel
def cut_forward(
    offsets, ends, num_groups, inner, step, block, outputs, out_step, out_block, skinny_rows,
    skinny_rest, lanes, num_tokens, tasks, stages,
):  # fmt: skip
    """Write the tasks and stages of the forward pass; return the number of tasks.

    The second products of a group come after the first ones of the next, and wait for those of
    their own; first products wait until what was in their slot has been read.
    """
    count, stage = 0, 0
    for g in range(num_groups + 1):
        for kind in (ACTIVATE, PROJECT):
            i = g if kind == ACTIVATE else g - 1
            if i < 0 or i >= num_groups:
                continue
            first = 0 if i == 0 else ends[i - 1]
            stages[stage, KIND], stages[stage, BEGIN] = kind, count
            stages[stage, SLOT] = i % SLOTS
            # ACTIVATE of group i > 0 is stage 2i - 1, and its PROJECT 2i + 2 or the last before.
            stages[stage, NEEDS] = max(2 * i, 1) if kind == PROJECT else max(2 * i - 3, 0)
            if kind == ACTIVATE:
                count += cut_tasks(offsets, first, ends[i], inner, step, block, skinny_rows,
                                   skinny_rest, lanes, tasks[count:])  # fmt: skip
            else:
                count += cut_tasks(offsets, first, ends[i], outputs, out_step, out_block,
                                   skinny_rows, skinny_rest, lanes, tasks[count:])  # fmt: skip
            stage += 1
    stages[stage, KIND], stages[stage, BEGIN], stages[stage, NEEDS] = SUM, count, stage
    for t in range(0, num_tokens, STEP):
        if count < len(tasks):
            tasks[count, 1], tasks[count, 2] = t, min(STEP, num_tokens - t)
        count += 1
    stages[stage + 1, BEGIN] = count
    return count
