"""What a forward pass draws at random, as arrays: the definition has no generator."""

from __future__ import annotations

from dataclasses import dataclass

from npmoe._typing import HostArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Random numbers, each None where there is none.

    Attributes
    ----------
    jitter : (T, H) float array or None
        Factors of the router's input, drawn from U(1 - eps, 1 + eps).
    noise : (T, E) float array or None
        Added to the logits, drawn from N(0, std^2).
    gumbel : (T, E) float array or None
        Added to the logits when the second expert is sampled.
    second : (T,) float array or None
        U(0, 1): a second expert of weight w stays if 2 w exceeds it.
    drop : (T, K) float array or None
        Rank of every route under drop_policy "random"; the smallest stay.
    dropout : (T, K, I) bool array or None
        Which activations stay; (sequences, E * S, I) for soft routing. K may be larger than needed.
    """

    jitter: HostArray | None = None
    noise: HostArray | None = None
    gumbel: HostArray | None = None
    second: HostArray | None = None
    drop: HostArray | None = None
    dropout: HostArray | None = None


NO_DRAWS = Draws()


def row_of(array: HostArray | None, *place: int) -> HostArray | None:
    """Return array[place], or None of None."""
    return None if array is None else array[place]
