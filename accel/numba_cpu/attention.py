"""Softmax attention: kernels, a task is a sequence and a head of keys.

Keys and values are laid out once per task; the queries that share them come in blocks, which meet
only the keys that they may see. The exponentials of a block are made where they are kept for the
backward pass.

Arrays are flat; `q_at` and its like say how many numbers sequences, heads and positions lie apart;
the elements of a head lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .compiling import inner, kernel, reassociated
from .curves import _exponential
from .host import ROWS
from .products import dot
from .tickets import take_ticket
from .tiles import largest, make_outer_tile, transpose_tile

# Registers along the columns of a tile; two keep enough multiply-adds under way.
WIDE = 2
# Queries in work at once: a multiple of ROWS, just below a panel.
BLOCK = 30

_by_row = make_outer_tile(WIDE)
_by_column = make_outer_tile(WIDE, by_column=True)


def cut_queries(
    length: int, keys: int, causal: bool, panel: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield the blocks that `attend` keeps: first query, queries, keys they see, row length."""
    for first in range(0, length, BLOCK):
        rows = min(BLOCK, length - first)
        end = keys - length + first + rows if causal else keys
        yield first, rows, end, -(-end // panel) * panel


@kernel
def attend(
    tickets, thread, scratch, places, sizes, causal, scale, q, q_at, k, k_at, v, v_at, out, kept,
    inverses,
):  # fmt: skip
    """Write ``out = softmax(scale q k^T) v`` (B, L, Hq, D).

    `sizes` is (B, Hkv, G, L, S, D, panel). `kept` (B*Hq, N) gets the exponentials by
    blocks (`cut_queries`), rows padded to whole panels; `inverses` (B, L, Hq) one over their sums.
    """
    batch, kv_heads, groups, length, keys, size, panel = sizes
    wide_keys, wide_size = _round_up(keys, panel), _round_up(size, panel)
    mine, starts = scratch[thread], places[thread]
    columns = np.int64(0)
    values = columns + size * wide_keys
    sums = values + keys * wide_size
    while True:
        ticket = take_ticket(tickets)
        if ticket >= batch * kv_heads:
            return
        b, h = ticket // kv_heads, ticket % kv_heads
        start_k, start_v = _place(k_at, b, h, 0), _place(v_at, b, h, 0)
        _lay_columns(k, start_k, k_at[2], keys, size, panel, starts, mine, columns)
        _lay_rows(v, start_v, v_at[2], keys, size, wide_size, mine, values)
        for head in range(h * groups, (h + 1) * groups):
            probs, at = kept[b * kv_heads * groups + head], np.int64(0)
            for first in range(0, length, BLOCK):
                rows = min(BLOCK, length - first)
                end = keys - length + first + rows if causal else keys
                stride = _round_up(end, panel)
                _multiply(q, _place(q_at, b, head, first), q_at[2], mine, columns, panel,
                          size * panel, probs, at, stride, rows, end, size, panel)  # fmt: skip
                for r in range(rows):
                    seen = keys - length + first + r + 1 if causal else keys
                    row = probs[at + r * stride : at + (r + 1) * stride]
                    _exponentiate(row, seen, scale, panel // WIDE)
                    inverses[_row(sizes, b, head, first + r)] = 1.0 / _total(row[:seen])
                _multiply(probs, at, stride, mine, values, wide_size, panel, mine, sums,
                          wide_size, rows, size, end, panel)  # fmt: skip
                for r in range(rows):
                    row = _row(sizes, b, head, first + r)
                    goal, inverse = out[row * size : (row + 1) * size], inverses[row]
                    for n in range(size):
                        goal[n] = mine[sums + r * wide_size + n] * inverse
                at += rows * stride


@kernel
def attend_backward(
    tickets, thread, scratch, places, sizes, causal, scale, grad, grad_at, q, q_at, k, k_at, v,
    v_at, out, kept, inverses, grad_q, grad_q_at, grad_k, grad_k_at, grad_v, grad_v_at,
):  # fmt: skip
    """Write the gradients of `attend`; see `npmoe.nn.causal_attention_backward`."""
    batch, kv_heads, groups, length, keys, size, panel = sizes
    wide_keys, wide_size = _round_up(keys, panel), _round_up(size, panel)
    mine, starts = scratch[thread], places[thread]
    columns = np.int64(0)
    key_rows = columns + size * wide_keys
    sums_k = key_rows + keys * wide_size
    sums_v = sums_k + keys * wide_size
    slopes = sums_v + keys * wide_size
    query_rows = slopes + BLOCK * wide_keys
    grad_rows = query_rows + BLOCK * wide_size
    sums_q = grad_rows + BLOCK * wide_size
    while True:
        ticket = take_ticket(tickets)
        if ticket >= batch * kv_heads:
            return
        b, h = ticket // kv_heads, ticket % kv_heads
        start_k, start_v = _place(k_at, b, h, 0), _place(v_at, b, h, 0)
        _lay_columns(v, start_v, v_at[2], keys, size, panel, starts, mine, columns)
        _lay_rows(k, start_k, k_at[2], keys, size, wide_size, mine, key_rows)
        mine[sums_k : sums_k + 2 * keys * wide_size] = 0.0
        for head in range(h * groups, (h + 1) * groups):
            probs, at = kept[b * kv_heads * groups + head], np.int64(0)
            for first in range(0, length, BLOCK):
                rows = min(BLOCK, length - first)
                end = keys - length + first + rows if causal else keys
                stride = _round_up(end, panel)
                _lay_rows(q, _place(q_at, b, head, first), q_at[2], rows, size, wide_size, mine,
                          query_rows)  # fmt: skip
                _lay_rows(grad, _place(grad_at, b, head, first), grad_at[2], rows, size, wide_size,
                          mine, grad_rows)  # fmt: skip
                for r in range(rows):
                    inverse = inverses[_row(sizes, b, head, first + r)]
                    row = mine[grad_rows + r * wide_size : grad_rows + (r + 1) * wide_size]
                    for n in range(wide_size):
                        row[n] *= inverse
                _multiply(mine, grad_rows, wide_size, mine, columns, panel, size * panel, mine,
                          slopes, stride, rows, end, size, panel)  # fmt: skip
                for r in range(rows):
                    row = _row(sizes, b, head, first + r)
                    g = mine[grad_rows + r * wide_size : grad_rows + r * wide_size + size]
                    along = dot(g, out[row * size : (row + 1) * size])
                    p = probs[at + r * stride : at + r * stride + end]
                    s = mine[slopes + r * stride : slopes + r * stride + end]
                    for n in range(end):
                        s[n] = p[n] * (s[n] - along) * scale
                _multiply(mine, slopes, stride, mine, key_rows, wide_size, panel, mine, sums_q,
                          wide_size, rows, size, end, panel)  # fmt: skip
                for r in range(rows):
                    to = _place(grad_q_at, b, head, first + r)
                    for n in range(size):
                        grad_q[to + n] = mine[sums_q + r * wide_size + n]
                _add_transposed(probs, at, stride, mine, grad_rows, sums_v, wide_size, rows, end,
                                panel)  # fmt: skip
                _add_transposed(mine, slopes, stride, mine, query_rows, sums_k, wide_size, rows,
                                end, panel)  # fmt: skip
                at += rows * stride
        for s in range(keys):
            to_k, to_v = _place(grad_k_at, b, h, s), _place(grad_v_at, b, h, s)
            for n in range(size):
                grad_k[to_k + n] = mine[sums_k + s * wide_size + n]
            for n in range(size):
                grad_v[to_v + n] = mine[sums_v + s * wide_size + n]


@inner
def _place(at, b, h, position):
    return b * at[0] + h * at[1] + position * at[2]


@inner
def _row(sizes, b, head, position):
    """Return which row of (B, L, Hq) this is."""
    return (b * sizes[3] + position) * sizes[1] * sizes[2] + head


@inner
def _round_up(count, unit):
    return -(-count // unit) * unit


@inner
def _lay_columns(x, start, stride, count, size, panel, places, out, at):
    """Lay rows out as panels [size][panel] of columns, zeros after the last."""
    lanes, whole = panel // WIDE, size - size % (panel // WIDE)
    for first in range(0, _round_up(count, panel), lanes):
        to = at + first // panel * size * panel + first % panel
        here = min(lanes, max(count - first, 0))
        ready = np.int64(0)
        if here == lanes:
            for i in range(lanes):
                places[i] = start + (first + i) * stride
            for n in range(0, whole, lanes):
                transpose_tile(x, places, 0, n, out, to + n * panel, panel, False)
            ready = whole
        for n in range(ready, size):
            for i in range(here):
                out[to + n * panel + i] = x[start + (first + i) * stride + n]
            for i in range(here, lanes):
                out[to + n * panel + i] = 0.0


@inner
def _lay_rows(x, start, stride, count, size, wide, out, at):
    """Lay rows out side by side, with zeros up to `wide`."""
    for i in range(count):
        source = x[start + i * stride : start + i * stride + size]
        goal = out[at + i * wide : at + (i + 1) * wide]
        for n in range(size):
            goal[n] = source[n]
        for n in range(size, wide):
            goal[n] = 0.0


@inner
def _multiply(
    a, a_start, a_stride, b, b_start, b_stride, b_step, c, c_start, c_stride, rows, columns, depth,
    panel,
):  # fmt: skip
    """Write ``c[m, n] = sum over k of a[m, k] b[k, n]``; panels of b begin `b_step` apart."""
    for n in range(0, columns, panel):
        at = b_start + n // panel * b_step
        for m in range(0, rows, ROWS):
            _by_row(a, a_start + m * a_stride, a_stride, b, at, b_stride, c,
                    c_start + m * c_stride + n, c_stride, depth, min(ROWS, rows - m), False,
                    b, 0, 0, 0, 0, 0)  # fmt: skip


@inner
def _add_transposed(a, a_start, a_stride, x, b, c, width, depth, rows, panel):
    """Add ``x[c + m, n] += sum over k of a[k, m] x[b + k, n]`` for rows m and `width` n."""
    for n in range(0, width, panel):
        for m in range(0, rows, ROWS):
            _by_column(a, a_start + m, a_stride, x, b + n, width, x, c + m * width + n, width,
                       depth, min(ROWS, rows - m), True, x, 0, 0, 0, 0, 0)  # fmt: skip


@inner
def _exponentiate(x, seen, scale, lanes):
    """Write ``exp(scale (x - max))`` of the first numbers, and zeros after them."""
    whole = _round_up(seen, lanes)
    x[seen:whole] = -np.inf
    shift = largest(x, 0, whole) * scale
    here = x[:seen]
    for i in range(seen):
        here[i] = _exponential(here[i] * scale - shift)
    x[seen:] = 0.0


@reassociated
def _total(x):
    total = x.dtype.type(0.0)
    for i in range(x.size):
        total += x[i]
    return total
