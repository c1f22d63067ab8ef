"""One row per choice of a token: its weight, its outcome, and its place among the rows."""

from __future__ import annotations

import numpy as np

from npmoe._typing import HostArray
from npmoe.explanation.result import ExplainedChoice, Outcome
from npmoe.explanation.steps import Call, Selection, places_in_line, weight_stages


def route_choices(
    call: Call, t: int, picked: Selection, limits: list[int] | None, block_size: int
) -> tuple[ExplainedChoice, ...]:
    """Return the choices of token t, in the order of topk_ids; none for a token without any."""
    routing, plan = call.routing, call.plan
    ids, raw, normalized = weight_stages(call)
    lines = None if limits is None else places_in_line(call, len(limits))
    key = picked.limited_key
    choices = []
    for k, expert in enumerate(ids[t].tolist()):
        if expert < 0 and not (call.replayed and call.valid[t]):
            continue
        line = None if lines is None else int(lines[t, k])
        outcome, reason = _outcome(call, t, k, expert, line)
        row = int(plan.row_ids[t, k])
        block, block_row = _block(plan.expert_offsets, expert, row, block_size)
        choices.append(
            ExplainedChoice(
                k=k,
                expert=expert,
                key=None if key is None else float(key[t, expert]),
                raw=float(raw[t, k]),
                normalized=None if normalized is None else float(normalized[t, k]),
                weight=float(routing.topk_weights[t, k]),
                outcome=outcome,
                reason=reason,
                slot=None if plan.slot_ids is None or row < 0 else int(plan.slot_ids[t, k]),
                row=None if row < 0 else row,
                block=block,
                block_row=block_row,
            )
        )
    return tuple(choices)


def slot_choices(call: Call, t: int, block_size: int) -> tuple[ExplainedChoice, ...]:
    """Return all slots of soft routing as token t sees them; none for a token that is left out."""
    if not call.valid[t]:
        return ()
    plan, combine = call.plan, call.routing.probs
    first = t // call.routing.sequence_length * combine.shape[1]
    choices = []
    for s in range(combine.shape[1]):
        expert, row = int(call.routing.topk_ids[first + s, 0]), int(plan.row_ids[first + s, 0])
        block, block_row = _block(plan.expert_offsets, expert, row, block_size)
        choices.append(
            ExplainedChoice(
                k=s,
                expert=expert,
                key=None,
                raw=None,
                normalized=None,
                weight=float(combine[t, s]),
                outcome="kept",
                reason="kept",
                slot=s % (call.cfg.expert_capacity or 1),
                row=row,
                block=block,
                block_row=block_row,
            )
        )
    return tuple(choices)


def _outcome(call: Call, t: int, k: int, expert: int, line: int | None) -> tuple[Outcome, str]:
    """Return what became of a choice, in a word and in words."""
    cfg, routing = call.cfg, call.routing
    if expert < 0:
        return "none", "none: the given id is -1"
    if routing.topk_ids[t, k] < 0:
        draws, (_, raw, normalized) = call.draw("random"), weight_stages(call)
        after_drop = normalized is None or cfg.renormalize_drop == "after"
        weight = (raw if after_drop or normalized is None else normalized)[t, k]
        drawn = "" if draws is None else f" <= {draws[t]:.4f}"
        return "refused", f"refused: 2 * {weight:.4f}{drawn}"
    if expert >= cfg.num_experts:
        return "identity", "identity: returns its input"
    if line is None:
        return "kept", "kept"
    if cfg.routing == "expert_choice":
        return "kept", "kept: taken by it"
    place = f"{_ordinal(line + 1)} in line"
    outcome: Outcome = "kept" if call.plan.row_ids[t, k] >= 0 else "dropped"
    return outcome, f"{outcome}: {place}"


def _block(
    offsets: HostArray, expert: int, row: int, block_size: int
) -> tuple[int | None, int | None]:
    """Return block and row inside it, in the list of blocks padded expert by expert."""
    if row < 0:
        return None, None
    blocks = -(-np.diff(offsets.astype(np.int64)) // block_size)
    block, block_row = divmod(row - int(offsets[expert]), block_size)
    return int(blocks[:expert].sum()) + block, block_row


def _ordinal(number: int) -> str:
    ending = (
        "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    )
    return f"{number}{ending}"
