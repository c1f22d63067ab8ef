"""What is refused before a launch: sizes that no device takes, and unknown schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from npmoe.errors import RangeError
from npmoe.testing.ptx.syntax import Function

__all__ = ["check_directives", "check_shared", "check_sizes", "schedule_number", "three_sizes"]


def three_sizes(value: int | Sequence[int], name: str) -> tuple[int, int, int]:
    """Give a grid or block size as three numbers."""
    given = (value,) if isinstance(value, int | np.integer) else tuple(value)
    if not 1 <= len(given) <= 3 or not all(
        isinstance(v, int | np.integer) and v > 0 for v in given
    ):
        raise RangeError(f"launch: {name} must be one to three positive integers, got {value!r}.")
    x, y, z = (*map(int, given), 1, 1)[:3]
    return x, y, z


def check_sizes(grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    """Give the limits that every device has."""
    if block[0] * block[1] * block[2] > 1024 or block[2] > 64:
        raise RangeError(
            f"launch: block must have at most 1024 threads and z at most 64, got {block}."
        )
    if max(grid[1:]) > 65535 or grid[0] > 2**31 - 1:
        raise RangeError(f"launch: grid must be at most (2**31 - 1, 65535, 65535), got {grid}.")


def check_directives(entry: Function, block: tuple[int, ...]) -> None:
    """Hold the block to what the kernel was compiled for."""
    threads = block[0] * block[1] * block[2]
    for directive in entry.directives:
        name, _, rest = directive.partition(" ")
        sizes = [int(n) for n in rest.replace(",", " ").split()] if rest else []
        if name == ".maxntid" and threads > math.prod(sizes):
            raise RangeError(
                f"launch: block must have at most {math.prod(sizes)} threads for {entry.name}, got "
                f"{block}. It was compiled with .maxntid (__launch_bounds__)."
            )
        if name == ".reqntid" and block != (*sizes, 1, 1)[:3]:
            raise RangeError(
                f"launch: block must be {(*sizes, 1, 1)[:3]} for {entry.name}, got {block}. "
                "It was compiled with .reqntid."
            )


def check_shared(shared_mem: int) -> int:
    """Give the bytes of dynamic shared memory."""
    if not 0 <= shared_mem <= 232448:
        raise RangeError(
            "launch: shared_mem must be from 0 to 232448 bytes (227 KiB, "
            f"the most of any device), got {shared_mem}."
        )
    return int(shared_mem)


def schedule_number(schedule: str | int) -> tuple[int, int]:
    """Give the number of a schedule and its seed."""
    if schedule == "in-order":
        return 0, 0
    if schedule == "reversed":
        return 1, 0
    if isinstance(schedule, int | np.integer) and not isinstance(schedule, bool) and schedule >= 0:
        return 2, int(schedule)
    raise RangeError(
        "launch: schedule must be 'in-order', 'reversed' or a seed (an integer >= 0), "
        f"got {schedule!r}."
    )
