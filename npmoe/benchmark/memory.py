"""Peak memory of one call, in two ways; and whether a case fits."""

from __future__ import annotations

import ctypes
import gc
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from npmoe.benchmark.card import Card
from npmoe.benchmark.cases import Direction, Load
from npmoe.benchmark.implementations import Implementation, plain_arrays
from npmoe.benchmark.result import Memory, Settings
from npmoe.errors import RangeError
from npmoe.params import MoEParams
from npmoe.routing import Routing

_PROC = Path("/proc/self")


def peak_arrays(call: Callable[[], object]) -> int:
    """Return the largest sum of bytes that Python and NumPy hold during a call beyond the start.

    What other libraries allocate by themselves is not seen.
    """
    running = tracemalloc.is_tracing()
    if not running:
        tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        result = call()
        peak = tracemalloc.get_traced_memory()[1] - before
        del result
    finally:
        if not running:
            tracemalloc.stop()
    return max(0, peak)


def peak_resident(call: Callable[[], object]) -> int | None:
    """Return by how many bytes the process grows at most during a call, or None if unknown.

    The kernel's high-water mark (VmHWM) is reset through /proc/self/clear_refs, and free memory
    that the allocator keeps is returned to the system first. It sees all allocators, counts
    touched pages, and is good to about 1 MB. Only Linux has it.
    """
    if not (_PROC / "clear_refs").exists():
        return None
    gc.collect()
    _trim()
    try:
        (_PROC / "clear_refs").write_text("5", encoding="ascii")
    except OSError:  # some containers forbid it
        return None
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM") - before
    del result
    return max(0, peak)


def available_memory() -> int | None:
    """Return the bytes that can be allocated without swapping, or None if unknown."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def measure_memory(one: Implementation, direction: Direction, routing_bytes: int) -> Memory:
    """Return peaks without the routing and, where a step makes them anew, without gradients."""
    call, beyond = one.call(direction), routing_bytes
    if direction == "forward+backward":
        beyond += one.new_gradient_bytes
    counted = not one.is_peer and one.peak is None
    one.release()
    arrays = max(0, peak_arrays(call) - beyond) if counted else None
    one.release()
    resident = peak_resident(call) if one.peak is None else one.peak(call)
    return Memory(arrays=arrays, resident=None if resident is None else max(0, resident - beyond))


def num_bytes(tree: Routing | MoEParams) -> int:
    """Return the bytes of all arrays in a frozen dataclass."""
    return sum(int(array.nbytes) for _, array in plain_arrays(tree))


def check_fits(settings: Settings, *, with_peers: bool) -> None:
    """Raise before anything is allocated if the largest case would not fit."""
    _check_fits(settings, available_memory(), "memory", copies=1, sets=2 if with_peers else 1)


def check_fits_card(settings: Settings, card: Card, *, num_backends: int, with_peers: bool) -> None:
    """Raise if the largest case would not fit on the device: each has its own copy of it."""
    sets = num_backends + with_peers
    _check_fits(settings, card.free_bytes(), f"memory of {card.name}", copies=sets, sets=sets)


def _check_fits(
    settings: Settings, available: int | None, where: str, *, copies: int, sets: int
) -> None:
    """Raise if so many copies of the weights and sets of gradients would not fit."""
    if available is None:
        return
    for case in settings.cases:
        everything = Load(
            num_rows=case.num_tokens * case.top_k,
            used_experts=case.num_experts,
            largest=case.num_tokens,
        )
        needed = 0
        for direction in settings.directions:
            cost = settings.cost(case, everything, direction)
            # What is read twice stands in memory once; a peer's gradients stand beside ours.
            weights = copies * case.num_weights * settings.weight_itemsize
            if direction == "forward+backward":
                weights += sets * case.num_weights * np.dtype(settings.dtype).itemsize
            needed = max(needed, weights + cost.extra_bytes)
        if needed > available:
            raise RangeError(
                f"bench: case must fit into {where}, got {case.name!r}, which needs about "
                f"{needed / 1e9:.1f} GB. {available / 1e9:.1f} GB are free. Choose fewer tokens "
                "or experts, or --direction forward."
            )


def _trim() -> None:
    """Let glibc return its free memory; other libraries keep theirs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    text = (_PROC / "status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
