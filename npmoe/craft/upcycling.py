"""Sparse upcycling: a trained dense model becomes an MoE model that computes the same function.

A dense sublayer of size I is cut into g = I / I_moe shards of its activations, which add up to its
output. Experts ``j*g .. j*g + g-1`` are group j: one copy of every shard. All experts of a group
have the same router row, hence the same logit, so that top-K with K a multiple of g takes whole
groups, and every shard takes part equally often. With combine weights that sum to s for every
token, the shards' weights sum to s / g, and ``down_proj`` times g / s makes up for it::

    sum over chosen (t, k) of w_tk (g/s) W2_shard act_shard = W2 act           for any activation
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np

from npmoe._checks import require
from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.errors import RangeError, ShapeError, UnsupportedError
from npmoe.models.config import LanguageConfig, VisionConfig
from npmoe.models.language import LanguageParams
from npmoe.models.vision import VisionParams
from npmoe.nn import MLPParams
from npmoe.params import MoEParams, check_params, init_params

P = TypeVar("P", LanguageParams, VisionParams)
C = TypeVar("C", LanguageConfig, VisionConfig)


def upcycle_mlp(
    params: MLPParams, cfg: MoEConfig, rng: int | np.random.Generator | np.random.SeedSequence = 0
) -> MoEParams:
    """Return an MoE layer that computes what a dense sublayer computes.

    Parameters
    ----------
    params : MLPParams
        Of the dense sublayer, with the activation of `cfg`. Its size I must be a multiple of
        ``cfg.intermediate_size``.
    cfg : MoEConfig
        Of the layer to be. Its combine weights must sum to the same number for every token:
        renormalised ones, or the softmax of the chosen logits. top_k and num_experts must be
        multiples of g = I / intermediate_size.
    rng : int, Generator or SeedSequence
        The router is drawn as by `init_params`, one row per group.

    Returns
    -------
    MoEParams
        New arrays of the dtype of `params`.

    Raises
    ------
    RangeError
        If the sizes do not divide each other, or the dense sublayer has biases and the experts
        have none.
    UnsupportedError
        If a field of the config makes the sum of the weights depend on the token, or adds
        something to the output.
    ShapeError
        If the hidden sizes differ.

    Notes
    -----
    **Accuracy**: the same function in exact arithmetic, as long as no route is dropped, no noise
    is drawn and the selection bias is equal within a group (it starts at 0). In floating point
    the weights' sum and K products are rounded: a relative error of gamma_{K+4} of the terms.
    Bitwise for K = g of integers with s and g powers of two.

    The copies of a shard are equal, and drift apart because they get other tokens. While they are
    equal the router has no gradient but that of auxiliary losses. ``num_groups = E/g`` with
    ``topk_group = K/g`` makes the router take whole groups for good, noise or not.

    References
    ----------
    Komatsuzaki et al. 2023, "Sparse Upcycling" (g = 1); He et al. 2024, "Upcycling Large Language
    Models into Mixture of Experts", virtual groups. Theirs has weights that do not sum to a
    constant and is exact on average; NVIDIA/Megatron-LM: upcycling_utils, puts roots of the scale
    on both matrices, which is exact for homogeneous activations alone.
    """
    function = "upcycle_mlp"
    total = _sum_of_weights(function, cfg)
    hidden_size, dense_size = params.down_proj.shape
    size, dtype = cfg.intermediate_size, str(params.down_proj.dtype)
    if hidden_size != cfg.hidden_size:
        raise ShapeError(
            f"{function}: params.down_proj must have shape (H, I) with H = {cfg.hidden_size}, got "
            f"{params.down_proj.shape}. H is bound by cfg."
        )
    if params.gate_up_proj.shape[0] != dense_size * (2 if cfg.gated else 1):
        raise ShapeError(
            f"{function}: params.gate_up_proj must have {dense_size * (2 if cfg.gated else 1)} "
            f"rows for cfg.activation {cfg.activation!r}, got {params.gate_up_proj.shape}. "
            "Give the activation that the dense sublayer has."
        )
    require(
        dense_size % size == 0,
        f"{function}: cfg.intermediate_size must divide I = {dense_size} of the dense sublayer, "
        f"got {size}.",
    )
    shards = dense_size // size
    top_k = cfg.num_experts if cfg.routing == "dense" else cfg.top_k
    for name, value in (("num_experts", cfg.num_experts), ("top_k", top_k)):
        require(
            value % shards == 0,
            f"{function}: cfg.{name} must be a multiple of the {shards} shards (I = {dense_size} "
            f"over cfg.intermediate_size = {size}), got {value}. Each shard must be chosen.",
        )
    biased = params.gate_up_bias is not None or params.down_bias is not None
    require(
        cfg.expert_bias or not biased,
        f"{function}: cfg.expert_bias must be True for a dense sublayer with biases, got False.",
    )
    fresh = init_params(cfg, rng, dtype)
    groups = cfg.num_experts // shards
    scale = shards / total

    def experts(stacked: HostArray) -> HostArray:
        """Repeat one group's arrays (g, ...) for all groups."""
        return np.concatenate([stacked] * groups)

    gate_up = experts(_row_shards(params.gate_up_proj, shards, cfg.gated))
    down = params.down_proj.reshape(hidden_size, shards, size).swapaxes(0, 1)
    upcycled = replace(
        fresh,
        router_weight=np.repeat(fresh.router_weight[:groups], shards, axis=0),
        gate_up_proj=gate_up,
        down_proj=experts(down * down.dtype.type(scale)),
    )
    if params.gate_up_bias is not None:
        bias = _row_shards(params.gate_up_bias, shards, cfg.gated)
        upcycled = replace(upcycled, gate_up_bias=experts(bias))
    if params.down_bias is not None:
        # Every route adds it: once per token, divided by the sum of all weights.
        bias = params.down_bias * params.down_bias.dtype.type(1.0 / total)
        upcycled = replace(upcycled, down_bias=np.tile(bias, (cfg.num_experts, 1)))
    check_params(function, upcycled, cfg, params.down_proj.dtype, "params")
    return upcycled


def upcycle_model(
    params: P,
    cfg: C,
    moe: MoEConfig,
    *,
    moe_every: int = 1,
    moe_last: int = 0,
    rng: int | np.random.SeedSequence = 0,
) -> tuple[P, C]:
    """Return an MoE model that computes what a dense model computes.

    Parameters
    ----------
    params, cfg
        The dense language or vision model, for example from `npmoe.training.load_trained`.
    moe : MoEConfig
        Of the layers to be; see `upcycle_mlp`.
    moe_every, moe_last : int
        Which blocks get one, as in the model's config; the others stay dense.
    rng : int or SeedSequence
        Every router has a stream of its own.

    Returns
    -------
    params : LanguageParams or VisionParams
        Shares the arrays of everything but the new layers. Train it on with
        ``npmoe.training.train(..., initial=params)``.
    cfg : LanguageConfig or VisionConfig

    Raises
    ------
    RangeError
        If the model has MoE layers already, or its activation is not that of `moe`.
    RangeError, UnsupportedError, ShapeError
        As `upcycle_mlp` and the model's config do.

    Notes
    -----
    **Accuracy**: as `upcycle_mlp`, through every layer.
    """
    function = "upcycle_model"
    if cfg.moe is not None:
        raise RangeError(
            f"{function}: cfg.moe must be None, got a config. The model has experts already."
        )
    require(
        moe.activation == cfg.activation,
        f"{function}: moe.activation must be that of the dense model, {cfg.activation!r}, got "
        f"{moe.activation!r}.",
    )
    new_cfg = replace(cfg, moe=moe, moe_every=moe_every, moe_last=moe_last)
    seeds = rng if isinstance(rng, np.random.SeedSequence) else np.random.SeedSequence(rng)
    blocks = list(params.blocks)
    for layer, seed in enumerate(seeds.spawn(cfg.num_layers)):
        dense = blocks[layer].feed_forward
        if new_cfg.is_moe_layer(layer) and isinstance(dense, MLPParams):
            sparse = upcycle_mlp(dense, moe, seed)
            blocks[layer] = replace(blocks[layer], feed_forward=sparse)
    return replace(params, blocks=tuple(blocks)), new_cfg


def _sum_of_weights(function: str, cfg: MoEConfig) -> float:
    """Return what the combine weights of every token sum to, or raise where that varies."""
    softmax_of_chosen = cfg.router_order == "topk_score" and cfg.score_fn == "softmax"
    softmax_of_all = cfg.routing == "dense" and cfg.score_fn == "softmax"
    normalized = cfg.normalizes and (cfg.renorm_eps, cfg.renorm_p) == (0.0, 1)
    if not (normalized or softmax_of_chosen or softmax_of_all):
        raise UnsupportedError(
            f"{function}: cfg must make the combine weights of a token sum to a constant, got "
            f"renormalize={cfg.renormalize}, renorm_eps={cfg.renorm_eps}, "
            f"renorm_p={cfg.renorm_p}, router_order={cfg.router_order!r}. With other weights the "
            "layer would not compute the dense function. Use renormalize=True."
        )
    unchanged = {
        "routing": cfg.routing in ("token_choice", "dense"),
        "second_expert_policy": cfg.second_expert_policy == "all",
        "num_identity_experts": cfg.num_identity_experts == 0,
        "weight_position": cfg.weight_position in ("output", "mid"),
        "shared_intermediate_size": cfg.shared_intermediate_size == 0,
        "activation_alpha": cfg.activation_alpha is None,
        "activation_limit": cfg.activation_limit is None,
        "routed_scaling_factor": cfg.routed_scaling_factor != 0,
    }
    for name, holds in unchanged.items():
        if not holds:
            raise UnsupportedError(
                f"{function}: cfg.{name} must leave the dense function as it is, got "
                f"{getattr(cfg, name)!r}. Start from its default and train from there."
            )
    return cfg.routed_scaling_factor


def _row_shards(array: HostArray, shards: int, gated: bool) -> HostArray:
    """Cut rows (2I, ...) or (I, ...) into (g, 2I/g, ...), a gate and an up half in each."""
    halves = 2 if gated else 1
    parts = array.reshape(halves, shards, -1, *array.shape[1:]).swapaxes(0, 1)
    joined: HostArray = parts.reshape(shards, -1, *array.shape[1:])
    return joined
