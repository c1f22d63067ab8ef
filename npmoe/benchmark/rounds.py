"""Everything in turn, round after round, so that a drifting machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from npmoe.benchmark.limits import Limits

# A call this short is repeated at once, and the second counts: the threads of the implementation
# timed before, which spin for a while, are then asleep, and its own are awake.
SHORT_SECONDS = 0.25
_LEAST_ROUNDS = 2


def time_in_turn(
    calls: Mapping[str, Callable[[], object]],
    limits: Limits,
    *,
    rounds: int,
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None],
) -> dict[str, list[float]]:
    """Time every call once per round; each round measures the limits and begins with another call.

    Of a short call, two in a row are made and the second is timed.

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
        limits.measure()
        first = number % len(names)
        for name in names[first:] + names[:first]:
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
