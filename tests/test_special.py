"""erf against math.erf, in units in the last place."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npmoe.special import erf


def sample() -> np.ndarray:
    """Return dense points, each binade, and the seams of the two fits."""
    rng = np.random.default_rng(0)
    seams = np.array([1.0, 6.0, 0.5, 3.0])
    steps = np.arange(-40, 41)
    near_seams = (seams[:, None] * (1.0 + steps * 2.0**-52)).ravel()
    binades = 2.0 ** rng.uniform(-1074, 4, 20_000)
    return np.concatenate([rng.uniform(0, 6.5, 120_000), binades, near_seams, [5e-324, 1e308]])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_float64_within_two_ulp(sign: float) -> None:
    x = sign * sample()
    exact = np.array([math.erf(v) for v in x.tolist()])
    got = erf(x)
    error = np.abs(got - exact) / np.spacing(np.abs(exact))
    assert error.max() <= 2.0, f"{error.max()} ulp at {x[error.argmax()]!r}"
    assert np.abs(got).max() <= 1.0


def test_float32_is_the_rounded_value() -> None:
    x = np.concatenate([sample(), -sample()])
    x = x[np.abs(x) < 1e30].astype(np.float32)
    exact = np.array([math.erf(v) for v in x.tolist()])
    got = erf(x)
    assert got.dtype == np.float32
    # Half a unit, and what two units of float64 add to it.
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    error = np.abs(got - exact) / ulp
    assert error.max() <= 0.5 + 2.0**-27


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(dtype: type) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 30.0, -30.0], dtype)
    before = x.copy()
    with np.errstate(all="raise", under="ignore"):
        got = erf(x)
    np.testing.assert_array_equal(got, np.array([np.nan, 1, -1, 0, 0, 1, -1], dtype))
    assert np.signbit(got[1:]).tolist() == [False, True, False, True, False, True]
    assert got.dtype == dtype
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (1, 0, 4)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = np.full(shape, 0.5)
    got = erf(x)
    assert got.shape == shape
    assert (np.abs(got - math.erf(0.5)) <= 2 * np.spacing(0.5)).all()


def test_strided_and_read_only() -> None:
    x = np.linspace(-3, 3, 40)
    x.flags.writeable = False
    assert erf(x[::-3]).tobytes() == erf(np.ascontiguousarray(x[::-3])).tobytes()


def test_odd_and_increasing() -> None:
    x = np.sort(sample())
    got = erf(x)
    np.testing.assert_array_equal(erf(-x), -got)
    # The fits may cross by their error, but not by more.
    assert (np.diff(got) >= -2 * np.spacing(got[1:])).all()
