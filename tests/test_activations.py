"""Activations: known values, gradients, and no floating-point error for any size of input."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npmoe import gradcheck
from npmoe.activations import ACTIVATIONS, sigmoid
from npmoe.testing.bounds import gamma

NAMES = list(ACTIVATIONS)
PLAIN = [n for n in NAMES if not ACTIVATIONS[n].gated]
DTYPES = [np.float32, np.float64]


def known(name: str, z: float) -> tuple[float, float]:
    """Return the value at z and the slope, from formulas of their own."""
    if name == "relu":
        return max(z, 0.0), float(z > 0)
    if name == "gelu":
        phi = math.erfc(-z / math.sqrt(2.0)) / 2
        return z * phi, phi + z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    s = 1 / (1 + math.exp(-z))
    return z * s, s + z * math.exp(-z) * s * s


def test_the_table() -> None:
    assert {n: a.gated for n, a in ACTIVATIONS.items()} == {
        "swiglu": True,
        "gelu": False,
        "relu": False,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_slopes(name: str, dtype: type) -> None:
    activation = ACTIVATIONS[name]
    z = np.random.default_rng(0).uniform(-6, 6, (50, 4)).astype(dtype)
    value, slope = np.vectorize(lambda v: known(name, v))(z.astype(np.float64))
    # Values and slopes stay below 8; sigmoid, erf and exp lose a few roundings each.
    bound = gamma(16, dtype) * 8.0
    if not activation.gated:
        act, grad = activation.recompute_and_backward(np.ones_like(z), z)
        assert np.abs(act - value).max() <= bound
        assert np.abs(grad - slope).max() <= bound
        return
    other = np.random.default_rng(1).integers(-3, 4, z.shape).astype(dtype)
    act, grad = activation.recompute_and_backward(
        np.full_like(z, 2.0), np.concatenate([z, other], axis=1)
    )
    assert np.abs(act - value * other).max() <= 3 * bound
    assert np.abs(grad[:, :4] - 2 * slope * other).max() <= 6 * bound
    assert np.abs(grad[:, 4:] - 2 * value).max() <= 2 * bound


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name: str) -> None:
    activation = ACTIVATIONS[name]
    pre = np.random.default_rng(3).uniform(-4, 4, (3, 6))
    gradcheck(
        activation.forward,
        lambda grad, x: (activation.backward(grad, x),),
        [pre],
        decisions=(lambda x: x > 0) if name == "relu" else None,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_recomputed_value_is_the_value(name: str, dtype: type) -> None:
    activation = ACTIVATIONS[name]
    rng = np.random.default_rng(4)
    pre = (10 * rng.standard_normal((40, 6))).astype(dtype)
    width = 3 if activation.gated else 6
    grad_act = rng.standard_normal((40, width)).astype(dtype)
    copies = pre.copy(), grad_act.copy()
    act, grad = activation.recompute_and_backward(grad_act, pre)
    assert act.tobytes() == activation.forward(pre).tobytes()
    assert grad.tobytes() == activation.backward(grad_act, pre).tobytes()
    assert act.dtype == grad.dtype == dtype
    assert act.shape == (40, width)
    assert grad.shape == pre.shape
    np.testing.assert_array_equal(pre, copies[0])
    np.testing.assert_array_equal(grad_act, copies[1])
    for result in (act, grad, activation.forward(pre)):
        assert not np.shares_memory(result, pre)
        assert not np.shares_memory(result, grad_act)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_no_overflow(name: str, dtype: type) -> None:
    activation = ACTIVATIONS[name]
    sizes = [0.0, 1e-30, 40.0, 88.8, 89.0, 104.0, 709.0, 710.0, 746.0, 1e4]
    z = np.array([sizes, np.negative(sizes)], dtype).T
    pre = np.concatenate([z, np.ones_like(z)], axis=1) if activation.gated else z
    with np.errstate(all="raise", under="ignore"):
        act, grad = activation.recompute_and_backward(np.ones_like(z), pre)
    large = np.abs(z) >= 40.0
    np.testing.assert_array_equal(act[large], np.maximum(z[large], 0.0))
    slope = grad[:, :2]
    np.testing.assert_array_equal(slope[large], (z[large] > 0).astype(dtype))
    assert np.isfinite(act).all()
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_takes_the_largest_numbers(dtype: type) -> None:
    z = np.array([np.finfo(dtype).max, -np.finfo(dtype).max])
    with np.errstate(all="raise", under="ignore"):
        act, grad = ACTIVATIONS["gelu"].recompute_and_backward(np.ones_like(z), z)
    assert act.tolist() == [z[0], 0.0]
    assert grad.tolist() == [1.0, 0.0]


def test_relu_at_zero() -> None:
    z = np.array([0.0, -0.0, 5e-324, -5e-324])
    act, grad = ACTIVATIONS["relu"].recompute_and_backward(np.ones(4), z)
    assert act.tolist() == [0.0, 0.0, 5e-324, 0.0]
    assert grad.tolist() == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid(dtype: type) -> None:
    x = np.linspace(-100, 100, 4001).astype(dtype)
    before = x.copy()
    with np.errstate(all="raise", under="ignore"):
        got = sigmoid(x)
    exact = 1.0 / (1.0 + np.exp(-x.astype(np.float64)))
    assert np.abs(got - exact).max() <= 4 * np.finfo(dtype).eps
    assert got.dtype == dtype
    assert ((got >= 0) & (got <= 1)).all()
    np.testing.assert_array_equal(x, before)
