"""Call somebody's function, and say what it did wrong before any number is compared."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from npmoe._half import is_float
from npmoe._typing import HostArray
from npmoe.errors import BackendUnavailableError, RangeError
from npmoe.testing.conformance.case import Case, Expected, Finding

ARRAYS = ("numpy", "torch", "cupy")


class Subject:
    """A function under test and the array type it works on.

    Parameters
    ----------
    function : callable
    name : str
        For reports; "module:function" if it can be imported again.
    array : {"numpy", "torch", "cupy"} or callable
        What to turn NumPy arrays into before the call. Outputs come back through NumPy, DLPack
        or ``__cuda_array_interface__``.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, array: str | Callable[[HostArray], Any]
    ) -> None:
        self.function = function
        self.name = name
        self.array = array
        self._convert = array_converter(array)

    def call(self, case: Case, expected: tuple[Expected, ...]) -> tuple[HostArray, ...]:
        """Return the outputs of one call as NumPy arrays of the expected shapes and dtypes.

        Raises
        ------
        Finding
            If it raises, changes an input, or returns something of another kind, shape or dtype.
        """
        given = {n: _copy(v) for n, v in case.arguments.items()}
        kept = {n: v.copy() for n, v in given.items() if isinstance(v, np.ndarray)}
        moved = {n: self._convert(v) if isinstance(v, np.ndarray) else v for n, v in given.items()}
        dirty_memory(expected)
        try:
            # Their overflow on the way to a right result is theirs; the result is judged.
            with np.errstate(all="ignore"):
                result = self.function(*moved.values())
        except (Exception, SystemExit) as error:  # a finding, never the end of the kit
            text = str(error).strip().splitlines()
            said = f": {text[0]}" if text else ""
            raise Finding(f"the call must return, got {type(error).__name__}{said}") from error
        for name, before in kept.items():
            now = to_numpy(moved[name])
            if now.tobytes() != before.tobytes():
                raise Finding(f"argument {name} must come back unchanged, it was written to.")
        return self._outputs(result, expected)

    def _outputs(self, result: Any, expected: tuple[Expected, ...]) -> tuple[HostArray, ...]:
        if len(expected) == 1 and not isinstance(result, tuple | list):
            result = (result,)
        if not isinstance(result, tuple | list) or len(result) != len(expected):
            many = f"{len(result)} of them" if isinstance(result, tuple | list) else type(result)
            raise Finding(f"the call must return {len(expected)} values, got {many}.")
        outputs = []
        for index, (value, want) in enumerate(zip(result, expected, strict=True)):
            where = "output" if len(expected) == 1 else f"output {index}"
            got = to_numpy(value)
            if want.any_shape and got.dtype == object and got.ndim == 0 and got.item() is None:
                outputs.append(got)
                continue
            if not (got.dtype.kind in "iub" or is_float(got.dtype)):
                raise Finding(f"{where} must be a numeric array, got {type(value).__name__}.")
            # A number may come as a scalar, or as an array of one element.
            if want.value.ndim == 0 and got.size == 1:
                got = got.reshape(())
            if got.shape != want.value.shape and not want.any_shape:
                raise Finding(f"{where} must have shape {want.value.shape}, got {got.shape}.")
            if want.dtype is not None and str(got.dtype) != want.dtype:
                raise Finding(f"{where} must have dtype {want.dtype}, got {got.dtype}.")
            if want.value.dtype.kind in "iu" and got.dtype.kind not in "iu":
                raise Finding(f"{where} must hold integers, got {got.dtype}.")
            outputs.append(got)
        return tuple(outputs)


def dirty_memory(expected: tuple[Expected, ...]) -> None:
    """Leave NaN (for integers: a huge number) in memory that the next allocation will get.

    Uninitialised memory is zero more often than not, which hides outputs never written.
    """
    for want in expected:
        for size in {want.value.nbytes, 2 * want.value.nbytes}:
            blocks = [np.full(max(1, size // 8), np.nan) for _ in range(3)]
            del blocks


def to_numpy(value: Any) -> HostArray:
    """Return an array of any kind as a NumPy array."""
    if isinstance(value, np.ndarray | np.generic | int | float):
        return np.asarray(value)
    if hasattr(value, "detach"):  # torch
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        return np.asarray(value.numpy())
    if hasattr(value, "get") and hasattr(value, "__cuda_array_interface__"):  # CuPy
        return np.asarray(value.get())
    if hasattr(value, "__dlpack__"):
        return np.from_dlpack(value)
    return np.asarray(value)


def _copy(value: Any) -> Any:
    """Return a copy with the same memory layout: strided and read-only arrays stay so."""
    if not isinstance(value, np.ndarray) or any(abs(n) >= 2**31 for n in value.strides):
        return value  # far_apart: a copy would not be
    if value.flags.c_contiguous:
        copy = value.copy()
    else:
        room = np.zeros((*value.shape[:-1], 2 * value.shape[-1]), value.dtype)
        copy = room[..., ::2]
        copy[...] = value
    copy.flags.writeable = value.flags.writeable
    return copy


def array_converter(array: str | Callable[[HostArray], Any]) -> Callable[[HostArray], Any]:
    """Return what turns a NumPy array into the subject's array type."""
    if callable(array):
        return array
    if array == "numpy":
        return lambda x: x
    if array == "torch":
        torch = _package("torch")
        return lambda x: torch.from_numpy(np.ascontiguousarray(x).copy())
    if array == "cupy":
        to_device: Callable[[HostArray], Any] = _package("cupy").asarray
        return to_device
    raise RangeError(
        f"check: array must be one of {', '.join(map(repr, ARRAYS))} or a function, got {array!r}."
    )


def _package(name: str) -> Any:
    """Import an array package, or say what is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendUnavailableError(
            f"check: package {name} must be installed for array={name!r}, got none."
        ) from error
