"""The blocks of a model one after another, with dropout before and a norm behind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npmoe import nn
from npmoe._typing import HostArray
from npmoe.backends import Backend, get_backend
from npmoe.config import MoEConfig
from npmoe.errors import UnsupportedError
from npmoe.models.block import (
    BlockParams,
    BlockSaved,
    NormParams,
    block,
    block_backward,
    drop,
    drop_backward,
    model_verbs,
    norm,
    norm_backward,
)
from npmoe.models.config import ModelConfig
from npmoe.params import MoEParams
from npmoe.stats import LoadStats


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSaved:
    """What the backward pass of the blocks needs."""

    dropout_mask: HostArray | None
    dropout: float
    blocks: tuple[BlockSaved, ...]
    last_hidden: HostArray
    verbs: nn.ModelVerbs

    def load_stats(self) -> list[LoadStats]:
        """Return the load of every MoE layer, in order."""
        return [saved.moe.stats() for saved in self.blocks if saved.moe is not None]


def host_backend(function: str, backend: str | Backend | None) -> Backend:
    """Return a backend that works on host arrays, as the rest of a model does.

    Raises
    ------
    UnsupportedError
        If it does not.
    BackendUnavailableError, RangeError
        As `get_backend` does.
    """
    run = get_backend(backend)
    if not run.host_arrays:
        raise UnsupportedError(
            f"{function}: backend must work on host arrays, got {run.name!r}. Attention and the "
            "optimizer work on these. Choose 'numpy', 'numba' or 'reference'."
        )
    return run


def stack(
    x: HostArray,
    blocks: tuple[BlockParams, ...],
    final_norm: NormParams | None,
    cfg: ModelConfig,
    *,
    rng: np.random.Generator | None = None,
    moe: MoEConfig | None = None,
    backend: str | Backend | None = None,
    caches: tuple[nn.KeyValueCache, ...] | None = None,
) -> tuple[HostArray, StackSaved]:
    """Run all blocks on embedded inputs.

    Parameters
    ----------
    x : (B, L, H) float array
    blocks : tuple of BlockParams
    final_norm : NormParams or None
        None with post-norm blocks, whose output is normalised already.
    cfg : LanguageConfig or VisionConfig
    rng : numpy Generator, optional
        Source of dropout and router noise; None means neither.
    moe : MoEConfig, optional
        Takes the place of `cfg.moe`.
    backend : str, Backend or None
        Runs the MoE sublayers, and what else it has kernels for.
    caches : tuple of KeyValueCache, optional
        One per block.

    Returns
    -------
    y : (B, L, H) float array
    saved : StackSaved
    """
    p = cfg.dropout if rng is not None else 0.0
    verbs = model_verbs(backend)
    moe = cfg.moe if moe is None else moe
    x, dropout_mask = drop(x, p, rng)
    saved_blocks = []
    for layer, block_params in enumerate(blocks):
        x, saved = block(
            x,
            block_params,
            cfg,
            moe,
            rng=rng,
            backend=backend,
            cache=None if caches is None else caches[layer],
        )
        saved_blocks.append(saved)
    return x if final_norm is None else norm(x, final_norm, verbs), StackSaved(
        dropout_mask=dropout_mask,
        dropout=p,
        blocks=tuple(saved_blocks),
        last_hidden=x,
        verbs=verbs,
    )


def stack_backward(
    grad_y: HostArray,
    saved: StackSaved,
    blocks: tuple[BlockParams, ...],
    final_norm: NormParams | None,
    cfg: ModelConfig,
    *,
    grad_router_logits: tuple[HostArray | None, ...] | None = None,
    out: tuple[BlockParams, ...] | None = None,
) -> tuple[HostArray, tuple[BlockParams, ...], NormParams | None]:
    """Return the gradients of x, of the blocks and of the final norm.

    Parameters
    ----------
    grad_y : (B, L, H) float array
    saved, blocks, final_norm, cfg
        As in the forward pass.
    grad_router_logits : tuple of (T, E) float arrays or None, optional
        One entry per block, from auxiliary losses.
    out : tuple of BlockParams, optional
        Arrays whose MoE leaves receive the MoE gradients.
    """
    grad_x, grad_final_norm = grad_y, None
    if final_norm is not None:
        grad_x, grad_final_norm = norm_backward(grad_y, saved.last_hidden, final_norm, saved.verbs)
    grad_blocks = []
    for layer in reversed(range(len(blocks))):
        target = None if out is None else out[layer].feed_forward
        grad_x, grad_block = block_backward(
            grad_x,
            saved.blocks[layer],
            blocks[layer],
            cfg,
            grad_router_logits=None if grad_router_logits is None else grad_router_logits[layer],
            out=target if isinstance(target, MoEParams) else None,
        )
        grad_blocks.append(grad_block)
    grad_x = drop_backward(grad_x, saved.dropout_mask, saved.dropout)
    return grad_x, tuple(reversed(grad_blocks)), grad_final_norm
