"""Softmax attention with grouped heads, causal or full, in blocks of queries.

A block of queries meets only the keys that it may see, which saves almost half of the work of the
causal kind, and keeps its part of the probabilities in cache between the two products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.errors import RangeError, ShapeError
from npmoe.nn._inputs import Inputs

_BLOCK = 32  # queries; 32 and 48 were fastest of 16..256 at B=8, Hq=4, L=256, D=32 in float32
_SAFE_LOGIT = 32.0  # exp(+-32) and sums of it are far from the ends of float32


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProbs:
    """Probabilities as the backward wants them: by blocks and not yet divided.

    blocks : tuple of (B, Hkv, G*n, end) float arrays
        exp(logit - shift) of n queries of each of G grouped heads against the keys before `end`.
    inverse_sums : (B, Hkv, G, L, 1) float array
        One over the row sums of `blocks`.
    out : (B, Hkv, G, L, D) float array
        A view of the attention's output, which must stay as it is until the backward.
    causal : bool
        Whether a query sees no later key.
    """

    blocks: tuple[HostArray, ...]
    inverse_sums: HostArray
    out: HostArray
    causal: bool = True

    def dense(self) -> HostArray:
        """Return the probabilities as one new array (B, Hq, L, S), exactly 0 at unseen keys."""
        batch, kv_heads, groups, length, _ = self.out.shape
        num_keys = self.blocks[-1].shape[-1] if self.blocks else 0
        probs = np.zeros((batch, kv_heads, groups, length, num_keys), self.out.dtype)
        parts = _blocks(length, num_keys, self.causal)
        for block, (start, stop, end) in zip(self.blocks, parts, strict=True):
            rows = block.reshape(batch, kv_heads, groups, stop - start, end)
            probs[..., start:stop, :end] = rows * self.inverse_sums[..., start:stop, :]
        return probs.reshape(batch, kv_heads * groups, length, num_keys)


def causal_attention(q: HostArray, k: HostArray, v: HostArray) -> tuple[HostArray, AttentionProbs]:
    """Average the values up to each query's position, weighted by softmax(q k^T / sqrt(D)).

    Parameters
    ----------
    q : (B, Hq, L, D) float array
        The last L of S positions. Hq is a multiple of Hkv; query head h reads key and value head
        h // (Hq / Hkv).
    k, v : (B, Hkv, S, D) float arrays

    Returns
    -------
    out : (B, Hq, L, D) float array
        New, laid out as (B, L, Hq, D) in memory, so that heads concatenate without a copy.
    probs : AttentionProbs
        For the backward; `probs.dense()` is the usual matrix.

    Raises
    ------
    ShapeError, DTypeError

    Notes
    -----
    **Cost**: about 2*B*Hq*D*L*(2*S - L) flops and half as many exponentials per D as a full
    matrix. **Accuracy**: gamma_D for a logit, gamma_S for a sum. Rows are shifted by their
    maximum unless |q| max|k| / sqrt(D), over the keys a query may see, is at most 32: then no
    shift is needed. **Order**: by blocks of 32 queries; a later position never changes a bit of
    an earlier output, if all values are finite.

    References
    ----------
    Vaswani et al. 2017, eq. 1; Ainslie et al. 2023, "GQA", section 2.2, for the grouped heads.
    """
    return _attend("causal_attention", q, k, v, causal=True)


def full_attention(q: HostArray, k: HostArray, v: HostArray) -> tuple[HostArray, AttentionProbs]:
    """Average all values for each query, weighted by softmax(q k^T / sqrt(D)).

    Parameters
    ----------
    q, k, v : float arrays
        As for `causal_attention`; every query sees all S keys.

    Returns
    -------
    out : (B, Hq, L, D) float array
    probs : AttentionProbs
        As from `causal_attention`.

    Raises
    ------
    ShapeError, DTypeError

    Notes
    -----
    **Cost**: 4*B*Hq*D*L*S flops. **Accuracy**, **Order**: as `causal_attention`.

    References
    ----------
    Vaswani et al. 2017, eq. 1.
    """
    return _attend("full_attention", q, k, v, causal=False)


def causal_attention_backward(
    grad_out: HostArray,
    q: HostArray,
    k: HostArray,
    v: HostArray,
    probs: AttentionProbs,
    *,
    out: tuple[HostArray, HostArray, HostArray] | None = None,
) -> tuple[HostArray, HostArray, HostArray]:
    """Return the gradients of `causal_attention`.

    With P the probabilities and s = 1/sqrt(D): grad_v = P^T g; grad_P = g v^T;
    grad_logits = P * (grad_P - rowsum(P * grad_P)); grad_q = s grad_logits k;
    grad_k = s grad_logits^T q. The row sum equals <g, out>.

    Parameters
    ----------
    grad_out : (B, Hq, L, D) float array
    q, k, v : float arrays
        As given to `causal_attention`.
    probs : AttentionProbs
        As returned by it.
    out : tuple of three float arrays, optional
        Where to write the gradients, of any strides: shapes of q, k and v.

    Returns
    -------
    grad_q : (B, Hq, L, D) float array
    grad_k, grad_v : (B, Hkv, S, D) float arrays
        New, or the arrays of `out`.

    Raises
    ------
    ShapeError, DTypeError

    Notes
    -----
    **Cost**: 5/2 of the forward's flops, no exponential. **Order**: blocks of 32 queries from
    the first to the last, each summed in the BLAS's order over its G*32 rows.
    """
    return _attend_backward("causal_attention_backward", grad_out, q, k, v, probs, out, causal=True)


def full_attention_backward(
    grad_out: HostArray,
    q: HostArray,
    k: HostArray,
    v: HostArray,
    probs: AttentionProbs,
    *,
    out: tuple[HostArray, HostArray, HostArray] | None = None,
) -> tuple[HostArray, HostArray, HostArray]:
    """Return the gradients of `full_attention`; everything as in `causal_attention_backward`."""
    return _attend_backward("full_attention_backward", grad_out, q, k, v, probs, out, causal=False)


def _attend(
    function: str, q: HostArray, k: HostArray, v: HostArray, *, causal: bool
) -> tuple[HostArray, AttentionProbs]:
    """Attend block by block; see the public functions."""
    batch, kv_heads, groups, length, size = shape = check_attention(
        function, q, k, v, causal=causal
    )
    num_keys = k.shape[2]
    scale = q.dtype.type(1 / math.sqrt(size))
    q = q.reshape(shape)
    needs_shift = _needs_shift(q, k, scale, causal)
    # OpenBLAS multiplies small row-major matrices almost twice as fast as transposed ones.
    k_columns = np.ascontiguousarray(k.swapaxes(-1, -2))  # (B, Hkv, D, S)
    v = np.ascontiguousarray(v)
    future = np.triu(np.ones((_BLOCK, _BLOCK), bool), 1)
    out = np.empty((batch, length, kv_heads, groups, size), q.dtype).transpose(0, 2, 3, 1, 4)
    inverse_sums = np.empty((*shape[:-1], 1), q.dtype)
    blocks = []
    for start, stop, end in _blocks(length, num_keys, causal):
        rows = stop - start
        block = _gather_queries(q, start, stop, scale) @ k_columns[..., :end]
        by_group = block.reshape(batch, kv_heads, groups, rows, end)
        if causal:
            np.copyto(by_group[..., end - rows :], -np.inf, where=future[:rows, :rows])
        if needs_shift[..., start:stop, :].any():
            largest = by_group.max(axis=-1, keepdims=True)
            by_group -= np.where(needs_shift[..., start:stop, :], largest, 0)
        np.exp(block, out=block)
        inverse = inverse_sums[..., start:stop, :]
        np.reciprocal(np.einsum("bhgls->bhgl", by_group)[..., None], out=inverse)
        summed = (block @ v[:, :, :end]).reshape(batch, kv_heads, groups, rows, size)
        np.multiply(summed, inverse, out=out[..., start:stop, :])
        blocks.append(block)
    probs = AttentionProbs(blocks=tuple(blocks), inverse_sums=inverse_sums, out=out, causal=causal)
    return out.reshape(batch, kv_heads * groups, length, size), probs


def _attend_backward(
    function: str,
    grad_out: HostArray,
    q: HostArray,
    k: HostArray,
    v: HostArray,
    probs: AttentionProbs,
    out: tuple[HostArray, HostArray, HostArray] | None,
    *,
    causal: bool,
) -> tuple[HostArray, HostArray, HostArray]:
    """Return all gradients block by block; see the public functions."""
    shape = check_attention(function, q, k, v, grad_out, causal=causal)
    batch, kv_heads, groups, length, size = shape
    num_keys = k.shape[2]
    probs_keys = probs.blocks[-1].shape[-1] if probs.blocks else num_keys
    check_saved_attention(function, probs, probs_keys, shape, num_keys, causal=causal)
    scale = q.dtype.type(1 / math.sqrt(size))
    if out is None:
        out = (np.empty(q.shape, q.dtype), np.empty(k.shape, k.dtype), np.empty(v.shape, v.dtype))
    check_gradients(function, out, q, k, v)
    grad_q, grad_k, grad_v = out
    grad_k[...] = 0
    grad_v[...] = 0
    q, grad_out = q.reshape(shape), grad_out.reshape(shape)
    k = np.ascontiguousarray(k)
    # A column of ones lets one product give grad_P minus the row sum.
    v_columns = np.empty((batch, kv_heads, size + 1, num_keys), v.dtype)
    v_columns[:, :, :size] = v.swapaxes(-1, -2)
    v_columns[:, :, size] = 1
    parts = _blocks(length, num_keys, probs.causal)
    for block, (start, stop, end) in zip(probs.blocks, parts, strict=True):
        rows = stop - start
        part: HostArray = np.empty((batch, kv_heads, groups, rows, size + 1), q.dtype)
        weighted = part[..., :size]
        inverse = probs.inverse_sums[..., start:stop, :]
        np.multiply(grad_out[..., start:stop, :], inverse, out=weighted)
        row_sums = np.einsum("bhgld,bhgld->bhgl", weighted, probs.out[..., start:stop, :])
        np.negative(row_sums, out=part[..., size])
        part = part.reshape(batch, kv_heads, groups * rows, size + 1)
        grad_v[:, :, :end] += block.swapaxes(-1, -2) @ part[..., :size]
        grad_logits = part @ v_columns[..., :end]
        grad_logits *= block
        queries = _gather_queries(q, start, stop, scale)
        grad_k[:, :, :end] += grad_logits.swapaxes(-1, -2) @ queries
        grad_queries = (grad_logits @ k[:, :, :end]).reshape(batch, kv_heads * groups, rows, size)
        np.multiply(grad_queries, scale, out=grad_q[:, :, start:stop])
    return out


def _blocks(length: int, num_keys: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, end): queries start..stop see keys before `end` at most."""
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        yield start, stop, num_keys - length + stop if causal else num_keys


def _gather_queries(q: HostArray, start: int, stop: int, scale: HostArray) -> HostArray:
    """Copy scaled queries (B, Hkv, G, L, D) of one block to (B, Hkv, G*n, D)."""
    batch, kv_heads, groups, _, size = q.shape
    rows: HostArray = np.multiply(q[..., start:stop, :], scale, order="C")
    return rows.reshape(batch, kv_heads, groups * (stop - start), size)


def _needs_shift(q: HostArray, k: HostArray, scale: HostArray, causal: bool) -> HostArray:
    """Say (B, Hkv, G, L, 1) whose logits may leave +-32, by Cauchy-Schwarz over visible keys.

    Only visible keys count, so that a later position cannot change an earlier row's rounding.
    """
    largest_key = np.maximum.accumulate(np.sqrt(np.einsum("bhsd,bhsd->bhs", k, k)), axis=-1)
    bound = np.sqrt(np.einsum("bhgld,bhgld->bhgl", q, q))
    first = k.shape[2] - (q.shape[3] if causal else 1)  # the last entry is the largest of all
    bound *= largest_key[:, :, None, first:]
    bound *= scale
    needs_shift: HostArray = ~(bound <= _SAFE_LOGIT)[..., None]
    return needs_shift


def check_attention(
    function: str,
    q: HostArray,
    k: HostArray,
    v: HostArray,
    grad_out: HostArray | None = None,
    *,
    causal: bool,
) -> tuple[int, int, int, int, int]:
    """Check all arrays and return (B, Hkv, G, L, D)."""
    inputs = Inputs(function)
    inputs.check("q", q, "B", "Hq", "L", "D")
    inputs.check("k", k, "B", "Hkv", "S", "D")
    inputs.check("v", v, "B", "Hkv", "S", "D")
    if grad_out is not None:
        inputs.check("grad_out", grad_out, "B", "Hq", "L", "D")
    batch, heads, length, size = q.shape
    _, kv_heads, num_keys, _ = k.shape
    if q.size == 0 < batch * heads * length or (q.size and num_keys == 0):
        raise ShapeError(
            f"{function}: q and k must have elements and keys to attend to, got D = {size} and "
            f"S = {num_keys}. A mean of no keys is not defined."
        )
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ShapeError(
            f"{function}: q must have a multiple of the {kv_heads} key heads, got {heads} heads. "
            "Every key head serves equally many query heads."
        )
    if causal and num_keys < length:
        raise ShapeError(
            f"{function}: k must hold at least the L = {length} positions of q, "
            f"got S = {num_keys}. The queries are the last L of S positions."
        )
    return batch, kv_heads, heads // kv_heads, length, size


def check_saved_attention(
    function: str,
    probs: Any,
    probs_keys: int,
    shape: tuple[int, ...],
    num_keys: int,
    *,
    causal: bool,
) -> None:
    """Raise unless a backward got what its own forward saved, for q of `shape`."""
    if (probs.out.shape, probs_keys) != (shape, num_keys):
        raise ShapeError(
            f"{function}: probs must have (B, Hkv, G, L, D) = {shape} and "
            f"S = {num_keys}, got {probs.out.shape} and {probs_keys}. The letters are bound by "
            "q and k. Pass what their own forward returned."
        )
    if probs.causal != causal:
        raise ShapeError(
            f"{function}: probs must come from {function.removesuffix('_backward')}, got those of "
            "the other kind. Pass what their own forward returned."
        )


def check_gradients(
    function: str, out: tuple[HostArray, ...], q: HostArray, k: HostArray, v: HostArray
) -> None:
    """Raise unless the three arrays can be written and have the shapes of q, k and v."""
    for name, target, given in zip("qkv", out, (q, k, v), strict=True):
        if target.shape != given.shape:
            raise ShapeError(
                f"{function}: out must hold an array of shape {given.shape} for grad_{name}, got "
                f"{target.shape}. It is the shape of {name}. Give arrays like q, k and v."
            )
        if not target.flags.writeable:
            raise RangeError(
                f"{function}: out must hold a writable array for grad_{name}, got a read-only one. "
                "Give a copy."
            )
