"""How many rows an expert may take: exact, or with the rounding of a named system."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from npmoe._typing import Array, array_namespace
from npmoe.config import MoEConfig

if TYPE_CHECKING:
    from fractions import Fraction

_EXACT: dict[str, Callable[[Fraction], int]] = {
    "ceil": math.ceil,
    "floor": math.floor,
    "round": round,
}


def expert_capacity(num_tokens: int, cfg: MoEConfig) -> int | None:
    """Return the number of rows that each expert may take, or None if dropless.

    ``C = round_up(max(min_capacity, rounding(T * K * capacity_factor / E)), capacity_multiple)``

    Parameters
    ----------
    num_tokens : int
        T, counting valid tokens only; those of one sequence with capacity_scope "sequence".
    cfg : MoEConfig
        Its capacity fields; `expert_capacity` is returned as it stands.

    Returns
    -------
    int or None

    Notes
    -----
    **Accuracy**: "ceil", "floor" and "round" are exact rational arithmetic. Floating-point
    versions in circulation differ, for example 56 instead of 55 for T=400, E=8, K=1 and a factor
    of 1.1; they can be had by name: "megatron_f64" is ``ceil((T*K / E) * factor)`` in float64,
    "deepspeed_f32" is ``ceil(T/E * (factor*K))`` with both factors rounded to float32. "tutel" is
    ``K * floor(factor * ceil(T/E))``, exact.

    References
    ----------
    Fedus et al. 2021, "Switch Transformers", eq. 3 (ceil); MegaBlocks
    ``ParallelMLP.expert_capacity`` (floor); V-MoE ``moe.compute_capacity`` (round, multiples);
    Megatron ``moe_utils.get_capacity``; DeepSpeed ``sharded_moe._capacity``; Tutel
    ``fast_dispatch.extract_critical``.

    Examples
    --------
    >>> cfg = MoEConfig(num_experts=8, top_k=1, capacity_factor="1.1")
    >>> expert_capacity(400, cfg)
    55
    """
    if cfg.expert_capacity is not None:
        return cfg.expert_capacity
    if cfg.capacity_factor is None:
        return None
    from fractions import Fraction  # noqa: PLC0415  # slow to import, and a capacity is rare

    factor, E = Fraction(cfg.capacity_factor), cfg.num_experts
    per_token = cfg.top_k if cfg.capacity_count_top_k else 1
    if cfg.capacity_rounding == "tutel":
        rows = per_token * math.floor(factor * -(-num_tokens // E))
    elif cfg.capacity_rounding == "megatron_f64":
        rows = math.ceil((num_tokens * per_token / E) * float(factor))
    elif cfg.capacity_rounding == "deepspeed_f32":
        share = np.float32(num_tokens / E) * np.float32(float(factor) * per_token)
        rows = math.ceil(float(share))
    else:
        rows = _EXACT[cfg.capacity_rounding](num_tokens * per_token * factor / E)
    rows = max(cfg.min_capacity, rows)
    return -(-rows // cfg.capacity_multiple) * cfg.capacity_multiple


def stretch_capacities(valid: Array, sequence_length: int, cfg: MoEConfig) -> list[int]:
    """Return the capacity of every stretch of tokens that competes for rows.

    Parameters
    ----------
    valid : (T,) bool array
        Tokens that count.
    sequence_length : int
        Tokens per sequence.
    cfg : MoEConfig
        One with a capacity. "batch" has one stretch, "sequence" T / sequence_length.

    Returns
    -------
    list of int
    """
    num_tokens = int(valid.shape[0])
    if cfg.capacity_scope == "batch" or not num_tokens:
        counts = [int(valid.sum())]
    else:
        xp = array_namespace(valid)
        rows = valid.reshape(num_tokens // sequence_length, sequence_length)
        counts = [int(n) for n in rows.astype(xp.int64).sum(axis=1).tolist()]
    return [expert_capacity(n, cfg) or 0 for n in counts]
