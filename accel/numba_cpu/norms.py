"""Root-mean-square normalisation: kernels."""

from __future__ import annotations

import numpy as np

from .compiling import kernel, reassociated
from .products import dot
from .rows import STEP
from .tickets import take_ticket


@reassociated
def _dot_of_three(a, b, c):
    total = a.dtype.type(0.0)
    for i in range(a.size):
        total += a[i] * b[i] * c[i]
    return total


@kernel
def normalize_rows(tickets, thread, scratch, places, x, weight, eps, y):
    """Write ``y = weight x / sqrt(mean(x**2) + eps)`` by rows."""
    width, one = weight.size, x.dtype.type(1.0)
    rows = x.size // width
    while True:
        begin = take_ticket(tickets) * STEP
        if begin >= rows:
            return
        for t in range(begin, min(begin + STEP, rows)):
            row, goal = x[t * width : (t + 1) * width], y[t * width : (t + 1) * width]
            inverse = one / np.sqrt(dot(row, row) / x.dtype.type(width) + eps)
            for n in range(width):
                goal[n] = row[n] * inverse * weight[n]


@kernel
def normalize_rows_backward(tickets, thread, scratch, places, grad, x, weight, eps, out, partial):
    """Write the gradient of x, and that of the weight as a row of `partial` (tasks, N) each."""
    width, one = weight.size, x.dtype.type(1.0)
    rows = x.size // width
    while True:
        task = take_ticket(tickets)
        begin = task * STEP
        if begin >= rows:
            return
        sums = partial[task]
        sums[:] = 0.0
        for t in range(begin, min(begin + STEP, rows)):
            row, goal = x[t * width : (t + 1) * width], out[t * width : (t + 1) * width]
            g = grad[t * width : (t + 1) * width]
            inverse = one / np.sqrt(dot(row, row) / x.dtype.type(width) + eps)
            # One factor at a time: the cube of a large row's inverse would underflow.
            along = _dot_of_three(g, row, weight) * inverse / x.dtype.type(width)
            along *= inverse * inverse
            for n in range(width):
                goal[n] = g[n] * weight[n] * inverse - row[n] * along
            for n in range(width):
                sums[n] += g[n] * row[n] * inverse
