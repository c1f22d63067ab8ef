"""exp and the activations of the kernels, number by number."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from needs import need_numba

need_numba()

import numba

import npmoe
from accel.curve import curve_of
from accel.numba_cpu import curves
from npmoe import MoEConfig
from npmoe.activations import ACTIVATIONS, bind_activation
from npmoe.testing import activation_bounds, check_activation, check_activation_backward
from npmoe.testing.balls import Ball, Model
from npmoe.testing.bounds import assert_within

DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
floats = pytest.mark.parametrize("dtype", DTYPES, ids=str)
names = pytest.mark.parametrize("name", ACTIVATIONS)
# Where exp overflows, and where it becomes 0.
ENDS = {"float32": (88.72284, -103.97208), "float64": (709.782712893384, -745.1332191019412)}


@numba.njit(error_model="numpy")
def exponentials(x, out):
    for i in range(x.size):
        out[i] = curves._exponential(x[i])


def exp_of(x: Any, dtype: Any) -> np.ndarray:
    x = np.asarray(x, dtype)
    out = np.full(x.shape, 77.0, dtype)
    exponentials(x, out)
    return out


def double_double_exp(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return exp of float64 numbers as an unevaluated sum, good to some 2**-100.

    In whole numbers of 2**-160: the reduced argument, and 30 terms of the series.
    """
    high, low = np.empty(len(x)), np.empty(len(x))
    one = 1 << 160
    ln2 = sum((one << 60) // (k << k) for k in range(1, 230)) >> 60
    for i, value in enumerate(x.tolist()):
        n = round(value / math.log(2.0))
        top, bottom = value.as_integer_ratio()
        r = (top << 160) // bottom - n * ln2
        total = term = one
        for k in range(1, 31):
            term = (term * r >> 160) // k
            total += term
        exact = Fraction(total, one) * Fraction(2) ** n
        high[i] = float(exact)
        low[i] = float(exact - Fraction(high[i]))
    return high, low


@floats
def test_exp_is_within_two_ulp(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    top, bottom = ENDS[str(dtype)]
    bottom = np.log(np.finfo(dtype).tiny)  # normal results
    size = 200_000 if dtype == np.float32 else 1500
    x = np.concatenate(
        [
            rng.uniform(bottom, top, size),
            rng.standard_normal(size),
            # Beside the ends of each interval of the reduction.
            (np.arange(int(bottom / np.log(2)) + 1, int(top / np.log(2))) + 0.5) * np.log(2.0),
            rng.uniform(-1, 1, 500) * 2.0 ** rng.integers(-60, 0, 500),
            [0.0, -0.0],
        ]
    ).astype(dtype)
    x = x[(x > bottom) & (x < top)]
    if dtype == np.float32:
        high, low = np.exp(x.astype(np.float64)), np.zeros(len(x))
    else:
        high, low = double_double_exp(x)
    got = exp_of(x, dtype)
    ulp = np.spacing(high.astype(dtype)).astype(np.float64)
    error = np.abs((got.astype(np.float64) - high) - low) / ulp
    assert error.max() <= 2.0, (error.max(), x[error.argmax()])
    assert error.max() > 0.3  # the reference is not the subject itself
    assert (got[x == 0] == 1.0).all()


@floats
def test_exp_at_its_ends(dtype: Any) -> None:
    top, bottom = ENDS[str(dtype)]
    info = np.finfo(dtype)
    beyond = [top * 1.0001, top + 1, 1e4, 1e30, info.max, np.inf]
    assert (exp_of(beyond, dtype) == np.inf).all()
    with np.errstate(under="ignore"):
        below = [bottom * 1.001, bottom - 1, -1e4, -1e30, info.min, -np.inf]
    assert (exp_of(below, dtype) == 0.0).all()
    assert np.isnan(exp_of([np.nan, -np.nan], dtype)).all()
    last = exp_of([np.nextafter(dtype.type(top), dtype.type(0)) * dtype.type(0.9999)], dtype)[0]
    assert np.isfinite(last)
    assert last > 0.9 * info.max


@floats
def test_exp_underflows_gradually(dtype: Any) -> None:
    """Subnormal results are within one of their steps."""
    _, bottom = ENDS[str(dtype)]
    x = np.linspace(bottom, np.log(info_tiny(dtype)), 400).astype(dtype)
    with np.errstate(under="ignore"):
        if dtype == np.float32:
            want = np.exp(x.astype(np.float64))
        else:
            shifted = exp_of(x + 500 * np.log(2.0), dtype)  # normal, tested above
            want = shifted * 2.0**-500
    got = exp_of(x, dtype)
    step = float(info_subnormal(dtype))
    # The shifted argument is rounded, which costs 746 * 2^-53 relatively.
    assert (np.abs(got.astype(np.float64) - want) <= 1.5 * step + 1e-13 * want).all()
    assert ((got > 0) & (got < info_tiny(dtype))).sum() > 300


def info_tiny(dtype: Any) -> Any:
    return np.finfo(dtype).tiny


def info_subnormal(dtype: Any) -> Any:
    return np.finfo(dtype).smallest_subnormal


def config(name: str, **options: Any) -> MoEConfig:
    return MoEConfig(hidden_size=4, activation=name, **options)


def extremes(dtype: Any) -> np.ndarray:
    """Return pairs of gate and up values (R, 2): every special number beside every other."""
    info = np.finfo(dtype)
    root = float(np.sqrt(info.max)) / 4
    sizes = [0.0, info.tiny, 1e-6, 0.5, 1.0, 7.0, 10.0, 39.9, 41.0, 88.9, 104.0, 710.0, 1e4, root]
    signed = [s * v for v in sizes for s in (1, -1)]
    return np.array([(g, u) for g in signed for u in (0.0, -0.5, 1.0, -7.0, 16.0)], dtype)


@floats
@names
def test_activations_at_extreme_values(name: str, dtype: Any) -> None:
    """Within the kit's bounds, and where the result is beyond the dtype, what the definition gives.

    The limits of gated ones are 7 and 10.
    """
    cfg, gated = config(name), ACTIVATIONS[name].gated
    pairs = extremes(dtype)
    gate_up = pairs if gated else pairs[:, :1].copy()
    rng = np.random.default_rng(0)
    grad = rng.choice([-2.0, -1.0, 1.0, 3.0], (len(pairs), 1)).astype(dtype)
    backend = npmoe.get_backend("numba")
    model, call = Model.of(dtype), cfg.activation_call()
    z, g = Ball.exact(gate_up, model), Ball.exact(grad, model)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        truth = activation_bounds.activation(z, *call)
        slope = activation_bounds.activation_backward(g, z, *call)
        got = backend.activation(gate_up, cfg)
        back = backend.activation_backward(grad, gate_up, cfg)
    most = float(np.finfo(dtype).max)
    for what, value, ball in (("forward", got, truth), ("backward", back, slope)):
        inside = ball.size <= most
        assert inside.mean() > 0.9
        assert_within(value[inside], ball.mid[inside], ball.rad[inside], f"{name} {what}")


@floats
@names
def test_activations_of_nan_and_infinity(name: str, dtype: Any) -> None:
    """No NaN but where the reference has one; infinities and zeros as it has them."""
    special = [np.nan, np.inf, -np.inf, 0.0, 1.0, -1.0]
    pairs = np.array([(g, u) for g in special for u in special], dtype)
    cfg, gated = config(name), ACTIVATIONS[name].gated
    gate_up = pairs if gated else pairs[:, :1].copy()
    grad = np.ones((len(pairs), 1), dtype)
    ours = npmoe.get_backend("numba")
    with np.errstate(all="ignore"):
        act, back = bind_activation(name).recompute_and_backward(grad, gate_up)
        got = ours.activation(gate_up, cfg), ours.activation_backward(grad, gate_up, cfg)
    for value, want in zip(got, (act, back), strict=True):
        nan = np.isnan(gate_up).any(axis=1)
        got_there, wanted = value[~nan], want[~nan]
        assert not (np.isnan(got_there) & ~np.isnan(wanted)).any()
        special_results = np.isinf(wanted) | (wanted == 0.0)
        np.testing.assert_array_equal(
            got_there[special_results], wanted[special_results], err_msg=name
        )
    # The activation of a NaN is NaN, in either half.
    assert np.isnan(got[0][np.isnan(gate_up).any(axis=1)]).all()


@names
def test_the_kit_on_activations(name: str) -> None:
    backend, cfg = npmoe.get_backend("numba"), config(name)

    def forward(gate_up: Any) -> Any:
        return backend.activation(gate_up, cfg)

    def backward(grad_act: Any, gate_up: Any) -> Any:
        return backend.activation_backward(grad_act, gate_up, cfg)

    for dtype in ("float32", "float64"):
        with np.errstate(all="ignore"):
            for report in (
                check_activation(forward, activation=name, dtype=dtype, quick=True),
                check_activation_backward(backward, activation=name, dtype=dtype, quick=True),
            ):
                assert report.passed, str(report)


@pytest.mark.parametrize("name", [n for n, f in ACTIVATIONS.items() if f.default_limit])
def test_a_limit_of_the_config_is_used(name: str) -> None:
    rng = np.random.default_rng(0)
    gate_up = rng.standard_normal((40, 10)) * 4
    grad = rng.standard_normal((40, 5))
    backend = npmoe.get_backend("numba")
    for limit in (0.75, 3.0):
        cfg = config(name, activation_limit=limit)
        other = dataclasses.replace(cfg, activation_limit=1.5)
        act, back = bind_activation(name, limit=limit).recompute_and_backward(grad, gate_up)
        np.testing.assert_allclose(backend.activation(gate_up, cfg), act, rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(
            backend.activation_backward(grad, gate_up, cfg), back, rtol=1e-13, atol=1e-14
        )
        assert (backend.activation(gate_up, other) != act).any()


@pytest.mark.parametrize("alpha", [0.5, 1.702, 3.0])
def test_alpha_of_the_config_is_used(alpha: float) -> None:
    cfg = config("swiglu_oai", activation_alpha=alpha)
    curve = curve_of(cfg, np.float32)
    assert curve.settings.tolist() == [np.float32(alpha), 7.0, np.inf, 7.0, 1.0]
    gate_up = np.random.default_rng(0).standard_normal((8, 6))
    act = bind_activation("swiglu_oai", alpha=alpha).forward(gate_up)
    got = npmoe.get_backend("numba").activation(gate_up, cfg)
    np.testing.assert_allclose(got, act, rtol=1e-14, atol=1e-15)
