"""What is timed on a case: a forward call and a training step, ours or a peer's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from npmoe._typing import HostArray
from npmoe.backends import Availability, Backend
from npmoe.benchmark.cases import Direction
from npmoe.benchmark.inputs import Inputs
from npmoe.layer import moe_backward, moe_forward
from npmoe.params import MoEGrads, MoEParams
from npmoe.tree import named_arrays


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Implementation:
    """One way to compute a case.

    Attributes
    ----------
    name : str
    is_peer : bool
    forward : callable
        Returns the output (T, H).
    step : callable
        Forward and backward; returns all gradients.
    rounding : str
        The narrowest dtype that it rounds to.
    new_gradients : bool
        Whether a step allocates weight gradients, instead of reusing those of the last one.
    not_timed : dict of str to str
        Direction -> why it is not timed in it.
    """

    name: str
    is_peer: bool
    forward: Callable[[], HostArray]
    step: Callable[[], MoEGrads]
    rounding: str
    new_gradients: bool
    not_timed: dict[Direction, str]

    def call(self, direction: Direction) -> Callable[[], HostArray | MoEGrads]:
        """Return what is timed in a direction."""
        return self.forward if direction == "forward" else self.step


class Peer(Protocol):
    """Somebody else's layer; `npmoe.benchmark.peers.PEERS` holds ours."""

    name: str

    def availability(self) -> Availability:
        """Say whether it can run here, and load what it needs."""

    def build(self, inputs: Inputs) -> Implementation:
        """Return the layer on the arrays of a case."""


class GradientArrays:
    """Weight gradients of the last step, which every backend's next step overwrites."""

    def __init__(self) -> None:
        self.params: MoEParams | None = None

    def poison(self) -> None:
        """Fill the arrays with NaN, so that a step which does not write them is found out."""
        if self.params is not None:
            for _, array in named_arrays(self.params):
                array.fill(np.nan)


def build_backend(backend: Backend, inputs: Inputs, gradients: GradientArrays) -> Implementation:
    """Return the layer of a backend; its steps reuse gradient arrays with ``out=``."""
    x, params, cfg = inputs.hidden_states, inputs.params, inputs.cfg

    def forward() -> HostArray:
        output: HostArray = moe_forward(x, params, cfg, backend=backend, save=False)[0]
        return output

    def step() -> MoEGrads:
        _, saved = moe_forward(x, params, cfg, backend=backend)
        grads = moe_backward(inputs.grad_output, saved, params, out=gradients.params)
        gradients.params = grads.params()
        return grads

    return Implementation(
        name=backend.name,
        is_peer=False,
        forward=forward,
        step=step,
        rounding=str(x.dtype),
        new_gradients=False,
        not_timed={},
    )
