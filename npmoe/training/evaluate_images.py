"""Testing on images: loss, confusion of the classes, and which expert takes which patches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npmoe import nn
from npmoe._typing import HostArray
from npmoe.backends import Backend
from npmoe.models.config import VisionConfig
from npmoe.models.vision import VisionParams, vision_forward
from npmoe.saved import SavedTensors
from npmoe.training.evaluate import BatchEvaluation, Evaluation, sum_batches

STRONGEST = 16  # patches kept of every expert


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionEvaluation(Evaluation):
    """Result of one pass over images.

    Attributes
    ----------
    confusion : (V, V) int array
        Images of class i that were taken for class j.
    weights : (MoE layers, L, E) float64 array
        Sum of the weights that expert e had for patches at each place, before any drop. For soft
        routing, of its slots' combine weights.
    strongest : (MoE layers, E, n, 2) int array
        The n = 16 patches (or fewer) for which each expert had the largest weight: image and
        place. Ties go to the first; -1 where it had fewer.
    """

    confusion: HostArray
    weights: HostArray
    strongest: HostArray

    @property
    def accuracy(self) -> float:
        """Share of images given their own class."""
        return float(np.trace(self.confusion) / self.confusion.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBatchEvaluation(BatchEvaluation):
    """Sums over one batch, as in VisionEvaluation; `strongest` with its weights."""

    confusion: HostArray
    weights: HostArray
    strongest: HostArray
    strongest_weights: HostArray


def evaluate_image_batch(
    params: VisionParams,
    cfg: VisionConfig,
    images: HostArray,
    labels: HostArray,
    *,
    first: int = 0,
    backend: str | Backend | None = None,
) -> ImageBatchEvaluation:
    """Return the sums over images (B, S, S, C) as the model takes them, and labels (B,).

    No dropout, no noise, and the evaluation's capacity. `first` is the number of the first image.
    """
    moe = None if cfg.moe is None else cfg.moe.for_evaluation()
    num_experts = 0 if moe is None else moe.num_experts
    logits, saved = vision_forward(images, params, cfg, moe=moe, backend=backend)
    loss, _ = nn.cross_entropy(logits, labels)
    confusion = np.zeros((cfg.num_classes, cfg.num_classes), np.int64)
    np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)
    length = cfg.num_patches
    served = np.zeros((cfg.num_moe_layers, length, num_experts), np.int64)
    weights = np.zeros(served.shape)
    kept = min(STRONGEST, len(labels) * length)
    strongest = np.zeros((cfg.num_moe_layers, num_experts, kept, 2), np.int64)
    strongest_weights = np.zeros(strongest.shape[:3])
    dropped = 0
    layers = [block.moe for block in saved.blocks if block.moe is not None]
    for number, layer in enumerate(layers):
        if layer.soft is None:
            served[number] = _count_by_place(layer.routing.topk_ids, length, num_experts)
            dropped += layer.stats().dropped_routes
        by_token = _weights_by_expert(layer)  # (T, E)
        weights[number] = by_token.reshape(-1, length, num_experts).sum(axis=0, dtype=np.float64)
        tokens = np.argsort(-by_token, axis=0, kind="stable")[:kept].T  # (E, n)
        strongest[number] = np.stack([first + tokens // length, tokens % length], axis=-1)
        strongest_weights[number] = np.take_along_axis(by_token.T, tokens, axis=1)
    return ImageBatchEvaluation(
        nats=loss * len(labels),
        targets=len(labels),
        served=served,
        dropped=dropped,
        confusion=confusion,
        weights=weights,
        strongest=strongest,
        strongest_weights=strongest_weights,
    )


def sum_image_batches(batches: list[ImageBatchEvaluation]) -> VisionEvaluation:
    """Return the evaluation of all images from their batches, in their order."""
    whole = sum_batches(list(batches))
    places = np.concatenate([b.strongest for b in batches], axis=2)
    weights = np.concatenate([b.strongest_weights for b in batches], axis=2)
    order = np.argsort(-weights, axis=2, kind="stable")[:, :, :STRONGEST]
    strongest = np.take_along_axis(places, order[..., None], axis=2)
    strongest[np.take_along_axis(weights, order, axis=2) <= 0] = -1
    return VisionEvaluation(
        loss=whole.loss,
        served=whole.served,
        dropped=whole.dropped,
        confusion=np.sum([b.confusion for b in batches], axis=0),
        weights=np.sum([b.weights for b in batches], axis=0),
        strongest=strongest,
    )


def _count_by_place(topk_ids: HostArray, length: int, num_experts: int) -> HostArray:
    """Return how often each expert was chosen at each place (L, E); -1 is no choice."""
    places = np.arange(topk_ids.shape[0])[:, None] % length
    chosen = (topk_ids >= 0) & (topk_ids < num_experts)
    cells = (places * num_experts + topk_ids)[chosen]
    counts = np.bincount(cells, minlength=length * num_experts)
    return counts.reshape(length, num_experts)


def _weights_by_expert(layer: SavedTensors) -> HostArray:
    """Return the weight of every expert for every token (T, E), 0 where it was not chosen."""
    routing, num_experts = layer.routing, layer.cfg.num_experts
    num_tokens = routing.probs.shape[0]
    if layer.soft is not None:
        summed: HostArray = routing.probs.reshape(num_tokens, num_experts, -1).sum(axis=2)
        return summed
    weights = np.zeros((num_tokens, num_experts), routing.topk_weights.dtype)
    chosen = (routing.topk_ids >= 0) & (routing.topk_ids < num_experts)
    tokens, slots = np.nonzero(chosen)
    weights[tokens, routing.topk_ids[tokens, slots]] = routing.topk_weights[tokens, slots]
    return weights
