"""Who is chosen: by the tokens (groups, bias, second expert) or by the experts."""

from __future__ import annotations

import math

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.naive.capacity import expert_capacity, sequences
from npmoe.naive.draws import row_of
from npmoe.naive.scoring import is_finite_row


def largest(key: list[float], count: int) -> list[int]:
    """Return the places of the `count` largest keys, falling; the lowest place among equals."""
    return sorted(range(len(key)), key=lambda e: (-key[e], e))[:count]


def selection_key(
    row: list[float], probs: list[float], cfg: MoEConfig, selection_bias: HostArray | None
) -> list[float]:
    """Return what experts are chosen by: probabilities or logits, with the selection bias."""
    on_logits = cfg.router_order == "topk_score" or (
        cfg.selection_bias and cfg.selection_bias_on == "logits"
    )
    key = list(row) if on_logits else list(probs)
    if selection_bias is not None:
        key = [x + float(selection_bias[e]) for e, x in enumerate(key)]
    return key


def limit_groups(key: list[float], cfg: MoEConfig) -> list[float]:
    """Return the key with -inf, or 0, outside the topk_group best groups of experts."""
    if cfg.num_groups == 1:
        return key
    size = len(key) // cfg.num_groups
    counted = {"max": 1, "top2_sum": 2, "topk_div": cfg.top_k // cfg.topk_group}[cfg.group_score]
    values = []
    for g in range(cfg.num_groups):
        members = key[g * size : (g + 1) * size]
        values.append(sum(members[e] for e in largest(members, counted)))
    best = largest(values, cfg.topk_group)
    fill = 0.0 if cfg.group_fill == "zero" else -math.inf
    return [x if e // size in best else fill for e, x in enumerate(key)]


def choose(
    row: list[float],
    probs: list[float],
    cfg: MoEConfig,
    selection_bias: HostArray | None,
    gumbel: HostArray | None,
) -> list[int]:
    """Return the experts of one token; the second may be drawn by the logits plus `gumbel`."""
    key = limit_groups(selection_key(row, probs, cfg, selection_bias), cfg)
    chosen = largest(key, cfg.top_k)
    if cfg.second_expert_policy == "sampling":
        if gumbel is None:
            raise RangeError(
                "route: draws.gumbel must be given with second_expert_policy='sampling', got "
                "None. The second expert is drawn at random."
            )
        noisy = [x + float(gumbel[e]) for e, x in enumerate(row)]
        chosen[1] = next(e for e in largest(noisy, 2) if e != chosen[0])
    return chosen


def keeps_second(weight: float, uniform: float) -> bool:
    """Return whether policy "random" keeps a second expert of this unscaled weight."""
    return 2.0 * weight > uniform


def experts_choose(
    probs: HostArray, valid: list[bool], cfg: MoEConfig, sequence_length: int | None
) -> HostArray:
    """Return topk_ids (T, K') when each expert takes its C most probable valid tokens.

    The lower token among equals; ids ascend in each row and -1 fills it up; K' >= 1 is the most
    experts any token got. C counts the valid tokens of the batch, or of each sequence.
    """
    num_tokens, num_experts = probs.shape
    taken_by: list[list[int]] = [[] for _ in range(num_tokens)]
    for tokens in sequences(num_tokens, sequence_length, cfg):
        candidates = [t for t in tokens if valid[t]]
        capacity = expert_capacity(len(candidates), cfg)
        for e in range(num_experts):
            for t in sorted(candidates, key=lambda t: (-probs[t, e], t))[:capacity]:
                taken_by[t].append(e)
    ids = np.full((num_tokens, max([1, *map(len, taken_by)])), -1)
    for t, experts in enumerate(taken_by):
        ids[t, : len(experts)] = experts
    return ids


def choose_ids(
    logits: HostArray,
    probs: HostArray,
    valid: list[bool],
    cfg: MoEConfig,
    selection_bias: HostArray | None,
    sequence_length: int | None,
    gumbel: HostArray | None,
) -> HostArray:
    """Return topk_ids (T, K); -1 in rows that are not valid."""
    if cfg.routing == "hash":
        raise RangeError(
            "route: topk_ids must be given with routing='hash', got None. The caller hashes."
        )
    if cfg.routing == "expert_choice":
        return experts_choose(probs, valid, cfg, sequence_length)
    num_tokens, num_experts = logits.shape
    top_k = num_experts if cfg.routing == "dense" else cfg.top_k
    ids = np.full((num_tokens, top_k), -1)
    for t in range(num_tokens):
        if not valid[t]:
            continue
        if cfg.routing == "dense" or not is_finite_row(logits[t]):
            ids[t] = range(top_k)
        else:
            drawn = row_of(gumbel, t)
            ids[t] = choose(logits[t].tolist(), probs[t].tolist(), cfg, selection_bias, drawn)
    return ids
