"""A vision transformer around the MoE layer: forward, backward and loss.

Patches of an image are projected, get positions, run through blocks with full attention, and
their mean is classified. Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; with MoE
sublayers Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts" (V-MoE).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npmoe import nn
from npmoe._checks import check_float
from npmoe._typing import HostArray
from npmoe.backends import Backend
from npmoe.config import MoEConfig
from npmoe.errors import ShapeError
from npmoe.models.block import BlockParams, BlockSaved, NormParams, init_block, init_norm
from npmoe.models.config import VisionConfig
from npmoe.models.objective import LossResult, objective, objective_value
from npmoe.models.stack import StackSaved, stack, stack_backward
from npmoe.stats import LoadStats


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionParams:
    """Parameters, or their gradients, of the model.

    Attributes
    ----------
    patch_proj : (H, P*P*C) float array
    patch_bias : (H,) float array
    position_embedding : (L, H) float array or None
        None with sinusoidal positions.
    blocks : tuple of BlockParams
    final_norm : NormParams or None
        None with post-norm blocks, whose output is normalised already.
    head : (V, H) float array
        V classes.
    head_bias : (V,) float array
    """

    patch_proj: HostArray
    patch_bias: HostArray
    position_embedding: HostArray | None
    blocks: tuple[BlockParams, ...]
    final_norm: NormParams | None
    head: HostArray
    head_bias: HostArray


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSaved:
    """What the backward pass of the model needs."""

    patches: HostArray
    stack: StackSaved
    hidden_shape: tuple[int, ...]
    pooled: HostArray

    @property
    def blocks(self) -> tuple[BlockSaved, ...]:
        """What each block saved."""
        return self.stack.blocks

    def load_stats(self) -> list[LoadStats]:
        """Return the load of every MoE layer, in order."""
        return self.stack.load_stats()


def init_vision_params(cfg: VisionConfig, seed: int = 0, dtype: str = "float32") -> VisionParams:
    """Draw all parameters; every block has a random stream of its own.

    Weights are normal with standard deviation 1/sqrt(fan-in), biases zero, positions normal with
    standard deviation 0.5: beside normalised pixels a much smaller one would be learned late.
    """
    streams = [
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(cfg.num_layers + 1)
    ]
    first, hidden = streams[0], cfg.hidden_size
    size = cfg.patch_size**2 * cfg.channels
    patch_proj = first.standard_normal((hidden, size)) / np.sqrt(size)
    head = first.standard_normal((cfg.num_classes, hidden)) / np.sqrt(hidden)
    positions = None
    if cfg.positions == "learned":
        positions = (0.5 * first.standard_normal((cfg.num_patches, hidden))).astype(dtype)
    return VisionParams(
        patch_proj=patch_proj.astype(dtype),
        patch_bias=np.zeros(hidden, dtype),
        position_embedding=positions,
        blocks=tuple(init_block(cfg, layer, rng, dtype) for layer, rng in enumerate(streams[1:])),
        final_norm=init_norm(cfg, dtype) if cfg.norm_position == "pre" else None,
        head=head.astype(dtype),
        head_bias=np.zeros(cfg.num_classes, dtype),
    )


def vision_forward(
    images: HostArray,
    params: VisionParams,
    cfg: VisionConfig,
    *,
    rng: np.random.Generator | None = None,
    moe: MoEConfig | None = None,
    backend: str | Backend | None = None,
) -> tuple[HostArray, VisionSaved]:
    """Return the logits of the classes.

    Parameters
    ----------
    images : (B, S, S, C) float array
        S = image_size; of the parameters' dtype.
    params : VisionParams
    cfg : VisionConfig
    rng : numpy Generator, optional
        Source of dropout and router noise; None means neither.
    moe : MoEConfig, optional
        Takes the place of `cfg.moe`: another noise or capacity, for a schedule or evaluation.
    backend : str, Backend or None
        Runs the MoE sublayers; host backends only.

    Returns
    -------
    logits : (B, V) float array
    saved : VisionSaved

    Raises
    ------
    ShapeError, DTypeError
        If the images do not fit the config or the parameters.
    """
    check_float("vision_forward", "images", images)
    side, channels = cfg.image_size, cfg.channels
    if images.shape[1:] != (side, side, channels):
        raise ShapeError(
            f"vision_forward: images must have shape (B, S, S, C) = (B, {side}, {side}, {channels})"
            f", got {images.shape}. S and C are bound by cfg. Crop or resize the images, or train "
            "a model of their size."
        )
    patches = nn.split_patches(images, cfg.patch_size)
    positions = params.position_embedding
    if positions is None:
        rows = side // cfg.patch_size
        positions = nn.grid_positions(rows, rows, cfg.hidden_size, str(images.dtype))
    x = nn.linear(patches, params.patch_proj, params.patch_bias)
    x += positions
    x, saved = stack(x, params.blocks, params.final_norm, cfg, rng=rng, moe=moe, backend=backend)
    pooled = nn.mean_pool(x)
    return nn.linear(pooled, params.head, params.head_bias), VisionSaved(
        patches=patches, stack=saved, hidden_shape=x.shape, pooled=pooled
    )


def vision_backward(
    grad_logits: HostArray,
    saved: VisionSaved,
    params: VisionParams,
    cfg: VisionConfig,
    *,
    grad_router_logits: tuple[HostArray | None, ...] | None = None,
    out: VisionParams | None = None,
) -> VisionParams:
    """Return the gradients of all parameters.

    Parameters
    ----------
    grad_logits : (B, V) float array
    saved, params, cfg
        As in the forward pass.
    grad_router_logits : tuple of (T, E) float arrays or None, optional
        One entry per block, from auxiliary losses.
    out : VisionParams, optional
        Arrays whose MoE leaves receive the MoE gradients.

    Returns
    -------
    VisionParams
        Gradients; with `out` its MoE leaves are those arrays.
    """
    grad_pooled, grad_head, grad_head_bias = nn.linear_backward(
        grad_logits, saved.pooled, params.head, params.head_bias
    )
    grad_x, grad_blocks, grad_final_norm = stack_backward(
        nn.mean_pool_backward(grad_pooled, saved.hidden_shape),
        saved.stack,
        params.blocks,
        params.final_norm,
        cfg,
        grad_router_logits=grad_router_logits,
        out=None if out is None else out.blocks,
    )
    _, grad_patch_proj, grad_patch_bias = nn.linear_backward(
        grad_x, saved.patches, params.patch_proj, params.patch_bias
    )
    return VisionParams(
        patch_proj=grad_patch_proj,
        patch_bias=grad_patch_bias,
        position_embedding=None if params.position_embedding is None else grad_x.sum(axis=0),
        blocks=grad_blocks,
        final_norm=grad_final_norm,
        head=grad_head,
        head_bias=grad_head_bias,
    )


def vision_loss(
    images: HostArray,
    labels: HostArray,
    params: VisionParams,
    cfg: VisionConfig,
    *,
    rng: np.random.Generator | None = None,
    moe: MoEConfig | None = None,
    backend: str | Backend | None = None,
    out: VisionParams | None = None,
    scale: float = 1.0,
) -> LossResult[VisionParams, VisionSaved]:
    """Return cross entropy plus auxiliary losses, and the gradients of their sum.

    ``loss = mean over images of -log p(label) + sum over MoE layers of
    (load_balancing_coefficient * balance + z_loss_coefficient * z)``

    Parameters
    ----------
    images : (B, S, S, C) float array
    labels : (B,) int array
    params, cfg, rng, moe, backend
        As for `vision_forward`.
    out : VisionParams, optional
        As for `vision_backward`.
    scale : float
        Multiplies the gradients (not the values), for averaging over micro-batches.

    Returns
    -------
    LossResult
    """
    logits, saved = vision_forward(images, params, cfg, rng=rng, moe=moe, backend=backend)
    loss = objective(logits, labels, saved.stack, cfg, scale)
    grads = vision_backward(
        loss.grad_logits,
        saved,
        params,
        cfg,
        grad_router_logits=loss.grad_router_logits,
        out=out,
    )
    return LossResult(
        cross_entropy=loss.cross_entropy, auxiliary=loss.auxiliary, grads=grads, saved=saved
    )


def vision_loss_value(
    images: HostArray,
    labels: HostArray,
    params: VisionParams,
    cfg: VisionConfig,
    *,
    rng: np.random.Generator | None = None,
    backend: str | Backend | None = None,
) -> tuple[float, VisionSaved]:
    """Return the total of `vision_loss`, without gradients, and what the model saved."""
    logits, saved = vision_forward(images, params, cfg, rng=rng, backend=backend)
    return objective_value(logits, labels, saved.stack, cfg), saved
