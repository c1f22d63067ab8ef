"""One block: attention and a feed-forward sublayer (dense or MoE), each with a residual.

Pre-norm: ``x + sublayer(norm(x))``. Post-norm: ``norm(x + sublayer(x))``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npmoe import nn
from npmoe._typing import HostArray
from npmoe.backends import Backend, get_backend
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.layer import moe_backward, moe_forward
from npmoe.models.config import ModelConfig
from npmoe.params import MoEParams, init_params
from npmoe.saved import SavedTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class NormParams:
    """Weight (H,), and bias (H,) for LayerNorm."""

    weight: HostArray
    bias: HostArray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockParams:
    """Parameters, or their gradients, of one block."""

    attention_norm: NormParams
    attention: nn.AttentionParams
    feed_forward_norm: NormParams
    feed_forward: nn.MLPParams | MoEParams


@dataclass(frozen=True, slots=True)
class DenseSaved:
    """Input and pre-activations of a dense feed-forward sublayer."""

    x: HostArray
    gate_up: HostArray


@dataclass(frozen=True, slots=True)
class SublayerSaved:
    """What enters the norm, what dropout kept, and what the sublayer itself saved."""

    norm_input: HostArray
    dropout_mask: HostArray | None
    inner: Any


@dataclass(frozen=True, slots=True)
class BlockSaved:
    """What the backward pass of one block needs."""

    attention: SublayerSaved
    feed_forward: SublayerSaved
    dropout: float
    verbs: nn.ModelVerbs

    @property
    def moe(self) -> SavedTensors | None:
        """The MoE layer's saved tensors; None in a dense block."""
        inner = self.feed_forward.inner
        return inner if isinstance(inner, SavedTensors) else None


def init_norm(cfg: ModelConfig, dtype: str) -> NormParams:
    """Return a norm that starts as the identity."""
    bias = np.zeros(cfg.hidden_size, dtype) if cfg.norm == "layer" else None
    return NormParams(weight=np.ones(cfg.hidden_size, dtype), bias=bias)


def model_verbs(backend: str | Backend | None) -> nn.ModelVerbs:
    """Return the backend's `nn`, or the module if it has none."""
    verbs: nn.ModelVerbs = getattr(get_backend(backend), "nn", nn)
    return verbs


def norm(x: HostArray, params: NormParams, verbs: nn.ModelVerbs) -> HostArray:
    """Apply RMSNorm, or LayerNorm if there is a bias."""
    if params.bias is None:
        return verbs.rms_norm(x, params.weight)
    return nn.layer_norm(x, params.weight, params.bias)


def norm_backward(
    grad_y: HostArray, x: HostArray, params: NormParams, verbs: nn.ModelVerbs
) -> tuple[HostArray, NormParams]:
    """Return the gradients of x and of the parameters."""
    if params.bias is None:
        grad_x, grad_weight = verbs.rms_norm_backward(grad_y, x, params.weight)
        return grad_x, NormParams(weight=grad_weight)
    grad_x, grad_weight, grad_bias = nn.layer_norm_backward(grad_y, x, params.weight, params.bias)
    return grad_x, NormParams(weight=grad_weight, bias=grad_bias)


def drop(
    x: HostArray, p: float, rng: np.random.Generator | None
) -> tuple[HostArray, HostArray | None]:
    """Apply dropout; without any, return x itself and None instead of a mask."""
    return (x, None) if rng is None or p == 0 else nn.dropout(x, p, rng)


def drop_backward(grad_y: HostArray, mask: HostArray | None, p: float) -> HostArray:
    """Return the gradient of x; grad_y itself without dropout."""
    return grad_y if mask is None else nn.dropout_backward(grad_y, mask, p)


def feed_forward(
    x: HostArray,
    params: nn.MLPParams | MoEParams,
    cfg: ModelConfig,
    moe: MoEConfig | None,
    rng: np.random.Generator | None,
    backend: str | Backend | None,
) -> tuple[HostArray, DenseSaved | SavedTensors]:
    """Run the dense or MoE sublayer on x (B, L, H)."""
    if isinstance(params, nn.MLPParams):
        y, gate_up = nn.mlp(x, params, cfg.activation)
        return y, DenseSaved(x, gate_up)
    if moe is None:
        raise RangeError("block: moe must be a config for a block with MoE parameters, got None.")
    return moe_forward(x, params, moe, backend, rng)


def feed_forward_backward(
    grad_y: HostArray,
    saved: DenseSaved | SavedTensors,
    params: nn.MLPParams | MoEParams,
    cfg: ModelConfig,
    grad_router_logits: HostArray | None,
    out: MoEParams | None,
) -> tuple[HostArray, nn.MLPParams | MoEParams]:
    """Return the gradients of x and of the parameters."""
    if isinstance(saved, DenseSaved) and isinstance(params, nn.MLPParams):
        return nn.mlp_backward(grad_y, saved.x, saved.gate_up, params, cfg.activation)
    if isinstance(saved, SavedTensors) and isinstance(params, MoEParams):
        grads = moe_backward(grad_y, saved, params, grad_router_logits, out)
        return grads.hidden_states, grads.params()
    raise RangeError(
        "block_backward: saved must come from a block with these parameters, got "
        f"{type(saved).__name__} with {type(params).__name__}."
    )


def init_block(cfg: ModelConfig, layer: int, rng: np.random.Generator, dtype: str) -> BlockParams:
    """Draw a block; what enters the residual stream is scaled by 1/sqrt(2 * num_layers)."""
    scale = float(1.0 / np.sqrt(2.0 * cfg.num_layers))
    attention = nn.init_attention_params(
        cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, rng, dtype, output_scale=scale
    )
    inner: nn.MLPParams | MoEParams
    if cfg.moe is not None and cfg.is_moe_layer(layer):
        inner = init_params(cfg.moe, rng, dtype)
    else:
        width = cfg.dense_intermediate_size
        inner = nn.init_mlp_params(cfg.hidden_size, width, cfg.activation, rng, dtype)
    return BlockParams(
        attention_norm=init_norm(cfg, dtype),
        attention=attention,
        feed_forward_norm=init_norm(cfg, dtype),
        feed_forward=replace(inner, down_proj=inner.down_proj * np.asarray(scale, dtype)),
    )


def block(
    x: HostArray,
    params: BlockParams,
    cfg: ModelConfig,
    moe: MoEConfig | None,
    *,
    rng: np.random.Generator | None = None,
    backend: str | Backend | None = None,
    cache: nn.KeyValueCache | None = None,
) -> tuple[HostArray, BlockSaved]:
    """Run one block.

    Parameters
    ----------
    x : (B, L, H) float array
    params : BlockParams
    cfg : LanguageConfig or VisionConfig
    moe : MoEConfig or None
        The MoE sublayer's config at this step (its router noise may change between steps).
    rng : numpy Generator, optional
        Source of dropout and router noise; None means neither.
    backend : str, Backend or None
        Runs the MoE sublayer, and what else it has kernels for.
    cache : KeyValueCache, optional
        Keys and values of earlier positions, extended by this call.

    Returns
    -------
    y : (B, L, H) float array
    saved : BlockSaved
    """
    p = cfg.dropout if rng is not None else 0.0
    verbs = model_verbs(backend)
    middle, attention_saved = _sublayer(
        x,
        params.attention_norm,
        cfg,
        p,
        rng,
        verbs,
        lambda h: nn.multihead_attention(
            h,
            params.attention,
            cfg.num_heads,
            cfg.num_kv_heads,
            rope_base=cfg.rope_base,
            causal=cfg.causal,
            cache=cache,
            verbs=verbs,
        ),
    )
    y, feed_forward_saved = _sublayer(
        middle,
        params.feed_forward_norm,
        cfg,
        p,
        rng,
        verbs,
        lambda h: feed_forward(h, params.feed_forward, cfg, moe, rng, backend),
    )
    return y, BlockSaved(attention_saved, feed_forward_saved, p, verbs)


def block_backward(
    grad_y: HostArray,
    saved: BlockSaved,
    params: BlockParams,
    cfg: ModelConfig,
    *,
    grad_router_logits: HostArray | None = None,
    out: MoEParams | None = None,
) -> tuple[HostArray, BlockParams]:
    """Return the gradients of x and of the parameters.

    Parameters
    ----------
    grad_y : (B, L, H) float array
    saved, params, cfg
        As in the forward pass.
    grad_router_logits : (T, E) float array, optional
        From auxiliary losses.
    out : MoEParams, optional
        Arrays that receive the MoE gradients.
    """
    p, verbs = saved.dropout, saved.verbs
    grad_middle, grad_feed_forward_norm, grad_feed_forward = _sublayer_backward(
        grad_y,
        saved.feed_forward,
        params.feed_forward_norm,
        cfg,
        p,
        verbs,
        lambda g, inner: feed_forward_backward(
            g, inner, params.feed_forward, cfg, grad_router_logits, out
        ),
    )
    grad_x, grad_attention_norm, grad_attention = _sublayer_backward(
        grad_middle,
        saved.attention,
        params.attention_norm,
        cfg,
        p,
        verbs,
        lambda g, inner: nn.multihead_attention_backward(g, inner, params.attention, verbs=verbs),
    )
    return grad_x, BlockParams(
        attention_norm=grad_attention_norm,
        attention=grad_attention,
        feed_forward_norm=grad_feed_forward_norm,
        feed_forward=grad_feed_forward,
    )


def _sublayer(
    x: HostArray,
    norm_params: NormParams,
    cfg: ModelConfig,
    p: float,
    rng: np.random.Generator | None,
    verbs: nn.ModelVerbs,
    function: Callable[[HostArray], tuple[HostArray, Any]],
) -> tuple[HostArray, SublayerSaved]:
    """Put norm, dropout and the residual around a sublayer."""
    pre = cfg.norm_position == "pre"
    update, inner = function(norm(x, norm_params, verbs) if pre else x)
    update, mask = drop(update, p, rng)
    total = x + update
    if pre:
        return total, SublayerSaved(x, mask, inner)
    return norm(total, norm_params, verbs), SublayerSaved(total, mask, inner)


def _sublayer_backward(
    grad_y: HostArray,
    saved: SublayerSaved,
    norm_params: NormParams,
    cfg: ModelConfig,
    p: float,
    verbs: nn.ModelVerbs,
    function_backward: Callable[[HostArray, Any], tuple[HostArray, Any]],
) -> tuple[HostArray, NormParams, Any]:
    """Return the gradients of x, of the norm and of the sublayer's parameters."""
    if cfg.norm_position == "pre":
        grad_hidden, grad_params = function_backward(
            drop_backward(grad_y, saved.dropout_mask, p), saved.inner
        )
        grad_hidden, grad_norm = norm_backward(grad_hidden, saved.norm_input, norm_params, verbs)
        return grad_y + grad_hidden, grad_norm, grad_params
    grad_total, grad_norm = norm_backward(grad_y, saved.norm_input, norm_params, verbs)
    grad_hidden, grad_params = function_backward(
        drop_backward(grad_total, saved.dropout_mask, p), saved.inner
    )
    return grad_total + grad_hidden, grad_norm, grad_params
