"""Modelled bounds as text and as JSON; every table says that it is modelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npmoe.benchmark.modelled import ModelledCase, read_figures
from npmoe.benchmark.text import align, milliseconds

_HEADER = (
    *("card", "math ms", "issue ms", "memory ms", "MODELLED ms", "TFLOP/s", "set by"),
    *("longest kernel", "blocks/SM", "waves", "busiest SM"),
)
LEGEND = (
    "MODELLED: nothing of this was measured. A bound under data-sheet rates, uniform routing and "
    "static figures\nof the compiled kernels (README.md of npmoe/benchmark has the assumptions); "
    "launches, latencies, the router\nand the plan are left out. math, issue: padded work of all "
    "kernels at the card's rates of multiplications and\nof instructions; memory: weights of used "
    "experts and activations; MODELLED ms: the largest term of each kernel,\nsummed, where the "
    "busiest multiprocessor (its blocks over the mean) sets math and issue. waves: blocks over\n"
    "what the card holds at once."
)


def modelled_table(found: Sequence[ModelledCase]) -> str:
    """Return one case and direction on several cards, in aligned columns."""
    first = found[0]
    T, H, I, E, K = first.case.sizes
    lines = [
        f"MODELLED, not measured: {first.case.name}, {first.direction}: T={T} H={H} I={I} E={E} "
        f"K={K}",
        f"  kernels of precision {first.precision}, expert weights {first.weights}; blocks of "
        f"{first.block_size} rows; {first.padding:.2f} multiply-adds made for each needed",
    ]
    lines += align([_HEADER, *(_row(one) for one in found)])
    lines += [f"  {one.card.name}: {one.note}." for one in found if one.note]
    return "\n".join(lines)


def modelled_json(found: Sequence[ModelledCase]) -> dict[str, Any]:
    """Return plain JSON values."""
    return {
        "schema": 1,
        "modelled": True,
        "kernels_compiled_by": read_figures()["compiler"],
        "cases": [one.to_dict() for one in found],
    }


def _row(one: ModelledCase) -> tuple[str, ...]:
    longest = max(one.launches, key=lambda launch: launch.seconds)
    return (
        one.card.name,
        *(milliseconds(one.total(f"{term}_seconds")) for term in ("math", "issue", "memory")),
        milliseconds(one.seconds),
        f"{one.flops / one.seconds / 1e12:.1f}",
        one.bound_by,
        longest.name,
        str(longest.resident) if longest.resident else "-",
        f"{longest.waves:.2f}" if longest.resident else "-",
        f"{longest.imbalance:.2f}" if longest.resident else "-",
    )
