"""naive.activations against closed forms, one-sided differences and central differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npmoe.activations import ACTIVATIONS
from npmoe.naive.activations import (
    GATED,
    LIMITS,
    PLAIN,
    activate,
    activate_backward,
    gated,
    gelu,
    gelu_slope,
    gelu_tanh,
    gelu_tanh_slope,
    relu,
    relu_slope,
    silu,
    silu_slope,
)

NAMES = [*GATED, *PLAIN]
PARAMETERS = [(n, None, None) for n in NAMES] + [
    ("swiglu_clamp_pre", None, 1.5),
    ("swiglu_clamp_post", None, 0.75),
    ("swiglu_oai", 0.5, 1.5),
]


def test_the_names_and_published_values_are_those_of_the_table() -> None:
    assert set(NAMES) == set(ACTIVATIONS)
    assert set(GATED) == {n for n, a in ACTIVATIONS.items() if a.gated}
    assert {n: a.default_limit for n, a in ACTIVATIONS.items() if a.default_limit} == LIMITS
    assert gated(1.0, 0.0, "swiglu_oai") == gated(1.0, 0.0, "swiglu_oai", alpha=1.702, limit=7.0)
    assert ACTIVATIONS["swiglu_oai"].default_alpha == 1.702


def test_values_by_hand() -> None:
    e = math.e
    for got, want in [
        (silu(1.0), e / (1 + e)),
        (silu(-2.0, 0.5), -2 / (1 + e)),
        (silu_slope(0.0), 0.5),
        (silu_slope(1.0), e / (1 + e) + e / (1 + e) ** 2),
        (gelu(1.0), 0.841344746068543),
        (gelu_slope(0.0), 0.5),
        (gelu_slope(1.0), 0.841344746068543 + 0.241970724519143),
        (gelu_tanh(1.0), 0.5 + 0.5 * math.tanh(0.7978845608028654 * 1.044715)),
        (gelu_tanh_slope(0.0), 0.5),
        (relu(-2.0), 0.0),
        (relu_slope(3.0), 1.0),
        (PLAIN["relu2"][0](-3.0), 0.0),
        (PLAIN["relu2"][0](3.0), 9.0),
        (PLAIN["relu2"][1](3.0), 6.0),
    ]:
        assert abs(got - want) < 1e-15


def test_what_the_gate_half_goes_through() -> None:
    for name, plain in [("swiglu", silu), ("geglu", gelu), ("geglu_tanh", gelu_tanh)]:
        assert gated(-1.5, 4.0, name)[0] == plain(-1.5) * 4.0
        assert gated(-1.5, 4.0, name)[2] == plain(-1.5)
    assert gated(1.5, 4.0, "reglu") == (6.0, 4.0, 1.5)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("swiglu", 9 / (1 + math.exp(-9)) * -8),
        ("swiglu_clamp_pre", 7 / (1 + math.exp(-7)) * -7),
        ("swiglu_clamp_post", 7 * -7),
        ("swiglu_oai", 7 / (1 + math.exp(-1.702 * 7)) * -6),
        ("geglu", -72.0),
        ("geglu_tanh", -72.0),
        ("reglu", -72.0),
    ],
)
def test_beyond_the_limits_by_hand(name: str, want: float) -> None:
    limit = 7.0 if name in LIMITS else None
    value, by_g, by_u = gated(9.0, -8.0, name, limit=limit)
    assert abs(value - want) < 1e-13
    assert (by_g == by_u == 0.0) == (name in LIMITS)


@pytest.mark.parametrize(("name", "alpha", "limit"), PARAMETERS)
def test_slopes(name: str, alpha: float | None, limit: float | None, assert_gradient) -> None:
    # All pairs of gate and up values, none within a step of a kink.
    points = np.array([-30.0, -5.0, -1.3, -0.2, 0.1, 0.9, 1.7, 4.0, 12.0, 30.0])
    if name in GATED:
        points = np.stack(np.meshgrid(points, points[1:-1])).reshape(-1)
    grad = np.linspace(-1.0, 1.0, len(points) // (2 if name in GATED else 1))
    found = activate_backward(grad, points, name, alpha, limit)
    assert_gradient(lambda z: float(activate(z, name, alpha, limit) @ grad), points, found)


@pytest.mark.parametrize("name", LIMITS)
def test_at_a_limit_the_slope_is_the_one_from_inside(name: str) -> None:
    h = 2.0**-24
    for limit in (LIMITS[name], 1.5):

        def value(g: float, u: float) -> float:
            return gated(g, u, name, limit=limit)[0]  # noqa: B023

        for u, inward in ((limit, -h), (-limit, h)):
            by_u = gated(0.5, u, name, limit=limit)[2]
            assert abs((value(0.5, u + inward) - value(0.5, u)) / inward - by_u) < 1e-6
            assert by_u > 0.3
            assert value(0.5, u - inward) == value(0.5, u)
            assert gated(0.5, u - inward, name, limit=limit)[2] == 0.0
        # Where SiLU comes first, the limit is met at the g whose SiLU it is.
        g, bound = (limit, limit) if name != "swiglu_clamp_post" else (limit, silu(limit))
        at, outside = (gated(x, 0.5, name, limit=bound) for x in (g, g + 2.0**-20))
        inner = gated(g - h, 0.5, name, limit=bound)
        assert abs((at[0] - inner[0]) / h - at[1]) < 1e-6
        assert at[1] > 0.45
        assert outside[0] == at[0]
        assert outside[1] == 0.0


def test_there_is_no_limit_below_the_gate() -> None:
    for name in LIMITS:
        value, by_g, _ = gated(-3.0, 1.0, name, limit=1.0)
        factor = 2.0 if name == "swiglu_oai" else 1.0
        alpha = 1.702 if name == "swiglu_oai" else 1.0
        assert value == silu(-3.0, alpha) * factor
        assert by_g == silu_slope(-3.0, alpha) * factor != 0.0


def test_kinks_at_zero_take_the_left_derivative() -> None:
    assert gated(0.0, 3.0, "reglu") == (0.0, 0.0, 0.0)
    assert activate_backward(np.ones(2), np.array([0.0, -0.0]), "relu").tolist() == [0.0, 0.0]
    assert activate_backward(np.ones(2), np.array([0.0, 2.0**-30]), "relu2").tolist() == [
        0.0,
        2.0**-29,
    ]


@pytest.mark.parametrize("name", NAMES)
def test_huge_values(name: str) -> None:
    row = np.array([-1e30, -1e4, -88.8, 88.8, 1e4, 1e30])
    huge = np.concatenate([row, np.ones(6)]) if name in GATED else row
    act = activate(huge, name)
    want = np.minimum(np.maximum(row, 0.0), LIMITS.get(name, math.inf))
    want = want**2 if name == "relu2" else want * (2.0 if name == "swiglu_oai" else 1.0)
    # silu(10) is 10 - 4.5e-4 and silu(-88.8) is -2.4e-37; without a limit the others are exact.
    np.testing.assert_allclose(act, want, atol=1e-3 if name in LIMITS else 3e-37, rtol=0)
    assert np.isfinite(activate_backward(np.ones(6), huge, name)).all()
