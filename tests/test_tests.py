"""The rules that hold in all tests (conftest.py) do hold."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("divide", lambda zero: 1 / zero),
        ("invalid", lambda zero: zero / zero),
        ("invalid", lambda zero: np.inf * zero),
        ("invalid", lambda zero: np.log(zero - 1)),
        ("overflow", lambda zero: np.exp(zero + 1000)),
    ],
)
def test_floating_point_errors_raise(name: str, operation) -> None:
    with pytest.raises(FloatingPointError, match=name):
        operation(np.zeros(3))


def test_a_flag_of_the_blas_is_not_an_error() -> None:
    product = np.full((2, 5), np.inf, np.float32) @ np.zeros((5, 1), np.float32)
    assert np.isnan(product).all()  # so the flag was set, and what is compared shows it
