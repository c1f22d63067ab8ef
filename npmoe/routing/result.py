"""Routing: what the router decided, for every token."""

from __future__ import annotations

from dataclasses import dataclass

from npmoe._typing import Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """What the router decided.

    N is the number of experts including identity experts. Soft routing has N = E*C slots in
    `probs` (weights over the slots) and `router_logits`, while `topk_ids` and `topk_weights`
    describe the slots: one expert each, with weight 1.

    Attributes
    ----------
    topk_ids : (T, K) int32 array
        Chosen experts, by selection key descending; -1 where there is none. Before any drop.
    topk_weights : (T, K) float array
        Combine weights as used; 0 where the id is -1.
    probs : (T, N) float array
        The score function of the logits over all experts, never biased; with softmax, rows sum
        to 1. Rows of masked tokens are 0.
    router_logits : (T, N) float array
        What entered the score function: after router bias, soft-cap and noise.
    token_mask : (T,) bool array or None
        True = valid. Under nan_policy "drop" it excludes the dropped rows as well.
    sequence_length : int
        Tokens per sequence.
    score_fn : str
        That of the config; "soft" for soft routing.
    clean_logits : (T, N) float array or None
        The logits before noise; None if none was added.
    summed_ids : (T, K) int32 array or None
        The experts whose weights were normalised together, where these are more than
        `topk_ids`: a second expert that second_expert_policy "random" then refused.
    """

    topk_ids: Array
    topk_weights: Array
    probs: Array
    router_logits: Array
    token_mask: Array | None = None
    sequence_length: int
    score_fn: str = "softmax"
    clean_logits: Array | None = None
    summed_ids: Array | None = None
