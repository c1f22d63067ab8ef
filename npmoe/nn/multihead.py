"""Multi-head self-attention with grouped heads: causal or full, with rotary positions or none.

The pairs that `apply_rotary` turns lie D/2 apart. Here the rows of the query and key projections
are reordered so that pairs are neighbours and a turn is one complex product in place: queries and
keys are reordered alike, so their dot products are those of the half-split convention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.errors import RangeError, ShapeError, UnsupportedError
from npmoe.nn import attention
from npmoe.nn._inputs import Inputs
from npmoe.nn.key_value_cache import KeyValueCache
from npmoe.nn.rotary import rotary_tables
from npmoe.nn.verbs import ModelVerbs


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParams:
    """Parameters of `multihead_attention`, or their gradients.

    qkv_proj : ((Hq + 2*Hkv)*D, H) float array
        Rows of the query heads, then of the key heads, then of the value heads.
    output_proj : (H, Hq*D) float array
    """

    qkv_proj: HostArray
    output_proj: HostArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAttention:
    """What `multihead_attention_backward` needs; x itself, not a copy.

    qkv : (B, L, Hq + 2*Hkv, D) float array
        Turned queries and keys with neighbouring pairs, and values.
    attended : (B, L, Hq*D) float array
    turns : (L, (Hq + Hkv)*D/2) complex array or None
        None without rotary positions; queries and keys are then as projected.
    probs : object
        What the attention returned for its backward; `AttentionProbs` unless `verbs` did it.
    """

    x: HostArray
    qkv: HostArray
    attended: HostArray
    turns: HostArray | None
    probs: Any
    num_kv_heads: int
    causal: bool
    cached: bool


def init_attention_params(
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    rng: int | np.random.Generator,
    dtype: str = "float32",
    *,
    output_scale: float = 1.0,
) -> AttentionParams:
    """Draw weights of standard deviation 1/sqrt(fan-in), with D = H / Hq.

    Parameters
    ----------
    hidden_size, num_heads, num_kv_heads : int
        H, Hq and Hkv.
    rng : int or Generator
    dtype : {"float32", "float64"}
        Values are drawn in float64 and rounded.
    output_scale : float
        Multiplies output_proj.

    Returns
    -------
    AttentionParams

    Raises
    ------
    ShapeError
        If H is no multiple of Hq, Hq none of Hkv, or D is odd.
    """
    if num_heads < 1 or hidden_size % num_heads != 0:
        raise ShapeError(
            f"init_attention_params: hidden_size must be a multiple of num_heads = {num_heads}, "
            f"got {hidden_size}. Every head has D = H / Hq elements."
        )
    head_dim = hidden_size // num_heads
    _check_heads("init_attention_params", num_heads, num_kv_heads, head_dim)
    generator = np.random.default_rng(rng)
    qkv = generator.standard_normal(((num_heads + 2 * num_kv_heads) * head_dim, hidden_size))
    qkv /= math.sqrt(hidden_size)
    output = generator.standard_normal((hidden_size, hidden_size))
    output *= output_scale / math.sqrt(hidden_size)
    return AttentionParams(qkv_proj=qkv.astype(dtype), output_proj=output.astype(dtype))


def multihead_attention(
    x: HostArray,
    params: AttentionParams,
    num_heads: int,
    num_kv_heads: int,
    *,
    rope_base: float | None = 10000.0,
    causal: bool = True,
    cache: KeyValueCache | None = None,
    verbs: ModelVerbs | None = None,
) -> tuple[HostArray, SavedAttention]:
    """Let every position attend to itself and the earlier ones, or to all.

    q, k, v = heads of qkv_proj x;  y = output_proj concat_h(attention(turn(q), turn(k), v)).

    Parameters
    ----------
    x : (B, L, H) float array
    params : AttentionParams
    num_heads, num_kv_heads : int
        Hq and Hkv.
    rope_base : float or None
        Base of `rotary_tables`; None leaves out the turn.
    causal : bool
        Whether a position sees no later one.
    cache : KeyValueCache, optional
        Holds the earlier positions; x continues them, and is appended. Causal only.
    verbs : ModelVerbs, optional
        Attends in the place of `causal_attention` and `full_attention`.

    Returns
    -------
    y : (B, L, H) float array
        New, with the dtype of x.
    saved : SavedAttention
        For the backward.

    Raises
    ------
    ShapeError, DTypeError
    RangeError
        If the cache is full, or given with causal=False.

    Notes
    -----
    **Cost**: 4*T*H*(Hq + Hkv)*D flops for T = B*L, and those of the attention.
    """
    if cache is not None and not causal:
        raise RangeError(
            "multihead_attention: cache must be None with causal=False, got one. "
            "Positions that are gone would have to see the new ones."
        )
    head_dim = _check("multihead_attention", x, params, num_heads, num_kv_heads)
    batch, length, hidden = x.shape
    start = 0 if cache is None else cache.length
    weight, turns = params.qkv_proj, None
    if rope_base is not None:
        turns = _turns(start, length, head_dim, rope_base, x.dtype, num_heads + num_kv_heads)
        weight = _neighbour_pairs(weight, num_heads + num_kv_heads, head_dim)
    qkv = (x.reshape(-1, hidden) @ weight.T).reshape(batch, length, -1, head_dim)
    if turns is not None:
        _turn(qkv, turns)
    q, k, v = _split_heads(qkv, num_kv_heads)
    if cache is not None:
        k, v = cache.append(k, v)
    run: Any = attention if verbs is None else verbs
    out, probs = (run.causal_attention if causal else run.full_attention)(q, k, v)
    attended = out.transpose(0, 2, 1, 3).reshape(batch, length, -1)
    y = (attended.reshape(batch * length, -1) @ params.output_proj.T).reshape(x.shape)
    return y, SavedAttention(
        x=x,
        qkv=qkv,
        attended=attended,
        turns=turns,
        probs=probs,
        num_kv_heads=num_kv_heads,
        causal=causal,
        cached=cache is not None,
    )


def multihead_attention_backward(
    grad_y: HostArray,
    saved: SavedAttention,
    params: AttentionParams,
    *,
    verbs: ModelVerbs | None = None,
) -> tuple[HostArray, AttentionParams]:
    """Return the gradients of `multihead_attention`.

    Parameters
    ----------
    grad_y : (B, L, H) float array
    saved : SavedAttention
        From the forward, without a cache.
    params, verbs
        As given to it.

    Returns
    -------
    grad_x : (B, L, H) float array
    grad_params : AttentionParams
        All new.

    Raises
    ------
    UnsupportedError
        If the forward used a cache.
    ShapeError, DTypeError
    """
    function = "multihead_attention_backward"
    if saved.cached:
        raise UnsupportedError(
            f"{function}: saved must come from a forward without a cache, got one with a cache. "
            "The inputs of cached positions are gone. Run the whole sequence at once."
        )
    batch, length, num_all, head_dim = saved.qkv.shape
    num_rotated = num_all - saved.num_kv_heads
    num_heads = num_rotated - saved.num_kv_heads
    _check(function, saved.x, params, num_heads, saved.num_kv_heads, grad_y=grad_y)
    rows, grad_rows = (a.reshape(batch * length, -1) for a in (saved.x, grad_y))
    grad_output_proj = grad_rows.T @ saved.attended.reshape(batch * length, -1)
    grad_attended = (grad_rows @ params.output_proj).reshape(batch, length, -1, head_dim)
    grad_qkv = np.empty(saved.qkv.shape, saved.qkv.dtype)
    run: Any = attention if verbs is None else verbs
    attend_backward = run.causal_attention_backward if saved.causal else run.full_attention_backward
    attend_backward(
        grad_attended.transpose(0, 2, 1, 3),
        *_split_heads(saved.qkv, saved.num_kv_heads),
        saved.probs,
        out=_split_heads(grad_qkv, saved.num_kv_heads),
    )
    weight = params.qkv_proj
    if saved.turns is not None:
        _turn(grad_qkv, saved.turns.conj())
        weight = _neighbour_pairs(weight, num_rotated, head_dim)
    grad_qkv_rows = grad_qkv.reshape(batch * length, -1)
    grad_x = (grad_qkv_rows @ weight).reshape(grad_y.shape)
    grad_qkv_proj = grad_qkv_rows.T @ rows
    if saved.turns is not None:
        grad_qkv_proj = _half_pairs(grad_qkv_proj, num_rotated, head_dim)
    return grad_x, AttentionParams(qkv_proj=grad_qkv_proj, output_proj=grad_output_proj)


def _split_heads(qkv: HostArray, num_kv_heads: int) -> tuple[HostArray, HostArray, HostArray]:
    """Return views q, k, v (B, heads, L, D) of (B, L, Hq + 2*Hkv, D)."""
    heads = qkv.transpose(0, 2, 1, 3)
    first_key = heads.shape[1] - 2 * num_kv_heads
    first_value = first_key + num_kv_heads
    return heads[:, :first_key], heads[:, first_key:first_value], heads[:, first_value:]


@lru_cache(maxsize=4)
def _turns(
    start: int, length: int, head_dim: int, base: float, dtype: np.dtype[Any], num_rotated: int
) -> HostArray:
    """Return the turns of all heads of a position side by side, (L, num_rotated*D/2) complex."""
    cos, sin = rotary_tables(start, length, head_dim, base, dtype)
    turns = np.tile(cos + 1j * sin, num_rotated)
    turns.flags.writeable = False
    return turns


def _turn(qkv: HostArray, turns: HostArray) -> None:
    """Multiply the neighbouring pairs of queries and keys by `turns`, in place."""
    pairs = qkv.reshape(*qkv.shape[:2], -1).view(turns.dtype)[..., : turns.shape[1]]
    np.multiply(pairs, turns, out=pairs)


def _neighbour_pairs(weight: HostArray, num_rotated: int, head_dim: int) -> HostArray:
    """Copy qkv_proj with rows (i, i + D/2) of each query and key head made neighbours."""
    return _swap_axes(weight, num_rotated, (2, head_dim // 2))


def _half_pairs(weight: HostArray, num_rotated: int, head_dim: int) -> HostArray:
    """Undo `_neighbour_pairs`, in a copy."""
    return _swap_axes(weight, num_rotated, (head_dim // 2, 2))


def _swap_axes(weight: HostArray, num_rotated: int, pair: tuple[int, int]) -> HostArray:
    rotated = num_rotated * pair[0] * pair[1]
    new = np.empty(weight.shape, weight.dtype)
    old_rows = weight[:rotated].reshape(num_rotated, *pair, -1)
    new[:rotated] = old_rows.swapaxes(1, 2).reshape(rotated, -1)
    new[rotated:] = weight[rotated:]
    return new


def _check_heads(function: str, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
        raise ShapeError(
            f"{function}: num_heads must be a multiple of num_kv_heads = {num_kv_heads}, "
            f"got {num_heads}. Every key head serves equally many query heads."
        )
    if head_dim % 2 != 0:
        raise ShapeError(
            f"{function}: the head size D must be even, got {head_dim}. "
            "Rotary positions turn pairs of elements."
        )


def _check(
    function: str,
    x: HostArray,
    params: AttentionParams,
    num_heads: int,
    num_kv_heads: int,
    *,
    grad_y: HostArray | None = None,
) -> int:
    """Check everything and return D."""
    inputs = Inputs(function)
    inputs.check("params.output_proj", params.output_proj, "H", "Q")
    width = params.output_proj.shape[1]
    if num_heads < 1 or width % num_heads != 0:
        raise ShapeError(
            f"{function}: params.output_proj must have a multiple of num_heads = {num_heads} "
            f"columns, got {width}. They are the heads' outputs, one after another."
        )
    head_dim: int = width // num_heads
    _check_heads(function, num_heads, num_kv_heads, head_dim)
    num_all = num_heads + 2 * num_kv_heads
    inputs.axes.bind("num_heads and num_kv_heads", N=num_all)
    inputs.axes.bind("params.output_proj and num_heads", D=head_dim)
    inputs.check("params.qkv_proj", params.qkv_proj, "N*D", "H")
    inputs.check("x", x, "B", "L", "H")
    if grad_y is not None:
        inputs.check("grad_y", grad_y, "B", "L", "H")
    return head_dim
