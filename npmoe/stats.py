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
    chosen_per_slot, dropped_per_slot : (K,) int64 array
        Routes of first choices, second choices, ...; and how many of them fell.
    top_share_per_slot : (K,) float64 array
        Share of the most chosen expert in the choices of each slot.
    entropy : float
        Mean over tokens of the entropy of their probabilities, in nats.
    identity_routes : int
        Choices of experts that compute nothing; no other number includes them.
    capacity : int or None
        Rows that an expert may take.
    """

    chosen_per_expert: HostArray
    kept_per_expert: HostArray
    num_tokens: int
    dropped_routes: int
    partially_dropped_tokens: int
    fully_dropped_tokens: int
    chosen_per_slot: HostArray
    dropped_per_slot: HostArray
    top_share_per_slot: HostArray
    entropy: float
    identity_routes: int
    capacity: int | None

    @property
    def drop_rate(self) -> float:
        """Dropped routes divided by chosen ones; 0 without routes."""
        chosen = int(self.chosen_per_expert.sum())
        return self.dropped_routes / chosen if chosen else 0.0

    @property
    def fraction(self) -> HostArray:
        """Share of every expert in the choices before the drop (E,); 0 without any."""
        return self.chosen_per_expert / max(int(self.chosen_per_expert.sum()), 1)

    @property
    def overflow_per_slot(self) -> HostArray:
        """Dropped routes of each slot divided by its chosen ones (K,); 0 without any."""
        return self.dropped_per_slot / np.maximum(self.chosen_per_slot, 1)

    @property
    def max_violation(self) -> float:
        """MaxVio of the choices before the drop."""
        return max_violation(self.chosen_per_expert)

    @property
    def variation(self) -> float:
        """Standard deviation of the choices before the drop, divided by their mean."""
        return coefficient_of_variation(self.chosen_per_expert)

    @property
    def gini(self) -> float:
        """Gini coefficient of the choices before the drop."""
        return gini(self.chosen_per_expert)

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

    def report(self) -> str:
        """Return the numbers as lines of text for a terminal."""
        chosen, kept = int(self.chosen_per_expert.sum()), int(self.kept_per_expert.sum())
        num_experts = len(self.chosen_per_expert)
        lines = [
            f"tokens    {self.num_tokens}; routes {chosen} chosen, {kept} kept, "
            f"{self.dropped_routes} dropped ({self.drop_rate:.1%})",
            f"load      MaxVio {self.max_violation:.3f}, CV {self.variation:.3f}, "
            f"Gini {self.gini:.3f}, {self.dead_experts} of {num_experts} experts unused",
            f"router    entropy {self.entropy:.3f} nats",
        ]
        if self.identity_routes:
            lines.append(f"identity  {self.identity_routes} routes")
        if self.capacity is not None:
            rows = num_experts * self.capacity
            lines.append(
                f"capacity  {self.capacity} rows per expert, {kept} of {rows} used; tokens with "
                f"some routes dropped {self.partially_dropped_tokens}, with all "
                f"{self.fully_dropped_tokens}"
            )
        for slot, (share, overflow) in enumerate(
            zip(self.top_share_per_slot, self.overflow_per_slot, strict=True)
        ):
            lines.append(
                f"slot {slot:<4} {self.chosen_per_slot[slot]} routes, {overflow:.1%} dropped, "
                f"{share:.1%} to one expert"
            )
        return "\n".join(lines)


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


def coefficient_of_variation(counts: HostArray) -> float:
    """Return the standard deviation (over E) divided by the mean; 0 without any count.

    Examples
    --------
    >>> import numpy as np
    >>> coefficient_of_variation(np.array([3, 1]))
    0.5
    """
    mean = float(counts.mean())
    return float(counts.std()) / mean if mean else 0.0


def gini(counts: HostArray) -> float:
    """Return the Gini coefficient: 0 if all are equal, 1 - 1/E if one expert has everything.

    ``sum over e, f of |n_e - n_f| / (2 E sum(n))``

    Examples
    --------
    >>> import numpy as np
    >>> gini(np.array([0, 0, 0, 8]))
    0.75
    """
    total, size = float(counts.sum()), len(counts)
    if not total:
        return 0.0
    ranks = 2 * np.arange(1, size + 1) - size - 1
    return float((ranks * np.sort(counts)).sum()) / (size * total)


def count_entropy(counts: HostArray) -> float:
    """Return ``E * sum over e of q_e * ln(q_e)``, q = n / sum(n), with 0 ln 0 = 0.

    A metric: counts have no gradient. It is -E ln E at perfect balance, 0 if one expert has
    everything, and 0 without any count. Its differentiable twin is the loss "prob_entropy".

    Examples
    --------
    >>> import numpy as np
    >>> count_entropy(np.array([0, 7, 0]))
    0.0
    """
    total = float(counts.sum())
    if not total:
        return 0.0
    shares = counts[counts > 0] / total
    return len(counts) * float((shares * np.log(shares)).sum())


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
    chosen = (ids >= 0) & (ids < num_experts)
    dropped = chosen & (row_ids < 0)
    lost, wanted = dropped.sum(axis=1), chosen.sum(axis=1)
    fully = (lost > 0) & (lost == wanted)
    top_k = ids.shape[1]
    places = ids + np.arange(top_k) * num_experts
    per_slot = np.bincount(places[chosen], minlength=top_k * num_experts)
    per_slot = per_slot.reshape(top_k, num_experts)
    chosen_per_slot = per_slot.sum(axis=1)
    num_tokens = routing.probs.shape[0] if mask is None else int(asnumpy(mask).sum())
    return LoadStats(
        chosen_per_expert=per_slot.sum(axis=0),
        kept_per_expert=np.diff(asnumpy(plan.expert_offsets)).astype(np.int64),
        num_tokens=num_tokens,
        dropped_routes=int(dropped.sum()),
        partially_dropped_tokens=int(((lost > 0) & ~fully).sum()),
        fully_dropped_tokens=int(fully.sum()),
        chosen_per_slot=chosen_per_slot,
        dropped_per_slot=dropped.sum(axis=0),
        top_share_per_slot=per_slot.max(axis=1, initial=0) / np.maximum(chosen_per_slot, 1),
        entropy=_mean_entropy(asnumpy(routing.probs), num_tokens),
        identity_routes=int((ids >= num_experts).sum()),
        capacity=plan.capacity,
    )


def _mean_entropy(probs: HostArray, num_tokens: int) -> float:
    """Return the mean entropy of the rows, each divided by its sum; rows of 0 add nothing.

    With s the scores and D their sum, -sum p ln p = ln D - sum s ln s / D.
    """
    total = probs.sum(axis=1)
    total[total == 0] = 1.0
    logs = np.log(np.where(probs > 0, probs, 1.0))
    entropy = np.log(total) - np.einsum("te,te->t", probs, logs) / total
    return float(entropy.sum(dtype=np.float64)) / max(num_tokens, 1)
