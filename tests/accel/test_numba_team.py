"""Threads, forks, and what happens when something goes wrong in one of them."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from needs import need_numba

need_numba()

import numba
from numba_problems import bits, draw_experts, run_experts, spread_plan

import npmoe
from accel.numba_cpu import launch
from accel.numba_cpu.team import Team, address, aligned_empty
from accel.numba_cpu.tickets import finish_task, wait_for_stage

HERE = Path(__file__).resolve().parent
ROOT = Path(npmoe.__file__).resolve().parents[1]
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


# The team alone, with Python functions for kernels.


def note_threads(tickets: Any, thread: int, scratch: Any, places: Any, seen: Any) -> None:
    seen[thread] += 1


def run_note(team: Team) -> list[int]:
    seen = [0] * team.num_threads
    team.run(note_threads, seen, dtype="float32", room=3)
    return seen


def test_every_thread_runs_once() -> None:
    for count in (1, 2, 5):
        team = Team(count)
        assert run_note(team) == [1] * count
        assert run_note(team) == [1] * count
        seen = [0] * count
        team.run(note_threads, seen, dtype="float32", room=3, small=True)
        assert seen == [1] + [0] * (count - 1)


def test_scratch_grows_and_is_one_part_per_thread() -> None:
    shapes: list[Any] = []

    def look(tickets: Any, thread: int, scratch: Any, places: Any, shapes: list[Any]) -> None:
        assert tickets[0] == 0
        assert scratch.ctypes.data % 64 == 0
        shapes.append((scratch.shape, scratch.dtype, places.shape[0]))

    team = Team(3)
    for room in (5, 1000, 7):
        team.run(look, shapes, dtype="float64", room=room)
    team.run(look, shapes, dtype="float32", room=1)
    sizes = [s[0] for s in shapes[::3]]
    assert [s[0] for s in sizes] == [3] * 4
    assert sizes[0][1] >= 5
    assert sizes[1][1] >= 1000
    assert sizes[2] == sizes[1]
    assert {s[1] for s in shapes} == {np.dtype("float32"), np.dtype("float64")}


def test_aligned_empty() -> None:
    for shape in ((0,), (1,), (3, 5), (0, 4), (17, 2, 3)):
        for dtype in ("float32", "float64", "int16"):
            array = aligned_empty(shape, dtype)
            assert array.shape == shape
            assert array.dtype == dtype
            assert array.flags.c_contiguous
            assert array.size == 0 or array.ctypes.data % 64 == 0


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_exception_reaches_the_caller_and_the_team_works_on(bad: int) -> None:
    def fail(tickets: Any, thread: int, scratch: Any, places: Any, ran: list[int]) -> None:
        if thread == bad:
            raise ZeroDivisionError(f"in {thread}")
        time.sleep(0.01)
        ran.append(thread)

    team = Team(3)
    for _ in range(2):
        ran: list[int] = []
        with pytest.raises(ZeroDivisionError, match=f"in {bad}"):
            team.run(fail, ran, dtype="float32", room=1)
        assert sorted(ran) == sorted({0, 1, 2} - {bad})  # all were waited for
        assert run_note(team) == [1, 1, 1]


def test_an_exception_of_a_kernel_reaches_the_caller() -> None:
    """Numba itself refuses what it cannot type; in all threads at once."""
    backend = npmoe.get_backend("numba", num_threads=3)
    x = np.ones((3000, 100), np.float32)
    team = backend._engines[x.dtype].team
    from accel.numba_cpu import rows

    with pytest.raises(Exception, match="typing"):
        team.run(rows.scale, "not an array", 3, x[0], x[0], dtype="float32", room=1)
    assert run_note(team) == [1, 1, 1]
    np.testing.assert_array_equal(backend.linear(x, x[:4], None), 100.0)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signal.setitimer")
def test_an_interrupted_wait_leaves_the_team_usable() -> None:
    """Ctrl-C while the caller waits: the next call must wait for its own work."""
    release = threading.Event()

    def slow(tickets: Any, thread: int, scratch: Any, places: Any) -> None:
        if thread:
            release.wait(10)

    def interrupt(*_: object) -> None:
        # The second signal comes too if the caller goes on waiting for what was begun.
        release.set()
        raise KeyboardInterrupt

    def late(tickets: Any, thread: int, scratch: Any, places: Any, seen: Any) -> None:
        if thread:
            time.sleep(0.2)
        seen[thread] += 1

    team = Team(2)
    run_note(team)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            team.run(slow, dtype="float32", room=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        release.set()
    for _ in range(3):
        seen = [0, 0]
        team.run(late, seen, dtype="float32", room=1)
        assert seen == [1, 1], "the call returned before its work was done"


# The backend in several threads.

CASE = draw_experts(spread_plan(400, 8, 2), 96, 80, activation="swiglu", integers=False)


def together(backends: list[Any], dtype: str) -> None:
    case = CASE.astype(dtype)
    want = bits(run_experts(backends[0], case))
    found: list[Any] = []
    start = threading.Barrier(len(backends))

    def work(backend: Any) -> None:
        start.wait()
        found.extend(bits(run_experts(backend, case)) for _ in range(8))

    threads = [threading.Thread(target=work, args=(b,)) for b in backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 8 * len(backends)
    assert all(f == want for f in found)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_threads_call_one_backend(dtype: str) -> None:
    together([npmoe.get_backend("numba", num_threads=2)] * 2, dtype)


def test_calls_at_the_same_time_share_no_temporary_arrays() -> None:
    """While one caller holds what the last call left, another computes."""
    backend = npmoe.get_backend("numba", num_threads=2)
    case = CASE.astype("float32")
    want = bits(run_experts(backend, case))
    engine = backend._engines[case.x.dtype]
    with engine.temporary(10) as (held,):
        whole = held.base
        assert whole.size > case.x.size
        whole[...] = 7.0
        assert bits(run_experts(backend, case)) == want
        assert (whole == 7.0).all()
    (kept,) = engine._kept  # of two that could be, one
    assert not np.shares_memory(kept, whole)


def test_temporary_arrays_are_kept_for_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = npmoe.get_backend("numba")._engines[np.dtype(np.float32)]
    with engine.temporary(3, 0, 40) as arrays:
        assert [a.size for a in arrays] == [3, 0, 40]
        assert all(address(a) % 64 == 0 for a in arrays)
        assert not np.shares_memory(arrays[0], arrays[2])
        first = address(arrays[0])
    with engine.temporary(50) as (again,):
        assert address(again) == first
    with engine.temporary(500) as (larger,):
        assert larger.size == 500
    with pytest.raises(KeyboardInterrupt), engine.temporary(500):
        raise KeyboardInterrupt  # other threads may still be writing
    assert engine._kept == []
    monkeypatch.setattr(launch, "_KEPT", 2000)
    for size, kept in ((496, 1), (512, 0)):
        with engine.temporary(size):
            pass
        assert len(engine._kept) == kept, size


@numba.njit(nogil=True)
def wait_for_two(tickets: Any, seen: Any) -> None:
    wait_for_stage(tickets, np.int64(1), np.int64(2))
    seen[0] = tickets[2]


@numba.njit
def finish(tickets: Any) -> None:
    finish_task(tickets, np.int64(1))


def test_a_stage_is_waited_for() -> None:
    tickets, seen = np.zeros(3, np.int64), np.full(1, -1)
    finish(tickets)
    wait_for_two(np.array([0, 0, 2]), seen)
    waiting = threading.Thread(target=wait_for_two, args=(tickets, seen), daemon=True)
    seen[0] = -1
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    assert seen[0] == -1
    finish(tickets)
    waiting.join(10)
    assert seen[0] == 2
    assert tickets.tolist() == [0, 0, 2]


def test_two_instances_at_once() -> None:
    together([npmoe.get_backend("numba", num_threads=n) for n in (2, 3)], "float32")


# Processes.


def script(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(HERE)])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


FORK = """
import os, sys, signal, warnings, threading, time
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on threads at a fork
import npmoe
from numba_problems import bits, draw_experts, run_experts, spread_plan
case = draw_experts(spread_plan(400, 8, 2), 96, 80, integers=False).astype("float32")
backend = npmoe.get_backend("numba", num_threads=3)
want = bits(run_experts(backend, case))
assert threading.active_count() == 3
{before}
child = os.fork()
if child == 0:
    signal.alarm(5)  # instead of waiting for ever
    same = bits(run_experts(backend, case)) == want
    os._exit(0 if same and threading.active_count() == 1 else 5)  # the child computes alone
same = bits(run_experts(backend, case)) == want
{after}
_, status = os.waitpid(child, 0)
assert same
print(os.waitstatus_to_exitcode(status))
"""


@forks
def test_after_a_fork_both_processes_work() -> None:
    result = script(FORK.format(before="", after=""))
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr


@forks
def test_a_fork_while_another_thread_computes() -> None:
    """The child must not wait for a thread that it does not have."""
    before = """
going = True
def work():
    while going:
        run_experts(backend, case)
thread = threading.Thread(target=work)
thread.start()
while not backend._engines[case.x.dtype].team._lock.locked():
    pass
"""
    after = "going = False; thread.join()"
    code = FORK.format(before=before, after=after)
    result = script(code)
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr


WORKERS = """
import numpy as np
import npmoe
from npmoe.training.workers import Workers, shared_array
from numba_problems import bits, draw_experts, run_experts, spread_plan
case = draw_experts(spread_plan(400, 8, 2), 96, 80, integers=False).astype("float32")
backend = npmoe.get_backend("numba", num_threads=2)
want = run_experts(backend, case)["output"]
found = shared_array((3, 400, 96), "float32")
class Job:
    def run(self, number):
        found[number] = run_experts(backend, case)["output"]
        return number
workers = Workers(Job(), 3)
print(workers.map("run", [0, 1, 2]))
workers.close()
assert all(f.tobytes() == want.tobytes() for f in found)
"""


@forks
def test_the_processes_of_training() -> None:
    result = script(WORKERS)
    assert (result.returncode, result.stdout) == (0, "[0, 1, 2]\n"), result.stderr
