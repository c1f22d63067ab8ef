"""How kernels are compiled: without the interpreter's lock, kept on disk, and never in silence."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import event

# Numba notices changes of the file of a kernel, not of those it is made from.
_SOURCES = [*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parents[1] / "curve.py"]
_STAMP = hashlib.sha256(b"".join(p.read_bytes() for p in _SOURCES)).hexdigest()

# Without reference counts: kernels make no arrays and whoever calls them holds those they get. A
# count is a locked instruction wherever a slice is handed on, which threads wait for, and every
# write past the caches; and without them compiling takes an eighth less.
_COMMON: Any = {"error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}
# Part of the kernels that call them: nothing that Python could call is made.
_PART: Any = _COMMON | {"no_cpython_wrapper": True}


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls, on first call, for the types of that call.

    No fast-math: sums keep their order, NaN and infinity their meaning.
    """
    compiled = numba.njit(function, nogil=True, cache=True, **_COMMON)
    compiled._cache._cache_file._source_stamp = _STAMP
    _progress.kernels.add(id(compiled))
    return compiled


def inner(function: Callable[..., Any]) -> Any:
    """Compile a function that only kernels call."""
    return numba.njit(function, **_PART)


def reassociated(function: Callable[..., Any]) -> Any:
    """Compile a sum whose order is left to the vectoriser: fixed for one machine's code."""
    return numba.njit(function, fastmath={"reassoc", "contract"}, **_PART)


class _Progress(event.Listener):
    """One line on the error stream while kernels are compiled, so that no pause is silent."""

    def __init__(self) -> None:
        self.kernels: set[int] = set()
        self._done = 0
        self._seconds = 0.0
        self._started = 0.0

    def on_start(self, event: Any) -> None:
        """Name the kernel."""
        if id(event.data["dispatcher"]) not in self.kernels:
            return
        self._started = time.perf_counter()
        name = event.data["dispatcher"].py_func.__name__
        self._say(f"npmoe: compiling kernels, once on this machine: {name}")

    def on_end(self, event: Any) -> None:
        """Count the seconds."""
        if id(event.data["dispatcher"]) not in self.kernels:
            return
        self._done += 1
        self._seconds += time.perf_counter() - self._started
        self._say(f"npmoe: {self._done} kernels compiled in {self._seconds:.1f} s", ended=True)

    def _say(self, text: str, *, ended: bool = False) -> None:
        if sys.stderr is None:
            return
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{text:<78}")
            sys.stderr.write("\r" if ended else "")
        elif not ended:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()


_progress = _Progress()
event.register("numba:compile", _progress)  # type: ignore[no-untyped-call]
