"""What a caller passes to a kernel: arrays with a promise about them, and scalars."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.testing.ptx.memory_layout import slot_base
from npmoe.testing.ptx.syntax import Function, Parameter

__all__ = ["Buffer", "ReadOnly", "Uninitialized", "numba_array", "pack_arguments"]


@dataclass(frozen=True, slots=True)
class ReadOnly:
    """An array that the kernel must not write.

    Parameters
    ----------
    array : array
        An array with ``writeable=False`` need not be wrapped.
    """

    array: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Uninitialized:
    """An array whose bytes the kernel must write before it reads them.

    Parameters
    ----------
    array : array
        What it holds before the launch is never seen by the kernel without a finding.
    """

    array: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Buffer:
    """An array argument at its place in the address space; `number` is its position in `args`."""

    array: npt.NDArray[Any]
    base: int
    number: int
    read_only: bool
    uninitialized: bool


def numba_array(array: npt.NDArray[Any] | ReadOnly | Uninitialized) -> list[Any]:
    """Spell out an array as numba-cuda passes it to a kernel.

    Parameters
    ----------
    array : array, ReadOnly or Uninitialized

    Returns
    -------
    list
        What stands for it in `args`: two null pointers, its size and item size, the array itself,
        its shape and its strides in bytes. Join the lists of all arguments.
    """
    data = array.array if isinstance(array, ReadOnly | Uninitialized) else array
    return [None, None, data.size, data.itemsize, array, *data.shape, *data.strides]


def pack_arguments(
    entry: Function, args: Sequence[Any], first_slot: int, offsets: dict[str, int], total: int
) -> tuple[bytes, list[Buffer]]:
    """Check arguments against the parameters of an entry and lay them out.

    Parameters
    ----------
    entry : Function
    args : sequence
        Arrays (plain, `ReadOnly` or `Uninitialized`) for 8 byte parameters, scalars for the others,
        ``bytes`` for parameters that are structs, None for a null pointer.
    first_slot, offsets, total : int, dict, int
        From the memory layout of the kernel.

    Returns
    -------
    bytes, list of Buffer
        The parameter block and the buffers.

    Raises
    ------
    ShapeError, DTypeError, RangeError
    """
    if len(args) != len(entry.parameters):
        names = ", ".join(f"{p.name} (.{p.type})" for p in entry.parameters)
        raise ShapeError(
            f"launch: args must hold {len(entry.parameters)} values for {entry.name}, "
            f"got {len(args)}. "
            f"Its parameters are: {names or 'none'}."
        )
    block = bytearray(total)
    buffers: list[Buffer] = []
    for number, (parameter, value) in enumerate(zip(entry.parameters, args, strict=True)):
        array = value.array if isinstance(value, ReadOnly | Uninitialized) else value
        if (
            isinstance(array, np.ndarray)
            and array.ndim + isinstance(value, ReadOnly | Uninitialized) > 0
        ):
            buffer = _make_buffer(value, array, number, parameter, first_slot + len(buffers))
            same = _find_alias(buffer, buffers)
            if same is None:
                buffers.append(buffer)
            data = struct.pack("<Q", (same or buffer).base)
        else:
            data = _pack_scalar(value, number, parameter)
        at = offsets[parameter.name]
        block[at : at + len(data)] = data
    return bytes(block), buffers


def _make_buffer(
    value: Any, array: npt.NDArray[Any], number: int, parameter: Parameter, slot: int
) -> Buffer:
    """Give an array argument, checked."""
    if parameter.size != 8 or parameter.elements:
        raise DTypeError(
            f"launch: args[{number}] must be a scalar of type .{parameter.type} for "
            f"{parameter.name}, "
            f"got an array of shape {array.shape}. Only .u64 and .b64 parameters take arrays."
        )
    if not array.flags.c_contiguous:
        raise ShapeError(
            f"launch: args[{number}] must be C-contiguous, got strides {array.strides} for shape "
            f"{array.shape}. "
            "A kernel sees bytes; pass numpy.ascontiguousarray(...) and copy back."
        )
    if array.dtype.hasobject:
        raise DTypeError(f"launch: args[{number}] must hold numbers, got dtype {array.dtype}.")
    read_only = isinstance(value, ReadOnly) or not array.flags.writeable
    if read_only and isinstance(value, Uninitialized):
        raise RangeError(
            f"launch: args[{number}] must be writeable, got a read-only array marked "
            "Uninitialized. "
            "Nobody could fill it."
        )
    return Buffer(array, slot_base(slot), number, read_only, isinstance(value, Uninitialized))


def _find_alias(new: Buffer, others: Sequence[Buffer]) -> Buffer | None:
    """Give the earlier buffer that is the same memory; raise if one overlaps it in another way."""
    for other in others:
        if not np.may_share_memory(new.array, other.array):
            continue
        same = (
            new.array.ctypes.data == other.array.ctypes.data
            and new.array.nbytes == other.array.nbytes
        )
        promises = (new.read_only, new.uninitialized) == (other.read_only, other.uninitialized)
        if same and promises:
            return other
        if not (new.read_only and other.read_only):
            raise RangeError(
                f"launch: args[{new.number}] must not overlap args[{other.number}], got "
                f"{'the same memory with another promise' if same else 'memory in common'}. "
                "Pass one array twice, with the same wrapper, or a copy."
            )
    return None


def _pack_scalar(value: Any, number: int, parameter: Parameter) -> bytes:
    """Give a scalar as the bytes of its parameter."""
    if parameter.elements:
        if isinstance(value, bytes) and len(value) == parameter.size:
            return value
        raise DTypeError(
            f"launch: args[{number}] must be bytes of length {parameter.size} for the struct "
            f"{parameter.name}, "
            f"got {value!r:.60}."
        )
    if value is None and parameter.size == 8:
        return bytes(8)
    kind, size = parameter.type, parameter.size
    given = np.asarray(value)
    if given.ndim or given.dtype.kind not in "biuf":
        raise DTypeError(
            f"launch: args[{number}] must be a number for {parameter.name} (.{kind}), "
            f"got {type(value).__name__}."
        )
    if isinstance(value, np.generic | np.ndarray) and given.dtype.itemsize != size:
        raise DTypeError(
            f"launch: args[{number}] must have {size} bytes for {parameter.name} (.{kind}), "
            f"got {given.dtype}. "
            "A driver would read past it or leave bytes unset."
        )
    if given.dtype.kind == "f" and isinstance(value, np.generic | np.ndarray):
        if kind[0] not in "fb":
            raise DTypeError(
                f"launch: args[{number}] must be an integer for {parameter.name} (.{kind}), "
                f"got {given.dtype}."
            )
        return given.tobytes()
    if kind in {"f32", "f64"} or given.dtype.kind == "f":
        if kind[0] not in "fb":
            raise DTypeError(
                f"launch: args[{number}] must be an integer for {parameter.name} (.{kind}), "
                f"got {value!r}."
            )
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], float(value))
    whole = int(value)
    if not -(1 << (8 * size - 1)) <= whole < 1 << (8 * size):
        raise RangeError(
            f"launch: args[{number}] must fit {size} bytes for {parameter.name} (.{kind}), "
            f"got {whole}."
        )
    return (whole % (1 << (8 * size))).to_bytes(size, "little")
