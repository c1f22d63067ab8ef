"""The tables as text for a terminal, and as plain values for JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from npmoe.conventions.balance import BalanceRow, balance_table
from npmoe.conventions.capacity import CAPACITY_EXAMPLES, CapacityRow, capacity_table
from npmoe.conventions.example import LOGITS, SELECTION_BIAS
from npmoe.conventions.routing import (
    RoutingConvention,
    RoutingRow,
    routing_convention,
    routing_table,
)

_WIDTH = 96
_SIZES = ("num_experts", "top_k")


def routing_text(rows: Iterable[RoutingRow] | None = None) -> str:
    """Return the routing conventions as text."""
    lines = [
        "ROUTING: which experts, with which weight. x logits, p = softmax(x), b selection bias.",
        "Computed for 4 tokens, 8 experts, top-2; '|' parts the tokens.",
        *(f"  x = {_numbers(row, '5.2f')}" for row in LOGITS),
        f"  b = {_numbers(SELECTION_BIAS, '5.3g')}",
    ]
    for number, row in enumerate(routing_table() if rows is None else rows, 1):
        entry = row.convention
        lines += [
            "",
            f"{number:2d} {row.name}: {entry.used_by}",
            *_wrap("choose by ", f"{entry.key}; weight {entry.weight}{_divisor(entry)}"),
            *_wrap("fields    ", _fields(row)),
        ]
        if entry.note:
            lines += _wrap("note      ", entry.note)
        if row.cfg.routing == "soft":
            lines += [
                f"     {'slot weights  ' if t == 0 else ' ' * 14}{_numbers(weights, '.3f')}"
                for t, weights in enumerate(row.topk_weights)
            ]
            continue
        lines += [
            "     ids       " + " | ".join(_numbers(ids, "5d") for ids in row.topk_ids),
            "     weights   " + " | ".join(_numbers(w, "5.3f") for w in row.topk_weights),
        ]
    return "\n".join(lines)


def balance_text(rows: Iterable[BalanceRow] | None = None) -> str:
    """Return the balance losses as text."""
    lines = [
        "BALANCE: one routing, many losses (coefficient 1). n counts, T tokens, E experts,",
        "k choices per token, P mean probability; 'uniform' is the value under uniform routing",
        "and probabilities.",
        "",
        f"{'name':<20}{'value':>9}  {'uniform':<19}{'counts':<15}scope",
    ]
    for row in balance_table() if rows is None else rows:
        uniform = row.uniform
        if not _is_number(uniform):
            uniform += f" = {row.uniform_value:.4g}"
        lines += [
            f"{row.name:<20}{row.value:>9.4f}  {uniform:<19}{row.counts:<15}{row.scope}",
            f"    {row.formula}",
            f"    {row.source}",
        ]
    return "\n".join(lines)


def capacity_text(rows: Iterable[CapacityRow] | None = None) -> str:
    """Return the capacities as text."""
    sizes = [f"T={t} E={e}" for t, e, _, _ in CAPACITY_EXAMPLES]
    factors = [f"k={k} cf={cf}" for _, _, k, cf in CAPACITY_EXAMPLES]
    lines = [
        "CAPACITY: rows per expert. T tokens, E experts, k choices per token, cf capacity factor.",
        "",
        f"{'':<14}" + "".join(f"{size:>14}" for size in sizes),
        f"{'name':<14}" + "".join(f"{factor:>14}" for factor in factors),
    ]
    for row in capacity_table() if rows is None else rows:
        entry = row.convention
        lines += [
            f"{row.name:<14}" + "".join(f"{n:>14}" for n in row.rows_per_expert),
            f"    {entry.formula}",
            f"    {entry.source}",
        ]
        if entry.note:
            lines += textwrap.wrap(
                entry.note, _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4
            )
    return "\n".join(lines)


def tables_as_values() -> dict[str, list[dict[str, Any]]]:
    """Return the three tables as plain values, by the names "routing", "balance", "capacity"."""
    return {
        "routing": [
            {
                "name": row.name,
                "key": row.convention.key,
                "weight": row.convention.weight,
                "renormalized": row.convention.renormalized,
                "scale": row.convention.scale,
                "used_by": row.convention.used_by,
                "note": row.convention.note,
                "config": row.cfg.to_dict(),
                "topk_ids": row.topk_ids.tolist(),
                "topk_weights": row.topk_weights.tolist(),
            }
            for row in routing_table()
        ],
        "balance": [
            {name: getattr(row, name) for name in BalanceRow.__dataclass_fields__}
            for row in balance_table()
        ],
        "capacity": [
            {
                "name": row.name,
                "formula": row.convention.formula,
                "source": row.convention.source,
                "note": row.convention.note,
                "rows_per_expert": [
                    {"T": t, "E": e, "K": k, "capacity_factor": cf, "rows": n}
                    for (t, e, k, cf), n in zip(CAPACITY_EXAMPLES, row.rows_per_expert, strict=True)
                ],
            }
            for row in capacity_table()
        ],
    }


def _fields(row: RoutingRow) -> str:
    """Return the fields that give the convention, as they are typed."""
    plain = routing_convention("softmax_topk", row.cfg.num_experts, row.cfg.top_k).to_dict()
    changed = {k: v for k, v in row.cfg.to_dict().items() if v != plain[k] and k not in _SIZES}
    return _typed(changed) or "all defaults"


def _typed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in fields.items())


def _divisor(entry: RoutingConvention) -> str:
    """Return what happens to the weights after they were taken."""
    divided = "" if entry.renormalized == "no" else f", divided by {entry.renormalized}"
    return divided + ("" if entry.scale == "-" else f"; scale {entry.scale}")


def _wrap(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"     {label}",
        subsequent_indent=" " * (5 + len(label)),
        break_on_hyphens=False,
    )


def _numbers(values: Iterable[Any], how: str) -> str:
    return " ".join(format(v, how) for v in values)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
