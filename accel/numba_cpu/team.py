"""Threads that run one kernel together, each taking tickets until none is left."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np

from npmoe._typing import HostArray

# Row starts of one block, which has at most half as many rows.
_PLACES = 2048
# Numbers by which scratch is rounded up, so that that of every thread begins at a cache line.
_LINE = 16


_teams: weakref.WeakSet[Team] = weakref.WeakSet()


class Team:
    """A number of threads with scratch memory of their own.

    The caller is one of them. Two callers take turns. In a forked child the team is the caller
    alone: whoever forks workers has given each of them a share of the machine.
    """

    def __init__(self, num_threads: int) -> None:
        self._begin(num_threads)
        _teams.add(self)

    def _begin(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._lock = threading.Lock()
        self._places = np.zeros((num_threads, _PLACES), np.int64)
        self._scratch: dict[Any, HostArray] = {}
        self._jobs: list[SimpleQueue[Any]] = []

    def run(
        self, kernel: Callable[..., None], *args: Any, dtype: Any, room: int, small: bool = False,
        stages: int = 0,
    ) -> None:  # fmt: skip
        """Call ``kernel(tickets, thread, scratch, places, *args)`` in every thread, and wait.

        `room` numbers of scratch are needed by each; `small` work stays in the caller's thread.
        After the number of the next ticket, `tickets` counts the tasks done of each stage.
        """
        with self._lock:
            scratch = self._scratch_of(np.dtype(dtype), room)
            # Tickets and queue of this call's own: a wait that was interrupted leaves threads at
            # work on the last call, and they must neither take nor give anything of this one.
            tickets = np.zeros(1 + stages, np.int64)
            call = (tickets, scratch, self._places, args)
            if small or self.num_threads == 1:
                kernel(tickets, 0, scratch, self._places, *args)
                return
            self._start()
            done: SimpleQueue[BaseException | None] = SimpleQueue()
            for jobs in self._jobs:
                jobs.put((kernel, call, done))
            failed: BaseException | None = None
            try:
                kernel(tickets, 0, scratch, self._places, *args)
            finally:
                for _ in self._jobs:
                    failed = done.get() or failed
            if failed is not None:
                raise failed

    def _scratch_of(self, dtype: Any, room: int) -> HostArray:
        room = -(-room // _LINE) * _LINE
        found = self._scratch.get(dtype)
        if found is None or found.shape[1] < room:
            found = self._scratch[dtype] = aligned_empty((self.num_threads, room), dtype)
        return found

    def _start(self) -> None:
        if self._jobs:
            return
        self._jobs = [SimpleQueue() for _ in range(1, self.num_threads)]
        for thread, jobs in enumerate(self._jobs, 1):
            threading.Thread(
                target=_work, args=(thread, jobs), name=f"npmoe-{thread}", daemon=True
            ).start()


def _work(thread: int, jobs: SimpleQueue[Any]) -> None:
    while True:
        kernel, (tickets, scratch, places, args), done = jobs.get()
        failed: BaseException | None = None
        try:
            kernel(tickets, thread, scratch, places, *args)
        except BaseException as error:  # handed to the caller, who raises it
            failed = error
        del kernel, tickets, scratch, places, args
        done.put(failed)
        del done


def _forget_threads() -> None:
    """Make every team of a forked child its caller alone: threads and locks stayed behind."""
    for team in _teams:
        team._begin(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> HostArray:
    """Return a new C-ordered array that begins at a cache line."""
    dtype = np.dtype(dtype)
    size = math.prod(shape)
    memory = np.empty(size + 64 // dtype.itemsize, dtype)
    skip = -address(memory) % 64 // dtype.itemsize
    return memory[skip : skip + size].reshape(shape)


def address(array: HostArray) -> int:
    """Return where an array's memory begins."""
    found: int = array.__array_interface__["data"][0]
    return found
