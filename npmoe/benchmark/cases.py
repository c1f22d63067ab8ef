"""What is timed: the named cases, cases of the user's, and what each costs at the least."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from npmoe.dispatch import DispatchPlan
from npmoe.errors import RangeError

Direction = Literal["forward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layer and its number of tokens.

    Raises
    ------
    RangeError
        If a size is less than 1, or K exceeds E.
    """

    name: str
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        if min(self.sizes) < 1:
            raise RangeError(
                f"bench: case must hold five positive whole numbers T,H,I,E,K, got {self.name!r}."
            )
        if self.top_k > self.num_experts:
            raise RangeError(
                f"bench: case must have K at most E = {self.num_experts}, got K = {self.top_k} "
                f"in {self.name!r}. The order is T,H,I,E,K."
            )

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """T, H, I, E, K."""
        return (
            self.num_tokens,
            self.hidden_size,
            self.intermediate_size,
            self.num_experts,
            self.top_k,
        )

    @property
    def num_weights(self) -> int:
        """How many numbers the weights of all experts are."""
        return 3 * self.num_experts * self.hidden_size * self.intermediate_size


def _case(name: str, sizes: tuple[int, int, int, int, int]) -> Case:
    T, H, I, E, K = sizes
    return Case(name=name, num_tokens=T, hidden_size=H, intermediate_size=I, num_experts=E, top_k=K)


CASES = {
    name: _case(name, sizes)
    for name, sizes in {
        "decode1_mixtral": (1, 1024, 3584, 8, 2),
        "decode16_mixtral": (16, 1024, 3584, 8, 2),
        "prefill_mixtral": (1024, 1024, 3584, 8, 2),
        "train_small": (4096, 512, 1024, 8, 2),
        "decode1_olmoe": (1, 2048, 1024, 64, 8),
        "decode32_olmoe": (32, 2048, 1024, 64, 8),
        "prefill_olmoe": (512, 2048, 1024, 64, 8),
        "switch_many": (2048, 256, 1024, 512, 1),
    }.items()
}


def parse_case(text: str) -> Case:
    """Return a named case, or one of five sizes "T,H,I,E,K", named after them.

    Raises
    ------
    RangeError
        If it is neither.

    Examples
    --------
    >>> parse_case("train_small").sizes
    (4096, 512, 1024, 8, 2)
    >>> parse_case("64,32,48,8,2").name
    'T64-H32-I48-E8-K2'
    """
    if text in CASES:
        return CASES[text]
    parts = text.split(",")
    if len(parts) == 1:
        near = difflib.get_close_matches(text, CASES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RangeError(
            f"bench: case must be a known name or T,H,I,E,K, got {text!r}.{hint} "
            f"Known: {', '.join(CASES)}."
        )
    if len(parts) != 5 or not all(part.strip().isdecimal() for part in parts):
        raise RangeError(
            f"bench: case must hold five positive whole numbers T,H,I,E,K, got {text!r}."
        )
    T, H, I, E, K = map(int, parts)
    return _case(f"T{T}-H{H}-I{I}-E{E}-K{K}", (T, H, I, E, K))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How the routes of one call fell on the experts."""

    num_rows: int
    used_experts: int
    largest: int  # rows of the busiest expert

    @classmethod
    def of(cls, plan: DispatchPlan) -> Load:
        """Count the rows of a plan."""
        rows = np.diff(np.asarray(plan.expert_offsets))
        return cls(
            num_rows=int(rows.sum()),
            used_experts=int(np.count_nonzero(rows)),
            largest=int(rows.max(initial=0)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The least that a case costs, counted.

    Attributes
    ----------
    flops : int
        Of the experts' matrix products: 2*R*3*H*I, three times that with the backward pass.
    weight_bytes : int
        The weights of the used experts, read once; with the backward pass they are read twice and
        their gradients written.
    extra_bytes : int
        Memory beyond inputs, parameters, their gradients and the routing; see README.md.
    """

    flops: int
    weight_bytes: int
    extra_bytes: int

    @property
    def intensity(self) -> float:
        """Flops per byte."""
        return self.flops / self.weight_bytes

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the least time that both limits allow, in seconds."""
        return max(self.flops / flops_per_second, self.weight_bytes / bytes_per_second)


def count_cost(
    case: Case, load: Load, direction: Direction, *, itemsize: int, weight_itemsize: int
) -> Cost:
    """Count flops, bytes and memory of one call; itemsizes are those of the dtypes."""
    T, H, I = case.num_tokens, case.hidden_size, case.intermediate_size
    R, largest = load.num_rows, load.largest
    weights = load.used_experts * 3 * H * I
    workspace = H * R + H * T + largest * (3 * I + H)
    if direction == "forward":
        return Cost(
            flops=6 * R * H * I,
            weight_bytes=weights * weight_itemsize,
            extra_bytes=workspace * itemsize,
        )
    return Cost(
        flops=18 * R * H * I,
        weight_bytes=weights * (2 * weight_itemsize + itemsize),
        extra_bytes=(workspace + 2 * I * R + H * T) * itemsize,
    )
