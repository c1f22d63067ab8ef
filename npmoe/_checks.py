"""Shape, dtype and range checks that say what, where and what to do."""

from __future__ import annotations

import math
import re
from typing import NoReturn

import numpy as np

from npmoe._typing import Array
from npmoe.errors import DTypeError, RangeError, ShapeError

FLOAT_DTYPES = frozenset({np.dtype(np.float32), np.dtype(np.float64)})


class Axes:
    """Sizes of the axis letters bound so far in one call, and who bound each."""

    def __init__(self, function: str) -> None:
        self.function = function
        self._sizes: dict[str, int] = {}
        # A source in words, or an array's name and shape: words cost time, and few are needed.
        self._bound_by: dict[str, str | tuple[str, tuple[int, ...]]] = {}

    def bind(self, source: str, **sizes: int) -> None:
        """Fix axis letters from something other than an array, for example a config."""
        for letter, size in sizes.items():
            self._sizes[letter] = size
            self._bound_by[letter] = source

    def check(self, name: str, array: Array, *axes: str) -> None:
        """Raise ShapeError unless `array` has the shape spelled by `axes` ("E", "2*I", "1").

        A letter not bound yet is bound by this array.
        """
        shape = tuple(array.shape)
        new = []
        fits = len(shape) == len(axes)
        for axis, size in zip(axes, shape, strict=False):
            known = self._sizes.get(axis)
            if known is None and not axis.isalpha():
                known = self._size(axis)
            if known is None:
                new.append((axis, size))
            elif known != size:
                fits = False
        if not fits:
            self._fail(name, shape, axes, [self._size(axis) for axis in axes])
        for axis, size in new:
            self._sizes[axis] = size
            self._bound_by[axis] = (name, shape)

    def _size(self, axis: str) -> int | None:
        if axis in self._sizes or axis.isalpha():
            return self._sizes.get(axis)
        if axis.isdigit():
            return int(axis)
        factors = [int(f) if f.isdigit() else self._sizes.get(f) for f in axis.split("*")]
        known = [f for f in factors if f is not None]
        return math.prod(known) if len(known) == len(factors) else None

    def _fail(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], expected: list[int | None]
    ) -> NoReturn:
        known = tuple(a if e is None else e for a, e in zip(axes, expected, strict=True))
        text = f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"
        values = f"({', '.join(map(str, known))}{',' if len(known) == 1 else ''})"
        message = f"{self.function}: {name} must have shape {text} = {values}, got {shape}."
        letters = dict.fromkeys(re.findall(r"[A-Z][a-z]*", " ".join(axes)))
        by_source: dict[str, list[str]] = {}
        for letter in letters:
            if letter in self._bound_by:
                bound_by = self._bound_by[letter]
                source = bound_by if isinstance(bound_by, str) else f"{bound_by[0]} {bound_by[1]}"
                by_source.setdefault(source, []).append(letter)
        for source, bound in by_source.items():
            verb = "is" if len(bound) == 1 else "are"
            message += f" {', '.join(bound)} {verb} bound by {source}."
        if len(shape) >= 2 and known == (*shape[:-2], shape[-1], shape[-2]):
            message += " It looks transposed."
        raise ShapeError(message)


def check_float(function: str, name: str, array: Array) -> None:
    """Raise DTypeError unless `array` is an array of float32 or float64."""
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise DTypeError(
            f"{function}: {name} must be an array, got {type(array).__name__}. "
            "Convert it with numpy.asarray or the backend's asarray."
        )
    if dtype not in FLOAT_DTYPES:
        raise DTypeError(
            f"{function}: {name} must have dtype float32 or float64, got {dtype}. "
            f"Convert it with {name}.astype('float32')."
        )


def check_same_dtype(function: str, name: str, array: Array, dtype: object, source: str) -> None:
    """Raise DTypeError unless `array` has the dtype that `source` fixed."""
    if array.dtype != dtype:
        raise DTypeError(
            f"{function}: {name} must have dtype {dtype}, got {array.dtype}. "
            f"The dtype is bound by {source}. Convert one of them with astype."
        )


def check_integer_ids(function: str, name: str, array: Array) -> None:
    """Raise DTypeError unless `array` holds integers."""
    dtype = getattr(array, "dtype", None)
    if dtype is None or not np.issubdtype(dtype, np.integer):
        got = type(array).__name__ if dtype is None else str(dtype)
        raise DTypeError(f"{function}: {name} must be an integer array, got {got}.")


def require(condition: bool, message: str) -> None:
    """Raise RangeError with `message` unless `condition` holds."""
    if not condition:
        raise RangeError(message)
