"""A decoder-only language model around the MoE layer: forward, backward and loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npmoe import nn
from npmoe._typing import HostArray
from npmoe.backends import Backend
from npmoe.config import MoEConfig
from npmoe.errors import RangeError, ShapeError
from npmoe.models.block import BlockParams, BlockSaved, NormParams, init_block, init_norm
from npmoe.models.config import LanguageConfig
from npmoe.models.objective import LossResult, objective, objective_value
from npmoe.models.stack import StackSaved, stack, stack_backward
from npmoe.stats import LoadStats


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageParams:
    """Parameters, or their gradients, of the model.

    Attributes
    ----------
    embedding : (V, H) float array
    blocks : tuple of BlockParams
    final_norm : NormParams or None
        None with post-norm blocks, whose output is normalised already.
    head : (V, H) float array or None
        None if tied to the embedding.
    """

    embedding: HostArray
    blocks: tuple[BlockParams, ...]
    final_norm: NormParams | None
    head: HostArray | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageSaved:
    """What the backward pass of the model needs."""

    ids: HostArray
    stack: StackSaved
    head_input: HostArray

    @property
    def blocks(self) -> tuple[BlockSaved, ...]:
        """What each block saved."""
        return self.stack.blocks

    def load_stats(self) -> list[LoadStats]:
        """Return the load of every MoE layer, in order."""
        return self.stack.load_stats()


def init_language_params(
    cfg: LanguageConfig, seed: int = 0, dtype: str = "float32"
) -> LanguageParams:
    """Draw all parameters; every block has a random stream of its own."""
    streams = [
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(cfg.num_layers + 1)
    ]
    shape = (cfg.vocab_size, cfg.hidden_size)
    scale = 1.0 / np.sqrt(cfg.hidden_size)
    embedding = (streams[0].standard_normal(shape) * scale).astype(dtype)
    head = None
    if not cfg.tie_embeddings:
        head = (streams[0].standard_normal(shape) * scale).astype(dtype)
    return LanguageParams(
        embedding=embedding,
        blocks=tuple(init_block(cfg, layer, rng, dtype) for layer, rng in enumerate(streams[1:])),
        final_norm=init_norm(cfg, dtype) if cfg.norm_position == "pre" else None,
        head=head,
    )


def language_forward(
    ids: HostArray,
    params: LanguageParams,
    cfg: LanguageConfig,
    *,
    rng: np.random.Generator | None = None,
    moe: MoEConfig | None = None,
    backend: str | Backend | None = None,
    caches: tuple[nn.KeyValueCache, ...] | None = None,
) -> tuple[HostArray, LanguageSaved]:
    """Return the logits of the next token at every position.

    Parameters
    ----------
    ids : (B, L) int array
        Token ids below V.
    params : LanguageParams
    cfg : LanguageConfig
    rng : numpy Generator, optional
        Source of dropout and router noise; None means neither.
    moe : MoEConfig, optional
        Takes the place of `cfg.moe`: another noise or capacity, for a schedule or evaluation.
    backend : str, Backend or None
        Runs the MoE sublayers; host backends only.
    caches : tuple of KeyValueCache, optional
        One per block: ids continue what the caches hold.

    Returns
    -------
    logits : (B, L, V) float array
    saved : LanguageSaved

    Raises
    ------
    ShapeError
        If ids are not 2-D.
    RangeError
        If L exceeds the context, or an id is out of range.
    """
    if ids.ndim != 2:
        raise ShapeError(f"language_forward: ids must have shape (B, L), got {ids.shape}.")
    if ids.shape[1] > cfg.context_length:
        raise RangeError(
            f"language_forward: ids must have at most context_length = {cfg.context_length} "
            f"columns, got {ids.shape[1]}. Shorten the input or train with a longer context."
        )
    x, saved = stack(
        nn.embedding(ids, params.embedding),
        params.blocks,
        params.final_norm,
        cfg,
        rng=rng,
        moe=moe,
        backend=backend,
        caches=caches,
    )
    logits = nn.linear(x, params.embedding if params.head is None else params.head)
    return logits, LanguageSaved(ids=ids, stack=saved, head_input=x)


def language_backward(
    grad_logits: HostArray,
    saved: LanguageSaved,
    params: LanguageParams,
    cfg: LanguageConfig,
    *,
    grad_router_logits: tuple[HostArray | None, ...] | None = None,
    out: LanguageParams | None = None,
) -> LanguageParams:
    """Return the gradients of all parameters.

    Parameters
    ----------
    grad_logits : (B, L, V) float array
    saved, params, cfg
        As in the forward pass.
    grad_router_logits : tuple of (T, E) float arrays or None, optional
        One entry per block, from auxiliary losses.
    out : LanguageParams, optional
        Arrays whose MoE leaves receive the MoE gradients.

    Returns
    -------
    LanguageParams
        Gradients; with `out` its MoE leaves are those arrays.
    """
    head = params.embedding if params.head is None else params.head
    grad_x, grad_head, _ = nn.linear_backward(grad_logits, saved.head_input, head)
    grad_x, grad_blocks, grad_final_norm = stack_backward(
        grad_x,
        saved.stack,
        params.blocks,
        params.final_norm,
        cfg,
        grad_router_logits=grad_router_logits,
        out=None if out is None else out.blocks,
    )
    grad_embedding = nn.embedding_backward(grad_x, saved.ids, params.embedding.shape[0])
    if params.head is None:
        grad_embedding += grad_head
    return LanguageParams(
        embedding=grad_embedding,
        blocks=grad_blocks,
        final_norm=grad_final_norm,
        head=None if params.head is None else grad_head,
    )


def language_loss(
    inputs: HostArray,
    targets: HostArray,
    params: LanguageParams,
    cfg: LanguageConfig,
    *,
    rng: np.random.Generator | None = None,
    moe: MoEConfig | None = None,
    backend: str | Backend | None = None,
    out: LanguageParams | None = None,
    scale: float = 1.0,
) -> LossResult[LanguageParams, LanguageSaved]:
    """Return cross entropy plus auxiliary losses, and the gradients of their sum.

    ``loss = mean over positions of -log p(target) + sum over MoE layers of
    (load_balancing_coefficient * balance + z_loss_coefficient * z)``

    Parameters
    ----------
    inputs, targets : (B, L) int array
    params, cfg, rng, moe, backend
        As for `language_forward`.
    out : LanguageParams, optional
        As for `language_backward`.
    scale : float
        Multiplies the gradients (not the values), for averaging over micro-batches.

    Returns
    -------
    LossResult
    """
    logits, saved = language_forward(inputs, params, cfg, rng=rng, moe=moe, backend=backend)
    loss = objective(logits, targets, saved.stack, cfg, scale)
    grads = language_backward(
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


def language_loss_value(
    inputs: HostArray,
    targets: HostArray,
    params: LanguageParams,
    cfg: LanguageConfig,
    *,
    rng: np.random.Generator | None = None,
    backend: str | Backend | None = None,
) -> tuple[float, LanguageSaved]:
    """Return the total of `language_loss`, without gradients, and what the model saved."""
    logits, saved = language_forward(inputs, params, cfg, rng=rng, backend=backend)
    return objective_value(logits, targets, saved.stack, cfg), saved
