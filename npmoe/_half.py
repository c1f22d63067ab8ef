"""The half-precision dtypes that expert weights may have.

bfloat16 is a dtype of the package ml_dtypes, and of no kind that NumPy calls floating: it is
known by its name, and the package is imported where such an array is made.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np

from npmoe.errors import BackendUnavailableError

HALF_DTYPES = ("float16", "bfloat16")


def is_half(dtype: Any) -> bool:
    """Return whether a dtype is float16 or bfloat16."""
    # NumPy spells a name anew each time, in microseconds; this is asked for every expert.
    return getattr(dtype, "itemsize", None) == 2 and _has_half_name(dtype)


@functools.cache
def _has_half_name(dtype: Any) -> bool:
    return getattr(dtype, "name", None) in HALF_DTYPES


def is_float(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is one of NumPy's floats, or bfloat16."""
    return dtype.kind == "f" or is_half(dtype)


def named_dtype(function: str, name: str, extra: str) -> np.dtype[Any]:
    """Return the dtype of a name; bfloat16 needs the package of an extra."""
    if name == "bfloat16":
        try:
            importlib.import_module("ml_dtypes")  # which tells NumPy the name
        except ImportError as error:
            raise BackendUnavailableError(
                f"{function}: bfloat16 needs the package ml_dtypes, which is not installed. "
                f"Install it with: pip install 'npmoe[{extra}]'."
            ) from error
    return np.dtype(name)
