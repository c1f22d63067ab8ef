"""Attention by explicit loops over batch and heads, in numbers with error radii."""

from functools import partial

import numpy as np

from npmoe.testing.balls import Ball, Model, softmax


def by_heads(function, dtype, *arrays):
    """Apply a function of one query head's balls to (B, H, ., D) arrays with grouped heads.

    Returns (B, Hq, ., .) middles and radii for each of the function's results.
    """
    model = Model.of(dtype)
    batch, heads = arrays[0].shape[:2]

    def head(array, b, h):
        return Ball.exact(array[b, h * array.shape[1] // heads], model)

    found = [
        [function(*(head(a, b, h) for a in arrays)) for h in range(heads)] for b in range(batch)
    ]
    count = len(found[0][0])
    return [
        Ball(
            np.array([[head[i].mid for head in row] for row in found]),
            np.array([[head[i].rad for head in row] for row in found]),
            model,
        )
        for i in range(count)
    ]


def attention_balls(dtype, q, k, v, grad_out, *, causal):
    """Return the balls of output, probabilities, grad_q, grad_k and grad_v, all heads."""
    forward = partial(attention_ball, causal=causal)
    backward = partial(attention_backward_ball, causal=causal)
    out, probs = by_heads(forward, dtype, q, k, v)
    grad_q, grad_k, grad_v = by_heads(backward, dtype, q, grad_out, k, v)
    return out, probs, grad_q, *(sum_groups(b, k.shape[1]) for b in (grad_k, grad_v))


def sum_groups(ball, kv_heads):
    """Sum the query heads (B, Hq, S, D) of each key head: (B, Hkv, S, D)."""
    batch, _, *rest = ball.mid.shape
    shape = (batch, kv_heads, -1, *rest)
    return Ball(ball.mid.reshape(shape), ball.rad.reshape(shape), ball.model).sum(2)


def attention_ball(q, k, v, *, causal=True):
    """Return output (L, D) and probabilities (L, S) of one head."""
    length, size = q.mid.shape
    num_keys = k.mid.shape[0]
    # The sum's D roundings, and those of the scale, of its root and of its product.
    logits = scaled(q.matmul(k.T, size + 3), size)
    last = np.arange(num_keys - length, num_keys) if causal else np.full(length, num_keys - 1)
    seen = np.arange(num_keys) <= last[:, None]
    masked = Ball(np.where(seen, logits.mid, -np.inf), np.where(seen, logits.rad, 0), q.model)
    probs = softmax(masked)
    return probs.matmul(v, num_keys + 2), probs


def attention_backward_ball(q, grad_out, k, v, *, causal=True):
    """Return grad_q (L, D), grad_k (S, D) and grad_v (S, D) of one head."""
    out, probs = attention_ball(q, k, v, causal=causal)
    length, size = q.mid.shape
    num_keys = k.mid.shape[0]
    # A row sum may be one more term of each element's dot product.
    terms = size + 4
    row_sums = (grad_out * out).sum(1, keepdims=True)
    row_sums = row_sums.rounded(row_sums.mid, row_sums.rad, terms)
    grad_logits = probs * (grad_out.matmul(v.T, terms) - row_sums)
    return (
        scaled(grad_logits.matmul(k, num_keys + 3), size),
        scaled(grad_logits.T.matmul(q, length + 3), size),
        probs.T.matmul(grad_out, length + 3),
    )


def scaled(ball, size):
    """Return the ball over sqrt(size)."""
    return ball.rounded(ball.mid / np.sqrt(size), ball.rad / np.sqrt(size))
