"""Pictures of one call of the layer; `npmoe.plots` offers them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from npmoe._checks import require
from npmoe._figures import new_figure, save_figure
from npmoe._typing import HostArray
from npmoe.dispatch import DispatchPlan
from npmoe.errors import ShapeError
from npmoe.routing import Routing
from npmoe.routing.weights import kept_routes
from npmoe.stats import LoadStats

_KEPT, _DROPPED = "tab:blue", "tab:red"


def plot_routing(
    routing: Routing,
    path: str | Path,
    *,
    plan: DispatchPlan | None = None,
    max_tokens: int = 64,
) -> None:
    """Draw which token went to which expert and with which weight, over faint probabilities.

    Soft routing is drawn as the combine weights of all slots.

    Parameters
    ----------
    routing : Routing
        On the host.
    path : path
        A PNG file.
    plan : DispatchPlan, optional
        Of the same call: choices that it dropped are crossed out.
    max_tokens : int
        Only the first tokens are drawn.

    Raises
    ------
    RangeError
        If `max_tokens` is not positive, or there is no token.
    ShapeError
        If the plan is of another call.
    BackendUnavailableError
        If matplotlib is not installed.
    CheckpointError
        If the file cannot be written; an earlier picture is intact.
    """
    require(max_tokens >= 1, f"plot_routing: max_tokens must be at least 1, got {max_tokens}.")
    num_tokens, size = routing.probs.shape
    require(num_tokens > 0, "plot_routing: routing must hold tokens, got none.")
    soft = routing.score_fn == "soft"
    if plan is not None and plan.row_ids.shape != routing.topk_ids.shape:
        raise ShapeError(
            f"plot_routing: plan.row_ids must have shape {routing.topk_ids.shape}, got "
            f"{plan.row_ids.shape}. Pass the plan of the same call."
        )
    shown = min(num_tokens, max_tokens)
    weights = np.full((num_tokens, size), np.nan)
    dropped: list[tuple[int, int]] = []
    if soft:
        weights[:] = routing.probs
    else:
        tokens, slots = np.nonzero(routing.topk_ids >= 0)
        experts = routing.topk_ids[tokens, slots]
        weights[tokens, experts] = routing.topk_weights[tokens, slots]
        if plan is not None:
            lost = ~kept_routes(routing, plan)[tokens, slots] & (tokens < shown)
            dropped = list(zip(experts[lost].tolist(), tokens[lost].tolist(), strict=True))
    figure, axes = new_figure(1, 1, (min(16.0, 4.0 + 0.28 * size), 2.2 + 0.16 * shown))
    panel = axes[0, 0]
    drawn = np.ma.masked_invalid(weights[:shown])
    faint = routing.probs[:shown]
    # Gray stays lighter than the colours: the likeliest of those not chosen is a fifth of black.
    top = max(float(np.where(drawn.mask, faint, 0.0).max()), 1e-30)
    panel.imshow(faint, aspect="auto", cmap="Greys", vmin=0, vmax=5.0 * top, interpolation="none")
    most = float(drawn.max()) if drawn.count() else 1.0
    image = panel.imshow(
        drawn, aspect="auto", cmap="viridis_r", vmin=0, vmax=most or 1.0, interpolation="none"
    )
    figure.colorbar(image, ax=panel, label="combine weight")
    if dropped:
        for color, width in (("white", 3.5), (_DROPPED, 1.5)):  # white, to stand out from dark
            panel.scatter(*zip(*dropped, strict=True), marker="x", s=36, color=color, lw=width)
    if soft:
        owners = routing.topk_ids[:size, 0]
        for boundary in np.flatnonzero(np.diff(owners)).tolist():
            panel.axvline(boundary + 0.5, color="white", lw=2)
    for t in np.flatnonzero(_masked(routing)[:shown]).tolist():
        panel.axhspan(t - 0.5, t + 0.5, facecolor="none", edgecolor="gray", hatch="////", lw=0)
    unit = "slot (white lines part the experts)" if soft else "expert"
    rest = "" if shown == num_tokens else f", first {shown} of {num_tokens} tokens"
    # Two lines: with few experts the panel is narrow.
    what = "colour: combine weight" + ("" if soft else " of a choice\ngray: score of the others")
    marks = [
        *(["red cross: dropped"] if dropped else []),
        *(["hatched: masked"] if _masked(routing)[:shown].any() else []),
    ]
    panel.set(xlabel=unit, ylabel="token", title=f"Routing{rest}\n{'; '.join([what, *marks])}")
    panel.title.set_fontsize(10)
    panel.set_xticks(np.arange(0, size, max(1, size // 16)))
    save_figure(figure, path)


def plot_load(load: LoadStats | HostArray, path: str | Path) -> None:
    """Draw how many routes each expert got: kept and dropped, mean and capacity.

    Parameters
    ----------
    load : LoadStats or (E,) int array
        ``saved.stats()``, or counts of choices.
    path : path
        A PNG file.

    Raises
    ------
    BackendUnavailableError
        If matplotlib is not installed.
    CheckpointError
        If the file cannot be written; an earlier picture is intact.
    """
    stats = load if isinstance(load, LoadStats) else None
    chosen = np.asarray(load) if stats is None else stats.chosen_per_expert
    kept = chosen if stats is None else stats.kept_per_expert
    dropped = chosen - kept
    size = len(chosen)
    experts = np.arange(size)
    figure, axes = new_figure(1, 1, (min(16.0, 4.5 + 0.22 * size), 4.0))
    panel = axes[0, 0]
    panel.bar(experts, kept, color=_KEPT, label=f"kept ({int(kept.sum())})")
    if dropped.any():
        label = f"dropped ({int(dropped.sum())})"
        panel.bar(experts, dropped, bottom=kept, color=_DROPPED, label=label)
    mean = float(chosen.mean())
    panel.axhline(mean, color="black", lw=1, ls=":", label=f"mean of all choices ({mean:.1f})")
    if stats is not None and stats.capacity is not None:
        panel.axhline(
            stats.capacity, color="black", lw=1.2, ls="--", label=f"capacity ({stats.capacity})"
        )
    violation = float(chosen.max()) / mean - 1 if mean else 0.0
    panel.set(
        title=f"Load per expert: the fullest is {violation:.0%} above the mean, "
        f"{int((chosen == 0).sum())} of {size} unused",
        xlabel="expert",
        ylabel="routes",
    )
    panel.title.set_fontsize(10)
    panel.set_xticks(np.arange(0, size, max(1, size // 16)))
    panel.margins(y=0.3)
    panel.set_xlim(-0.7, size - 0.3)
    panel.legend(ncols=2, fontsize=8, loc="upper right")
    save_figure(figure, path)


def plot_drops(stats: LoadStats, path: str | Path) -> None:
    """Draw which share of first choices, second choices, ... was dropped.

    Parameters
    ----------
    stats : LoadStats
        ``saved.stats()``.
    path : path
        A PNG file.

    Raises
    ------
    BackendUnavailableError
        If matplotlib is not installed.
    CheckpointError
        If the file cannot be written; an earlier picture is intact.
    """
    rates = 100.0 * stats.overflow_per_slot
    size = len(rates)
    figure, axes = new_figure(1, 1, (min(12.0, 4.0 + 0.8 * size), 4.0))
    panel = axes[0, 0]
    bars = panel.bar(np.arange(size), rates, color=_DROPPED, width=0.6)
    labels = [
        f"{lost} of {offered}"
        for lost, offered in zip(stats.dropped_per_slot, stats.chosen_per_slot, strict=True)
    ]
    texts = panel.bar_label(bars, labels, fontsize=8, padding=4, zorder=3)
    for text in texts:
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    panel.axhline(100.0 * stats.drop_rate, color="black", lw=1, ls=":", label="all choices")
    panel.set(
        title=f"Dropped choices: {stats.drop_rate:.1%} of all, "
        f"{stats.fully_dropped_tokens} of {stats.num_tokens} tokens entirely",
        xlabel="choice of the token (0 is its first)",
        ylabel="dropped, %",
        ylim=(0, max(1.0, 1.15 * float(rates.max(initial=0.0)))),
    )
    panel.title.set_fontsize(10)
    panel.set_xticks(np.arange(size))
    panel.legend(fontsize=8, loc="upper left")
    save_figure(figure, path)


def _masked(routing: Routing) -> HostArray:
    mask = routing.token_mask
    return np.zeros(routing.probs.shape[0], bool) if mask is None else ~mask
