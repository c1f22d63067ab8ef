"""Rounds, limits, samples, memory and threads, each by itself."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from bench_fakes import Clock, KnownLimits, settings

from npmoe.benchmark import machine, memory, parse_case, threads
from npmoe.benchmark.implementations import Implementation
from npmoe.benchmark.limits import MeasuredLimits
from npmoe.benchmark.result import Sample
from npmoe.benchmark.rounds import time_in_turn, wait_for_sleeping_threads
from npmoe.errors import BackendUnavailableError, RangeError

pytest.importorskip("threadpoolctl")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_sample_by_hand():
    sample = Sample.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (sample.median, sample.lower_quartile, sample.upper_quartile) == (3.0, 2.0, 4.0)
    assert sample.values == (5.0, 1.0, 3.0, 2.0, 4.0)
    assert Sample.of([7.0]) == Sample(
        median=7.0, lower_quartile=7.0, upper_quartile=7.0, values=(7.0,)
    )


# --- rounds


def run_rounds(takes, **changes):
    """Return what was called in order, the times, the limits and the rounds announced."""
    clock, called, limits, rounds = Clock(), [], KnownLimits(), []

    def call(name):
        def run():
            called.append(name)
            clock.advance(takes[name])

        return run

    options = {"rounds": 3, "budget": 1e9} | changes
    seconds = time_in_turn(
        {name: call(name) for name in takes},
        limits,
        clock=clock,
        on_round=rounds.append,
        **options,
    )
    return called, seconds, limits.measured, rounds


def test_every_round_calls_everybody_and_begins_with_another():
    called, seconds, measured, rounds = run_rounds({"a": 1.0, "b": 2.0, "c": 3.0}, rounds=4)
    assert "".join(called) == "abc bca cab abc".replace(" ", "")
    assert seconds == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [3.0] * 4}
    assert measured == 4
    assert rounds == [0, 1, 2, 3]


def test_of_a_short_call_the_second_counts():
    clock, takes = Clock(), iter([0.1, 0.05, 0.25])
    seconds = time_in_turn(
        {"a": lambda: clock.advance(next(takes))},
        KnownLimits(),
        rounds=2,
        budget=1.0,
        clock=clock,
        on_round=lambda _: None,
    )
    assert seconds["a"] == [pytest.approx(0.05), pytest.approx(0.25)]


@pytest.mark.parametrize(("budget", "rounds"), [(0.5, 2), (3.0, 2), (7.9, 2), (8.0, 3), (1e9, 6)])
def test_no_round_begins_after_the_budget_but_the_first_two(budget, rounds):
    _, seconds, measured, _ = run_rounds({"a": 1.0, "b": 3.0}, rounds=6, budget=budget)
    assert len(seconds["a"]) == len(seconds["b"]) == measured == rounds


def test_everything_is_measured_after_threads_have_gone_to_sleep():
    events = []

    class Limited(KnownLimits):
        def measure(self):
            events.append("limits")

    time_in_turn(
        {"a": lambda: events.append("a"), "b": lambda: events.append("b")},
        Limited(),
        rounds=2,
        budget=1.0,
        clock=iter(range(1000)).__next__,  # every call takes a second
        settle=lambda: events.append("settle"),
        on_round=lambda _: None,
    )
    settled = events[::2], events[1::2]
    assert settled == (["settle"] * 6, ["limits", "a", "b", "limits", "b", "a"])


@pytest.mark.parametrize(("busy_seconds", "waits"), [(0.0, 1), (0.031, 4), (0.14, 15), (1e9, 200)])
def test_waiting_ends_when_nothing_is_computed_any_more(busy_seconds, waits):
    clock, slept = Clock(), []

    def sleep(seconds):
        slept.append(seconds)
        clock.advance(seconds)

    wait_for_sleeping_threads(
        sleep=sleep, clock=clock, cpu_clock=lambda: min(clock(), busy_seconds)
    )
    assert len(slept) == pytest.approx(waits, abs=1)
    assert sum(slept) <= 2.0 + 0.02


# --- limits


def test_limits_count_flops_and_bytes_of_the_best_call():
    clock = Clock()
    limits = MeasuredLimits("float64", 2, clock=clock, gemm_size=8, read_bytes=4000)
    products, reads = iter([4.0, 2.0, 3.0]), iter([5.0, *[8.0] * 7])
    limits._multiply = lambda: clock.advance(next(products))
    limits._read_all = lambda: clock.advance(next(reads))
    limits.measure()
    flops, bytes_ = limits.take()
    assert flops.values == (2 * 8**3 / 2.0,)
    assert bytes_.values == (4000 / 5.0,)
    limits.close()


def test_limits_read_the_whole_buffer_and_multiply_in_their_dtype(monkeypatch):
    limits = MeasuredLimits("float64", 3, gemm_size=16, read_bytes=4003)
    assert limits._c.dtype == np.float64
    assert np.array_equal(limits._c, limits._a @ limits._b)
    assert sum(part.nbytes for part in limits._parts) == limits._read_bytes == 4000
    assert len(limits._parts) == 3
    seen = []
    limits._parts = [np.full(5, 1.0), np.full(5, 2.0), np.full(5, 3.0)]
    monkeypatch.setattr(limits._pool, "map", lambda f, parts: [seen.append(f(p)) for p in parts])
    limits._read_all()
    assert seen == [1.0, 2.0, 3.0]
    limits.close()


def test_limits_of_earlier_cases_are_forgotten():
    limits = MeasuredLimits("float32", 1, gemm_size=8, read_bytes=400)
    limits.measure()
    limits.measure()
    assert len(limits.take()[0].values) == 2
    limits.measure()
    assert [len(sample.values) for sample in limits.take()] == [1, 1]
    limits.close()


# --- memory


def test_arrays_are_counted_at_their_peak():
    kept = []

    def call():
        first = np.empty(1_000_000, np.uint8)
        second = np.empty(2_000_000, np.uint8)
        del first
        kept.append(np.empty(500_000, np.uint8))
        return second

    for _ in range(2):
        assert 3_000_000 <= memory.peak_arrays(call) < 3_050_000


def test_tracing_that_ran_before_goes_on():
    import tracemalloc

    tracemalloc.start()
    try:
        memory.peak_arrays(lambda: None)
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()
    memory.peak_arrays(lambda: None)
    assert not tracemalloc.is_tracing()


@linux
def test_resident_memory_is_that_of_touched_pages():
    if memory.peak_resident(lambda: None) is None:
        pytest.skip("/proc/self/clear_refs may not be written here")

    def touch(size):
        return lambda: np.ones(size, np.uint8).sum()

    for size in (20_000_000, 60_000_000):
        assert 0.95 * size < memory.peak_resident(touch(size)) < 1.15 * size + 2e6
    untouched = memory.peak_resident(lambda: np.empty(60_000_000, np.uint8))
    assert untouched < 5e6


def test_resident_memory_is_unknown_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    assert memory.peak_resident(lambda: 1 / 0) is None
    (tmp_path / "clear_refs").mkdir()  # exists, and cannot be written
    assert memory.peak_resident(lambda: 1 / 0) is None


@pytest.mark.parametrize(
    ("with_peers", "directions", "gigabytes"),
    # 3*E*H*I = 3e9 numbers, and 5*4 + ... small change.
    [
        (False, ("forward",), 12.0),
        (False, ("forward+backward",), 24.0),
        (True, ("forward", "forward+backward"), 36.0),
    ],
)
def test_a_case_that_does_not_fit(monkeypatch, with_peers, directions, gigabytes):
    chosen = settings(cases=(parse_case("1,1000,1000,1000,1"),), directions=directions)
    monkeypatch.setattr(memory, "available_memory", lambda: int(gigabytes * 1.01e9))
    memory.check_fits(chosen, with_peers=with_peers)
    monkeypatch.setattr(memory, "available_memory", lambda: int(gigabytes * 1e9))
    with pytest.raises(RangeError) as raised:
        memory.check_fits(chosen, with_peers=with_peers)
    assert str(raised.value) == (
        "bench: case must fit into memory, got 'T1-H1000-I1000-E1000-K1', which needs about "
        f"{gigabytes:.1f} GB. {gigabytes:.1f} GB are free. Choose fewer tokens or experts, or "
        "--direction forward."
    )
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    memory.check_fits(chosen, with_peers=with_peers)


@linux
def test_free_memory_is_known_on_linux():
    assert 1e6 < memory.available_memory() < 1e15


# --- threads and the machine


def test_threads_must_be_cores_that_can_be_used():
    cores = threads.usable_cores()
    assert threads.check_threads(1) == 1
    assert threads.check_threads(cores) == cores
    for wrong in (0, -1, cores + 1):
        with pytest.raises(RangeError, match=rf"--threads must lie in 1\.\.{cores}, got {wrong}\."):
            threads.check_threads(wrong)


def test_usable_cores_follow_the_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert threads.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert threads.usable_cores() == 7


def pools():
    from threadpoolctl import threadpool_info

    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_the_limit_holds_inside_and_ends(monkeypatch):
    counts = [8]
    torch = SimpleNamespace(get_num_threads=lambda: counts[-1], set_num_threads=counts.append)
    monkeypatch.setitem(sys.modules, "torch", torch)
    before = pools()
    with threads.limit_threads(1):
        assert pools() == {1}
        assert counts[-1] == 1
    assert pools() == before
    assert counts == [8, 1, 8]


def test_torch_is_not_loaded_for_its_threads(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with threads.limit_threads(1):
        assert "torch" not in sys.modules


def test_a_missing_threadpoolctl_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    with (
        pytest.raises(BackendUnavailableError, match=r"threadpoolctl must be .*'npmoe\[cli\]'"),
        threads.limit_threads(1),
    ):
        pass


def test_a_backend_with_threads_of_its_own_gets_them(monkeypatch):
    class Threaded:
        def __init__(self, num_threads=9):
            self.num_threads = num_threads

    monkeypatch.setattr(threads, "get_backend", lambda name, **options: Threaded(**options))
    assert threads.backend_with_threads("threaded", 2).num_threads == 2
    monkeypatch.undo()
    assert threads.backend_with_threads("numpy", 2).name == "numpy"


def test_the_machine_says_what_figures_depend_on():
    found = machine.describe_machine(3)
    assert found.threads == 3
    assert found.packages["numpy"] == np.__version__
    assert found.packages.keys() >= {"torch", "transformers", "numba"}
    assert found.thread_pools
    assert found.processor


@linux
def test_work_of_this_process_is_not_elsewhere():
    before = machine.busy_elsewhere()
    own = os.times()
    while os.times().user - own.user < 0.3:
        sum(range(10000))
    after = machine.busy_elsewhere()
    # Others may work meanwhile, on all cores; this process's 0.3 s must not count as theirs.
    elapsed = os.times().elapsed - own.elapsed
    assert after - before < (os.cpu_count() or 1) * elapsed - 0.2


def test_kept_memory_counts_as_memory_of_a_call():
    kept = []

    def call():
        if not kept:
            kept.append(np.zeros(1_000_000, np.int8))
        return np.zeros(1)

    one = Implementation(
        name="keeps",
        is_peer=False,
        forward=call,
        step=call,
        rounding="float32",
        new_gradient_bytes=0,
        not_timed={},
        release=kept.clear,
    )
    call()
    assert memory.measure_memory(one, "forward", 0).arrays >= 1_000_000
