"""The verbs of a backend in vectorised NumPy: the reference that accelerators are held to.

Every function takes its array functions from its argument, so that another NumPy-like array
(CuPy's, for example) runs through the same lines. The routing verbs live in `npmoe.routing` and
`npmoe.dispatch`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from npmoe._half import is_half
from npmoe._typing import Array, array_namespace
from npmoe.activations import Activation, bind_activation, sigmoid
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Return ``x @ weight.T + bias``.

    Parameters
    ----------
    x : (T, N) float array
    weight : (M, N) float array
    bias : (M,) float array, optional

    Returns
    -------
    (T, M) float array
        New.

    Notes
    -----
    **Cost**: 2*T*M*N flops. **Accuracy**: gamma_N in the dtype of x. **Order**: the BLAS's.
    """
    y = x @ weight.T
    if bias is not None:
        y += bias
    return y


def linear_backward(
    grad_y: Array, x: Array, weight: Array, bias: Array | None = None
) -> tuple[Array, Array, Array | None]:
    """Return (grad_x (T, N), grad_weight (M, N), grad_bias (M,) or None) of `linear`."""
    grad_bias = None if bias is None else grad_y.sum(axis=0)
    return grad_y @ weight, grad_y.T @ x, grad_bias


def mask_rows(x: Array, mask: Array) -> Array:
    """Return a copy of x (T, N) with zeros in the rows where mask (T,) is False."""
    xp = array_namespace(x)
    return xp.where(mask[:, None], x, xp.zeros_like(x))


def add(x: Array, y: Array) -> Array:
    """Return x + y."""
    return x + y


def multiply(x: Array, y: Array) -> Array:
    """Return x * y, elementwise."""
    return x * y


def scale(x: Array, factor: float) -> Array:
    """Return factor * x."""
    return x * factor


def cast(x: Array, dtype: str) -> Array:
    """Return x in another float dtype; x itself if it has that already."""
    return x.astype(dtype, copy=False)


def add_bias(x: Array, bias: Array, mask: Array | None = None) -> Array:
    """Return x (T, H) + bias (H,), in the rows where mask (T,) is True."""
    y = x + bias
    return y if mask is None else mask_rows(y, mask)


def sum_rows(x: Array) -> Array:
    """Return the sum of x (T, H) over its rows (H,). Adjoint of adding a bias."""
    return x.sum(axis=0)


def gate_rows(rows: Array, logit: Array) -> Array:
    """Multiply rows (T, N) by the sigmoid of their logit (T, 1)."""
    return rows * sigmoid(logit)


def gate_rows_backward(grad_act: Array, act: Array, logit: Array) -> Array:
    """Return the gradient of the logit (T, 1) of a gated linear map.

    For y = s W a with s = sigmoid(logit) and the gradient ``grad_act = s W^T g`` of a,
    ``<g, W a> s (1 - s) = <grad_act, a> (1 - s)``: y itself is not needed.
    """
    inner = array_namespace(act).einsum("tn,tn->t", grad_act, act)[:, None]
    return inner * sigmoid(-logit)


def combine_identity(x: Array, topk_ids: Array, topk_weights: Array, num_experts: int) -> Array:
    """Return x (T, H) times the summed weights of each token's identity experts.

    Rows without any are 0, whatever they hold.
    """
    xp = array_namespace(x)
    identity = topk_ids >= num_experts
    total = xp.where(identity, topk_weights, xp.zeros_like(topk_weights)).sum(axis=1)
    return mask_rows(x * total[:, None], identity.any(axis=1))


def combine_identity_backward(
    grad: Array, x: Array, topk_ids: Array, topk_weights: Array, num_experts: int
) -> tuple[Array, Array]:
    """Return the gradients of x (T, H) and of topk_weights (T, K) of `combine_identity`."""
    xp = array_namespace(x)
    identity = topk_ids >= num_experts
    inner = xp.einsum("th,th->t", grad, x)[:, None]
    grad_x = combine_identity(grad, topk_ids, topk_weights, num_experts)
    return grad_x, xp.where(identity, inner, xp.zeros_like(topk_weights))


def gather_rows(x: Array, plan: DispatchPlan) -> Array:
    """Copy each kept route's token into expert order: (T, H) -> (R, H). Adjoint: combine_rows."""
    return array_namespace(x).take(x, plan.token_ids[: plan.num_rows], axis=0)


def combine_rows(rows: Array, plan: DispatchPlan, *, topk_weights: Array | None = None) -> Array:
    """Sum each token's rows, weighted: (R, H) -> (T, H).

    ``out[t] = sum over k of w[t, k] * rows[row_ids[t, k]]``, slots in ascending order; dropped
    routes are not read and contribute exactly 0.
    """
    xp = array_namespace(rows)
    whole = plan.num_rows == plan.num_tokens * plan.top_k
    out = xp.zeros((plan.num_tokens, rows.shape[1]), dtype=rows.dtype)
    for k in range(plan.top_k):
        row_ids = plan.row_ids[:, k]
        tokens = slice(None) if whole else xp.nonzero(row_ids >= 0)[0]
        part = xp.take(rows, row_ids[tokens], axis=0)
        if topk_weights is not None:
            part *= topk_weights[tokens, k][:, None]
        out[tokens] += part
    return out


def scale_rows(rows: Array, plan: DispatchPlan, topk_weights: Array) -> Array:
    """Multiply every row (R, N) by its route's weight from topk_weights (T, K)."""
    weights = topk_weights.reshape(-1)[plan.pair_ids[: plan.num_rows]]
    return rows * weights[:, None]


def row_dot(rows_a: Array, rows_b: Array, plan: DispatchPlan) -> Array:
    """Return the dot product of paired rows as (T, K); 0 for dropped routes."""
    xp = array_namespace(rows_a)
    flat = xp.zeros((plan.num_tokens * plan.top_k,), dtype=rows_a.dtype)
    flat[plan.pair_ids[: plan.num_rows]] = xp.einsum("rn,rn->r", rows_a, rows_b)
    return flat.reshape(plan.num_tokens, plan.top_k)


def grouped_gemm(
    x: Array,
    weight: Array,
    plan: DispatchPlan,
    *,
    bias: Array | None = None,
    transposed: bool = False,
) -> Array:
    """Multiply each expert's rows by that expert's matrix.

    ``y[r] = weight[e] @ x[r] + bias[e]``, or ``weight[e].T @ x[r]`` if `transposed`, where e is
    the expert of row r.

    Parameters
    ----------
    x : (R, N) float array, or (R, M) if transposed
    weight : (E, M, N) float array
        Of the dtype of x; float16 or bfloat16 beside float32.
    plan : DispatchPlan
    bias : (E, M) float array, optional
        Not together with `transposed`.
    transposed : bool

    Returns
    -------
    (R, M) float array, or (R, N) if transposed
        New.

    Notes
    -----
    **Cost**: 2*R*M*N flops; reads each used expert once, and holds one of them as float32 if they
    are in half precision. **Accuracy**: gamma_N (gamma_M) in the dtype of x: conversion is exact.
    """
    xp = array_namespace(x)
    y = xp.empty((plan.num_rows, weight.shape[2 if transposed else 1]), dtype=x.dtype)
    for e, rows in expert_rows(plan):
        matrix = expert_matrix(weight, e)
        xp.matmul(x[rows], matrix if transposed else matrix.T, out=y[rows])
        if bias is not None:
            y[rows] += bias[e]
    return y


def grouped_gemm_wgrad(
    x: Array,
    grad_y: Array,
    plan: DispatchPlan,
    *,
    out: Array | None = None,
    accumulate: bool = False,
) -> Array:
    """Return every expert's weight gradient ``grad_y[rows].T @ x[rows]`` (E, M, N).

    Experts without rows get exact zeros. With `out` the result is written there, and with
    `accumulate` added to it. It has the dtype of x, whatever that of the weights.
    **Cost**: 2*R*M*N flops, E*M*N numbers written.
    """
    xp = array_namespace(x)
    shape = (plan.num_experts, grad_y.shape[1], x.shape[1])
    if out is None:
        out, accumulate = xp.empty(shape, dtype=x.dtype), False
    counts = _host_offsets(plan)
    for e in range(plan.num_experts):
        rows = slice(counts[e], counts[e + 1])
        if accumulate:
            if rows.start < rows.stop:
                out[e] += grad_y[rows].T @ x[rows]
        elif rows.start < rows.stop:
            xp.matmul(grad_y[rows].T, x[rows], out=out[e])
        else:
            out[e] = 0.0
    return out


def segment_sum(rows: Array, plan: DispatchPlan) -> Array:
    """Sum each expert's rows (R, N) -> (E, N); exact zeros for empty experts."""
    xp = array_namespace(rows)
    out = xp.zeros((plan.num_experts, rows.shape[1]), dtype=rows.dtype)
    for e, members in expert_rows(plan):
        out[e] = rows[members].sum(axis=0)
    return out


def spread_experts(values: Array, plan: DispatchPlan) -> Array:
    """Copy each expert's vector (E, N) to its rows (R, N). Adjoint of segment_sum."""
    xp = array_namespace(values)
    out = xp.empty((plan.num_rows, values.shape[1]), dtype=values.dtype)
    for e, members in expert_rows(plan):
        out[members] = values[e]
    return out


def activation(gate_up: Array, cfg: MoEConfig, *, shared: bool = False) -> Array:
    """Apply the experts' (or the shared expert's) activation: (R, 2I) or (R, I) -> (R, I)."""
    return activation_of(cfg, shared=shared).forward(gate_up)


def activation_backward(
    grad_act: Array, gate_up: Array, cfg: MoEConfig, *, shared: bool = False
) -> Array:
    """Return the gradient of gate_up."""
    return activation_of(cfg, shared=shared).backward(grad_act, gate_up)


def activation_of(cfg: MoEConfig, *, shared: bool = False) -> Activation:
    """Return the activation of the experts, or of the shared expert, with its parameters."""
    return bind_activation(*cfg.activation_call(shared=shared))


def draw_dropout(plan: DispatchPlan, cfg: MoEConfig, rng: np.random.Generator, dtype: str) -> Array:
    """Return what multiplies the activations (R, I): 0, or 1 / (1 - expert_dropout)."""
    xp = array_namespace(plan.expert_offsets)
    kept = rng.random((plan.num_rows, cfg.intermediate_size)) >= cfg.expert_dropout
    return xp.asarray((kept / (1.0 - cfg.expert_dropout)).astype(dtype))


def store(value: Array, out: Array | None, accumulate: bool) -> Array:
    """Return `value`, or put it into `out` (adding if `accumulate`) and return that."""
    if out is None:
        return value
    if accumulate:
        out += value
    else:
        out[...] = value
    return out


def expert_matrix(weight: Array, e: int) -> Array:
    """Return the matrix of expert e; from half precision a float32 copy, which is exact."""
    matrix = weight[e]
    return matrix.astype("float32") if is_half(weight.dtype) else matrix


def expert_rows(plan: DispatchPlan) -> Iterator[tuple[int, slice]]:
    """Yield (expert, its rows) for every expert that has rows, in ascending order."""
    offsets = _host_offsets(plan)
    for e in range(plan.num_experts):
        if offsets[e] < offsets[e + 1]:
            yield e, slice(offsets[e], offsets[e + 1])


def _host_offsets(plan: DispatchPlan) -> list[int]:
    offsets: list[int] = plan.expert_offsets.tolist()
    return offsets
