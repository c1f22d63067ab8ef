"""Capacity in exact rational arithmetic, and the normalisation after a drop."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from typing import Any

import pytest

from npmoe import MoEConfig, expert_capacity


def half_even(x: Fraction) -> int:
    """Round to the nearest integer, halves to the even one."""
    low = x.numerator // x.denominator
    rest = x - low
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1)
    return low + up


ROUND = {
    "ceil": lambda x: -(-x.numerator // x.denominator),
    "floor": lambda x: x.numerator // x.denominator,
    "round": half_even,
}


@pytest.mark.parametrize("rounding", ROUND)
def test_grid_against_integer_arithmetic(rounding: Any) -> None:
    grid = product((1, 3, 8), (1, 2), ("1/3", "1.1", "0.5", "1", "1.25", "2"), (0, 5), (1, 4))
    for num_experts, top_k, factor, least, multiple in grid:
        if top_k > num_experts:
            continue
        for count_top_k in (True, False):
            if top_k == 1 and not count_top_k:
                continue
            cfg = MoEConfig(
                num_experts=num_experts,
                top_k=top_k,
                capacity_factor=factor,
                capacity_rounding=rounding,
                capacity_count_top_k=count_top_k,
                min_capacity=least,
                capacity_multiple=multiple,
            )
            for num_tokens in (0, 1, 2, 7, 12, 30, 400, 4097):
                share = Fraction(factor) * num_tokens * (top_k if count_top_k else 1) / num_experts
                rows = max(ROUND[rounding](share), least)
                rows = multiple * math.ceil(Fraction(rows, multiple))
                assert expert_capacity(num_tokens, cfg) == rows
                assert type(expert_capacity(num_tokens, cfg)) is int


def test_the_trap_of_floating_point() -> None:
    assert math.ceil(400 * 1 * 1.1 / 8) == 56  # what float64 makes of 55
    for factor in (1.1, "1.1", Fraction(11, 10)):
        cfg = MoEConfig(num_experts=8, top_k=1, capacity_factor=factor)
        assert expert_capacity(400, cfg) == 55


def test_huge_batches_are_exact() -> None:
    cfg = MoEConfig(num_experts=3, top_k=1, capacity_factor=1)
    assert expert_capacity(3 * 10**18 + 1, cfg) == 10**18 + 1


def test_explicit_rows_and_dropless() -> None:
    assert expert_capacity(5, MoEConfig()) is None
    assert expert_capacity(5, MoEConfig(expert_capacity=3)) == 3
    assert expert_capacity(10**6, MoEConfig(expert_capacity=0)) == 0
