"""Which experts a token takes, and which tokens an expert takes."""

from __future__ import annotations

import numpy as np

from npmoe._typing import Array, array_namespace
from npmoe.config import MoEConfig
from npmoe.errors import RangeError

# Up to this K repeated argmax beats sorting whole rows.
_ARGMAX_TOP_K = 8
# Entries of one block of rows: small enough for the cache, and for the memory of large E.
_BLOCK_ENTRIES = 2**17


def stable_topk(key: Array, top_k: int) -> Array:
    """Return the columns of the `top_k` largest entries of each row, ties to the lowest column.

    Parameters
    ----------
    key : (T, E) float array
        No NaN; -inf is allowed.
    top_k : int
        K.

    Returns
    -------
    (T, K) integer array
        By key, descending.

    Notes
    -----
    **Cost**: O(T*E*K) for K <= 8, else O(T*E*log E); a block of rows at a time, so that no
    second array of the size of `key` is made.

    Examples
    --------
    >>> import numpy as np
    >>> stable_topk(np.array([[1.0, 2.0, 2.0, 0.0]]), 3)
    array([[1, 2, 0]])
    """
    xp = array_namespace(key)
    if top_k == 1:
        return key.argmax(axis=1)[:, None]
    ids = xp.empty((key.shape[0], top_k), dtype=xp.int64)
    step = max(1, _BLOCK_ENTRIES // max(1, key.shape[1]))
    for start in range(0, key.shape[0], step):
        block = slice(start, start + step)
        ids[block] = _block_topk(key[block], top_k)
    return ids


def _block_topk(key: Array, top_k: int) -> Array:
    xp = array_namespace(key)
    if top_k <= _ARGMAX_TOP_K:
        rest = key.copy()
        rows = xp.arange(key.shape[0])
        ids = xp.empty((key.shape[0], top_k), dtype=xp.int64)
        lowest = xp.full((key.shape[0],), xp.inf, dtype=key.dtype)
        for k in range(top_k):
            best = rest.argmax(axis=1)
            ids[:, k] = best
            lowest = rest[rows, best]
            rest[rows, best] = -xp.inf
        if bool((lowest > -xp.inf).all()):
            return ids
        # An entry of -inf was chosen: one taken before looks the same.
    return xp.argsort(-key, axis=1, kind="stable")[:, :top_k]


def selection_key(
    logits: Array, probs: Array, cfg: MoEConfig, selection_bias: Array | None
) -> Array:
    """Return what experts are chosen by (T, N): scores or logits, biased, limited to groups."""
    by_logits = cfg.router_order == "topk_score" or cfg.selection_bias_on == "logits"
    key = logits if by_logits else probs
    if selection_bias is not None:
        key = key + selection_bias.astype(key.dtype)
    return key if cfg.num_groups == 1 else limit_groups(key, cfg)


def limit_groups(key: Array, cfg: MoEConfig) -> Array:
    """Return the key with the experts outside the best groups filled.

    References
    ----------
    "max" with fill "zero": DeepSeek-V2 ``group_limited_greedy``; "top2_sum" with "-inf":
    DeepSeek-V3; "topk_div": Megatron ``group_limited_topk``.
    """
    xp = array_namespace(key)
    num_tokens, size = key.shape
    members = key.reshape(num_tokens, cfg.num_groups, size // cfg.num_groups)
    group_key = group_scores(key, cfg)
    kept = xp.zeros((num_tokens, cfg.num_groups), dtype=bool)
    rows = xp.arange(num_tokens)
    best_groups = stable_topk(group_key, cfg.topk_group)
    for g in range(cfg.topk_group):
        kept[rows, best_groups[:, g]] = True
    fill = -xp.inf if cfg.group_fill == "-inf" else 0.0
    return xp.where(kept[:, :, None], members, fill).reshape(num_tokens, size)


def group_scores(key: Array, cfg: MoEConfig) -> Array:
    """Return the score of every group (T, G): its best key, or the sum of its best ones."""
    xp = array_namespace(key)
    num_tokens, size = key.shape
    members = key.reshape(num_tokens, cfg.num_groups, size // cfg.num_groups)
    if cfg.group_score == "max":
        return members.max(axis=2)
    count = 2 if cfg.group_score == "top2_sum" else cfg.top_k // cfg.topk_group
    best = xp.sort(members, axis=2)[:, :, -min(count, members.shape[2]) :]
    return best[:, :, ::-1].sum(axis=2)


def sample_second(logits: Array, first: Array, rng: np.random.Generator) -> Array:
    """Return a second expert (T,) drawn by softmax from all but the first.

    The largest of logits plus Gumbel noise is such a draw; the logits are not changed.

    References
    ----------
    Lepikhin et al. 2020, "GShard", section 2.2; DeepSpeed ``top2gating``, fairseq ``top2gate``.
    """
    xp = array_namespace(logits)
    drawn = logits + xp.asarray(rng.gumbel(size=logits.shape).astype(str(logits.dtype)))
    drawn[xp.arange(logits.shape[0]), first] = -xp.inf
    return drawn.argmax(axis=1)


def choose_tokens(probs: Array, valid: Array, capacities: list[int]) -> Array:
    """Let every expert choose its most probable valid tokens; return topk_ids (T, K').

    Parameters
    ----------
    probs : (T, N) float array
    valid : (T,) bool array
        Other tokens are never chosen.
    capacities : list of int
        Tokens that each expert takes from each of the equal stretches of tokens.

    Returns
    -------
    (T, K') int32 array
        Ascending experts, padded with -1; K' is the most that chose one token, at least 1.

    Notes
    -----
    **Order**: ties go to the lower token. Not causal: a token's experts depend on later tokens.

    References
    ----------
    Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", eq. 1-3.
    """
    xp = array_namespace(probs)
    num_tokens, size = probs.shape
    chosen = xp.zeros((size, num_tokens), dtype=bool)
    experts = xp.arange(size)
    stretch = num_tokens // max(1, len(capacities))
    for b, rows in enumerate(capacities):
        tokens = xp.nonzero(valid[b * stretch : (b + 1) * stretch])[0] + b * stretch
        best = stable_topk(probs[tokens].T, min(rows, tokens.shape[0])) if rows else tokens[:0]
        for k in range(min(rows, tokens.shape[0])):
            chosen[experts, tokens[best[:, k]]] = True
    token_ids, expert_ids = xp.nonzero(chosen.T)
    counts = xp.bincount(token_ids, minlength=num_tokens)
    starts = xp.cumsum(counts) - counts
    width = max(1, int(counts.max())) if num_tokens else 1
    ids = xp.full((num_tokens, width), -1, dtype=xp.int32)
    ids[token_ids, xp.arange(token_ids.shape[0]) - starts[token_ids]] = expert_ids
    return ids


def need_generator(rng: np.random.Generator | None, field: str, value: str) -> np.random.Generator:
    """Return the generator, or say which option needs it."""
    if rng is None:
        raise RangeError(
            f"moe_forward: rng must be given with {field}={value!r}, got None. Pass a numpy "
            "Generator, or use cfg.for_evaluation()."
        )
    return rng
