"""Which experts a token goes to, with which weights: one token at a time, in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.naive.draws import NO_DRAWS, Draws
from npmoe.naive.scoring import is_finite_row, score, softmax
from npmoe.naive.selection import choose_ids, keeps_second
from npmoe.naive.weights import (
    chosen_weights,
    chosen_weights_backward,
    renormalize,
    renormalize_backward,
)

__all__ = ["NaiveRouting", "route", "route_backward", "softmax", "valid_tokens"]


class NaiveRouting(NamedTuple):
    """Choices before any drop for capacity."""

    topk_ids: HostArray  # (T, K) int64; by falling key, -1 where there is none
    topk_weights: HostArray  # (T, K), 0 where the id is -1
    probs: HostArray  # (T, E), 0 where masked or not finite
    summed_ids: HostArray  # (T, K), topk_ids with the second experts that policy "random" dropped


def valid_tokens(logits: HostArray, cfg: MoEConfig, token_mask: HostArray | None) -> list[bool]:
    """Return which tokens take part: not masked, and no non-finite row under nan_policy "drop"."""
    valid = []
    for t in range(logits.shape[0]):
        masked = token_mask is not None and not token_mask[t]
        broken = not masked and not is_finite_row(logits[t])
        if broken and cfg.nan_policy == "raise":
            raise RangeError(
                f"route: logits must have a finite largest value in every row, got {logits[t]} "
                f"for token {t}. Mask the token or choose another nan_policy."
            )
        valid.append(not masked and not (broken and cfg.nan_policy == "drop"))
    return valid


def route(
    logits: HostArray,
    cfg: MoEConfig,
    token_mask: HostArray | None = None,
    topk_ids: HostArray | None = None,
    *,
    selection_bias: HostArray | None = None,
    sequence_length: int | None = None,
    draws: Draws = NO_DRAWS,
) -> NaiveRouting:
    """Choose the experts of every token; `topk_ids` (T, K) replays choices, -1 is no expert.

    With renormalize_drop="after" the weights are neither normalised nor scaled. A row that is
    not finite has probabilities and weights 0, and under "clamp" the ids 0 to K-1.

    Raises
    ------
    RangeError
        If the largest logit of a row is NaN or infinite and nan_policy is "raise"; if choices or
        random numbers are missing.
    """
    valid = valid_tokens(logits, cfg, token_mask)
    usable = [v and is_finite_row(logits[t]) for t, v in enumerate(valid)]
    probs = np.zeros(logits.shape)
    for t in range(logits.shape[0]):
        if usable[t]:
            probs[t] = score(logits[t].tolist(), cfg.score_fn)
    if topk_ids is None:
        ids = choose_ids(logits, probs, valid, cfg, selection_bias, sequence_length, draws.gumbel)
    else:
        ids = np.where(np.array(valid, dtype=bool)[:, None], topk_ids, -1)
    weights = np.zeros(ids.shape)
    for t in range(ids.shape[0]):
        slots = [k for k in range(ids.shape[1]) if usable[t] and ids[t, k] >= 0]
        experts = [int(ids[t, k]) for k in slots]
        if usable[t]:
            weights[t, slots] = chosen_weights(logits[t].tolist(), experts, cfg)
    if cfg.renormalize_drop == "before":
        weights = renormalize(weights, ids >= 0, cfg)
    summed_ids = ids.copy()
    if cfg.second_expert_policy == "random" and topk_ids is None:
        if draws.second is None:
            raise RangeError(
                "route: draws.second must be given with second_expert_policy='random', got None. "
                "The second expert is kept at random."
            )
        for t in range(ids.shape[0]):
            if not keeps_second(float(weights[t, 1]), float(draws.second[t])):
                ids[t, 1], weights[t, 1] = -1, 0.0
    if cfg.renormalize_drop == "before":
        weights = weights * cfg.routed_scaling_factor
    return NaiveRouting(ids, weights, probs, summed_ids)


def route_backward(
    grad_topk_weights: HostArray,
    logits: HostArray,
    topk_ids: HostArray,
    cfg: MoEConfig,
    kept: HostArray | None = None,
    summed_ids: HostArray | None = None,
) -> HostArray:
    """Return the gradient of the logits (T, E); the choice itself is a constant.

    With `kept` (T, K), `grad_topk_weights` is the gradient of the weights after the drop: a
    dropped route has none, and with renormalize_drop="after" the kept ones were normalised and
    scaled. `summed_ids` are topk_ids if omitted.
    """
    grad = np.where(topk_ids >= 0 if kept is None else kept, grad_topk_weights, 0.0)
    ids = topk_ids if summed_ids is None else summed_ids
    dropped_yet = cfg.renormalize_drop == "before" or kept is not None
    if dropped_yet:
        grad = grad * cfg.routed_scaling_factor
    weights = np.zeros(ids.shape)
    rows = [t for t in range(ids.shape[0]) if is_finite_row(logits[t])]
    slots = {t: [k for k in range(ids.shape[1]) if ids[t, k] >= 0] for t in rows}
    for t in rows:
        experts = [int(ids[t, k]) for k in slots[t]]
        weights[t, slots[t]] = chosen_weights(logits[t].tolist(), experts, cfg)
    if dropped_yet:
        summed = kept if cfg.renormalize_drop == "after" and kept is not None else ids >= 0
        grad = renormalize_backward(grad, weights, summed, cfg)
    grad_logits = np.zeros(logits.shape)
    for t in rows:
        experts = [int(ids[t, k]) for k in slots[t]]
        row = logits[t].tolist()
        grad_logits[t] = chosen_weights_backward(grad[t, slots[t]].tolist(), row, experts, cfg)
    return grad_logits
