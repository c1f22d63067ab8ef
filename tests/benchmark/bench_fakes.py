"""A clock that is set, limits that are known, and layers that take as long as they say."""

from __future__ import annotations

import dataclasses

import numpy as np

from accel.loopback import LoopbackBackend
from npmoe.backends import Availability, NumpyBackend
from npmoe.benchmark import Settings, parse_case
from npmoe.benchmark.implementations import Implementation
from npmoe.benchmark.memory import num_bytes
from npmoe.benchmark.result import Sample
from npmoe.layer import moe_backward, moe_forward

SMALL = parse_case("12,16,24,4,2")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


class KnownLimits:
    """A gigaflop and a tenth of a gigabyte per second, however often they are measured."""

    def __init__(self):
        self.measured = 0

    def measure(self):
        self.measured += 1

    def take(self):
        taken, self.measured = self.measured, 0
        return Sample.of([1e9] * taken), Sample.of([1e8] * taken)

    def text(self):
        return "known"


class ClockedCard(LoopbackBackend):
    """A device that is not there; forward calls take a second, the first a hundred more."""

    name = "card"

    def __init__(self, clock, operands=None):
        self.clock, self.operands, self.log = clock, operands, []

    def asarray(self, x):
        self.log.append("asarray")
        return super().asarray(x)

    def synchronize(self):
        self.log.append("synchronize")

    def plan_dispatch(self, *args, **options):
        self.log.append("plan")
        self.clock.advance(1.0 if self.log.count("plan") > 1 else 101.0)
        return super().plan_dispatch(*args, **options)


class ClockedBackend(NumpyBackend):
    """NumPy's backend; one forward call takes a second more by the clock."""

    name = "clocked"

    def __init__(self, clock):
        self.clock = clock

    def experts_forward(self, *args, **options):
        self.clock.advance(1.0)
        return super().experts_forward(*args, **options)


class FakePeer:
    """The NumPy backend under another name, as slow and as wrong as it is told to be."""

    def __init__(
        self, name, clock, seconds, *, ok=True, not_timed=None, wrong=0.0, wrong_field=None
    ):
        self.name, self.clock, self.seconds = name, clock, seconds
        self.ok, self.not_timed = ok, not_timed or {}
        self.wrong, self.wrong_field = wrong, wrong_field
        self.calls = []

    def availability(self):
        return Availability(self.ok, "" if self.ok else "needs a package")

    def build(self, inputs):
        def forward():
            self.calls.append("forward")
            self.clock.advance(self.seconds)
            output = moe_forward(
                inputs.hidden_states, inputs.params, inputs.cfg, "numpy", save=False
            )[0]
            return self._spoil("output", output)

        def step():
            self.calls.append("step")
            self.clock.advance(3 * self.seconds)
            _, saved = moe_forward(inputs.hidden_states, inputs.params, inputs.cfg, "numpy")
            grads = moe_backward(inputs.grad_output, saved, inputs.params)
            if self.wrong_field not in (None, "output"):
                right = getattr(grads, self.wrong_field)
                wrong = self._spoil(self.wrong_field, right)
                grads = dataclasses.replace(grads, **{self.wrong_field: wrong})
            return grads

        return Implementation(
            name=self.name,
            is_peer=True,
            forward=forward,
            step=step,
            rounding="float32",
            new_gradient_bytes=num_bytes(inputs.params),
            not_timed=self.not_timed,
        )

    def _spoil(self, name, array):
        """Change the last row alone."""
        if name == self.wrong_field:
            array = np.array(array)
            array[-1] += np.asarray(self.wrong, array.dtype) * np.abs(array[-1])
        return array


def settings(**changes):
    values = {
        "cases": (SMALL,),
        "directions": ("forward", "forward+backward"),
        "dtype": "float32",
        "weights": "float32",
        "rounds": 3,
        "budget": 1e9,
        "threads": 1,
    }
    return Settings(**(values | changes))
