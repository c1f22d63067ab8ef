"""Logits and choices that show one mistake each in a loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.conformance.case import Case, Effort
from npmoe.testing.conformance.draw import draw_ids, draw_separated, route_sizes

Rng = np.random.Generator


def make(logits: HostArray, topk_ids: HostArray, what: str) -> Case:
    """Return a case."""
    (tokens, experts), top_k = logits.shape, topk_ids.shape[1]
    return Case(
        arguments={
            "router_logits": np.ascontiguousarray(logits),
            "topk_ids": np.ascontiguousarray(topk_ids, np.int32),
        },
        note=f"T={tokens} E={experts} K={top_k}, {what}",
        options={"what": what},
    )


def best(logits: HostArray, top_k: int) -> HostArray:
    """Return the ids of the largest logits, the lower one among equals."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :top_k]


def turned(experts: int, top_k: int) -> HostArray:
    """Return ids (E, K) of which every expert has K, and one in every column."""
    return (np.arange(experts)[:, None] + np.arange(top_k)) % experts


@dataclass(frozen=True, slots=True)
class LossCases:
    """Generators of cases; `counts` is that of the loss."""

    counts: str | None

    def normal(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield normal logits with their top-k, or with any ids."""
        for i, (tokens, experts, top_k) in enumerate(route_sizes(rng, effort)):
            x = draw_separated(rng, (tokens, experts), effort.dtype)
            if i % 2:
                yield make(x, best(x, top_k), "ids of the top-k")
            else:
                yield make(x, draw_ids(rng, tokens, experts, top_k), "any ids")

    def uniform(self, rng: Rng, effort: Effort) -> Iterator[Case]:  # noqa: ARG002
        """Yield equal logits and balanced choices."""
        for experts, top_k in ((2, 1), (2, 2), (4, 2), (3, 3), (5, 3), (8, 2), (16, 4)):
            for value in (0.0, 2.5):
                x = np.full((experts, experts), value, effort.dtype)
                yield make(x, turned(experts, top_k), "all uniform")

    def collapsed(self, rng: Rng, effort: Effort) -> Iterator[Case]:  # noqa: ARG002
        """Yield every token at the same experts."""
        for tokens, experts, top_k in ((1, 2, 1), (2, 4, 1), (3, 4, 2), (8, 8, 2)):
            row = np.where(np.arange(experts) < top_k, 4.0 - np.arange(experts) / 4.0, 0.0)
            x = np.tile(row - np.arange(experts) / 16.0, (tokens, 1)).astype(effort.dtype)
            yield make(x, best(x, top_k), "all at the same experts")

    def same_counts(self, rng: Rng, effort: Effort) -> Iterator[Case]:  # noqa: ARG002
        """Yield the same choices with flat, steep and steeper probabilities."""
        for tokens, experts, top_k in ((1, 2, 1), (2, 3, 1), (3, 4, 2)):
            for scale in (1 / 16, 1.0, 4.0):
                x = np.tile(-scale * np.arange(experts), (tokens, 1)).astype(effort.dtype)
                yield make(x, best(x, top_k), f"logits {scale:g} apart")

    def contrary(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield ids of the smallest logits; their first column differs from the others."""
        for tokens, experts, top_k in ((1, 2, 1), (2, 4, 2), (3, 5, 2), (6, 8, 3)):
            x = draw_separated(rng, (tokens, experts), effort.dtype)
            yield make(x, best(-x, top_k), "ids of the smallest logits")

    def balanced(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield balanced top-k choices with probabilities that are not."""
        for experts, top_k in ((2, 1), (3, 1), (3, 2), (4, 2), (8, 3)):
            row = draw_separated(rng, (1, experts), "float64", gap=1 / 4)[0]
            x = np.stack([np.roll(row, t) * (0.5 + t) for t in range(experts)])
            x = x.astype(effort.dtype)
            yield make(x, best(x, top_k), "balanced choices")

    def unchosen(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield experts that no token chooses."""
        for tokens, experts, top_k in ((1, 2, 1), (2, 3, 1), (2, 4, 2), (5, 8, 3)):
            x = draw_separated(rng, (tokens, experts), effort.dtype)
            x = np.sort(x, axis=1)[:, ::-1].copy()
            yield make(x, best(x, top_k), "experts without tokens")

    def grid(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield distinct multiples of 1/4, which small steps change exactly and reorder nowhere."""
        for tokens, experts, top_k in ((1, 2, 1), (2, 3, 1), (2, 4, 2), (3, 5, 2), (4, 3, 3)):
            steps = [rng.permutation(2 * experts)[:experts] - experts for _ in range(tokens)]
            x = (np.array(steps) / 4.0).astype(effort.dtype)
            yield make(x, best(x, top_k), "multiples of 1/4")

    def steep(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield probabilities near 0 and 1."""
        for tokens, experts, top_k in ((1, 2, 1), (2, 3, 2), (3, 4, 1), (9, 8, 2)):
            x = 4.0 * draw_separated(rng, (tokens, experts), effort.dtype, gap=1 / 2)
            yield make(x.astype(effort.dtype), best(x, top_k), "steep")

    def huge(self, rng: Rng, effort: Effort) -> Iterator[Case]:  # noqa: ARG002
        """Yield logits whose exponential overflows, or underflows to 0.

        A fresh top-k of probabilities could not tell those at 0 apart.
        """
        for value in (89.0, 100.0, 710.0, 1e4):
            row = value * np.array([1.0, -1.0, 0.5])
            for top_k in (1,) if self.counts == "fresh" else (1, 2):
                for rows, what in ((row[None], "a token"), (np.stack([row, -row]), "two tokens")):
                    x = rows.astype(effort.dtype)
                    yield make(x, best(x, top_k), f"{what} with logits up to {value:g}")

    def masked(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield experts with logit -inf in every token, or in some."""
        for tokens, experts, top_k in ((1, 2, 1), (2, 4, 2), (3, 5, 2)):
            for rows in (slice(None), slice(0, 1)):
                x = draw_separated(rng, (tokens, experts), effort.dtype)
                x[rows, -1] = -np.inf
                yield make(x, best(x, top_k), "an expert at -inf")

    def one_expert(self, rng: Rng, effort: Effort) -> Iterator[Case]:  # noqa: ARG002
        """Yield E = 1, where nothing can be learned."""
        for tokens in (1, 3):
            x = np.arange(tokens, dtype=effort.dtype)[:, None]
            yield make(x, np.zeros((tokens, 1)), "one expert")

    def no_tokens(self, rng: Rng, effort: Effort) -> Iterator[Case]:  # noqa: ARG002
        """Yield T = 0."""
        for experts, top_k in ((1, 1), (4, 2)):
            yield make(np.zeros((0, experts), effort.dtype), np.zeros((0, top_k)), "no tokens")

    def many(self, rng: Rng, effort: Effort) -> Iterator[Case]:
        """Yield many experts, the last ones chosen, and tokens around the tiles of kernels."""
        shapes = ((2, 257, 2), (2, 1025, 8), (17, 5, 2), (33, 4, 1), (65, 3, 1), (129, 2, 1))
        for tokens, experts, top_k in shapes:
            x = draw_separated(rng, (tokens, experts), effort.dtype, gap=1 / 128)
            x[0].sort()
            yield make(x, best(x, top_k), "many")
