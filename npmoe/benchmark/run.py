"""One run: checks first, then every case, all implementations in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence

from npmoe.backends import Backend, get_backend
from npmoe.benchmark.agreement import (
    Fingerprint,
    agreement_bound,
    compare,
    fingerprint_gradients,
    fingerprint_output,
)
from npmoe.benchmark.card import Card, card_of
from npmoe.benchmark.card_limits import CardLimits
from npmoe.benchmark.cases import Case, Direction, Load
from npmoe.benchmark.implementations import (
    GradientArrays,
    Implementation,
    Peer,
    build_backend,
    plain_arrays,
)
from npmoe.benchmark.inputs import Inputs, make_inputs
from npmoe.benchmark.limits import Limits, MeasuredLimits
from npmoe.benchmark.machine import DeviceFacts, busy_elsewhere, describe_machine
from npmoe.benchmark.memory import check_fits, check_fits_card, measure_memory, num_bytes
from npmoe.benchmark.result import (
    Agreement,
    BenchmarkResult,
    CaseTimings,
    Omission,
    Sample,
    Settings,
    Timing,
)
from npmoe.benchmark.rounds import time_in_turn
from npmoe.benchmark.threads import limit_threads
from npmoe.errors import NpmoeError, RangeError
from npmoe.testing import check_backend
from npmoe.testing.conformance.report import Report

Event = CaseTimings | Omission


def run_benchmark(
    settings: Settings,
    backends: Sequence[Backend],
    peers: Sequence[Peer] = (),
    *,
    asked_peers: frozenset[str] = frozenset(),
    limits: Limits | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_event: Callable[[Event], None] = lambda _: None,
    progress: Callable[[str, float], None] = lambda *_: None,
) -> BenchmarkResult:
    """Check and time backends and peers.

    A backend is timed only if the quick conformance run is green, and anything only where its
    results agree with the NumPy backend's on the case itself.

    Parameters
    ----------
    settings : Settings
    backends : sequence of Backend
        All on host arrays, or all on a device, which is then what is measured.
    peers : sequence of Peer
        Those that cannot run here are omitted.
    asked_peers : frozenset of str
        Names whose omission makes the run incomplete.
    limits : Limits, optional
        `MeasuredLimits`, or `CardLimits` for a device, with its defaults if omitted.
    clock : callable
        Seconds now.
    on_event : callable
        Called with each `CaseTimings` and each `Omission` as it comes.
    progress : callable
        Called with what is going on and the share of the run that is done.

    Returns
    -------
    BenchmarkResult

    Raises
    ------
    RangeError
        If a case does not fit into memory, or products do not round as `settings` say.
    UnsupportedError
        If some backends work on host arrays and others do not.
    BackendUnavailableError
        If threadpoolctl is not installed.
    """
    card = card_of(backends)
    _check_operands(settings, backends)
    check_fits(settings, with_peers=bool(peers))
    if card is not None:
        check_fits_card(settings, card, num_backends=len(backends), with_peers=bool(peers))
    able = {peer.name: peer.availability() for peer in peers}  # loads torch, so before the limit
    with limit_threads(settings.threads), contextlib.ExitStack() as stack:
        device = None
        if limits is None:
            progress("limits", 0.0)
            if card is None:
                measured = MeasuredLimits(settings.dtype, settings.threads, clock=clock)
                limits = stack.enter_context(contextlib.closing(measured))
            else:
                limits = CardLimits(card, settings.dtype, settings.operands, clock=clock)
        if card is not None:
            device = DeviceFacts(name=card.name, limits=limits.text(), memory=card.memory_text)
        run = _Run(settings, card, limits, clock, on_event, progress, asked_peers, len(backends))
        for name, availability in able.items():
            if not availability.ok:
                run.omit(name, availability.reason, asked=name in asked_peers)
        usable = [peer for peer in peers if able[peer.name].ok]
        green = [backend for backend in backends if run.is_green(backend)]
        for case in settings.cases:
            run.time_case(case, green, usable)
        machine = describe_machine(settings.threads, device)
    return BenchmarkResult(
        machine=machine,
        settings=settings,
        checked=run.checked,
        cases=tuple(run.cases),
        omissions=tuple(run.omissions),
    )


def _check_operands(settings: Settings, backends: Sequence[Backend]) -> None:
    """Raise unless all backends round operands as the settings, peers and limits do."""
    for backend in backends:
        if backend.operands != settings.operands:
            raise RangeError(
                f"run_benchmark: settings.precision must be what products round to, got "
                f"{settings.precision} with backend {backend.name!r}, whose products round to "
                f"{backend.operands}. Limits, peers and the bound of agreement follow it."
            )


class _Run:
    """What a run has found so far."""

    def __init__(
        self,
        settings: Settings,
        card: Card | None,
        limits: Limits,
        clock: Callable[[], float],
        on_event: Callable[[Event], None],
        progress: Callable[[str, float], None],
        asked_peers: frozenset[str],
        num_backends: int,
    ) -> None:
        self.settings, self.card, self.limits, self.clock = settings, card, limits, clock
        self.on_event, self.progress, self.asked_peers = on_event, progress, asked_peers
        self.checked: dict[str, bool] = {}
        self.cases: list[CaseTimings] = []
        self.omissions: list[Omission] = []
        self._done = 0
        # Every direction is checked, timed in rounds, and measured.
        per_case = 1 + len(settings.directions) * (settings.rounds + 2)
        self._steps = num_backends + len(settings.cases) * per_case

    def is_green(self, backend: Backend) -> bool:
        """Run the quick conformance checks of a backend; note and announce a refusal."""

        def say(check: str) -> None:
            self.progress(f"{backend.name}: {check}", self._done / self._steps)

        red: list[str] = []
        for dtype in dict.fromkeys((self.settings.dtype, self.settings.weights)):
            report: Report = check_backend(
                backend, quick=True, dtype=dtype, name=backend.name, progress=say
            )
            red += [failure.check for failure in report.failures]
        self._done += 1
        self.checked[backend.name] = not red
        if red:
            reason = f"its conformance run is red: {', '.join(dict.fromkeys(red))}"
            self.omit(backend.name, reason, red_checks=tuple(dict.fromkeys(red)), asked=True)
        return not red

    def time_case(self, case: Case, backends: Sequence[Backend], peers: Sequence[Peer]) -> None:
        """Time everything on one case."""
        self._step(f"{case.name}: inputs")
        chosen = self.settings
        inputs = make_inputs(case, chosen.dtype, chosen.weights, chosen.operands)
        numpy_backend = get_backend("numpy")
        gradients = [GradientArrays()]
        reference = build_backend(numpy_backend, inputs, gradients[0])
        logits = numpy_backend.linear(inputs.hidden_states, inputs.params.router_weight)
        routing = numpy_backend.route(logits, inputs.cfg)
        plan = numpy_backend.plan_dispatch(routing.topk_ids, num_experts=case.num_experts)
        load, routing_bytes = Load.of(plan), num_bytes(routing)
        found = []
        for backend in backends:
            if self.card is not None:  # arrays of one are nothing to another
                gradients.append(GradientArrays())
            found.append(build_backend(backend, inputs, gradients[-1], self.card))
        found += [peer.build(inputs) for peer in peers]
        for direction in self.settings.directions:
            self._step(f"{case.name} {direction}: checks")
            expected = _fingerprint(reference, direction)
            agreements = {}
            for one in found:
                for arrays in gradients:
                    arrays.poison()
                agreement = self._agreement(one, expected, case, load, direction)
                if agreement is not None:
                    agreements[one.name] = agreement
            del expected
            able = [one for one in found if one.name in agreements]
            if able:
                timings = self._time(inputs, load, routing_bytes, direction, able, agreements)
                self.cases.append(timings)
                self.on_event(timings)

    def _agreement(
        self,
        one: Implementation,
        expected: Fingerprint,
        case: Case,
        load: Load,
        direction: Direction,
    ) -> Agreement | None:
        """Return by how much results differ, or None if the implementation must not be timed."""
        if direction in one.not_timed:
            asked = one.name in self.asked_peers
            self.omit(
                one.name, one.not_timed[direction], asked=asked, case=case.name, direction=direction
            )
            return None
        bound = agreement_bound(case, load, direction, one.rounding, one.operands)
        try:
            agreement = compare(_fingerprint(one, direction), expected, bound)
        except NpmoeError as error:  # legal, but not for this implementation
            asked = not one.is_peer or one.name in self.asked_peers
            self.omit(one.name, str(error), asked=asked, case=case.name, direction=direction)
            return None
        if not agreement.ok:
            reason = (
                f"its {agreement.where} differs from the numpy backend's by "
                f"{agreement.difference:.1e}, allowed are {bound:.1e}"
            )
            self.omit(one.name, reason, asked=True, case=case.name, direction=direction)
            return None
        return agreement

    def _time(
        self,
        inputs: Inputs,
        load: Load,
        routing_bytes: int,
        direction: Direction,
        able: list[Implementation],
        agreements: dict[str, Agreement],
    ) -> CaseTimings:
        case, label = inputs.case, f"{inputs.case.name} {direction}"
        calls = {one.name: one.call(direction) for one in able}
        first, start, busy = self._done, time.perf_counter(), busy_elsewhere()
        seconds = time_in_turn(
            calls,
            self.limits,
            rounds=self.settings.rounds,
            budget=self.settings.budget,
            clock=self.clock,
            on_round=lambda number: self._step(f"{label}: round {number + 1}"),
        )
        self._done = first + self.settings.rounds  # the budget may have ended it earlier
        other_load = _other_load(busy, time.perf_counter() - start)
        flops_per_second, bytes_per_second = self.limits.take()
        cost = self.settings.cost(case, load, direction)
        floor = cost.floor(flops_per_second.median, bytes_per_second.median)
        samples = {name: Sample.of(values) for name, values in seconds.items()}
        best_peer = min((samples[o.name].median for o in able if o.is_peer), default=None)
        self._step(f"{label}: memory")
        timings = []
        for one in able:
            sample = samples[one.name]
            memory = measure_memory(one, direction, routing_bytes)
            timings.append(
                Timing(
                    name=one.name,
                    is_peer=one.is_peer,
                    seconds=sample,
                    share_of_limit=floor / sample.median,
                    ratio_to_best_peer=None if best_peer is None else best_peer / sample.median,
                    memory=memory,
                    agreement=agreements[one.name],
                )
            )
        return CaseTimings(
            case=case,
            direction=direction,
            load=load,
            cost=cost,
            flops_per_second=flops_per_second,
            bytes_per_second=bytes_per_second,
            floor_seconds=floor,
            other_load=other_load,
            timings=tuple(timings),
        )

    def _step(self, label: str) -> None:
        self.progress(label, self._done / self._steps)
        self._done += 1

    def omit(
        self,
        name: str,
        reason: str,
        *,
        asked: bool,
        case: str | None = None,
        direction: str | None = None,
        red_checks: tuple[str, ...] = (),
    ) -> None:
        """Note and announce what is not timed."""
        omission = Omission(
            name=name,
            reason=reason,
            case=case,
            direction=direction,
            red_checks=red_checks,
            asked=asked,
        )
        self.omissions.append(omission)
        self.on_event(omission)


def _other_load(busy_before: float | None, seconds: float) -> float | None:
    """Return the cores that other processes kept busy on average."""
    busy = busy_elsewhere()
    if busy_before is None or busy is None:
        return None
    return max(0.0, busy - busy_before) / seconds


def _fingerprint(one: Implementation, direction: Direction) -> Fingerprint:
    if direction == "forward":
        return fingerprint_output(one.to_host(one.forward()))
    grads = one.step()
    host = {name: one.to_host(array) for name, array in plain_arrays(grads)}
    return fingerprint_gradients(dataclasses.replace(grads, **host))
