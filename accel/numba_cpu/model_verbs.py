"""What a model computes around its MoE layers: the functions of `npmoe.nn` that have kernels."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe import nn
from npmoe._checks import check_same_dtype
from npmoe._typing import HostArray
from npmoe.nn.attention import check_attention, check_gradients, check_saved_attention
from npmoe.nn.norm import check_norm

from . import attention, norms
from .launch import SMALL, Engine, flat
from .rows import STEP
from .team import address

Gradients = tuple[HostArray, HostArray, HostArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRows:
    """What the backward needs: probabilities by blocks, not yet divided.

    kept : (B*Hq, N) float array
        Exponentials, as `attention.attend` lays them out.
    inverses : (B*L*Hq,) float array
        One over the sums of their rows.
    out : (B, Hkv, G, L, D) float array
        A view of the attention's output, which must stay as it is until the backward.
    num_keys : int
    panel : int
        Rows of `kept` are padded to multiples of it.
    causal : bool
    """

    kept: HostArray
    inverses: HostArray
    out: HostArray
    num_keys: int
    panel: int
    causal: bool

    def dense(self) -> HostArray:
        """Return the probabilities as one new array (B, Hq, L, S), exactly 0 at unseen keys."""
        batch, kv_heads, groups, length, _ = self.out.shape
        heads, num_keys, at = kv_heads * groups, self.num_keys, 0
        probs = np.zeros((batch * heads, length, num_keys), self.out.dtype)
        blocks = attention.cut_queries(length, num_keys, self.causal, self.panel)
        for first, rows, end, stride in blocks:
            block = self.kept[:, at : at + rows * stride].reshape(-1, rows, stride)
            probs[:, first : first + rows, :end] = block[..., :end]
            at += rows * stride
        probs = probs.reshape(batch, heads, length, num_keys)
        probs *= self.inverses.reshape(batch, length, heads).swapaxes(1, 2)[..., None]
        return probs


class ModelVerbs:
    """The functions of `npmoe.nn` of the same names; what they promise holds here too.

    The order of sums depends on nothing but the sizes. Where the elements of a head do not lie side
    by side, the array is copied first. Empty arrays are left to `npmoe.nn`.
    """

    def __init__(self, engine: Callable[[str, HostArray], Engine]) -> None:
        self._engine = engine

    def rms_norm(self, x: HostArray, weight: HostArray, eps: float = 1e-6) -> HostArray:
        """Return ``weight x / sqrt(mean(x**2) + eps)``; see `npmoe.nn.rms_norm`."""
        check_norm("rms_norm", x, weight, None, eps)
        y = np.empty(x.shape, x.dtype)
        if x.size:
            engine = self._engine("x", x)
            engine.over_rows(norms.normalize_rows, flat(x), flat(weight), x.dtype.type(eps),
                             y.reshape(-1), numbers=x.size)  # fmt: skip
        return y

    def rms_norm_backward(
        self, grad_y: HostArray, x: HostArray, weight: HostArray, eps: float = 1e-6
    ) -> tuple[HostArray, HostArray]:
        """Return the gradients of `rms_norm`; rows are summed 64 at a time."""
        rows = check_norm("rms_norm_backward", x, weight, None, eps, grad_y=grad_y)
        grad_x = np.empty(x.shape, x.dtype)
        partial = np.empty((-(-len(rows) // STEP), len(weight)), x.dtype)
        if x.size:
            engine = self._engine("x", x)
            engine.over_rows(norms.normalize_rows_backward, flat(grad_y), flat(x), flat(weight),
                             x.dtype.type(eps), grad_x.reshape(-1), partial,
                             numbers=x.size)  # fmt: skip
        return grad_x, partial.sum(axis=0)

    def causal_attention(self, q: HostArray, k: HostArray, v: HostArray) -> tuple[HostArray, Any]:
        """Return the output and what the backward needs; see `npmoe.nn.causal_attention`."""
        return self._attend("causal_attention", q, k, v, causal=True)

    def full_attention(self, q: HostArray, k: HostArray, v: HostArray) -> tuple[HostArray, Any]:
        """Return the output and what the backward needs; see `npmoe.nn.full_attention`."""
        return self._attend("full_attention", q, k, v, causal=False)

    def causal_attention_backward(
        self, grad_out: HostArray, q: HostArray, k: HostArray, v: HostArray, probs: Any, *,
        out: Gradients | None = None,
    ) -> Gradients:  # fmt: skip
        """Return the gradients of `causal_attention`."""
        return self._attend_backward(
            "causal_attention_backward", grad_out, q, k, v, probs, out, causal=True
        )

    def full_attention_backward(
        self, grad_out: HostArray, q: HostArray, k: HostArray, v: HostArray, probs: Any, *,
        out: Gradients | None = None,
    ) -> Gradients:  # fmt: skip
        """Return the gradients of `full_attention`."""
        return self._attend_backward(
            "full_attention_backward", grad_out, q, k, v, probs, out, causal=False
        )

    def _attend(
        self, function: str, q: HostArray, k: HostArray, v: HostArray, *, causal: bool
    ) -> tuple[HostArray, Any]:
        shape = check_attention(function, q, k, v, causal=causal)
        if not (q.size and k.size):
            result: tuple[HostArray, Any] = getattr(nn, function)(q, k, v)
            return result
        batch, kv_heads, groups, length, size = shape
        engine, num_keys = self._engine("q", q), k.shape[2]
        out = np.empty((batch, length, kv_heads, groups, size), q.dtype)
        sizes, scale = _sizes(engine, shape, num_keys), q.dtype.type(1 / math.sqrt(size))
        panel = sizes[-1]
        blocks = attention.cut_queries(length, num_keys, causal, panel)
        count = sum(rows * stride for _, rows, _, stride in blocks)
        kept = engine.empty(batch * kv_heads * groups, count)
        inverses = np.empty(q.size // size, q.dtype)
        arrays = [_Strided(a, q.dtype) for a in (q, k, v)]
        wide_keys, wide_size = (-(-n // panel) * panel for n in (num_keys, size))
        engine.team.run(
            attention.attend, sizes, causal, scale, *(part for a in arrays for part in a.parts),
            out.reshape(-1), kept, inverses, dtype=q.dtype, small=_is_small(shape, num_keys),
            room=size * wide_keys + (num_keys + attention.BLOCK) * wide_size,
        )  # fmt: skip
        saved = AttentionRows(
            kept=kept, inverses=inverses, out=out.transpose(0, 2, 3, 1, 4), num_keys=num_keys,
            panel=panel, causal=causal,
        )  # fmt: skip
        return saved.out.reshape(q.shape), saved

    def _attend_backward(
        self, function: str, grad_out: HostArray, q: HostArray, k: HostArray, v: HostArray,
        probs: Any, out: Gradients | None, *, causal: bool,
    ) -> Gradients:  # fmt: skip
        shape = check_attention(function, q, k, v, grad_out, causal=causal)
        if isinstance(probs, nn.AttentionProbs):
            result: Gradients = getattr(nn, function)(grad_out, q, k, v, probs, out=out)
            return result
        engine, num_keys, size = self._engine("q", q), k.shape[2], shape[-1]
        check_saved_attention(function, probs, probs.num_keys, shape, num_keys, causal=causal)
        check_same_dtype(function, "probs", probs.out, q.dtype, "q")
        if out is None:
            out = (np.empty(q.shape, q.dtype), np.empty(k.shape, q.dtype),
                   np.empty(v.shape, q.dtype))  # fmt: skip
        check_gradients(function, out, q, k, v)
        sizes, scale = _sizes(engine, shape, num_keys), q.dtype.type(1 / math.sqrt(size))
        panel = sizes[-1]
        given = [_Strided(a, q.dtype) for a in (grad_out, q, k, v)]
        written = [_Strided(a, q.dtype) for a in out]
        wide_keys, wide_size = (-(-n // panel) * panel for n in (num_keys, size))
        engine.team.run(
            attention.attend_backward, sizes, causal, scale,
            *(part for a in given for part in a.parts), flat(probs.out.transpose(0, 3, 1, 2, 4)),
            probs.kept, probs.inverses, *(part for a in written for part in a.parts),
            dtype=q.dtype, small=_is_small(shape, num_keys),
            room=(size + attention.BLOCK) * wide_keys
            + 3 * (num_keys + attention.BLOCK) * wide_size,
        )  # fmt: skip
        for array, target in zip(written, out, strict=True):
            array.copy_back(target)
        return out


class _Strided:
    """An array (B, heads, L, D) as kernels take it: its memory, flat, and where things lie."""

    def __init__(self, array: HostArray, dtype: np.dtype[Any]) -> None:
        step = array.itemsize
        strides = array.strides
        if (
            array.dtype != dtype
            or not array.flags.aligned
            or strides[-1] != step
            or any(s < 0 or s % step for s in strides)
        ):
            array, step = np.array(array, dtype, order="C"), dtype.itemsize
            strides = array.strides
        self._array = array
        whole = array.transpose(0, 2, 1, 3)
        if whole.flags.c_contiguous:  # as models have it
            memory = flat(whole)
        else:
            span = step + sum((n - 1) * s for n, s in zip(array.shape, strides, strict=True))
            raw: Any = (ctypes.c_char * span).from_address(address(array))
            # A thread may outlive an interrupted call, and then the memory must too.
            raw.owner = array
            memory = np.ndarray(span // step, dtype, raw)
        self.parts = memory, tuple(s // step for s in strides[:3])

    def copy_back(self, target: HostArray) -> None:
        """Write to the array that this was made of, where it had to be a copy."""
        if target is not self._array:
            np.copyto(target, self._array, casting="same_kind")


def _sizes(engine: Engine, shape: tuple[int, ...], num_keys: int) -> tuple[int, ...]:
    """Return what kernels call `sizes`."""
    return (*shape[:4], num_keys, shape[4], attention.WIDE * engine.lanes)


def _is_small(shape: tuple[int, ...], num_keys: int) -> bool:
    return math.prod(shape) * num_keys < SMALL
