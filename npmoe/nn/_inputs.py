"""Checks of one call's arrays: one dtype, axis letters, leading dimensions, ids."""

from __future__ import annotations

import numpy as np

from npmoe._checks import Axes, check_float, check_same_dtype
from npmoe._typing import HostArray
from npmoe.errors import RangeError


class Inputs:
    """The arrays of one call: the first binds the dtype, each may bind axis letters."""

    def __init__(self, function: str) -> None:
        self.axes = Axes(function)
        self._first: tuple[str, HostArray] | None = None

    def check(self, name: str, array: HostArray, *letters: str) -> None:
        """Raise unless `array` is float, of the call's dtype and of the shape `letters`."""
        check_float(self.axes.function, name, array)
        if self._first is None:
            self._first = (name, array)
        source, first = self._first
        check_same_dtype(self.axes.function, name, array, first.dtype, source)
        self.axes.check(name, array, *letters)

    def rows(self, name: str, array: HostArray, letter: str) -> HostArray:
        """Check an array (..., letter) and return it as rows (T, letter)."""
        return self.rows_like(name, array, getattr(array, "shape", ())[:-1], letter)

    def rows_like(
        self, name: str, array: HostArray, leading: tuple[int, ...], letter: str
    ) -> HostArray:
        """Check an array (*leading, letter) and return it as rows (T, letter)."""
        self.check(name, array, *map(str, leading), letter)
        return array.reshape(-1, array.shape[-1])


def check_ids(function: str, name: str, ids: HostArray, count: int) -> None:
    """Raise RangeError, naming the first offender, unless all ids lie in [0, count)."""
    if ids.size and (ids.min() < 0 or ids.max() >= count):
        first = np.argwhere((ids < 0) | (ids >= count))[0]
        position = tuple(int(i) for i in first)
        raise RangeError(
            f"{function}: {name} must lie in [0, {count}), got {ids[position]} at {position}."
        )
