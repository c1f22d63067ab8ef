"""Balance without a loss: count what was chosen, and move the selection bias against it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from npmoe._checks import check_float, require
from npmoe._typing import Array, array_namespace
from npmoe.dispatch import DispatchPlan
from npmoe.errors import ShapeError
from npmoe.losses.conventions import COUNT_SOURCES, CountSource, check_choice
from npmoe.losses.counts import count_choices
from npmoe.losses.probabilities import check_routing, num_valid_tokens
from npmoe.routing import Routing


@dataclass(frozen=True, slots=True)
class _Entry:
    """What one key added."""

    tokens_per_expert: Array
    num_tokens: int
    num_choices: int


class LoadCounter:
    """Choices of several micro-batches or ranks of one layer, each counted once.

    Nothing is counted unless `add` is called: leave it out in evaluation. A recomputed forward
    pass adds the same key again, which changes nothing. Masked tokens do not count.

    Parameters
    ----------
    num_experts : int
        E.
    counts : {"executed", "pre_drop", "post_drop", "unbiased_topk", "top1"}
        What is counted, as in `load_balancing_loss`.

    Examples
    --------
    >>> counter = LoadCounter(4)
    >>> counter.tokens_per_expert.tolist(), counter.num_tokens
    ([0, 0, 0, 0], 0)
    """

    def __init__(self, num_experts: int, *, counts: CountSource = "pre_drop") -> None:
        require(
            num_experts >= 1, f"LoadCounter: num_experts must be at least 1, got {num_experts}."
        )
        check_choice("LoadCounter", "counts", counts, COUNT_SOURCES)
        self.num_experts = num_experts
        self.counts: CountSource = counts
        self._entries: dict[Hashable, _Entry] = {}

    @property
    def tokens_per_expert(self) -> Array:
        """Choices of every expert (E,), int64."""
        counts = [entry.tokens_per_expert for entry in self._entries.values()]
        if not counts:
            return np.zeros(self.num_experts, dtype=np.int64)
        return sum(counts[1:], counts[0].copy())

    @property
    def num_tokens(self) -> int:
        """Valid tokens."""
        return sum(entry.num_tokens for entry in self._entries.values())

    @property
    def num_choices(self) -> int:
        """Choices that the tokens had: K each, or 1 with counts "top1"."""
        return sum(entry.num_choices for entry in self._entries.values())

    def add(self, routing: Routing, *, key: Hashable, plan: DispatchPlan | None = None) -> bool:
        """Count one micro-batch; return False if its key was counted before.

        Parameters
        ----------
        routing : Routing
        key : hashable
            Names the micro-batch, such as (step, micro_batch, rank).
        plan : DispatchPlan, optional
            As in `load_balancing_loss`.

        Raises
        ------
        RangeError
            If a key comes back with other counts, or a plan is missing.
        ShapeError
            For another number of experts, soft routing, or a foreign plan.
        """
        check_routing("LoadCounter.add", routing)
        num_experts = routing.probs.shape[1]
        if num_experts != self.num_experts:
            raise ShapeError(
                f"LoadCounter.add: routing.probs must have E = {self.num_experts} columns, got "
                f"{num_experts}. E is bound by the counter."
            )
        counts, choices = count_choices("LoadCounter.add", routing, self.counts, plan=plan)
        num_tokens = num_valid_tokens(routing)
        entry = _Entry(counts[0], num_tokens, num_tokens * choices)
        known = self._entries.get(key)
        if known is None:
            self._entries[key] = entry
            return True
        require(
            bool((known.tokens_per_expert == entry.tokens_per_expert).all())
            and known.num_choices == entry.num_choices,
            f"LoadCounter.add: key must name one micro-batch, got {key!r} with other counts than "
            "before. Flush after each step, or put the step into the key.",
        )
        return False

    def merge(self, other: LoadCounter) -> None:
        """Add what another counter holds, from other micro-batches or ranks.

        Raises
        ------
        RangeError
            If the two count different things, or share a key.
        ShapeError
            If they count different numbers of experts.
        """
        if other.num_experts != self.num_experts:
            raise ShapeError(
                f"LoadCounter.merge: other must count E = {self.num_experts} experts, got "
                f"{other.num_experts}. E is bound by this counter."
            )
        require(
            other.counts == self.counts,
            f"LoadCounter.merge: other must count {self.counts!r}, got {other.counts!r}.",
        )
        shared = [key for key in other._entries if key in self._entries]
        require(
            not shared,
            "LoadCounter.merge: other must hold no key of this counter, got "
            f"{shared[0] if shared else None!r} in both. Put the rank into the key.",
        )
        self._entries.update(other._entries)

    def flush(self) -> Array:
        """Return `tokens_per_expert` and forget everything."""
        total = self.tokens_per_expert
        self._entries.clear()
        return total


def update_selection_bias(
    selection_bias: Array, tokens_per_expert: Array, *, rate: float, center: bool = False
) -> Array:
    """Return the selection bias moved one step towards balance.

    ``b + rate * sign(mean(n) - n)``; sign(0) = 0.

    Parameters
    ----------
    selection_bias : (E,) float array
    tokens_per_expert : (E,) int array
        Of one optimizer step, over all micro-batches and ranks: ``counter.flush()``.
    rate : float
        Length of the step, at least 0.
    center : bool
        Subtract the mean of the change, so that the sum of the biases stays.

    Returns
    -------
    (E,) float array
        New, of the dtype of `selection_bias`.

    Raises
    ------
    DTypeError
        If the bias is neither float32 nor float64.
    ShapeError
        If the two differ in shape.
    RangeError
        If the rate is negative or not finite.

    References
    ----------
    Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy", algorithm 1;
    NVIDIA/Megatron-LM: get_updated_expert_bias. Centered: pytorch/torchtitan,
    components/optimizer.

    Examples
    --------
    >>> import numpy as np
    >>> update_selection_bias(np.zeros(3), np.array([5, 3, 1]), rate=0.5)
    array([-0.5,  0. ,  0.5])
    """
    function = "update_selection_bias"
    check_float(function, "selection_bias", selection_bias)
    require(
        math.isfinite(rate) and rate >= 0, f"{function}: rate must be finite and >= 0, got {rate}."
    )
    if tuple(tokens_per_expert.shape) != tuple(selection_bias.shape):
        raise ShapeError(
            f"{function}: tokens_per_expert must have shape (E,) = {tuple(selection_bias.shape)}, "
            f"got {tuple(tokens_per_expert.shape)}. E is bound by selection_bias."
        )
    xp = array_namespace(selection_bias)
    num_experts = selection_bias.shape[0]
    # E times the difference to the mean, so that integers stay exact.
    wide = xp.int64 if tokens_per_expert.dtype.kind in "iu" else xp.float64
    counts = tokens_per_expert.astype(wide)
    signs = xp.sign(counts.sum() - counts * num_experts)
    change = signs.astype(xp.float64)
    if center:
        change -= change.mean()
    return selection_bias + (rate * change).astype(selection_bias.dtype)
