"""Explanation: everything that happened to one token, from its logits to its rows."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.explanation.text import explanation_text

Status = Literal["valid", "masked", "not finite"]
Outcome = Literal["kept", "dropped", "refused", "identity", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedChoice:
    """One choice of the token (of an expert that took it, or of a slot of soft routing).

    Attributes
    ----------
    k : int
        Column of topk_ids; for soft routing, the slot.
    expert : int
        -1 if none was given.
    key : float or None
        Selection key after the limit to groups; None if the choice was not the router's.
    raw, normalized : float or None
        Weight as scored, and divided; None where there is no such step.
    weight : float
        As the layer used it; for soft routing, the combine weight.
    outcome : {"kept", "dropped", "refused", "identity", "none"}
    reason : str
        The outcome in words.
    slot, row, block, block_row : int or None
        Place in the expert's buffer (None if dropless), row of the plan, block of the list of
        blocks padded per expert, and row inside that block. None without a row.
    """

    k: int
    expert: int
    key: float | None
    raw: float | None
    normalized: float | None
    weight: float
    outcome: Outcome
    reason: str
    slot: int | None
    row: int | None
    block: int | None
    block_row: int | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Explanation:
    """What happened to one token; `str` gives it as text.

    Arrays are (N,), N counting identity experts; soft routing has N = E*C slots. A field is None
    where the config has no such step.

    Attributes
    ----------
    token, batch, position : int
        Flat index, sequence and place in it.
    num_tokens : int
        T.
    cfg : MoEConfig
    status : {"valid", "masked", "not finite"}
    verdict : str
        The status in words.
    linear, biased, clean, noise : (N,) float array or None
        W h; with router bias; after the soft-cap; and the noise that was added.
    router_logits, probs : (N,) float array
        As in `Routing`.
    selection_bias, key, limited_key : (N,) float array or None
        By what was chosen, before and after the limit to groups.
    group_scores : (G,) float array or None
    kept_groups : tuple of int or None
    gumbel : (N,) float array or None
        Added to the logits to draw the second expert.
    ranks, thresholds : (N,) array or None
        Expert choice: the token's rank in each expert's list, 0 best, and the lowest score that
        the expert took (NaN if it took none).
    dispatch : (N,) float array or None
        Soft routing: the token's share in every slot's input.
    capacity : int or None
        Rows per expert where this token competes.
    choices : tuple of ExplainedChoice
    replayed : bool
        Whether the ids were given.
    block_size : int
    """

    token: int
    batch: int
    position: int
    num_tokens: int
    cfg: MoEConfig
    status: Status
    verdict: str
    linear: HostArray | None
    biased: HostArray | None
    clean: HostArray | None
    noise: HostArray | None
    router_logits: HostArray
    probs: HostArray
    selection_bias: HostArray | None
    key: HostArray | None
    limited_key: HostArray | None
    group_scores: HostArray | None
    kept_groups: tuple[int, ...] | None
    gumbel: HostArray | None
    ranks: HostArray | None
    thresholds: HostArray | None
    dispatch: HostArray | None
    capacity: int | None
    choices: tuple[ExplainedChoice, ...]
    replayed: bool
    block_size: int

    def text(self, *, max_experts: int = 16) -> str:
        """Return the explanation for a terminal of 100 columns.

        Parameters
        ----------
        max_experts : int
            How many experts (or slots) to list: the chosen ones first, then the best others.
        """
        return explanation_text(self, max_experts)

    def __str__(self) -> str:
        """Return `text()`."""
        return self.text()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; numbers that JSON lacks become "nan", "inf" or "-inf"."""
        values: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name == "cfg":
                value = self.cfg.to_dict()
            elif entry.name == "choices":
                value = [dataclasses.asdict(choice) for choice in self.choices]
            values[entry.name] = _plain(value)
        return values


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
