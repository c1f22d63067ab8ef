"""The roofline picture: every case under the two limits."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from npmoe._figures import new_figure, save_figure
from npmoe.benchmark.cases import Direction
from npmoe.benchmark.result import BenchmarkResult, CaseTimings
from npmoe.errors import RangeError

_COLOURS = ("tab:blue", "tab:green", "tab:purple", "tab:cyan", "tab:olive")
_PEER_COLOURS = ("tab:orange", "tab:red", "tab:brown", "tab:pink")
_MARKERS: dict[Direction, str] = {"forward": "o", "forward+backward": "s"}
_DECADE = 2.8  # inches
_COLUMN = 0.52  # inches between two cases
_HALF = 0.11  # inches from the middle of a case to the middle of a direction
_LEAST_DECADES = 2.8
_HEIGHT = 6.8


def plot_roofline(result: BenchmarkResult, path: str | Path) -> None:
    """Draw GFLOP/s over flops per byte: the two limits, and a column of dots for every case.

    Cases of nearly the same intensity stand side by side; the short black bar over the dots is the
    limit of the case at its true intensity, as its own rounds measured it.

    Parameters
    ----------
    result : BenchmarkResult
    path : path
        A PNG file.

    Raises
    ------
    RangeError
        If nothing was timed.
    BackendUnavailableError
        If matplotlib is not installed.
    CheckpointError
        If the file cannot be written; an earlier picture is intact.
    """
    if not result.cases:
        raise RangeError("plot_roofline: result must hold a timed case, got none.")
    columns = _columns(result.cases)
    left, right = (f(columns.values()) for f in (min, max))
    flops = statistics.median(c.flops_per_second.median for c in result.cases) / 1e9
    read = statistics.median(c.bytes_per_second.median for c in result.cases) / 1e9
    ridge = flops / read
    low, high = min(left, math.log10(ridge)) - 0.3, max(right, math.log10(ridge)) + 0.4
    more = max(0.0, _LEAST_DECADES - (high - low)) / 2
    low, high = low - more, high + more
    figure, axes = new_figure(1, 1, (2.6 + _DECADE * (high - low), _HEIGHT))
    panel = axes[0, 0]
    panel.plot(
        [10**low, ridge, 10**high], [read * 10**low, flops, flops], color="black", lw=1.5, zorder=2
    )
    rates = [rate for found in result.cases for rate in _rates(found).values()]
    top = math.log10(flops * 2.0)
    bottom = min(math.log10(min(rates)) - 0.12, top - 1.5)
    # Room for the names below the lowest dot.
    share = min(0.6, 0.05 + 0.0135 * max(len(name) for name in columns))
    floor = bottom - (top - bottom) * share / (1 - share)
    panel.set(xscale="log", yscale="log", xlim=(10**low, 10**high), ylim=(10**floor, 10**top))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda *_: "")
    moved = "reads" if result.machine.device is None else "copies"
    _name_limits(panel, flops, read, high, moved)
    colours = _colours_of(result)
    directions = list(dict.fromkeys(found.direction for found in result.cases))
    for found in result.cases:
        side = 2 * directions.index(found.direction) - len(directions) + 1
        middle = columns[found.case.name] + side * _HALF / _DECADE
        _draw_column(panel, found, middle, colours)
    for name, x in columns.items():
        panel.text(10**x, 10 ** (floor + 0.03), name, rotation=90, ha="center", va="bottom",
                   fontsize=9)  # fmt: skip
        ceiling = min(flops, read * 10**x)
        panel.plot([10**x] * 2, [10**bottom, ceiling], color="0.85", lw=0.8, zorder=1)
    _draw_legend(panel, colours, directions)
    device, threads = result.machine.device, result.machine.threads
    if device is None:
        where = result.machine.processor
        what = f"{threads} thread{'s' if threads > 1 else ''}, {result.settings.dtype_text}"
    else:
        where, what = device.name, result.settings.dtype_text
    panel.set_title(f"MoE layers under the limits of {where}\n{what}", fontsize=11)
    panel.set(xlabel="flops per byte of used expert weights", ylabel="GFLOP/s")
    panel.grid(alpha=0.25, which="major")
    save_figure(figure, path)


def _rates(found: CaseTimings) -> dict[str, float]:
    """Return GFLOP/s of every implementation."""
    return {t.name: found.cost.flops / t.seconds.median / 1e9 for t in found.timings}


def _columns(cases: tuple[CaseTimings, ...]) -> dict[str, float]:
    """Return log10 of where each case stands: at its intensity, or beside its neighbours."""
    true = {c.case.name: math.log10(c.cost.intensity) for c in cases}
    order = sorted(true, key=lambda name: true[name])
    least = _COLUMN / _DECADE
    groups: list[list[str]] = []
    for name in order:
        groups.append([name])
        # Two groups that would touch become one around their mean.
        while len(groups) > 1 and _start(groups[-1], true, least) < (
            _start(groups[-2], true, least) + len(groups[-2]) * least
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    return {
        name: _start(group, true, least) + (i + 0.5) * least
        for group in groups
        for i, name in enumerate(group)
    }


def _start(group: list[str], true: dict[str, float], least: float) -> float:
    """Return the left edge of columns centred at their mean intensity."""
    return sum(true[name] for name in group) / len(group) - len(group) * least / 2


def _colours_of(result: BenchmarkResult) -> dict[str, str]:
    """Return a colour for every implementation: backends first, then peers."""
    names = dict.fromkeys((t.is_peer, t.name) for c in result.cases for t in c.timings)
    colours: dict[str, str] = {}
    for is_peer, palette in ((False, _COLOURS), (True, _PEER_COLOURS)):
        group = [name for peer, name in names if peer == is_peer]
        colours |= {name: palette[i % len(palette)] for i, name in enumerate(group)}
    return colours


def _draw_column(panel: Any, found: CaseTimings, middle: float, colours: dict[str, str]) -> None:
    """Draw the dots of one case and direction around 10**middle, and its limit as a short bar."""
    # Dots of equal speed stay visible beside each other.
    step = 1.1 * _HALF / len(colours)
    for name, rate in _rates(found).items():
        place = list(colours).index(name) - (len(colours) - 1) / 2
        panel.scatter(10 ** (middle + place * step / _DECADE), rate, s=36, color=colours[name],
                      marker=_MARKERS[found.direction], edgecolor="white", lw=0.6,
                      zorder=4)  # fmt: skip
    limit = found.cost.flops / found.floor_seconds / 1e9
    ends = [10 ** (middle + side * 0.85 * _HALF / _DECADE) for side in (-1, 1)]
    panel.plot(ends, [limit, limit], color="black", lw=2.4, zorder=3, solid_capstyle="butt")


def _name_limits(panel: Any, flops: float, read: float, high: float, what: str) -> None:
    """Write the two rates along their lines."""
    words = {"fontsize": 9, "va": "bottom", "ha": "right"}
    panel.text(10 ** (high - 0.03), flops * 1.2, f"matrix products: {flops:.0f} GFLOP/s", **words)
    x = 0.8 * flops / read
    # The direction of the line where it stands, in units of the axes.
    panel.text(x, 1.12 * read * x, f"{what}: {read:.1f} GB/s",
               rotation=math.degrees(math.atan2(read, 1.0)), rotation_mode="anchor",
               transform_rotates_text=True, **words)  # fmt: skip


def _draw_legend(panel: Any, colours: dict[str, str], directions: list[Direction]) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    handles = [
        Line2D([], [], color=colour, marker="o", ls="", label=name)
        for name, colour in colours.items()
    ]
    handles += [
        Line2D([], [], color="gray", marker=_MARKERS[direction], ls="", label=direction)
        for direction in directions
    ]
    handles.append(Line2D([], [], color="black", lw=2.4, label="limit of the case"))
    panel.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
