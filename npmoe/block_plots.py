"""A plan as blocks of one expert each, with the padding visible: a picture and lines of text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npmoe._checks import require
from npmoe._figures import new_figure, save_figure
from npmoe._typing import HostArray
from npmoe.dispatch import DispatchPlan
from npmoe.plans.blocks import BlockPlan, check_size
from npmoe.plans.tables import to_blocks

_COLOURS = ("#8fbbe0", "#f7b26f", "#90d08b", "#e79a97", "#c2a8e0", "#c9a99c", "#efb3d9", "#d8da7c")
_NO_EXPERT, _PADDING, _FAINT = "#c8c8c8", "#f4f4f4", "#a0a0a0"
_WIDEST_WITH_NUMBERS = 16
_SHOWN_IN_TEXT = 16


def plot_blocks(
    plan: DispatchPlan | BlockPlan,
    path: str | Path,
    *,
    block_size: int,
    num_routes: int | None = None,
    top_k: int | None = None,
    max_blocks: int = 48,
) -> None:
    """Draw a plan as its kernel reads it: a line per block, a colour per expert, padding hatched.

    Cells hold the route and, if K is known, its token, while blocks have at most 16 rows.

    Parameters
    ----------
    plan : DispatchPlan or BlockPlan
        On the host; a DispatchPlan is cut into blocks as "vllm" does.
    path : path
        A PNG file.
    block_size : int
        B.
    num_routes, top_k : int, optional
        T*K, which a BlockPlan needs, and K. A DispatchPlan knows both.
    max_blocks : int
        Only the first blocks are drawn.

    Raises
    ------
    RangeError
        If a number is missing or less than 1, or there is no block.
    BackendUnavailableError
        If matplotlib is not installed.
    CheckpointError
        If the file cannot be written; an earlier picture is intact.

    Examples
    --------
    >>> from npmoe.dispatch import plan_dispatch
    >>> plan = plan_dispatch(np.array([[0, 2], [0, 1], [2, 3]]), num_experts=4)
    >>> plot_blocks(plan, "blocks.png", block_size=2)  # doctest: +SKIP
    """
    view = _view("plot_blocks", plan, block_size, num_routes, top_k)
    check_size("plot_blocks", "max_blocks", max_blocks)
    require(view.num_blocks > 0, "plot_blocks: plan must hold a block, got none.")
    B, shown = view.block_size, min(max_blocks, view.num_blocks)
    numbers = B <= _WIDEST_WITH_NUMBERS
    cell, line = (0.66, 0.5) if numbers else (7.0 / B, 0.26)  # inches
    left, right = 2.1 / cell, 0.9 / cell
    experts = view.experts[:shown]
    runs = _runs(experts)
    gaps = np.zeros(shown)
    gaps[[start for start, _ in runs]] = 0.4
    tops = np.arange(shown) * 1.12 + np.cumsum(gaps)
    height = float(tops[-1] - tops[0]) + 1
    width = max(6.0, (left + B + right) * cell)
    figure, axes = new_figure(1, 1, (width, 0.9 + line * (height + 0.5)))
    panel = axes[0, 0]
    for b, top in enumerate(tops.tolist()):
        _draw_block(panel, view, b, top, numbers=numbers)
        beside = {"y": top + 0.5, "va": "center", "fontsize": 9}
        panel.text(-0.1 / cell, s=f"block {b}", ha="right", **beside)
        colour = "black" if view.used(b) == B else "#b03030"
        panel.text(B + 0.1 / cell, s=f"{view.used(b)} of {B}", color=colour, **beside)
    for start, end in runs:
        expert, ends, x = int(experts[start]), (tops[start], tops[end - 1] + 1), -0.85 / cell
        panel.plot([x, x], ends, lw=5, color=_colour(expert), solid_capstyle="butt")
        name = {"s": _expert_name(expert), "fontweight": "bold", "fontsize": 10}
        panel.text(x - 0.1 / cell, sum(ends) / 2, ha="right", va="center", **name)
    rest = "" if shown == view.num_blocks else f"; the first {shown} blocks"
    legend = f"hatched: padding, which holds {view.num_routes}"
    if numbers:
        legend = f"number: the route{' t*K + k' if view.top_k else ''} of a row; {legend}"
    panel.set_title(f"{view.summary()}{rest}\n{legend}", fontsize=10)
    panel.set_xlim(-left, B + right)
    panel.set_ylim(tops[-1] + 1.1, tops[0] - 0.1)
    panel.axis("off")
    save_figure(figure, path)


def blocks_text(
    plan: DispatchPlan | BlockPlan,
    *,
    block_size: int,
    num_routes: int | None = None,
    max_blocks: int = 48,
) -> str:
    """Return a plan as lines of text: expert, block, its routes, and a dot for padding.

    Parameters
    ----------
    plan : DispatchPlan or BlockPlan
        As in `plot_blocks`.
    block_size : int
        B.
    num_routes : int, optional
        T*K, which a BlockPlan needs.
    max_blocks : int
        Only the first blocks get a line.

    Returns
    -------
    str
        Without a line end; of a block of more than 16 rows, the first routes.

    Raises
    ------
    RangeError
        If a number is missing or less than 1.

    Examples
    --------
    >>> from npmoe.dispatch import plan_dispatch
    >>> plan = plan_dispatch(np.array([[2, 0], [2, 1], [0, 2]]), num_experts=4)
    >>> print(blocks_text(plan, block_size=2))
    expert 0  block 0 | 1 4
    expert 1  block 1 | 3 .
    expert 2  block 2 | 0 2
              block 3 | 5 .
    6 routes in 4 blocks of 2; padding: 2 of 8 rows (25 %)
    """
    view = _view("blocks_text", plan, block_size, num_routes, None)
    check_size("blocks_text", "max_blocks", max_blocks)
    shown = min(max_blocks, view.num_blocks)
    names = [""] * shown
    for start, _ in _runs(view.experts[:shown]):
        names[start] = _expert_name(int(view.experts[start]))
    widest = max(map(len, names), default=0)
    digits, places = len(str(max(0, view.num_routes - 1))), len(str(max(0, shown - 1)))
    lines = []
    for b in range(shown):
        entries = [
            f"{route if 0 <= route < view.num_routes else '.':>{digits}}"
            for route in view.table[b, :_SHOWN_IN_TEXT].tolist()
        ]
        more = "" if view.block_size <= _SHOWN_IN_TEXT else f" ... {view.used(b)} routes"
        lines.append(f"{names[b]:<{widest}}  block {b:>{places}} | {' '.join(entries)}{more}")
    if shown < view.num_blocks:
        rest = view.num_blocks - shown
        lines.append(f"... {rest} more {'block' if rest == 1 else 'blocks'}")
    return "\n".join([*lines, view.summary()])


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """Blocks (N, B) and their experts (N,), with what is needed to read them."""

    table: HostArray
    experts: HostArray
    is_route: HostArray  # (N, B)
    num_routes: int
    top_k: int | None

    @property
    def num_blocks(self) -> int:
        return int(self.table.shape[0])

    @property
    def block_size(self) -> int:
        return int(self.table.shape[1])

    def used(self, block: int) -> int:
        """Return how many rows of a block hold a route."""
        return int(self.is_route[block].sum())

    def summary(self) -> str:
        routes, rows = int(self.is_route.sum()), int(self.table.size)
        share = f" ({(rows - routes) / rows:.0%})".replace("%", " %") if rows else ""
        return (
            f"{routes} {'route' if routes == 1 else 'routes'} in {self.num_blocks} "
            f"{'block' if self.num_blocks == 1 else 'blocks'} of {self.block_size}; padding: "
            f"{rows - routes} of {rows} rows{share}"
        )


def _view(
    function: str,
    plan: DispatchPlan | BlockPlan,
    block_size: int,
    num_routes: int | None,
    top_k: int | None,
) -> _View:
    B = check_size(function, "block_size", block_size)
    if isinstance(plan, DispatchPlan):
        num_routes, top_k = plan.num_tokens * plan.top_k, plan.top_k
        plan = to_blocks(plan, block_size=B)
    require(
        num_routes is not None,
        f"{function}: num_routes must be given with a BlockPlan, got None. It is the sentinel.",
    )
    sentinel = int(num_routes or 0)
    if plan.sorted_token_ids is None:
        table = np.full((plan.expert_ids.shape[0], B), sentinel)
        table[:, 0] = np.arange(table.shape[0])
    else:
        blocks = int(plan.num_tokens_post_padded[0]) // B
        table = plan.sorted_token_ids[: blocks * B].reshape(-1, B)
    return _View(
        table=table,
        experts=plan.expert_ids[: table.shape[0]],
        is_route=(table >= 0) & (table < sentinel),
        num_routes=sentinel,
        top_k=top_k,
    )


def _runs(values: HostArray) -> list[tuple[int, int]]:
    """Return the start and the end of every stretch of equal neighbours."""
    starts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist()] if values.size else []
    return list(zip(starts, [*starts[1:], values.shape[0]], strict=True)) if starts else []


def _expert_name(expert: int) -> str:
    return "no expert" if expert < 0 else f"expert {expert}"


def _colour(expert: int) -> str:
    return _NO_EXPERT if expert < 0 else _COLOURS[expert % len(_COLOURS)]


def _draw_block(panel: Any, view: _View, block: int, top: float, *, numbers: bool) -> None:
    """Draw the rows of one block: cells with numbers, or stretches of routes and of padding."""
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    colour, filled = _colour(int(view.experts[block])), view.is_route[block]
    cells = [(i, i + 1) for i in range(view.block_size)] if numbers else _runs(filled)
    for start, end in cells:
        if filled[start]:
            patch = Rectangle((start, top), end - start, 1, facecolor=colour, edgecolor="white")
        else:
            patch = Rectangle(
                (start, top),
                end - start,
                1,
                facecolor=_PADDING,
                edgecolor=_FAINT,
                hatch="////",
                lw=0,
            )
        panel.add_patch(patch)
    if numbers:
        for i, route in enumerate(view.table[block].tolist()):
            _write_row(panel, view, (i + 0.5, top), route, filled=bool(filled[i]))
    outline = Rectangle((0, top), view.block_size, 1, fill=False, edgecolor="#404040", lw=1.2)
    panel.add_patch(outline)


def _write_row(
    panel: Any, view: _View, at: tuple[float, float], route: int, *, filled: bool
) -> None:
    """Write a route and its token, or a sentinel, into a cell."""
    centred = {"ha": "center", "va": "center"}
    x, top = at
    if not filled:
        box = {"facecolor": _PADDING, "edgecolor": "none", "pad": 1.0}
        panel.text(x, top + 0.5, str(route), fontsize=9, color=_FAINT, bbox=box, **centred)
    elif view.top_k:
        panel.text(x, top + 0.36, str(route), fontsize=11, **centred)
        panel.text(x, top + 0.77, f"token {route // view.top_k}", fontsize=7, **centred)
    else:
        panel.text(x, top + 0.5, str(route), fontsize=11, **centred)
