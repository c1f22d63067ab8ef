"""A decoder-only language model around the MoE layer: forward, backward and loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npmoe import losses, nn
from npmoe._typing import HostArray
from npmoe.backends import Backend, get_backend
from npmoe.config import MoEConfig
from npmoe.errors import RangeError, ShapeError, UnsupportedError
from npmoe.models.block import (
    BlockParams,
    BlockSaved,
    NormParams,
    block,
    block_backward,
    drop,
    drop_backward,
    init_block,
    init_norm,
    norm,
    norm_backward,
)
from npmoe.models.config import LanguageConfig
from npmoe.params import MoEParams
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
    embedding_dropout: HostArray | None
    dropout: float
    blocks: tuple[BlockSaved, ...]
    last_hidden: HostArray
    head_input: HostArray

    def load_stats(self) -> list[LoadStats]:
        """Return the load of every MoE layer, in order."""
        return [saved.moe.stats() for saved in self.blocks if saved.moe is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossResult:
    """Cross entropy (nats per token), the auxiliary losses as added, and all gradients."""

    cross_entropy: float
    auxiliary: float
    grads: LanguageParams
    saved: LanguageSaved

    @property
    def total(self) -> float:
        """The scalar whose gradients these are."""
        return self.cross_entropy + self.auxiliary


def host_backend(function: str, backend: str | Backend | None) -> Backend:
    """Return a backend that works on host arrays, as the rest of the model does.

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
            "optimizer run in NumPy. Choose 'numpy' or 'reference'."
        )
    return run


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
    p = cfg.dropout if rng is not None else 0.0
    moe = cfg.moe if moe is None else moe
    x, embedding_mask = drop(nn.embedding(ids, params.embedding), p, rng)
    saved_blocks = []
    for layer, block_params in enumerate(params.blocks):
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
    last = x
    if params.final_norm is not None:
        x = norm(x, params.final_norm)
    logits = nn.linear(x, params.embedding if params.head is None else params.head)
    return logits, LanguageSaved(
        ids=ids,
        embedding_dropout=embedding_mask,
        dropout=p,
        blocks=tuple(saved_blocks),
        last_hidden=last,
        head_input=x,
    )


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
    grad_final_norm = None
    if params.final_norm is not None:
        grad_x, grad_final_norm = norm_backward(grad_x, saved.last_hidden, params.final_norm)
    grad_blocks = []
    for layer in reversed(range(len(params.blocks))):
        target = None if out is None else out.blocks[layer].feed_forward
        grad_x, grad_block = block_backward(
            grad_x,
            saved.blocks[layer],
            params.blocks[layer],
            cfg,
            grad_router_logits=None if grad_router_logits is None else grad_router_logits[layer],
            out=target if isinstance(target, MoEParams) else None,
        )
        grad_blocks.append(grad_block)
    grad_x = drop_backward(grad_x, saved.embedding_dropout, saved.dropout)
    grad_embedding = nn.embedding_backward(grad_x, saved.ids, params.embedding.shape[0])
    if params.head is None:
        grad_embedding += grad_head
    return LanguageParams(
        embedding=grad_embedding,
        blocks=tuple(reversed(grad_blocks)),
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
) -> LossResult:
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
    flat = logits.reshape(-1, logits.shape[-1])
    flat_targets = targets.reshape(-1)
    cross_entropy, log_sum_exp = nn.cross_entropy(flat, flat_targets)
    grad = nn.cross_entropy_backward(scale, flat, flat_targets, log_sum_exp)
    auxiliary = 0.0
    grad_router: list[HostArray | None] = []
    for saved_block in saved.blocks:
        value, router_grad = _auxiliary(saved_block, cfg, scale)
        auxiliary += value
        grad_router.append(router_grad)
    grads = language_backward(
        grad.reshape(logits.shape),
        saved,
        params,
        cfg,
        grad_router_logits=tuple(grad_router),
        out=out,
    )
    return LossResult(cross_entropy=cross_entropy, auxiliary=auxiliary, grads=grads, saved=saved)


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
    cross_entropy, _ = nn.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    auxiliary = 0.0
    for saved_block in saved.blocks:
        auxiliary += _auxiliary(saved_block, cfg, 1.0)[0]
    return cross_entropy + auxiliary, saved


def _auxiliary(
    saved: BlockSaved, cfg: LanguageConfig, scale: float
) -> tuple[float, HostArray | None]:
    """Return the auxiliary losses of one block and `scale` times their gradient."""
    if saved.moe is None:
        return 0.0, None
    routing = saved.moe.routing
    value, grad = losses.load_balancing_loss(routing, coefficient=cfg.load_balancing_coefficient)
    z_value, z_grad = losses.z_loss(routing, coefficient=cfg.z_loss_coefficient)
    grad += z_grad
    grad *= scale
    return value + z_value, grad
