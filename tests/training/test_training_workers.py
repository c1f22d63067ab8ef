"""Worker processes: order, shared arrays, errors, and what happens when one of them dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from npmoe.errors import NpmoeError, RangeError, UnsupportedError
from npmoe.training import workers as module
from npmoe.training.workers import Workers, shared_array


class Target:
    """Something with methods to run."""

    def __init__(self):
        self.table = shared_array((4,), np.float32)
        self.private = np.zeros(4)

    def square(self, x):
        return x * x, os.getpid()

    def fill(self, i):
        self.table[i] = i + 1
        self.private[i] = i + 1

    def read(self, i):
        return float(self.table[i])

    def fail(self, i):
        if i == 1:
            raise RangeError(f"bad item {i}")
        return i

    def die(self, i):
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return i


@pytest.fixture
def three():
    pool = Workers(Target(), 3)
    yield pool
    pool.close()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("num_items", [0, 1, 2, 7])
def test_results_come_in_the_order_of_the_items(count, num_items):
    pool = Workers(Target(), count)
    results = pool.map("square", list(range(num_items)))
    pool.close()
    assert [value for value, _ in results] == [i * i for i in range(num_items)]
    assert len({process for _, process in results}) == min(count, num_items)


def test_only_shared_arrays_are_shared_both_ways(three):
    three.map("fill", [0, 1, 2, 3])
    assert three.target.table.tolist() == [1, 2, 3, 4]
    assert three.target.private.tolist() == [1, 0, 0, 4]  # items 1 and 2 ran in the copies
    three.target.table[:] = [9, 8, 7, 6]
    assert three.map("read", [0, 1, 2, 3]) == [9, 8, 7, 6]


def test_an_exception_of_a_copy_is_raised_here_and_the_pool_goes_on(three):
    for _ in range(2):
        with pytest.raises(RangeError, match="bad item 1"):
            three.map("fail", [0, 1, 2, 3, 4])
    assert three.map("fail", [0, 2, 3]) == [0, 2, 3]


def test_an_exception_here_leaves_no_answer_behind(three):
    with pytest.raises(RangeError, match="bad item 1"):
        three.map("fail", [1, 2, 3])
    assert three.map("fail", [5, 6, 7]) == [5, 6, 7]


def test_a_dead_copy_is_reported(three):
    with pytest.raises(NpmoeError, match=r"a worker process died.*Continue with --resume"):
        three.map("die", [0, 1, 2])


def test_close_leaves_no_process_behind():
    pool = Workers(Target(), 3)
    processes = [process for process, _ in pool._children]
    pool.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_copies_end_when_the_parent_is_killed():
    code = (
        "import os, time\n"
        "from npmoe.training.workers import Workers\n"
        "pool = Workers(object(), 4)\n"
        "print(*[p for p, _ in pool._children], flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        processes = [int(p) for p in run.stdout.readline().split()]
        run.kill()
    assert len(processes) == 3
    deadline = time.monotonic() + 20
    while any(_alive(p) for p in processes):
        assert time.monotonic() < deadline, "a copy outlived its parent"
        time.sleep(0.05)


def _alive(process):
    """Whether a process runs; a zombie that nobody has waited for does not count."""
    try:
        with Path(f"/proc/{process}/stat").open() as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bad_counts(monkeypatch):
    with pytest.raises(RangeError, match="train: workers must be at least 1, got 0"):
        Workers(Target(), 0)
    monkeypatch.setattr(module, "can_fork", lambda: False)
    with pytest.raises(UnsupportedError, match="workers must be 1 on this system"):
        Workers(Target(), 2)
    assert Workers(Target(), 1).map("square", [3])[0][0] == 9


def test_an_empty_shared_array():
    assert shared_array((0, 3), np.float64).shape == (0, 3)
