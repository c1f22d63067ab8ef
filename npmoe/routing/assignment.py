"""Balanced choices over a whole batch, to be replayed: Sinkhorn and quantile balancing.

Both return topk_ids for `moe_forward(..., topk_ids=...)`, which takes the weights from the
current logits. They are for training: a token's choice depends on the whole batch.
"""

from __future__ import annotations

import numpy as np

from npmoe._typing import HostArray
from npmoe.errors import RangeError
from npmoe.routing.selection import stable_topk


def sinkhorn(
    router_logits: HostArray, *, tolerance: float = 1e-4, max_iterations: int = 10_000
) -> HostArray:
    """Return exp(x) scaled to near-uniform column sums, whose row-wise top-k is balanced.

    ``d0 = 1/(T (K d1 + eps))``, ``d1 = 1/(N (K^T d0 + eps))`` with K = exp(x), eps = 1e-8, from
    d1 = 1 until the mean change of d1 is at most `tolerance`.

    Parameters
    ----------
    router_logits : (T, N) float array
        Finite. Shifting all by one number changes only eps's share.
    tolerance : float
    max_iterations : int

    Returns
    -------
    (T, N) float array
        Of the dtype of the logits; new.

    Raises
    ------
    RangeError
        If the tolerance is not positive, or not reached: the change is absolute, and rounding
        may keep it above a tolerance that is small beside d1.

    References
    ----------
    Megatron ``moe_utils.sinkhorn``; Clark et al. 2022, "Unified Scaling Laws for Routed Language
    Models", section B.2.

    Examples
    --------
    >>> import numpy as np
    >>> balanced = sinkhorn(np.array([[2.0, 0.0], [1.0, 0.0]]))
    >>> balanced.argmax(axis=1).tolist()
    [0, 1]
    """
    if not tolerance > 0:
        raise RangeError(f"sinkhorn: tolerance must be positive, got {tolerance}.")
    num_tokens, size = router_logits.shape
    cost = np.exp(router_logits)
    before = columns = np.ones(size, cost.dtype)
    if not num_tokens:
        return cost
    for _ in range(max_iterations):
        rows = 1.0 / (num_tokens * (cost @ columns + 1e-8))
        before, columns = columns, 1.0 / (size * (rows @ cost + 1e-8))
        if np.abs(before - columns).mean() <= tolerance:
            balanced: HostArray = columns * cost * rows[:, None]
            return balanced
    raise RangeError(
        f"sinkhorn: tolerance must be reached within {max_iterations} iterations, got a change of "
        f"{np.abs(before - columns).mean():.1e} in the last one. Raise the tolerance {tolerance}."
    )


def quantile_balance(
    probs: HostArray, top_k: int, *, thresholds: HostArray | None = None
) -> tuple[HostArray, HostArray]:
    """Choose the top-k of ``probs - thresholds`` and return new thresholds that balance the load.

    One step of the alternation: ``alpha_t`` is the (K+1)-th largest of ``s_t - beta``, and the new
    ``beta_e`` the (T*K/N + 1)-th largest of ``s_te - alpha_t`` over tokens.

    Parameters
    ----------
    probs : (T, N) float array
        Scores.
    top_k : int
        K, below N.
    thresholds : (N,) float array, optional
        beta of the step before; 0 if omitted.

    Returns
    -------
    topk_ids : (T, K) int32 array
        Chosen with the new thresholds: upstream's choice of the step after.
    thresholds : (N,) float array

    Raises
    ------
    RangeError
        If N does not divide T*K, or K is not below N.

    References
    ----------
    Megatron ``moe_utils.qb_dual_update``.
    """
    num_tokens, size = probs.shape
    if not 1 <= top_k < size:
        raise RangeError(f"quantile_balance: top_k must lie in 1..{size - 1}, got {top_k}.")
    if num_tokens * top_k % size or num_tokens * top_k >= num_tokens * size:
        raise RangeError(
            f"quantile_balance: num_experts must divide tokens * top_k = {num_tokens * top_k}, "
            f"got {size}. Every expert takes the same number."
        )
    beta = np.zeros(size, probs.dtype) if thresholds is None else thresholds
    alpha = -np.sort(-(probs - beta), axis=1)[:, top_k]  # (T,)
    per_expert = num_tokens * top_k // size
    beta = -np.sort(-(probs - alpha[:, None]), axis=0)[per_expert]
    return stable_topk(probs - beta, top_k).astype(np.int32), beta
