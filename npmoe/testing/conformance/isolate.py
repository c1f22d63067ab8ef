"""Run a target in a child process, so that a hang or a crash is a finding and not our end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.conformance.draw import read_only, strided
from npmoe.testing.conformance.subject import array_converter, to_numpy


class Hang(Exception):
    """No answer within the time limit."""


class Died(Exception):
    """The child process ended during a call."""


class TargetError(Exception):
    """The target raised; the text says what."""


class IsolatedTarget:
    """A callable that runs ``module:function`` in a child process.

    Parameters
    ----------
    target : str
        As for `load_target`.
    array : {"numpy", "torch", "cupy"}
        Array type of the target; conversion happens in the child.
    seconds : float
        Time limit of one call; the first one may take `start_seconds` for imports.
    start_seconds : float
    """

    def __init__(
        self,
        target: str,
        *,
        array: str = "numpy",
        seconds: float = 10.0,
        start_seconds: float = 120.0,
    ) -> None:
        self.__name__ = target.rpartition(":")[2]
        self._target, self._array = target, array
        self._seconds, self._start_seconds = seconds, start_seconds
        self._process: Any = None
        self._pipe: Connection | None = None

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """Return what the target returned, as NumPy arrays; write back what it changed."""
        pipe = self._start()
        sent = [_pack(a) if isinstance(a, np.ndarray) else a for a in arguments]
        try:
            pipe.send(sent)
            if not pipe.poll(self._seconds):
                self.close()
                raise Hang(f"no answer within {self._seconds:g} s")
            kind, value, after = pipe.recv()
        except (EOFError, OSError) as error:
            code = self._end()
            raise Died(_how(code)) from error
        for given, now in zip(arguments, after, strict=True):
            if isinstance(given, np.ndarray) and given.tobytes() != now.tobytes():
                given.flags.writeable = True
                given[...] = now
        if kind == "error":
            raise TargetError(value)
        return tuple(value)

    def close(self) -> None:
        """End the child process."""
        if self._process is not None and self._process.is_alive():
            self._process.kill()
        self._end()

    def _start(self) -> Connection:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            mine, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(theirs, self._target, self._array, list(sys.path)), daemon=True
            )
            self._process.start()
            theirs.close()
            self._pipe = mine
            try:
                if not mine.poll(self._start_seconds):
                    self.close()
                    raise Hang(f"not imported within {self._start_seconds:g} s")
                mine.recv()
            except (EOFError, OSError) as error:
                raise Died(_how(self._end())) from error
        return self._pipe

    def _end(self) -> int | None:
        """Forget the child; return its exit code."""
        code = None
        if self._process is not None:
            self._process.join(5)
            code = self._process.exitcode
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None
        return code


def _serve(pipe: Connection, target: str, array: str, path: list[str]) -> None:
    """Answer calls until the pipe closes."""
    from npmoe.testing.conformance.targets import load_target  # noqa: PLC0415  # child only

    sys.path[:] = path
    # What a target prints would disturb the parent's table.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    function = load_target(target)
    convert = array_converter(array)
    pipe.send("ready")
    while True:
        try:
            sent = pipe.recv()
        except EOFError:
            return
        arguments = [_unpack(a) if isinstance(a, _Packed) else a for a in sent]
        moved = [convert(a) if isinstance(a, np.ndarray) else a for a in arguments]
        try:
            result = function(*moved)
            parts = result if isinstance(result, tuple | list) else (result,)
            answer: tuple[str, Any] = ("ok", [to_numpy(p) for p in parts])
        except (Exception, SystemExit) as error:  # reported to the parent
            text = str(error).strip().splitlines()
            answer = ("error", f"{type(error).__name__}: {text[0] if text else ''}")
        after = [
            to_numpy(a) if isinstance(a, np.ndarray) or hasattr(a, "shape") else a for a in moved
        ]
        pipe.send((*answer, after))


class _Packed(tuple[HostArray, bool, bool]):
    """An array with what pickling forgets: (values, writeable, strided)."""


def _pack(x: HostArray) -> _Packed:
    return _Packed((np.ascontiguousarray(x), x.flags.writeable, not x.flags.c_contiguous))


def _unpack(packed: _Packed) -> HostArray:
    x, writeable, gaps = packed
    if gaps:
        x = strided(x)
    return x if writeable else read_only(x)


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the process died by {signal.Signals(-code).name}"
    return f"the process ended with code {code}"
