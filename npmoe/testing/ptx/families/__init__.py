"""One module for each family of instructions; HANDLERS maps the first word of an opcode to C++."""

from __future__ import annotations

from collections.abc import Callable

from npmoe.testing.ptx.context import Context
from npmoe.testing.ptx.families import (
    atomics,
    compare,
    control,
    convert,
    data,
    floating,
    integer,
    matrix,
    warp,
)
from npmoe.testing.ptx.syntax import Instruction

__all__ = ["HANDLERS"]

HANDLERS: dict[str, Callable[[Context, Instruction], str]] = {
    **integer.HANDLERS,
    **floating.HANDLERS,  # knows the names that it shares with the integers
    **convert.HANDLERS,
    **compare.HANDLERS,
    **data.HANDLERS,
    **atomics.HANDLERS,
    **control.HANDLERS,
    **warp.HANDLERS,
    **matrix.HANDLERS,
}
