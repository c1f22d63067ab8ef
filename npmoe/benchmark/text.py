"""A run as text: one table per case and direction, and one sentence at the end."""

from __future__ import annotations

from collections.abc import Iterable

from npmoe.benchmark.machine import Machine
from npmoe.benchmark.result import BenchmarkResult, CaseTimings, Omission, Settings, Timing

_HEADER = (
    "implementation",
    "median ms",
    "quartiles",
    "of limit",
    "x best peer",
    "extra MB",
    "resident",
    "count",
)
_QUIET = 0.1  # cores
LEGEND = (
    "of limit: floor / median. x best peer: how many times as fast as the fastest peer.\n"
    "extra MB: peak beyond inputs, parameters, their gradients and the routing, of one call: of "
    "NumPy arrays (tracemalloc),\nresident pages of the process (VmHWM, +-1 MB), and the count "
    "of README.md's formula."
)


def legend_text(machine: Machine) -> str:
    """Say what the columns mean."""
    if machine.device is None:
        return LEGEND
    return (
        "of limit: floor / median. x best peer: how many times as fast as the fastest peer.\n"
        f"limits: {machine.device.limits}.\n"
        "extra MB: not told apart on a device. resident: peak on the device beyond inputs, "
        "parameters, their\ngradients and the routing, of one call; of backends: "
        f"{machine.device.memory}. count: that of README.md's formula."
    )


def machine_text(machine: Machine) -> str:
    """Return the machine in two lines, after one for its device if that was measured."""
    if machine.device is not None:
        return f"{machine.device.name}\n{_host_text(machine)}"
    return _host_text(machine)


def _host_text(machine: Machine) -> str:
    packages = ", ".join(f"{n} {v}" for n, v in machine.packages.items() if v is not None)
    return (
        f"{machine.processor}, {machine.usable_cores} of {machine.cores} cores usable, "
        f"{machine.threads} thread{'s' if machine.threads > 1 else ''} for every implementation\n"
        f"npmoe {machine.npmoe}, Python {machine.python}, {packages}"
    )


def table_text(found: CaseTimings, settings: Settings) -> str:
    """Return the limits and the implementations, fastest first, in aligned columns."""
    case, load = found.case, found.load
    T, H, I, E, K = case.sizes
    lines = [
        f"{case.name}, {found.direction}: T={T} H={H} I={I} E={E} K={K}, {settings.dtype_text}; "
        f"{load.used_experts} of {E} experts used, at most {load.largest} rows each",
        f"  limits {found.flops_per_second.median / 1e9:.1f} GFLOP/s and "
        f"{found.bytes_per_second.median / 1e9:.1f} GB/s: floor "
        f"{milliseconds(found.floor_seconds)} ms, "
        f"set by {'memory' if found.bound_by_memory else 'arithmetic'}; "
        f"{found.num_rounds} round{'s' if found.num_rounds > 1 else ''}",
    ]
    if found.other_load is not None and found.other_load > _QUIET:
        lines.append(
            f"  DISTURBED: other processes kept {found.other_load:.1f} cores busy; run it again"
        )
    ordered = sorted(found.timings, key=lambda timing: timing.seconds.median)
    count = _mb(found.cost.extra_bytes)
    lines += align([_HEADER, *((*_row(timing), count) for timing in ordered)])
    return "\n".join(lines)


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Return lines of columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells))
    return lines


def omission_text(omission: Omission) -> str:
    """Return what was not timed, and why."""
    where = [part for part in (omission.case, omission.direction) if part is not None]
    place = f" in {', '.join(where)}" if where else ""
    return f"not timed: {omission.name}{place}: {omission.reason.removesuffix('.')}."


def last_line(result: BenchmarkResult) -> str:
    """Return one sentence: what was timed, against whom, and what was not."""
    ours = _names(t.name for c in result.cases for t in c.timings if not t.is_peer)
    theirs = _names(t.name for c in result.cases for t in c.timings if t.is_peer)
    cases = _names(c.case.name for c in result.cases)
    directions = _names(c.direction for c in result.cases)
    timed = "Timed nothing"
    if result.cases:
        timed = (
            f"Timed {ours or 'no backend'} against {theirs or 'no peer'} in {cases} ({directions})"
        )
    refused = [o for o in result.omissions if o.asked]
    skipped = [o for o in result.omissions if not o.asked]
    for word, group in (("refused or missing", refused), ("skipped", skipped)):
        if group:
            timed += f"; {word}: {_reasons(group, result.settings)}"
    return timed + "."


def _row(timing: Timing) -> tuple[str, ...]:
    seconds, memory = timing.seconds, timing.memory
    ratio = timing.ratio_to_best_peer
    return (
        timing.name,
        milliseconds(seconds.median),
        f"{milliseconds(seconds.lower_quartile)} - {milliseconds(seconds.upper_quartile)}",
        f"{timing.share_of_limit:.2f}",
        "-" if ratio is None else f"{ratio:.2f}",
        _mb(memory.arrays),
        _mb(memory.resident),
    )


def milliseconds(seconds: float) -> str:
    """Return a time with as many digits as mean something."""
    return f"{seconds * 1e3:.3f}" if seconds < 0.01 else f"{seconds * 1e3:.1f}"


def _mb(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f}" if count < 1e7 else f"{count / 1e6:.1f}"


def _names(names: Iterable[str]) -> str:
    """Return each name once, in order."""
    return ", ".join(dict.fromkeys(names))


def _reasons(omissions: list[Omission], settings: Settings) -> str:
    """Return each implementation and reason once, with the cases where they hold, if not all."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for o in omissions:
        places = found.setdefault((o.name, o.reason), {})
        if o.case is not None and o.direction is not None:
            places.setdefault(o.case, []).append(o.direction)
    every, everywhere = len(settings.directions), len(settings.directions) * len(settings.cases)
    texts = []
    for (name, reason), places in found.items():
        where = ""
        if sum(map(len, places.values())) not in (0, everywhere):
            where = " in " + ", ".join(
                case if len(directions) == every else " ".join((case, *directions))
                for case, directions in places.items()
            )
        texts.append(f"{name}{where} ({reason})")
    return ", ".join(texts)
