"""How many routes an expert may take, which it keeps, and in which slot of its buffer."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.errors import RangeError


def expert_capacity(num_tokens: int, cfg: MoEConfig) -> int | None:
    """Return the rows each expert may take, or None for as many as come.

    `num_tokens` counts the tokens of the batch, or of one sequence, that are not masked.
    """
    if cfg.expert_capacity is not None:
        return cfg.expert_capacity
    if cfg.capacity_factor is None:
        return None
    factor, E = Fraction(cfg.capacity_factor), cfg.num_experts
    per_token = cfg.top_k if cfg.capacity_count_top_k else 1
    exact = num_tokens * per_token * factor / E
    if cfg.capacity_rounding == "ceil":
        capacity = math.ceil(exact)
    elif cfg.capacity_rounding == "floor":
        capacity = math.floor(exact)
    elif cfg.capacity_rounding == "round":
        capacity = round(exact)
    elif cfg.capacity_rounding == "tutel":
        capacity = per_token * math.floor(factor * -(-num_tokens // E))
    elif cfg.capacity_rounding == "megatron_f64":
        capacity = math.ceil((num_tokens * per_token / E) * float(factor))
    else:
        product = np.float32(num_tokens / E) * np.float32(float(factor) * per_token)
        capacity = math.ceil(product)
    capacity = max(capacity, cfg.min_capacity)
    while capacity % cfg.capacity_multiple != 0:
        capacity += 1
    return capacity


def sequences(num_tokens: int, sequence_length: int | None, cfg: MoEConfig) -> list[range]:
    """Return the tokens that share one capacity: the batch, or each sequence of it."""
    if cfg.capacity_scope == "batch" or sequence_length is None or num_tokens == 0:
        return [range(num_tokens)]
    return [range(t, t + sequence_length) for t in range(0, num_tokens, sequence_length)]


def assign_slots(
    topk_ids: HostArray,
    topk_weights: HostArray,
    capacity: int | None,
    cfg: MoEConfig,
    uniforms: HostArray | None = None,
) -> HostArray:
    """Return the slot of every route in its expert's buffer, (T, K), -1 where there is none.

    Each expert ranks the routes that want it, and the first `capacity` stay:
    "position"        by token,
    "k_major"         all first choices before any second one,
    "batch_priority"  the same, and tokens by their first weight, falling,
    "probability"     by weight, falling,
    "random"          by `uniforms` (T, K), rising;
    then the lower token among equals. The slot is the rank, or with slot_order="token" the rank
    by token among those that stay. Identity experts have no buffer.
    """
    num_tokens, top_k = topk_ids.shape
    by_first = sorted(range(num_tokens), key=lambda t: (-topk_weights[t, 0], t))

    def rank(route: tuple[int, int]) -> tuple[float, ...]:
        t, k = route
        if cfg.drop_policy == "k_major":
            return (k, t)
        if cfg.drop_policy == "batch_priority":
            return (k, by_first.index(t))
        if cfg.drop_policy == "probability":
            return (-topk_weights[t, k], t, k)
        if cfg.drop_policy == "random":
            if uniforms is None:
                raise RangeError(
                    "keep_routes: draws.drop must be given with drop_policy='random', got None. "
                    "The routes are ranked at random."
                )
            return (uniforms[t, k], t, k)
        return (t, k)

    slot_ids = np.full((num_tokens, top_k), -1)
    for e in range(cfg.num_experts):
        wanting = [(t, k) for t in range(num_tokens) for k in range(top_k) if topk_ids[t, k] == e]
        staying = sorted(wanting, key=rank)[:capacity]
        if cfg.slot_order == "token":
            staying.sort()
        for slot, route in enumerate(staying):
            slot_ids[route] = slot
    return slot_ids


def keep_routes(
    topk_ids: HostArray,
    topk_weights: HostArray,
    valid: list[bool],
    cfg: MoEConfig,
    sequence_length: int | None = None,
    uniforms: HostArray | None = None,
) -> tuple[HostArray, HostArray | None]:
    """Return which routes are kept (T, K) bool, and their slots (T, K), None if none can drop.

    The `valid` tokens of the batch, or of each sequence, determine the capacity. Routes to
    identity experts are always kept. Where the experts choose, there is room for all they chose.
    """
    if not cfg.has_capacity:
        return topk_ids >= 0, None
    slot_ids = np.full(topk_ids.shape, -1)
    for tokens in sequences(len(topk_ids), sequence_length, cfg):
        part = slice(tokens.start, tokens.stop)
        capacity = expert_capacity(sum(valid[part]), cfg)
        drawn = None if uniforms is None else uniforms[part]
        slot_ids[part] = assign_slots(topk_ids[part], topk_weights[part], capacity, cfg, drawn)
    return (slot_ids >= 0) | (topk_ids >= cfg.num_experts), slot_ids
