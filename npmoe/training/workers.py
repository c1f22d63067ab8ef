"""Worker processes that share arrays with their parent: one step's parts at the same time.

Threads would wait for the interpreter's lock at every small NumPy call; processes do not.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import warnings
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np

from npmoe._typing import HostArray
from npmoe.errors import NpmoeError, RangeError, UnsupportedError


def can_fork() -> bool:
    """Whether worker processes work here; Apple's BLAS must not run in a forked process."""
    return hasattr(os, "fork") and sys.platform != "darwin"


def default_workers() -> int:
    """Return 2 where that is possible, else 1."""
    return min(2, os.cpu_count() or 1) if can_fork() else 1


def shared_array(shape: tuple[int, ...], dtype: Any) -> HostArray:
    """Return a zeroed array whose memory processes forked later share with this one."""
    count = int(np.prod(shape, dtype=np.int64))
    size = max(1, count * np.dtype(dtype).itemsize)
    return np.frombuffer(mmap.mmap(-1, size), dtype, count).reshape(shape)


class Workers:
    """Run methods of one object in this process and in ``count - 1`` forked copies of it.

    A copy sees the object as it was when it was forked, except for arrays made by
    `shared_array`. Whatever else a method needs must be in its argument.

    Parameters
    ----------
    target : object
        Whose methods are run.
    count : int
        Processes, this one included.

    Raises
    ------
    RangeError
        If `count` is below 1.
    UnsupportedError
        If it is above 1 on a system without fork.
    """

    def __init__(self, target: Any, count: int) -> None:
        if count < 1:
            raise RangeError(f"train: workers must be at least 1, got {count}.")
        if count > 1 and not can_fork():
            raise UnsupportedError(
                f"train: workers must be 1 on this system ({sys.platform}), got {count}. "
                "More than one needs fork."
            )
        self.target = target
        self._children: list[tuple[int, Connection[Any, Any]]] = []
        for _ in range(count - 1):
            ours, theirs = Pipe()
            process = _fork()
            if process == 0:
                # An end kept open here would hide the parent's death from the other copies.
                for connection in (ours, *(c for _, c in self._children)):
                    connection.close()
                self._serve(theirs)
            theirs.close()
            self._children.append((process, ours))

    def map(self, method: str, items: list[Any]) -> list[Any]:
        """Return ``target.method(item)`` of every item, in order; item i runs in worker i mod n.

        Raises
        ------
        NpmoeError
            If a worker process died. An exception of a method is raised here.
        """
        count = len(self._children) + 1
        busy = [c for w, (_, c) in enumerate(self._children, start=1) if items[w::count]]
        for worker, (_, connection) in enumerate(self._children, start=1):
            if connection in busy:
                connection.send((method, items[worker::count]))
        results: list[Any] = [None] * len(items)
        failure: Exception | None = None
        try:
            results[0::count] = [getattr(self.target, method)(item) for item in items[0::count]]
        except Exception as error:
            failure = error  # answers that are under way must be read before anything is raised
        for worker, connection in enumerate(busy, start=1):
            try:
                answer, raised = connection.recv()
            except (EOFError, ConnectionError) as dead:
                raise NpmoeError(
                    "train: a worker process died; the system may have run out of memory. "
                    "Continue with --resume, perhaps with --workers 1."
                ) from dead
            failure = failure or raised
            results[worker::count] = answer
        if failure is not None:
            raise failure
        return results

    def close(self) -> None:
        """End the worker processes."""
        for process, connection in self._children:
            connection.close()
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        self._children = []

    def _serve(self, connection: Connection[Any, Any]) -> NoReturn:
        """Answer the parent's requests until it is gone."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        try:
            while True:
                method, items = connection.recv()
                connection.send(self._answer(method, items))
        except (EOFError, OSError):
            pass  # the parent is gone
        finally:
            # Not sys.exit: what the parent registered to run at its end is not ours to run.
            os._exit(0)

    def _answer(self, method: str, items: list[Any]) -> tuple[list[Any], Exception | None]:
        """Return the results, or the exception that the parent is to raise."""
        try:
            return [getattr(self.target, method)(item) for item in items], None
        except Exception as error:
            return [None] * len(items), error


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns of threads at a fork. The copy takes no lock of theirs: it runs NumPy
        # alone, with every BLAS call in one thread.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()
