"""Load of the experts and what was dropped, as host numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from npmoe._typing import Array, HostArray
from npmoe.dispatch import DispatchPlan
from npmoe.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadStats:
    """Load and drops of one call of the layer.

    Attributes
    ----------
    chosen_per_expert, kept_per_expert : (E,) int64 array
        Routes before and after the drop.
    num_tokens : int
        Valid tokens.
    dropped_routes, partially_dropped_tokens, fully_dropped_tokens : int
        What the capacity refused. A token all of whose routes fell is counted as fully dropped.
    dropped_per_slot : (K,) int64 array
        Dropped routes of first choices, second choices, ...
    capacity : int or None
        Rows that an expert may take.
    """

    chosen_per_expert: HostArray
    kept_per_expert: HostArray
    num_tokens: int
    dropped_routes: int
    partially_dropped_tokens: int
    fully_dropped_tokens: int
    dropped_per_slot: HostArray
    capacity: int | None

    @property
    def drop_rate(self) -> float:
        """Dropped routes divided by chosen ones; 0 without routes."""
        chosen = int(self.chosen_per_expert.sum())
        return self.dropped_routes / chosen if chosen else 0.0

    @property
    def max_violation(self) -> float:
        """MaxVio of the choices before the drop."""
        return max_violation(self.chosen_per_expert)

    @property
    def dead_experts(self) -> int:
        """Experts that nobody chose."""
        return int((self.chosen_per_expert == 0).sum())

    @property
    def utilisation(self) -> float | None:
        """Kept rows divided by E * capacity; None if dropless or if the capacity is 0."""
        if not self.capacity:
            return None
        return float(self.kept_per_expert.sum()) / (len(self.kept_per_expert) * self.capacity)


def max_violation(counts: HostArray) -> float:
    """Return MaxVio = max(n_e) / mean(n) - 1; 0 at perfect balance, and without any choice.

    References
    ----------
    Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy", eq. 4.

    Examples
    --------
    >>> import numpy as np
    >>> max_violation(np.array([3, 1]))
    0.5
    """
    total = float(counts.sum())
    return float(counts.max()) * len(counts) / total - 1.0 if total else 0.0


def load_stats(
    routing: Routing,
    plan: DispatchPlan,
    num_experts: int,
    asnumpy: Callable[[Array], HostArray] = np.asarray,
) -> LoadStats:
    """Count choices and drops.

    Parameters
    ----------
    routing : Routing
    plan : DispatchPlan
    num_experts : int
        E.
    asnumpy : callable
        The backend's transfer to the host.

    Returns
    -------
    LoadStats
    """
    ids = asnumpy(routing.topk_ids)  # (T, K)
    row_ids = asnumpy(plan.row_ids)  # (T, K)
    mask = routing.token_mask
    chosen = ids >= 0
    dropped = chosen & (row_ids < 0)
    lost, wanted = dropped.sum(axis=1), chosen.sum(axis=1)
    fully = (lost > 0) & (lost == wanted)
    return LoadStats(
        chosen_per_expert=np.bincount(ids[chosen], minlength=num_experts),
        kept_per_expert=np.diff(asnumpy(plan.expert_offsets)).astype(np.int64),
        num_tokens=ids.shape[0] if mask is None else int(asnumpy(mask).sum()),
        dropped_routes=int(dropped.sum()),
        partially_dropped_tokens=int(((lost > 0) & ~fully).sum()),
        fully_dropped_tokens=int(fully.sum()),
        dropped_per_slot=dropped.sum(axis=0),
        capacity=plan.capacity,
    )
