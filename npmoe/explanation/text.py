"""An explanation as text for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from npmoe._typing import HostArray

if TYPE_CHECKING:
    from npmoe.explanation.result import ExplainedChoice, Explanation

_POLICY = {
    "position": "first tokens first",
    "k_major": "first choices before second ones",
    "batch_priority": "tokens by their first weight",
    "probability": "largest weights first",
    "random": "at random",
}
_SCORES = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "sqrt(softplus)"}


def explanation_text(e: Explanation, max_experts: int) -> str:
    """Return the whole text."""
    lines = [_title(e), *_how(e)]
    if e.status == "masked" or (e.status == "not finite" and not e.choices):
        return "\n".join([*lines, *_broken_logits(e)])
    lines += ["", *_groups(e)] if e.group_scores is not None else [""]
    if e.dispatch is not None:
        return "\n".join([*lines, *_slots(e, max_experts)])
    lines += [*_experts(e, max_experts), "", *_choices(e, max_experts)]
    return "\n".join(lines)


def _title(e: Explanation) -> str:
    where = f"token {e.token} of {e.num_tokens} (sequence {e.batch}, position {e.position})"
    return where if e.status == "valid" and e.verdict == "valid" else f"{where}: {e.verdict}"


def _how(e: Explanation) -> list[str]:
    """Say in a line or two how this config routes."""
    cfg = e.cfg
    score = _SCORES[cfg.score_fn]
    if cfg.routing == "soft":
        slots = f"{cfg.expert_capacity} slot{'' if cfg.expert_capacity == 1 else 's'} each"
        rows = f"{cfg.num_experts} experts with {slots}"
        return [f"soft routing, {rows}: every token is part of every slot of its sequence"]
    if cfg.routing == "dense":
        first = f"dense: all {cfg.router_size} experts, weighted by {score}(logit)"
    elif cfg.routing == "expert_choice":
        first = f"expert choice: every expert takes its {e.capacity} best tokens by {score}(logit)"
    elif e.replayed:
        first = f"experts given by topk_ids, weighted by {score}(logit)"
    else:
        by_logit = cfg.router_order == "topk_score" or cfg.selection_bias_on == "logits"
        key = "logit" if by_logit else f"{score}(logit)"
        key += " + selection bias" if cfg.selection_bias else ""
        groups = f", {cfg.topk_group} of {cfg.num_groups} groups" if cfg.num_groups > 1 else ""
        first = f"top {cfg.top_k} of {cfg.router_size} experts by {key}{groups}"
        if by_logit:
            first += f"; weights {score} of the chosen" + " logits" * (cfg.score_fn == "softmax")
    if cfg.routing == "expert_choice":
        return [first + (" of the sequence" if cfg.capacity_scope == "sequence" else "")]
    if e.capacity is None:
        return [first, "no capacity limit: nothing is dropped"]
    scope = " and sequence" if cfg.capacity_scope == "sequence" else ""
    rows = "1 row" if e.capacity == 1 else f"{e.capacity} rows"
    return [first, f"capacity: {rows} per expert{scope}, {_POLICY[cfg.drop_policy]}"]


def _broken_logits(e: Explanation) -> list[str]:
    """Name the logits that are not finite, if that is the matter."""
    bad = np.flatnonzero(~np.isfinite(e.router_logits))
    if e.status == "masked" or bad.size == 0:
        return []
    some = ", ".join(f"expert {i}: {e.router_logits[i]}" for i in bad[:6].tolist())
    rest = f", and {bad.size - 6} more" if bad.size > 6 else ""
    return [f"logits that are not finite: {some}{rest}"]


def _groups(e: Explanation) -> list[str]:
    """Return the table of groups."""
    cfg = e.cfg
    if e.group_scores is None or e.kept_groups is None:
        return []
    size = cfg.router_size // cfg.num_groups
    name = {"max": "best key", "top2_sum": "sum of the best 2 keys"}.get(
        cfg.group_score, f"sum of the best {cfg.top_k // cfg.topk_group} keys"
    )
    lines = [f"groups, by {name}"]
    for g, value in enumerate(e.group_scores.tolist()):
        stays = "stays" if g in e.kept_groups else f"out: its keys become {_fill(e)}"
        first, last = g * size, (g + 1) * size - 1
        lines.append(f"  group {g:>3}  experts {first:>4}-{last:<4} {value:>10.4f}  {stays}")
    return [*lines, ""]


def _fill(e: Explanation) -> str:
    return "-inf" if e.cfg.group_fill == "-inf" else "0"


def _experts(e: Explanation, max_experts: int) -> list[str]:
    """Return the table of experts: the chosen, then the best others."""
    chosen = [c.expert for c in e.choices if c.expert >= 0]
    if e.limited_key is not None:
        best, ranking = e.limited_key, "key"
    elif e.ranks is not None:
        best, ranking = -e.ranks.astype(float), "rank in the expert's list"
    else:
        best, ranking = e.router_logits, "logit"
    # Experts of groups that are out follow, by the key they had.
    own = best if e.key is None else e.key
    others = [i for i in np.lexsort((-own, -best)).tolist() if i not in chosen]
    listed = (chosen + others)[: max(max_experts, 1)]
    columns = _stages(e)
    head = "  expert" + "".join(f"{name:>10}" for name, _ in columns)
    lines = [f"experts, the chosen first, then by {ranking}", head]
    for i in listed:
        cells = [
            f"{values[i]:>10.0f}" if name == "rank" else _number(float(values[i]), 10)
            for name, values in columns
        ]
        lines.append(f"  {i:>6}{''.join(cells)}  {_note(e, i, chosen)}")
    if len(listed) < len(best):
        lines.append(f"  ... and {len(best) - len(listed)} more experts")
    if e.ranks is not None:
        lines.append("  its last: the lowest score that the expert took")
    return [line.rstrip() for line in lines]


def _stages(e: Explanation) -> list[tuple[str, HostArray]]:
    """Return the columns of the table of experts that this config has."""
    noisy_or_capped = e.clean is not None or e.noise is not None
    stages: list[tuple[str, HostArray | None]] = [
        ("W h", e.linear if e.biased is not None or noisy_or_capped else None),
        ("+ bias", e.biased),
        ("soft-cap", e.clean),
        ("noise", e.noise),
        ("logit", e.router_logits),
        ("score", e.probs),
        ("sel. bias", e.selection_bias),
        ("key", e.key),
        ("+ Gumbel", None if e.gumbel is None else e.router_logits + e.gumbel),
    ]
    if e.key is not None and e.selection_bias is None and e.kept_groups is None:
        stages = [(name, v) for name, v in stages if name != "key"]  # it is the score, or logit
    if e.ranks is not None and e.thresholds is not None:
        stages += [("rank", e.ranks + 1.0), ("its last", e.thresholds)]
    return [(name, values) for name, values in stages if values is not None]


def _note(e: Explanation, expert: int, chosen: Sequence[int]) -> str:
    if e.ranks is not None and e.thresholds is not None:
        if expert in chosen:
            return "took it"
        tie = e.probs[expert] == e.thresholds[expert]
        return "tie, lost to a lower token" if tie else ""
    if expert in chosen:
        place = list(chosen).index(expert)
        if e.replayed or e.cfg.routing == "dense":
            return ""
        drawn = place == 1 and e.gumbel is not None
        return f"<- choice {place}" + (", drawn" if drawn else "")
    if e.kept_groups is not None:
        group = expert // (e.cfg.router_size // e.cfg.num_groups)
        if group not in e.kept_groups:
            return f"group {group} is out"
    return ""


def _choices(e: Explanation, limit: int) -> list[str]:
    """Return the table of choices."""
    if not e.choices:
        return ["no expert took this token: the routed output is 0"]
    scale = e.cfg.routed_scaling_factor
    columns: list[tuple[str, Callable[[ExplainedChoice], float | None]]] = [
        ("raw", lambda c: c.raw),
        ("normalized", lambda c: c.normalized),
        (f"x {scale:g}" if scale != 1 else "weight", lambda c: c.weight),
    ]
    if e.choices[0].normalized is None:
        columns.pop(1)
        if scale == 1:
            columns.pop(0)
    slots = any(c.slot is not None for c in e.choices)
    after = e.cfg.renormalize_drop == "after"
    head = "  choice expert" + "".join(f"{name:>11}" for name, _ in columns)
    head += ("  slot" if slots else "") + "    row  block:row  outcome"
    title = "choices" + (", normalized over what was kept" if after else "")
    lines = [f"{title} (blocks of {e.block_size} rows)", head]
    for c in e.choices[:limit]:
        line = f"  {c.k:>6} {c.expert:>6}" + "".join(_number(get(c)) for _, get in columns)
        line += f"{_place(c.slot):>6}" if slots else ""
        block = "-" if c.block is None else f"{c.block}:{c.block_row}"
        lines.append(f"{line}{_place(c.row):>7}{block:>11}  {c.reason}")
    if len(e.choices) > limit:
        lines.append(f"  ... and {len(e.choices) - limit} more choices")
    total = sum(c.weight for c in e.choices)
    used = sum(c.weight for c in e.choices if c.outcome in ("kept", "identity"))
    lost = f", of which {total - used:.4f} is dropped" if used < total else ""
    lines.append(f"  weights sum to {total:.4f}{lost}")
    if any(c.outcome == "refused" for c in e.choices):
        lines.append(
            "  refused: a second expert stays if twice its weight exceeds a draw of U(0, 1)"
        )
    return lines


def _slots(e: Explanation, limit: int) -> list[str]:
    """Return the table of slots of soft routing."""
    if not e.choices or e.dispatch is None:
        return []
    lines = [
        f"slots, by combine weight (blocks of {e.block_size} rows)",
        "    slot expert   of it      logit   dispatch    combine    row  block:row",
    ]
    dispatch, logits = e.dispatch, e.router_logits
    ordered = sorted(e.choices, key=lambda c: (-c.weight, c.k))
    for c in ordered[:limit]:
        lines.append(
            f"  {c.k:>6} {c.expert:>6} {_place(c.slot):>7}{_number(float(logits[c.k]))}"
            f"{_number(float(dispatch[c.k]))}{_number(c.weight)}{_place(c.row):>7}"
            f"{f'{c.block}:{c.block_row}':>11}"
        )
    if len(ordered) > limit:
        lines.append(f"  ... and {len(ordered) - limit} more slots")
    return [
        *lines,
        "  dispatch: this token's share in the slot's input; combine: the slot's in its output",
    ]


def _number(value: float | None, width: int = 11) -> str:
    if value is None:
        return f"{'-':>{width}}"
    small = value != 0 and abs(value) < 5e-4
    return f"{value:>{width}.2e}" if small or abs(value) >= 1e4 else f"{value:>{width}.4f}"


def _place(value: int | None) -> str:
    return "-" if value is None else str(value)
