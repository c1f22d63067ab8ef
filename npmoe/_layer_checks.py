"""What the layer's two functions check of their arguments."""

from __future__ import annotations

import math

import numpy as np

from npmoe._checks import Axes, check_float, check_integer_ids, check_same_dtype
from npmoe._typing import Array
from npmoe.backends import Backend
from npmoe.config import MoEConfig
from npmoe.errors import RangeError, ShapeError
from npmoe.params import MoEParams, check_params


def check_inputs(
    name: str, hidden_states: Array, params: MoEParams, cfg: MoEConfig
) -> tuple[int, ...]:
    """Check input and parameters; return the input's shape."""
    check_float(name, "hidden_states", hidden_states)
    shape = tuple(hidden_states.shape)
    if len(shape) < 2 or shape[-1] != cfg.hidden_size:
        raise ShapeError(
            f"{name}: hidden_states must have shape (..., H) = (..., {cfg.hidden_size}) with at "
            f"least two axes, got {shape}. H is bound by cfg."
        )
    check_params(name, params, cfg, hidden_states.dtype, "hidden_states")
    return shape


def flat_mask(name: str, token_mask: Array | None, shape: tuple[int, ...]) -> Array | None:
    """Return the mask as (T,)."""
    if token_mask is None:
        return None
    if str(getattr(token_mask, "dtype", None)) != "bool" or tuple(token_mask.shape) != shape[:-1]:
        raise ShapeError(
            f"{name}: token_mask must be a bool array of shape {shape[:-1]}, got "
            f"{getattr(token_mask, 'dtype', type(token_mask).__name__)} "
            f"{tuple(getattr(token_mask, 'shape', ()))}. True means valid."
        )
    return token_mask.reshape(math.prod(shape[:-1]))


def flat_ids(
    name: str, topk_ids: Array | None, shape: tuple[int, ...], cfg: MoEConfig, run: Backend
) -> Array | None:
    """Return replayed ids as (T, K)."""
    if topk_ids is None:
        return None
    if cfg.routing in ("dense", "soft"):
        raise RangeError(
            f"{name}: topk_ids must be None with routing={cfg.routing!r}, got an array. "
            "Nothing is chosen."
        )
    check_integer_ids(name, "topk_ids", topk_ids)
    if tuple(topk_ids.shape[:-1]) != shape[:-1] or topk_ids.shape[-1] < 1:
        raise ShapeError(
            f"{name}: topk_ids must have shape (..., K) = {(*shape[:-1], cfg.top_k)}, got "
            f"{tuple(topk_ids.shape)}. The leading axes are bound by hidden_states {shape}."
        )
    flat = topk_ids.reshape(math.prod(shape[:-1]), topk_ids.shape[-1])
    host = run.asnumpy(flat)
    if host.size and not (host.min() >= -1 and host.max() < cfg.router_size):
        raise RangeError(
            f"{name}: topk_ids must lie in -1..{cfg.router_size - 1}, got "
            f"{int(host.min())}..{int(host.max())}. E is bound by cfg; -1 means no expert."
        )
    ordered = np.sort(host, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if repeated.any():
        raise RangeError(
            f"{name}: topk_ids must be distinct within a token, got "
            f"{host[repeated.any(axis=1)][0].tolist()}."
        )
    return flat


def check_gradients(
    name: str,
    grad_output: Array,
    shape: tuple[int, ...],
    router_logits: Array,
    grad_router_logits: Array | None,
    dtype: object,
) -> None:
    """Check the gradients that come from outside against the forward pass."""
    check_float(name, "grad_output", grad_output)
    if tuple(grad_output.shape) != shape:
        raise ShapeError(
            f"{name}: grad_output must have shape {shape}, got {tuple(grad_output.shape)}. "
            "It is bound by the output of the forward pass."
        )
    check_same_dtype(name, "grad_output", grad_output, dtype, "hidden_states")
    if grad_router_logits is not None:
        axes = Axes(name)
        num_tokens, size = router_logits.shape
        axes.bind("the forward pass", T=num_tokens, E=size)
        check_float(name, "grad_router_logits", grad_router_logits)
        axes.check("grad_router_logits", grad_router_logits, "T", "E")
        source = "the router logits" if router_logits.dtype != dtype else "hidden_states"
        check_same_dtype(
            name, "grad_router_logits", grad_router_logits, router_logits.dtype, source
        )


def check_writable(name: str, out: MoEParams) -> None:
    """Raise unless every array that gradients are written into can be written."""
    for field in MoEParams.__dataclass_fields__:
        flags = getattr(getattr(out, field), "flags", None)
        if flags is not None and not flags.writeable:
            raise RangeError(
                f"{name}: out.{field} must be writable, got a read-only array. Give a copy."
            )
