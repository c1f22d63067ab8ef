"""Pre-activations that show one mistake each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from npmoe._typing import HostArray
from npmoe.activations import ACTIVATIONS
from npmoe.naive.activations import silu
from npmoe.testing.conformance.case import Case, Effort
from npmoe.testing.conformance.draw import WIDTHS

Rng = np.random.Generator


def describe(width: int, gate_up: HostArray, what: str) -> str:
    """Return the note of a case."""
    return f"R={gate_up.shape[0]} I={width}, {what}"


@dataclass(frozen=True, slots=True)
class ActivationCases:
    """Generators of cases of one activation, or of its backward pass."""

    name: str
    alpha: float
    limit: float
    backward: bool

    @property
    def gated(self) -> bool:
        """Whether there is an up half."""
        return ACTIVATIONS[self.name].gated

    def make(
        self,
        rng: Rng,
        effort: Effort,
        g: HostArray,
        u: HostArray,
        what: str,
        *,
        exact: bool = False,
        grad: HostArray | None = None,
    ) -> Case:
        """Return a case from gate and up half (R, I), of which a plain activation takes g."""
        gate_up = np.concatenate([g, u], axis=1) if self.gated else np.asarray(g)
        arguments = {"gate_up": gate_up.astype(effort.dtype)}
        if self.backward:
            if grad is None:
                grad = rng.choice([-2.0, -1.0, 1.0, 3.0], g.shape)
            arguments = {"grad_act": grad.astype(effort.dtype)} | arguments
        return Case(
            arguments=arguments,
            note=describe(g.shape[1], gate_up, what),
            options={"exact": exact, "what": what},
        )

    def pairs(
        self, rng: Rng, effort: Effort, values: list[tuple[float, float]], what: str
    ) -> Iterator[Case]:
        """Yield each pair (g, u) alone, then all together."""
        table = np.array(values)
        for g, u in values:
            yield self.make(rng, effort, np.array([[g]]), np.array([[u]]), what)
        yield self.make(rng, effort, table[None, :, 0], table[None, :, 1], what)

    def normal(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield normal numbers, growing in size and spread."""
        for i in range(effort.cases):
            reach = (i + 1) / effort.cases
            shape = (int(rng.integers(1, 2 + int(16 * reach))), int(rng.choice(WIDTHS[: 2 + i])))
            g, u, grad = (rng.standard_normal(shape) for _ in range(3))
            yield self.make(rng, effort, g * (1 + i % 3), u * (1 + i % 4), "normal", grad=grad)

    def integers(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield small integers, for activations that keep them."""
        for i in range(effort.cases):
            shape = (int(rng.integers(1, 3 + i)), int(rng.choice(WIDTHS[: 2 + i])))
            g, u = (rng.integers(-4, 5, shape).astype(float) for _ in range(2))
            yield self.make(rng, effort, g, u, "integers", exact=True)

    def halves_differ(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield halves that cannot be taken for each other."""
        yield from self.pairs(rng, effort, [(-2.0, 3.0), (1.5, -0.5), (3.0, 0.25)], "g unlike u")

    def halves_agree(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield g = u, so that only the places of pairs matter."""
        for width in (2, 3, 8):
            v = 0.75 * np.arange(1.0, width + 1)[None] * np.where(np.arange(width) % 2, -1, 1)
            yield self.make(rng, effort, v, v, "g = u")

    def grid(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield the curve itself, u = 1."""
        z = np.arange(-40, 41) / 8.0
        for value in z[::8]:
            yield self.make(rng, effort, np.array([[value]]), np.ones((1, 1)), "u = 1")
        yield self.make(rng, effort, z[:, None], np.ones((len(z), 1)), "u = 1")

    def beyond(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield values beyond the limit, one half at a time and both; forward also at it."""
        c = self.limit
        values = [(1.5 * c, 1.0), (1.0, 2 * c), (1.0, -3 * c), (9 * c, 9 * c), (2 * c, -2 * c)]
        if not self.backward:
            values += [(c, 1.0), (1.0, c), (1.0, -c)]
        yield from self.pairs(rng, effort, values, "beyond the limit")

    def below(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield gates below minus the limit, where nothing is cut off."""
        c = self.limit
        values = [(-c - 0.125, 1.0), (-c - 0.5, 1.0), (-1.25 * c, 0.5), (-2 * c, c), (-c, 1.0)]
        yield from self.pairs(rng, effort, values, "gate below minus the limit")

    def between(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield gates above the limit whose curve is below it."""
        c = self.limit
        gap = c - silu(c, self.alpha)
        values = [(c + 0.5 * gap, 1.0), (c + 0.25 * gap, -0.5), (c + 1.0, 1.0)]
        yield from self.pairs(rng, effort, values, "just above the limit")

    def at_limit(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield values exactly at the limit."""
        c = self.limit
        values = [(c, 1.0), (1.0, c), (1.0, -c), (c, c), (c, -c), (-1.0, c)]
        yield from self.pairs(rng, effort, values, "at the limit")

    def small_up(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield u around 0 and -1, which a shift by one tells apart."""
        values = [(1.0, 0.0), (1.0, -1.0), (2.0, -0.5), (-1.0, 0.25)]
        yield from self.pairs(rng, effort, values, "small u")

    def zeros(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield the kink at 0, of either sign."""
        yield from self.pairs(rng, effort, [(0.0, 1.0), (-0.0, 2.0), (1.0, 0.0), (0.0, 0.0)], "0")

    def large(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield numbers whose exponential or cube overflows."""
        sizes = (88.8, 104.0, 710.0, 4096.0) if self.backward else (88.8, 104.0, 710.0, 1e4)
        for size in sizes:
            pairs = [(size, 1.0), (-size, 1.0), (size, -size), (-size, size)]
            yield from self.pairs(rng, effort, pairs, f"{size:g}")

    def with_nan(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield one NaN in either half among other numbers."""
        for rows, width in ((1, 2), (2, 1), (3, 4), (5, 17)):
            for in_gate in (True, False):
                g, u = (rng.standard_normal((rows, width)) for _ in range(2))
                (g if in_gate or not self.gated else u)[rng.integers(rows), rng.integers(width)] = (
                    np.nan
                )
                yield self.make(rng, effort, g, u, "one NaN")

    def no_gradient(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield gradients of 0."""
        for size in (1.0, 89.0, 1e4):
            g, u = (size * rng.standard_normal((2, 3)) for _ in range(2))
            yield self.make(rng, effort, g, u, "grad_act = 0", grad=np.zeros((2, 3)))

    def edges_of_tiles(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield rows and widths around the tiles of kernels."""
        shapes = ((1, 17), (15, 1), (17, 16), (33, 31), (2, 65), (65, 3), (129, 2), (1, 129))
        for shape in shapes:
            g, u = (rng.standard_normal(shape) for _ in range(2))
            yield self.make(rng, effort, g, u, "beside a tile")

    def no_rows(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield R = 0."""
        for width in (1, 4):
            g = np.zeros((0, width))
            yield self.make(rng, effort, g, g, "no rows", grad=g)
