"""Router logits that show one mistake each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.conformance.case import Case, Effort
from npmoe.testing.conformance.draw import draw_separated, route_sizes

Rng = np.random.Generator


def describe(logits: HostArray, top_k: int, what: str) -> str:
    """Return the note of a case."""
    return f"T={logits.shape[0]} E={logits.shape[1]} K={top_k}, {what}"


def make(logits: HostArray, top_k: int, what: str) -> Case:
    """Return a case."""
    return Case(
        arguments={"router_logits": np.ascontiguousarray(logits), "top_k": top_k},
        note=describe(logits, top_k, what),
        options={"what": what},
    )


@dataclass(frozen=True, slots=True)
class RouterCases:
    """Generators of cases; those of a sigmoid stay where it does not saturate."""

    softmax: bool

    def separated(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield logits that no rounding confuses."""
        for tokens, experts, top_k in route_sizes(rng, effort):
            yield make(draw_separated(rng, (tokens, experts), effort.dtype), top_k, "distinct")

    def several_of_more(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield 1 < K < E."""
        for case in self.separated(rng, effort):
            x, top_k = case.arguments.values()
            if 1 < top_k < x.shape[1]:
                yield case

    def single(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield K = 1."""
        for tokens, experts, _ in route_sizes(rng, effort):
            yield make(draw_separated(rng, (tokens, experts), effort.dtype), 1, "one choice")

    def normal(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield normal logits, every third time with pairs that differ in the last bit."""
        for i, (tokens, experts, top_k) in enumerate(route_sizes(rng, effort)):
            x = (3.0 * rng.standard_normal((tokens, experts))).astype(effort.dtype)
            if i % 3 == 0:
                near = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)
                half = experts // 2
                rows = np.arange(tokens)[:, None]
                x[rows, near[:, :half]] = np.nextafter(x[rows, near[:, half : 2 * half]], np.inf)
            yield make(x, top_k, "near ties" if i % 3 == 0 else "normal")

    def close(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield logits just above 1 that are too close for the next narrower dtype."""
        gap = 2.0**-13 if effort.dtype == "float32" else 2.0**-30
        for tokens, experts, top_k in route_sizes(rng, effort):
            if top_k < experts:
                steps = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)
                yield make((1.0 + gap * steps).astype(effort.dtype), top_k, f"{gap:g} apart")

    def tied(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield equal logits: all of them, or many at the edge of the choice."""
        for value in (0.0, 2.5, -3.0):
            for experts, top_k in ((2, 1), (4, 2), (5, 5), (9, 4)):
                yield make(np.full((1, experts), value, effort.dtype), top_k, "all equal")
        for tokens, experts, top_k in route_sizes(rng, effort):
            x = rng.integers(-1, 2, (tokens, experts)).astype(effort.dtype)
            yield make(x, top_k, "many equal")

    def one_sign(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield logits all below, or all above 0."""
        shift = 50.0 if self.softmax else 10.0
        for tokens, experts, top_k in route_sizes(rng, effort):
            x = draw_separated(rng, (tokens, experts), effort.dtype)
            for sign, what in ((-1, "all negative"), (1, "all positive")):
                yield make(x + np.array(sign * shift, x.dtype), top_k, what)

    def square(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield T = E, and tokens whose logits lie far from each other's."""
        far = 300.0 if self.softmax else 3.0
        for size, top_k in ((2, 1), (2, 2), (3, 2), (8, 3)):
            x = draw_separated(rng, (size, size), effort.dtype)
            yield make(x, top_k, "T = E")
            shift = far * (np.arange(size) % 3 - 1.0)
            yield make(x + shift[:, None].astype(x.dtype), top_k, "tokens far apart")

    def huge(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield logits whose exponential overflows."""
        for top_k in (1, 2, 3):
            for value in (89.0, 100.0, 710.0, 1e4, 1e30):
                row = value * np.array([1.0, -1.0, 0.5])
                yield make(row[None].astype(effort.dtype), top_k, f"up to {value:g}")
            x = draw_separated(rng, (2, 4), effort.dtype)
            yield make(x + np.array(1000.0, x.dtype), top_k, "around 1000")
            yield make(x * np.array(4096.0, x.dtype), top_k, "times 4096")

    def underflow(self, rng: Rng, effort: Effort) -> Iterator[Case]:  # noqa: ARG002
        """Yield scores that underflow, of some or of all chosen."""
        for row in ([0.0, -1e4], [0.0, -200.0, -1e4], [-200.0, 0.0, -900.0, -901.0]):
            for top_k in range(1, len(row) + 1):
                yield make(np.array([row], effort.dtype), top_k, "far apart")
        for value in (-95.0, -200.0, -1e4):
            x = value - np.arange(4.0)[None]
            yield make(x.astype(effort.dtype), 2, f"all near {value:g}")

    def near_eps(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield sigmoids about as large as 1e-20."""
        for tokens, experts, top_k in route_sizes(rng, effort):
            if experts > 1 < top_k:
                x = draw_separated(rng, (tokens, experts), effort.dtype)
                yield make(x - np.array(46.0, x.dtype), top_k, "scores near 1e-20")

    def masked(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield rows with -inf, with enough other logits and without."""
        for tokens, experts, top_k in ((1, 2, 1), (1, 2, 2), (2, 4, 2), (3, 5, 4), (4, 8, 8)):
            x = draw_separated(rng, (tokens, experts), effort.dtype)
            x[:, rng.permutation(experts)[: max(1, experts // 2)]] = -np.inf
            yield make(x, top_k, "half masked")

    def broken(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield a row without a finite largest logit among others."""

        def set_all(value: float) -> Callable[[HostArray], None]:
            return lambda row: row.fill(value)

        def set_some(*values: float) -> Callable[[HostArray], None]:
            def change(row: HostArray) -> None:
                row[-len(values) :] = values

            return change

        nan, inf = np.nan, np.inf
        changes = {
            "a NaN": set_some(nan),
            "all NaN": set_all(nan),
            "an infinity": set_some(inf),
            "infinities": set_some(inf, inf),
            "both infinities": set_some(inf, -inf),
            "NaN and infinity": set_some(nan, inf),
            "all -inf": set_all(-inf),
        }
        shapes = ((2, 3, 2), (3, 4, 4), (2, 2, 1), (5, 8, 3))
        for tokens, experts, top_k in shapes[:2] if effort.quick else shapes:
            for what, change in changes.items():
                x = draw_separated(rng, (tokens, experts), effort.dtype)
                change(x[int(rng.integers(tokens))])
                yield make(x, top_k, f"{what} in a row")

    def many_experts(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield 257 and 1,025 experts whose last ones have the largest logits."""
        shapes = ((65, 3), (129, 2), (257, 1), (257, 8), (1025, 2), (1025, 32))
        for experts, top_k in shapes:
            x = draw_separated(rng, (2, experts), effort.dtype, gap=1 / 128)
            x[0].sort()
            yield make(x, top_k, "the last are best")

    def many_choices(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield K up to 32 and K = E."""
        for experts, top_k in ((9, 9), (17, 9), (33, 31), (40, 32), (33, 33), (64, 24)):
            yield make(draw_separated(rng, (3, experts), effort.dtype), top_k, "many choices")

    def edges_of_tiles(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield tokens and experts around the tiles of kernels."""
        for tokens, experts in ((15, 4), (17, 5), (33, 31), (63, 7), (65, 8), (129, 3), (257, 2)):
            x = draw_separated(rng, (tokens, experts), effort.dtype)
            yield make(x, min(2, experts), "beside a tile")

    def no_tokens(self, rng: Rng, effort: Effort) -> Iterator[Case]:  # noqa: ARG002
        """Yield T = 0."""
        for experts, top_k in ((1, 1), (4, 2)):
            yield make(np.zeros((0, experts), effort.dtype), top_k, "no tokens")
