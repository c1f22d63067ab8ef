"""Launches of what moves rows and adds them up: `accel/kernels/rows.cu`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._typing import Array
from npmoe.dispatch import DispatchPlan

from ..curve import Curve
from .kernel import Device, InOut, Kernel, Out
from .tilings import element_name, real_name

THREADS = 128
_WARPS = THREADS // 32
_I = np.int32


def _launch(device: Device, entry: str, dtype: Any, blocks: int, args: list[Any]) -> None:
    """Launch so many blocks, if there are any."""
    if blocks:
        device.launch(
            Kernel("rows", entry, (("REAL", real_name(dtype)),)), (blocks,), THREADS, args
        )


def _rows_in(x: Array) -> int:
    """Return the rows of an array that has columns."""
    return int(x.shape[0]) if x.size else 0


def optional(device: Device, x: Array | None) -> Array | None:
    """Return x as kernels read it."""
    return None if x is None else device.contiguous(x)


def gather(device: Device, x: Array, plan: DispatchPlan) -> Array:
    """(T, H) -> (T*K, H)."""
    x, N = device.contiguous(x), x.shape[1]
    out = device.empty((plan.token_ids.shape[0], N), x.dtype)
    args = [x, device.contiguous(plan.token_ids), _I(N), Out(out)]
    _launch(device, "gather_rows", x.dtype, _rows_in(out), args)
    return out


def scale(device: Device, x: Array, plan: DispatchPlan, topk_weights: Array) -> Array:
    """Multiply rows by the weights of their routes."""
    x, out = device.contiguous(x), device.empty(x.shape, x.dtype)
    args = [x, device.contiguous(plan.pair_ids), device.contiguous(topk_weights),
            _I(x.shape[1]), Out(out)]  # fmt: skip
    _launch(device, "scale_rows", x.dtype, _rows_in(x), args)
    return out


def spread(device: Device, values: Array, plan: DispatchPlan) -> Array:
    """(E, N) -> (T*K, N)."""
    values, N = device.contiguous(values), values.shape[1]
    out = device.empty((plan.pair_ids.shape[0], N), values.dtype)
    args = [values, device.contiguous(plan.pair_ids), device.contiguous(plan.expert_offsets),
            _I(plan.num_experts), _I(N), Out(out)]  # fmt: skip
    _launch(device, "spread_experts", values.dtype, _rows_in(out), args)
    return out


def combine(
    device: Device, rows: Array, plan: DispatchPlan, topk_weights: Array | None = None
) -> Array:
    """(R, H) -> (T, H), slots in ascending order."""
    rows, N = device.contiguous(rows), rows.shape[1]
    out = device.empty((plan.num_tokens, N), rows.dtype)
    args = [rows, device.contiguous(plan.row_ids), optional(device, topk_weights),
            _I(N), _I(plan.top_k), Out(out)]  # fmt: skip
    _launch(device, "combine_rows", rows.dtype, _rows_in(out), args)
    return out


def dot(device: Device, a: Array, b: Array, plan: DispatchPlan) -> Array:
    """(R, N), (R, N) -> (T, K)."""
    out = device.empty((plan.num_tokens, plan.top_k), a.dtype)
    args = [device.contiguous(a), device.contiguous(b), device.contiguous(plan.row_ids),
            _I(out.size), _I(a.shape[1]), Out(out)]  # fmt: skip
    _launch(device, "row_dot", a.dtype, -(-out.size // _WARPS), args)
    return out


def finish_weights(
    device: Device, dots: Array, plan: DispatchPlan, grad_output: Array, bias: Array | None
) -> Array:
    """Return the gradient of the weights (T, K) from the dots of tiles (R, tiles)."""
    out = device.empty((plan.num_tokens, plan.top_k), dots.dtype)
    args = [dots, _I(dots.shape[1]), grad_output, optional(device, bias),
            device.contiguous(plan.row_ids), device.contiguous(plan.expert_offsets),
            _I(plan.num_experts), _I(out.size), _I(plan.top_k), _I(grad_output.shape[1]),
            Out(out)]  # fmt: skip
    _launch(device, "finish_weights", dots.dtype, -(-out.size // _WARPS), args)
    return out


def segment_sum(
    device: Device,
    rows: Array,
    plan: DispatchPlan,
    out: Array,
    accumulate: bool = False,
    weights: Array | None = None,
) -> None:
    """Sum the rows of every expert into out (E, N); with weights, tokens' rows (T, N) weighted."""
    E, N = out.shape
    if out.size:
        options = (("REAL", real_name(out.dtype)), ("OPERAND", element_name(rows.dtype)))
        device.launch(
            Kernel("rows", "segment_sum", options), (-(-N // THREADS), E), THREADS,
            [device.contiguous(rows), device.contiguous(plan.pair_ids), weights,
             device.contiguous(plan.expert_offsets), _I(plan.top_k), _I(N),
             InOut(out) if accumulate else Out(out), _I(accumulate)],
        )  # fmt: skip


def activate(device: Device, gate_up: Array, curve: Curve) -> Array:
    """(R, 2I) -> (R, I)."""
    gate_up, I = device.contiguous(gate_up), gate_up.shape[1] // (2 if curve.gated else 1)
    out = device.empty((gate_up.shape[0], I), gate_up.dtype)
    args = [gate_up, *_shape_and_curve(out, curve), Out(out)]
    _launch(device, "activation", out.dtype, _rows_in(out), args)
    return out


def activate_backward(device: Device, grad_act: Array, gate_up: Array, curve: Curve) -> Array:
    """Return grad_gate_up."""
    out = device.empty(gate_up.shape, gate_up.dtype)
    args = [device.contiguous(grad_act), device.contiguous(gate_up),
            *_shape_and_curve(grad_act, curve), Out(out)]  # fmt: skip
    _launch(device, "activation_backward", out.dtype, _rows_in(grad_act), args)
    return out


def _shape_and_curve(act: Array, curve: Curve) -> list[Any]:
    """Return I, gated, kind and the settings."""
    real = np.dtype(act.dtype).type
    return [_I(act.shape[1]), _I(curve.gated), _I(curve.kind), *map(real, curve.settings)]


@dataclass(slots=True)
class Goal:
    """Where a kernel writes a gradient, and what the caller gets."""

    array: Array
    result: Array


@contextlib.contextmanager
def writable(
    device: Device, out: Array | None, like: Array, x: Array, accumulate: bool
) -> Iterator[Goal]:
    """Give a kernel a place for a gradient: the caller's array, or one that is copied there."""
    if out is None:
        new = device.empty(like.shape, x.dtype)
        yield Goal(new, new)
    elif device.is_contiguous(out):
        yield Goal(out, out)
    else:
        beside = device.contiguous(out) if accumulate else device.empty(out.shape, out.dtype)
        yield Goal(beside, out)
        out[...] = beside
