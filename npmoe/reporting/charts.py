"""Charts as inline SVG: every one has a name and a description, and takes its colours from CSS."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from npmoe._typing import HostArray

_COLOURS = 8  # --c0 .. --c7 in the style sheet
# From dark to light, so that it reads in gray as well: blue, teal, green, yellow.
_SCALE = np.array([[38, 38, 92], [46, 94, 140], [42, 148, 142], [110, 196, 98], [250, 230, 60]])
_UNUSED = (214, 40, 76)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve: its name, steps (N,) and values (N,); the colour of its number unless given."""

    name: str
    steps: HostArray
    values: HostArray
    markers: bool = False
    colour: int | None = None
    dashed: bool = False

    def stroke(self, number: int) -> tuple[str, bool]:
        """Return the CSS colour and whether the line is dashed, as the eighth and later are."""
        place = number if self.colour is None else self.colour
        return f"var(--c{place % _COLOURS})", self.dashed or place >= _COLOURS


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    log_scale: bool = False,
    from_zero: bool = False,
    mark: int | None = None,
) -> str:
    """Return curves over steps as a figure; `mark` is a step with a line through it.

    Curves with more than 400 points are thinned to the least and largest of each stretch.
    """
    width, height, left, right, top, bottom = 380, 214, 52, 10, 26, 34
    drawn = [_thin(line) for line in lines if len(line.steps)]
    xs = np.concatenate([line.steps for line in drawn])
    ys = np.concatenate([line.values for line in drawn])
    if log_scale:
        ys = ys[ys > 0]
        log_scale = bool(ys.size)
    low, high = (float(ys.min()), float(ys.max())) if ys.size else (0.0, 1.0)
    ticks = _log_ticks(low, high) if log_scale else _ticks(0.0 if from_zero else low, high)
    low, high = min([low, *ticks]), max([high, *ticks])
    first, last = float(xs.min()), float(xs.max())

    def place_x(x: HostArray | float) -> HostArray:
        return left + (width - left - right) * (np.asarray(x) - first) / max(last - first, 1.0)

    def place_y(y: HostArray | float) -> HostArray:
        values: HostArray = np.maximum(y, low)
        least, most = low, high
        if log_scale:
            values, least, most = np.log(values), math.log(low), math.log(high)
        share: HostArray = (values - least) / ((most - least) or 1.0)
        return height - bottom - (height - top - bottom) * share

    parts = []
    for tick in ticks:
        y = float(place_y(tick))
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{left - 5}" y="{y + 3.5:.1f}" text-anchor="end">{_short(tick)}</text>'
        )
    for tick in _step_ticks(first, last):
        x = float(place_x(tick))
        parts.append(
            f'<text x="{x:.1f}" y="{height - bottom + 14}" text-anchor="middle">{tick}</text>'
        )
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 4}" text-anchor="middle">step</text>')
    if mark is not None and first <= mark <= last:
        x = float(place_x(mark))
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>'
        )
    for number, line in enumerate(drawn):
        colour, dashes = line.stroke(number)
        points = list(zip(place_x(line.steps), place_y(line.values), strict=True))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = ' stroke-dasharray="5 3"' if dashes else ""
        parts.append(f'<polyline class="curve" style="stroke:{colour}"{dashed} points="{path}"/>')
        if line.markers or len(points) == 1:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" style="fill:{colour}"/>'
                for x, y in points
            ]
    about = "; ".join(
        f"{line.name} from {_short(line.values[0])} at step {line.steps[0]:.0f} to "
        f"{_short(line.values[-1])} at step {line.steps[-1]:.0f}"
        for line in lines
        if len(line.steps)
    )
    caption = title + (f" <span class=dim>{html.escape(unit)}</span>" if unit else "")
    keys = ""
    if len(drawn) > 1:
        keys = '<div class="keys">' + "".join(
            f'<span><i style="background:{line.stroke(number)[0]}"></i>'
            f"{html.escape(line.name)}</span>"
            for number, line in enumerate(drawn)
            if not line.dashed
        )
        keys += "</div>"
    svg = _svg(width, height, f"{title} over steps", about, "".join(parts))
    return f"<figure><figcaption>{caption}</figcaption>{svg}{keys}</figure>"


def load_heat_map(title: str, steps: HostArray, shares: HostArray) -> str:
    """Return the load of every expert over steps: shares (N, E), where 1 is a fair share.

    An expert that nobody chose is red. Many steps are averaged to at most 240 columns; a column
    is red only where all its steps are.
    """
    count, size = shares.shape
    columns = np.array_split(np.arange(count), min(count, 240))
    cells = np.stack([shares[c].mean(axis=0) for c in columns], axis=1)  # (E, columns)
    top = max(2.0, float(cells.max()))
    pixels = _colours(cells / top)
    pixels[cells == 0] = _UNUSED
    extent = f"{steps[0]:.0f}", f"{steps[-1]:.0f}"
    worst = np.unravel_index(int(cells.argmax()), cells.shape)
    about = (
        f"{size} experts over steps {extent[0]} to {extent[1]}. The largest load is "
        f"{cells.max():.2f} times the fair share, expert {worst[0]}; at the last step it is "
        f"{shares[-1].max():.2f} times, and {int((shares[-1] == 0).sum())} experts are unused."
    )
    return _map(
        title,
        about,
        pixels,
        rows=_numbered("", size),
        columns=extent,
        x_label="step",
        y_label="expert",
        legend=_legend(f"0 to {top:.1f} times the fair share", unused=True),
    )


def table_heat_map(title: str, rows: Sequence[str], shares: HostArray) -> str:
    """Return how the choices of each row (rows, E) are spread over the experts; rows sum to 1."""
    top = max(0.5, float(shares.max(initial=0.0)))
    size = shares.shape[1]
    best = [
        f"{name}: expert {int(s.argmax())} ({s.max():.0%})"
        for name, s in zip(rows, shares, strict=True)
    ]
    return _map(
        title,
        "The favourite expert of each row. " + "; ".join(best),
        _colours(shares / top),
        rows=list(rows),
        columns=("0", str(size - 1)),
        x_label="expert",
        y_label="",
        legend=_legend(f"0 to {top:.0%} of the row's choices"),
    )


def plan_strip(title: str, rows_per_expert: HostArray, block_size: int) -> str:
    """Return a plan as its kernel reads it: rows by expert, in blocks, padding hatched."""
    rows = rows_per_expert.astype(np.int64)
    blocks = -(-rows // block_size)
    padded = blocks * block_size
    total = int(padded.sum())
    width, height, left = 760, 66, 4
    scale = (width - 2 * left) / max(total, 1)
    parts, start = [], 0
    for place, expert in enumerate(np.flatnonzero(rows).tolist()):
        x, w = left + start * scale, rows[expert] * scale
        pad = (padded[expert] - rows[expert]) * scale
        name = f"expert {expert}: {rows[expert]} rows in {blocks[expert]} blocks"
        parts.append(
            f'<rect class="{"odd" if place % 2 else "even"}" x="{x:.2f}" y="4" width="{w:.2f}" '
            f'height="34"><title>{name}</title></rect>'
        )
        parts.append(
            f'<rect fill="url(#hatch)" x="{x + w:.2f}" y="4" width="{pad:.2f}" height="34">'
            f"<title>expert {expert}: {padded[expert] - rows[expert]} rows of padding</title>"
            "</rect>"
        )
        if padded[expert] * scale >= 16:
            parts.append(
                f'<text x="{x + padded[expert] * scale / 2:.2f}" y="52" text-anchor="middle">'
                f"{expert}</text>"
            )
        start += int(padded[expert])
    if total // block_size <= 190:
        edges = left + np.arange(0, total + 1, block_size) * scale
        parts += [f'<line class="edge" x1="{x:.2f}" x2="{x:.2f}" y1="4" y2="38"/>' for x in edges]
    waste = total - int(rows.sum())
    about = (
        f"{int(rows.sum())} rows in {int(blocks.sum())} blocks of {block_size}, padding {waste} of "
        f"{total} rows ({waste / max(total, 1):.0%}); fullest expert {int(rows.argmax())} with "
        f"{int(rows.max(initial=0))} rows, {int((rows == 0).sum())} of {len(rows)} experts without "
        "a row"
    )
    svg = _svg(width, height, f"{title}: plan", about, "".join(parts))
    return (
        f"<figure class=wide><figcaption>{html.escape(title)} <span class=dim>{about}</span>"
        f'</figcaption><div class="scroll" tabindex=0>{svg}</div></figure>'
    )


def png_data_uri(content: bytes) -> str:
    """Return a PNG as the address of an image that is inside the page."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _map(
    title: str,
    about: str,
    pixels: HostArray,
    *,
    rows: Sequence[str],
    columns: tuple[str, str],
    x_label: str,
    y_label: str,
    legend: str,
) -> str:
    """Return a coloured table (rows, columns, 3) with names beside it."""
    size = len(rows)
    line = max(4.0, min(18.0, 260.0 / max(size, 1)))
    left = 30 + 6.4 * max((len(r) for r in rows), default=1)
    width, top = 620, 6
    inner, height = width - left - 8, top + line * size + 32
    every = max(1, math.ceil(11 / line))
    parts = [
        f'<image x="{left:.1f}" y="{top}" width="{inner:.1f}" height="{line * size:.1f}" '
        f'preserveAspectRatio="none" style="image-rendering:pixelated" '
        f'href="{png_data_uri(_png(pixels))}"/>'
    ]
    for number in range(0, size, every):
        y = top + line * (number + 0.5) + 3.5
        parts.append(
            f'<text x="{left - 6:.1f}" y="{y:.1f}" text-anchor="end">'
            f"{html.escape(rows[number])}</text>"
        )
    under = top + line * size + 14
    parts.append(f'<text x="{left:.1f}" y="{under:.1f}">{columns[0]}</text>')
    parts.append(f'<text x="{width - 8}" y="{under:.1f}" text-anchor="end">{columns[1]}</text>')
    middle = left + inner / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{under + 12:.1f}" text-anchor="middle">{x_label}</text>'
    )
    if y_label:
        y = top + line * size / 2
        parts.append(
            f'<text transform="translate(11 {y:.1f}) rotate(-90)" text-anchor="middle">'
            f"{y_label}</text>"
        )
    svg = _svg(width, height, title, about, "".join(parts))
    return (
        f"<figure class=map><figcaption>{html.escape(title)}</figcaption>"
        f'<div class="scroll" tabindex=0>{svg}</div>{legend}</figure>'
    )


def _legend(text: str, *, unused: bool = False) -> str:
    stops = ", ".join(f"rgb{tuple(int(v) for v in c)}" for c in _SCALE)
    bar = f'<i class="bar" style="background:linear-gradient(90deg, {stops})"></i>'
    red = f'<span><i style="background:rgb{_UNUSED}"></i>nobody chose it</span>' if unused else ""
    return f'<div class="keys"><span>{bar}{text}</span>{red}</div>'


def _svg(width: float, height: float, title: str, about: str, body: str) -> str:
    name = html.escape(f"{title}: {about}")
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}">{body}</svg>'


def _colours(values: HostArray) -> HostArray:
    """Return (rows, columns, 3) uint8 of values in 0..1."""
    places = np.clip(values, 0.0, 1.0) * (len(_SCALE) - 1)
    low = np.minimum(places.astype(np.int64), len(_SCALE) - 2)
    part = (places - low)[..., None]
    mixed: HostArray = (1 - part) * _SCALE[low] + part * _SCALE[low + 1]
    return mixed.round().astype(np.uint8)


def _png(pixels: HostArray) -> bytes:
    """Return pixels (rows, columns, 3) uint8 as a PNG file (ISO/IEC 15948, filter 0)."""
    rows, columns, _ = pixels.shape
    raw = np.zeros((rows, 1 + 3 * columns), np.uint8)
    raw[:, 1:] = pixels.reshape(rows, -1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    data = zlib.compress(raw.tobytes(), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def _thin(line: Line, most: int = 400) -> Line:
    """Keep the least and the largest value of every stretch, so that no peak is lost."""
    if len(line.steps) <= most:
        return line
    found = {0, len(line.steps) - 1}
    for part in np.array_split(np.arange(len(line.steps)), most // 2):
        values = line.values[part]
        found |= {int(part[values.argmin()]), int(part[values.argmax()])}
    kept = sorted(found)
    return replace(line, steps=line.steps[kept], values=line.values[kept])


def _ticks(low: float, high: float) -> list[float]:
    """Return four or so round numbers around a range."""
    span = high - low
    if span <= 0:
        span = abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 3))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 4.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten around a range of positive numbers, five at most."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 4))
    return [10.0**n for n in range(first, last + stride, stride)]


def _step_ticks(first: float, last: float) -> list[int]:
    inner = [round(t) for t in _ticks(first, last) if first <= t <= last]
    return sorted(set(inner)) or [round(first)]


def _short(value: float) -> str:
    text = f"{float(value):.4g}"
    return f"{value:,.0f}" if "e+0" in text and abs(value) < 1e7 else text


def _numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(count)]
