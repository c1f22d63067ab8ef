"""What the tensor-core kernels must return, in float64, with error bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
from kernel_runs import TILE, UNTOUCHED, Blocks, Problem, as_multiplied

from npmoe.testing.activation_bounds import activation, activation_backward
from npmoe.testing.balls import Ball, Model
from npmoe.testing.bounds import assert_within

FLOAT = Model.of(np.float32)
STORED = {
    "bfloat16": Model(2.0**-8 + 2.0**-50, 2.0**-124),
    "half16": Model.of(np.float16),
    "float": FLOAT,
}


def multiply_rows(problem: Problem) -> Ball:
    """x W of every row, sorted by expert, without bias: (R, columns)."""
    p, b = problem, problem.blocks
    mids, rads = [], []
    for e in range(len(p.weight)):
        pairs = b.pair_ids[b.expert_offsets[e] : b.expert_offsets[e + 1]]
        sources = pairs // b.top_k if p.variant.gather else b.row_ids[pairs]
        w = as_multiplied(p.weight[e])
        ball = Ball.exact(as_multiplied(p.x)[sources], FLOAT).matmul(
            Ball.exact(w if p.variant.transposed else w.T, FLOAT), p.x.shape[1]
        )
        mids.append(ball.mid)
        rads.append(ball.rad)
    return Ball(np.concatenate(mids), np.concatenate(rads), FLOAT)


def expect(problem: Problem) -> dict[str, Ball]:
    """All outputs of the epilogue, rows sorted by expert."""
    p, v, b = problem, problem.variant, problem.blocks
    R = b.num_rows
    pairs = b.pair_ids[:R]
    weights = Ball.exact(p.topk_weights[pairs][:, None], FLOAT)
    sums = multiply_rows(p)
    if p.bias is not None:
        owners = np.repeat(np.arange(len(p.weight)), np.diff(b.expert_offsets))
        sums = sums + Ball.exact(p.bias[owners], FLOAT)
    if v.epilogue == "STORE":
        return {"y": sums}
    if v.epilogue == "ROUTED":
        return {"y": weights * sums}
    call = (p.curve.name, p.curve.alpha, p.curve.limit)
    stored = STORED[v.operand]
    if v.epilogue == "ACTIVATE":
        act = {"act": activation(sums, *call).cast(stored)}
        return act | {"y": sums} if p.keep_y else act
    kept = Ball.exact(p.y[:R], FLOAT)
    plain = activation(kept, *call)
    products = sums * plain
    dots = [products[:, c : c + TILE].sum(1, keepdims=True) for c in range(0, p.columns, TILE)]
    return {
        "act": (weights * plain).cast(stored),
        "grad_y": activation_backward(weights * sums, kept, *call).cast(stored),
        "dots": Ball(*(np.concatenate([getattr(d, k) for d in dots], 1) for k in ("mid", "rad")),
                     FLOAT),
    }  # fmt: skip


def check_grouped(problem: Problem, *, exact: bool) -> None:
    """Compare outputs, and that nothing else was written; exactly, in numbers of their type."""
    R = problem.blocks.num_rows
    expected = expect(problem)
    for name in ("y", "act", "grad_y", "dots"):
        got: Any = getattr(problem, name)
        if name == "y" and problem.variant.epilogue == "ACTIVATE_BACKWARD":
            continue
        written = R if name in expected else 0
        assert (got[written:].astype(np.float64) == float(got.dtype.type(UNTOUCHED))).all(), name
        if name not in expected:
            continue
        ball = expected[name]
        if exact:
            same = got[:R] == ball.mid.astype(np.float32).astype(got.dtype)
            assert same.all(), (name, np.argwhere(~same)[:5])
        else:
            assert_within(got[:R].astype(np.float64), ball.mid, ball.rad, name)


def expect_wgrad(blocks: Blocks, gather: int, grad_y: Any, x: Any) -> Ball:
    """Sum of grad_y[r] x[r]^T over the rows of each expert: (E, M, N)."""
    mids, rads = [], []
    for begin, end in zip(blocks.expert_offsets, blocks.expert_offsets[1:], strict=False):
        rows = np.arange(begin, end)
        tokens = blocks.pair_ids[rows] // blocks.top_k
        left = Ball.exact(as_multiplied(grad_y)[tokens if gather == 2 else rows], FLOAT)
        right = Ball.exact(as_multiplied(x)[tokens if gather == 1 else rows], FLOAT)
        ball = left.T.matmul(right, max(1, len(rows)))
        mids.append(ball.mid)
        rads.append(ball.rad)
    return Ball(np.stack(mids), np.stack(rads), FLOAT)
