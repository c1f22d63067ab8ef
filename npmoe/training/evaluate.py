"""Validation: mean loss, and which expert served which characters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npmoe import nn
from npmoe._typing import HostArray
from npmoe.backends import Backend
from npmoe.errors import DataError
from npmoe.models.config import LanguageConfig
from npmoe.models.language import LanguageParams, language_forward
from npmoe.stats import max_violation
from npmoe.training.data import validation_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Result of one pass over a text, or over images.

    Attributes
    ----------
    loss : float
        Mean nats per character, or per image.
    served : (MoE layers, V, E) int array
        How often expert e was chosen for an input character v, or for a patch at place v of an
        image, before any drop.
    dropped : int
        Routes that the capacity refused.
    """

    loss: float
    served: HostArray
    dropped: int

    @property
    def tokens_per_expert(self) -> HostArray:
        """Choices of every expert (MoE layers, E)."""
        counts: HostArray = self.served.sum(axis=1)
        return counts

    @property
    def load_imbalance(self) -> float:
        """MaxVio of the summed choices, mean over MoE layers; 0 for a dense model."""
        counts = self.tokens_per_expert
        return float(np.mean([max_violation(c) for c in counts])) if len(counts) else 0.0

    @property
    def drop_rate(self) -> float:
        """Dropped routes divided by chosen ones; 0 without routes."""
        chosen = int(self.served.sum())
        return self.dropped / chosen if chosen else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEvaluation:
    """Sums over one batch: nats, targets, choices (MoE layers, V, E) and dropped routes."""

    nats: float
    targets: int
    served: HostArray
    dropped: int


def evaluate(
    params: LanguageParams,
    cfg: LanguageConfig,
    ids: HostArray,
    *,
    batch_size: int = 8,
    backend: str | Backend | None = None,
) -> Evaluation:
    """Return the loss over a text, each character but the first predicted exactly once.

    The text is cut into windows of `context_length` that touch without overlap, so a character
    sees between 1 and `context_length` characters before it. No dropout, no noise, and the
    evaluation's capacity.

    Parameters
    ----------
    params, cfg
        The model.
    ids : (N,) int array
        The text.
    batch_size : int
        Windows at a time.
    backend : str, Backend or None

    Returns
    -------
    Evaluation

    Raises
    ------
    DataError
        If the text is shorter than the context.
    """
    return sum_batches(
        [
            evaluate_batch(params, cfg, inputs, targets, backend=backend)
            for inputs, targets in validation_batches(ids, cfg.context_length, batch_size)
        ]
    )


def evaluate_batch(
    params: LanguageParams,
    cfg: LanguageConfig,
    inputs: HostArray,
    targets: HostArray,
    *,
    backend: str | Backend | None = None,
) -> BatchEvaluation:
    """Return the sums over one batch of inputs and targets (B, L)."""
    moe = None if cfg.moe is None else cfg.moe.for_evaluation()
    num_experts = 0 if moe is None else moe.num_experts
    logits, saved = language_forward(inputs, params, cfg, moe=moe, backend=backend)
    loss, _ = nn.cross_entropy(logits.reshape(-1, cfg.vocab_size), targets.reshape(-1))
    served = np.zeros((cfg.num_moe_layers, cfg.vocab_size, num_experts), np.int64)
    dropped = 0
    layers = [block.moe for block in saved.blocks if block.moe is not None]
    for number, layer in enumerate(layers):
        chosen = layer.routing.topk_ids  # (T, K)
        cells = inputs.reshape(-1, 1) * num_experts + chosen
        counts = np.bincount(cells.ravel(), minlength=cfg.vocab_size * num_experts)
        served[number] = counts.reshape(cfg.vocab_size, num_experts)
        dropped += layer.stats().dropped_routes
    return BatchEvaluation(
        nats=loss * targets.size, targets=targets.size, served=served, dropped=dropped
    )


def sum_batches(batches: list[BatchEvaluation]) -> Evaluation:
    """Return the evaluation of a whole text from its batches, in their order."""
    count = sum(b.targets for b in batches)
    if count == 0:
        raise DataError("evaluate: ids must hold at least one target, got none.")
    return Evaluation(
        loss=sum(b.nats for b in batches) / count,
        served=np.sum([b.served for b in batches], axis=0),
        dropped=sum(b.dropped for b in batches),
    )
