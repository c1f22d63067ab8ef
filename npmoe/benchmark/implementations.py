"""What is timed on a case: a forward call and a training step, ours or a peer's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from npmoe._typing import Array, HostArray
from npmoe.backends import Availability, Backend
from npmoe.benchmark.card import Card
from npmoe.benchmark.cases import Direction
from npmoe.benchmark.inputs import Inputs, move_inputs
from npmoe.layer import moe_backward, moe_forward
from npmoe.params import MoEGrads, MoEParams


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Implementation:
    """One way to compute a case.

    Attributes
    ----------
    name : str
    is_peer : bool
    forward : callable
        Returns the output (T, H) when it is there.
    step : callable
        Forward and backward; returns all gradients when they are there.
    rounding : str
        The narrowest dtype that its sums round to.
    new_gradient_bytes : int
        Of weight gradients that a step allocates, instead of reusing those of the last one.
    not_timed : dict of str to str
        Direction -> why it is not timed in it.
    operands : str or None
        What it rounds to where the experts' products begin.
    to_host : callable
        Copies one of its arrays to the host.
    release : callable
        Frees what it keeps between calls, so that a call's peak holds all it needs.
    peak : callable or None
        Returns the peak bytes of a call on a device; None: it computes on the host.
    """

    name: str
    is_peer: bool
    forward: Callable[[], Array]
    step: Callable[[], MoEGrads]
    rounding: str
    new_gradient_bytes: int
    not_timed: dict[Direction, str]
    operands: str | None = None
    to_host: Callable[[Array], HostArray] = np.asarray
    release: Callable[[], None] = lambda: None
    peak: Callable[[Callable[[], object]], int | None] | None = None

    def call(self, direction: Direction) -> Callable[[], Array | MoEGrads]:
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
        for _, array in plain_arrays(self.params):
            array[...] = np.nan


def plain_arrays(tree: Any) -> Iterator[tuple[str, Array]]:
    """Yield name and array of the fields that hold one, on the host or on a device."""
    for field in dataclasses.fields(tree) if tree is not None else ():
        value = getattr(tree, field.name)
        if hasattr(value, "dtype"):
            yield field.name, value


def build_backend(
    backend: Backend, inputs: Inputs, gradients: GradientArrays, card: Card | None = None
) -> Implementation:
    """Return the layer of a backend; its steps reuse gradient arrays with ``out=``.

    On a `card` the inputs are moved there once, and calls end when their results are there.
    """
    if card is not None:
        inputs = move_inputs(inputs, backend)
    x, params, cfg = inputs.hidden_states, inputs.params, inputs.cfg

    def forward() -> Array:
        output = moe_forward(x, params, cfg, backend=backend, save=False)[0]
        backend.synchronize()
        return output

    def step() -> MoEGrads:
        _, saved = moe_forward(x, params, cfg, backend=backend)
        grads = moe_backward(inputs.grad_output, saved, params, out=gradients.params)
        gradients.params = grads.params()
        backend.synchronize()
        return grads

    return Implementation(
        name=backend.name,
        is_peer=False,
        forward=forward,
        step=step,
        rounding=str(x.dtype),
        new_gradient_bytes=0,
        not_timed={},
        operands=backend.operands,
        to_host=backend.asnumpy,
        release=getattr(backend, "release", lambda: None),
        peak=None if card is None else card.peak,
    )
