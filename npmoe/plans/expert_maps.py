"""Which rank has which expert, as the `expert_map` of every rank."""

from __future__ import annotations

from typing import Literal

import numpy as np

from npmoe._checks import require
from npmoe._typing import HostArray
from npmoe.plans.blocks import check_size


def make_expert_map(
    num_experts: int,
    num_ranks: int,
    rank: int,
    *,
    placement: Literal["linear", "round_robin"] = "linear",
) -> HostArray:
    """Return the numbers that the experts of one rank have there, and -1 for all others.

    Parameters
    ----------
    num_experts, num_ranks, rank : int
        E, n, and a rank in 0..n-1.
    placement : {"linear", "round_robin"}
        Stretches of experts, the first E % n ranks having one more; or expert e on rank e % n.

    Returns
    -------
    (E,) int32 array
        New; numbers ascend with the experts.

    Raises
    ------
    DTypeError, RangeError
        If a size is not a positive integer, there is no such rank, or no such placement.

    References
    ----------
    vLLM, ``determine_expert_map``.

    Examples
    --------
    >>> make_expert_map(5, 2, 0).tolist(), make_expert_map(5, 2, 1).tolist()
    ([0, 1, 2, -1, -1], [-1, -1, -1, 0, 1])
    >>> make_expert_map(5, 2, 1, placement="round_robin").tolist()
    [-1, 0, -1, 1, -1]
    """
    E = check_size("make_expert_map", "num_experts", num_experts)
    n = check_size("make_expert_map", "num_ranks", num_ranks)
    require(0 <= rank < n, f"make_expert_map: rank must lie in 0..{n - 1}, got {rank}.")
    require(
        placement in ("linear", "round_robin"),
        f"make_expert_map: placement must be 'linear' or 'round_robin', got {placement!r}.",
    )
    if placement == "linear":
        each, more = divmod(E, n)
        start = rank * each + min(rank, more)
        mine = np.arange(start, start + each + (rank < more))
    else:
        mine = np.arange(rank, E, n)
    expert_map = np.full(E, -1, np.int32)
    expert_map[mine] = np.arange(mine.shape[0])
    return expert_map
