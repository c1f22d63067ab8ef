"""Everything in turn, round after round, so that a drifting machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from npmoe.benchmark.limits import Limits

# A call this short is repeated at once, and the second counts: its threads are then awake.
SHORT_SECONDS = 0.25
_LEAST_ROUNDS = 2
# Of waiting for threads to sleep: looked at in such steps, and given up after so long.
_STEP_SECONDS = 0.01
_LONGEST_SECONDS = 2.0


def wait_for_sleeping_threads(
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.process_time,
) -> None:
    """Wait until this process uses no processor time, or for two seconds.

    Threads of a BLAS or of OpenMP spin after their work: OpenBLAS's for about 0.14 s of processor
    time, and whoever is timed meanwhile has to share a core with them.
    """
    begin = clock()
    while clock() - begin < _LONGEST_SECONDS:
        start, used = clock(), cpu_clock()
        sleep(_STEP_SECONDS)
        if cpu_clock() - used < (clock() - start) / 4:
            return


def time_in_turn(
    calls: Mapping[str, Callable[[], object]],
    limits: Limits,
    *,
    rounds: int,
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
    settle: Callable[[], None] = wait_for_sleeping_threads,
    on_round: Callable[[int], None],
) -> dict[str, list[float]]:
    """Time every call once per round; each round measures the limits and begins with another call.

    Before each, threads that still spin from the one before are waited for. Of a short call, two
    in a row are made and the second is timed.

    Parameters
    ----------
    calls : dict of str to callable
        Warmed up.
    limits : Limits
    rounds : int
        At the most.
    budget : float
        Seconds after which no round begins, except the first two.
    clock : callable
        Seconds now.
    settle : callable
        Called before every measurement.
    on_round : callable
        Called with the number of each round before it begins.

    Returns
    -------
    dict of str to list of float
        Seconds, in order.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begin = clock()
    for number in range(rounds):
        if number >= _LEAST_ROUNDS and clock() - begin > budget:
            break
        on_round(number)
        settle()
        limits.measure()
        first = number % len(names)
        for name in names[first:] + names[:first]:
            settle()
            took = _seconds(calls[name], clock)
            if took < SHORT_SECONDS:
                took = _seconds(calls[name], clock)
            seconds[name].append(took)
    return seconds


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Time one call, and what freeing its result takes."""
    start = clock()
    call()
    return clock() - start
