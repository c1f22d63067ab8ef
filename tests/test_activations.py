"""Activations: known values, gradients, kinks, and no floating-point error for any input."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from activation_curves import curve
from scipy import special

from npmoe import GradientError, gradcheck
from npmoe.activations import ACTIVATIONS, bind_activation, kink_sides, sigmoid
from npmoe.errors import RangeError
from npmoe.naive.activations import activate, activate_backward
from npmoe.testing import activation_bounds
from npmoe.testing.balls import Ball, Model
from npmoe.testing.bounds import assert_within

NAMES = list(ACTIVATIONS)
GATED = [n for n in NAMES if ACTIVATIONS[n].gated]
LIMITED = ["swiglu_clamp_pre", "swiglu_clamp_post", "swiglu_oai"]
SMOOTH = ["swiglu", "geglu", "geglu_tanh", "silu", "gelu", "gelu_tanh"]
DTYPES = [np.float32, np.float64]
# (alpha, limit): the published values, and others whose limits are met by numbers around 1.
PARAMETERS = [(n, None, None) for n in NAMES] + [
    ("swiglu_clamp_pre", None, 1.25),
    ("swiglu_clamp_post", None, 0.75),
    ("swiglu_oai", 0.625, 1.5),
]


def test_the_table() -> None:
    assert {n: (a.gated, a.default_alpha, a.default_limit) for n, a in ACTIVATIONS.items()} == {
        "swiglu": (True, None, None),
        "swiglu_clamp_pre": (True, None, 10.0),
        "swiglu_clamp_post": (True, None, 7.0),
        "swiglu_oai": (True, 1.702, 7.0),
        "geglu": (True, None, None),
        "geglu_tanh": (True, None, None),
        "reglu": (True, None, None),
        "silu": (False, None, None),
        "gelu": (False, None, None),
        "gelu_tanh": (False, None, None),
        "relu": (False, None, None),
        "relu2": (False, None, None),
    }
    for name, family in ACTIVATIONS.items():
        assert bind_activation(name).gated == family.gated


@pytest.mark.parametrize("name", NAMES)
def test_values_and_slopes_inside_the_limits(name: str) -> None:
    bound = bind_activation(name)
    z = np.random.default_rng(0).uniform(-6, 6, (50, 4))
    value, slope = curve(name, z)
    # Values stay below 40; either side's sigmoid, erf, tanh and exp lose a few roundings each.
    exact = 40.0 * 2.0**-53 * 40.0
    if not bound.gated:
        act, grad = bound.recompute_and_backward(np.full_like(z, -3.0), z)
        assert_within(act, value, exact, name)
        assert_within(grad, -3.0 * slope, 3 * exact, name)
        return
    u = np.random.default_rng(1).integers(-3, 4, z.shape).astype(float)
    act, grad = bound.recompute_and_backward(np.full_like(z, 2.0), np.hstack([z, u]))
    factor = u + 1.0 if name == "swiglu_oai" else u
    assert_within(act, value * factor, 4 * exact, name)
    assert_within(grad[:, :4], 2 * slope * factor, 8 * exact, name)
    assert_within(grad[:, 4:], 2 * value, 2 * exact, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "alpha", "limit"), PARAMETERS)
def test_within_the_bounds_of_the_definition(
    name: str, alpha: float | None, limit: float | None, dtype: type
) -> None:
    bound = bind_activation(name, alpha, limit)
    rng = np.random.default_rng(2)
    wide = 12 if bound.gated else 6
    z = (rng.choice([0.1, 1.0, 4.0, 30.0], (60, wide)) * rng.standard_normal((60, wide))).astype(
        dtype
    )
    grad_act = rng.standard_normal((60, 6)).astype(dtype)
    act, grad = bound.recompute_and_backward(grad_act, z)
    exact, exact_grad = z.astype(np.float64), grad_act.astype(np.float64)
    model = Model.of(dtype)
    ball = Ball.exact(exact, model)
    radius = activation_bounds.activation(ball, name, alpha, limit).rad
    want = np.array([activate(row, name, alpha, limit) for row in exact])
    assert_within(act, want, radius, name)
    grad_ball = activation_bounds.activation_backward(
        Ball.exact(exact_grad, model), ball, name, alpha, limit
    )
    want_grad = np.array(
        [
            activate_backward(g, row, name, alpha, limit)
            for g, row in zip(exact_grad, exact, strict=True)
        ]
    )
    assert_within(grad, want_grad, grad_ball.rad, name)
    assert radius.max() < 0.01 * np.abs(want).max()
    assert grad_ball.rad.max() < 0.01 * np.abs(want_grad).max()


@pytest.mark.parametrize(("name", "alpha", "limit"), PARAMETERS)
def test_balls_hold_their_members(name: str, alpha: float | None, limit: float | None) -> None:
    """Also where a ball reaches over a kink, and its middle lies on the other side."""
    bound = bind_activation(name, alpha, limit)
    rng = np.random.default_rng(5)
    wide = 8 if bound.gated else 4
    member = rng.standard_normal((200, wide)).astype(np.float32)
    if limit is not None:
        at = np.float32(limit if name != "swiglu_clamp_post" else 1.0203512)  # silu: 0.75
        near = np.float32([0, 1e-5, -1e-5])
        member[::2] = rng.choice(np.array([-limit, limit, at]), member[::2].shape)
        member[::2] += rng.choice(near, member[::2].shape)
    mid = member + rng.choice([-1.0, 1.0], member.shape) * rng.random(member.shape) * 2.0**-12
    ball = Ball(mid, np.abs(mid - member), Model.of(np.float32))
    grad_act = rng.standard_normal((200, 4)).astype(np.float32)
    act, grad = bound.recompute_and_backward(grad_act, member)
    value = activation_bounds.activation(ball, name, alpha, limit)
    slope = activation_bounds.activation_backward(
        Ball.exact(grad_act, ball.model), ball, name, alpha, limit
    )
    assert_within(act, value.mid, value.rad, name)
    assert_within(grad, slope.mid, slope.rad, name)
    assert np.median(value.rad) < 1e-3
    assert np.median(slope.rad) < 2e-3
    if limit is not None:
        assert (np.abs(grad - slope.mid) > 0.1).any()


@pytest.mark.parametrize("name", ["relu", *LIMITED])
def test_exact_balls_take_one_side_of_a_kink(name: str) -> None:
    model = Model.of(np.float64)
    row = np.array([[0.5, 1.5, -1.5, 1.5, -1.5, 0.25]]) if name in LIMITED else np.zeros((1, 6))
    limit = 1.5 if name in LIMITED else None
    one = Ball.exact(np.ones((1, 3 if limit else 6)), model)
    slope = activation_bounds.activation_backward(one, Ball.exact(row, model), name, limit=limit)
    want = activate_backward(one.mid[0], row[0], name, limit=limit)
    assert_within(slope.mid[0], want, 0.0, name)
    assert slope.rad.max() < 1e-13
    assert (want == 0.0).all() == (name == "relu")


def test_balls_know_that_a_limit_may_round() -> None:
    limit = 1.1  # 1.10000002 in float32
    pre = np.array([[limit, limit, limit, 3.0]], np.float32)
    model = Model.of(np.float32)
    ball = Ball.exact(pre.astype(np.float64), model)
    grad = bind_activation("swiglu_clamp_pre", limit=limit).backward(np.ones((1, 2), "f4"), pre)
    one = Ball.exact(np.ones((1, 2)), model)
    slope = activation_bounds.activation_backward(one, ball, "swiglu_clamp_pre", limit=limit)
    assert_within(grad, slope.mid, slope.rad, "grad")
    assert np.abs(grad - slope.mid)[0, 2] > 0.5
    clipped = activation_bounds._clip(ball, -limit, limit)
    assert_within(np.clip(pre, -limit, limit), clipped.mid, clipped.rad, "clip")
    assert 0.0 < clipped.rad[0, 3] < 2e-7


def checked(name: str, alpha: float | None, limit: float | None, factor: float = 1.0) -> None:
    bound = bind_activation(name, alpha, limit)
    gradcheck(
        bound.forward,
        lambda grad, x: (factor * bound.backward(grad, x),),
        [np.random.default_rng(3).uniform(-4, 4, (4, 8))],
        decisions=lambda x: kink_sides(x, name, alpha, limit),
    )


@pytest.mark.parametrize(("name", "alpha", "limit"), PARAMETERS)
def test_gradient(name: str, alpha: float | None, limit: float | None) -> None:
    checked(name, alpha, limit)
    with pytest.raises(GradientError):
        checked(name, alpha, limit, factor=1.001)


@pytest.mark.parametrize("name", LIMITED)
def test_the_checked_points_meet_every_limit(name: str) -> None:
    _, alpha, limit = next(p for p in PARAMETERS if p[0] == name and p[2] is not None)
    pre = np.random.default_rng(3).uniform(-4, 4, (4, 8))
    sides = kink_sides(pre, name, alpha, limit)
    for kink in np.split(sides, 3, axis=-1):
        assert kink.any()
        assert not kink.all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "alpha", "limit"), PARAMETERS)
def test_recomputed_value_is_the_value(
    name: str, alpha: float | None, limit: float | None, dtype: type
) -> None:
    bound = bind_activation(name, alpha, limit)
    rng = np.random.default_rng(4)
    pre = (10 * rng.standard_normal((40, 6))).astype(dtype)
    width = 3 if bound.gated else 6
    grad_act = rng.standard_normal((40, width)).astype(dtype)
    copies = pre.copy(), grad_act.copy()
    act, grad = bound.recompute_and_backward(grad_act, pre)
    assert act.tobytes() == bound.forward(pre).tobytes()
    assert grad.tobytes() == bound.backward(grad_act, pre).tobytes()
    assert act.dtype == grad.dtype == dtype
    assert act.shape == (40, width)
    assert grad.shape == pre.shape
    np.testing.assert_array_equal(pre, copies[0])
    np.testing.assert_array_equal(grad_act, copies[1])
    for result in (act, grad, bound.forward(pre)):
        assert not np.shares_memory(result, pre)
        assert not np.shares_memory(result, grad_act)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_no_overflow(name: str, dtype: type) -> None:
    bound = bind_activation(name)
    limit = ACTIVATIONS[name].default_limit or math.inf
    largest = float(np.finfo(dtype).max)
    sizes = [0.0, 1e-30, 40.0, 88.8, 89.0, 104.0, 709.0, 710.0, 746.0, 1e4, 1e18]
    if name != "relu2":  # whose square of these does not exist
        sizes += [1e30, largest]
    z = np.array([sizes, np.negative(sizes)], dtype).T
    pre = np.hstack([z, np.ones_like(z)]) if bound.gated else z
    with np.errstate(all="raise", under="ignore"):
        act, grad = bound.recompute_and_backward(np.ones_like(z), pre)
        assert act.tobytes() == bound.forward(pre).tobytes()
    large = np.abs(z) >= 40.0
    value = np.minimum(np.maximum(z, 0.0), limit)
    slope = ((z > 0) & (z <= limit)).astype(dtype)
    if name == "relu2":
        value, slope = value * value, 2 * value
    if name == "swiglu_oai":
        value *= 2
    # exp(-40) is 4e-18; only what is limited before SiLU has a limit that SiLU still bends.
    nearly = 1e-3 if limit < math.inf else 2e-16
    assert_within(act[large], value[large], nearly, name)
    assert_within(grad[:, :2][large], slope[large], 4e-16, name)
    assert np.isfinite(act).all()
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LIMITED)
def test_the_largest_numbers_in_both_halves(name: str, dtype: type) -> None:
    corners = list(itertools.product((-np.finfo(dtype).max, np.finfo(dtype).max), repeat=2))
    with np.errstate(all="raise", under="ignore"):
        act, grad = bind_activation(name).recompute_and_backward(
            np.ones((4, 1), dtype), np.array(corners, dtype)
        )
    limit = ACTIVATIONS[name].default_limit
    top = {"swiglu_clamp_post": limit}.get(name, curve(name, np.array(limit))[0])
    shift = 1.0 if name == "swiglu_oai" else 0.0
    want = [0.0, 0.0, top * (shift - limit), top * (shift + limit)]
    assert_within(act[:, 0], np.array(want), 100 * 4 * float(np.finfo(dtype).eps), name)
    assert not grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_far_to_the_left_the_relative_error_stays_small(name: str, dtype: type) -> None:
    depth = {np.float32: 85.0, np.float64: 700.0}[dtype]
    z = -np.linspace(2.0, depth if name == "silu" else depth**0.5 / 1.7, 300).astype(dtype)
    wide = z.astype(np.float64)
    if name == "silu":
        inner, slope = wide, np.exp(wide) * (1 + wide)
    else:
        inner = 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        slope = None
    # x e^y / (1 + e^y); the exponent's own rounding is multiplied by its size.
    want = wide * np.exp(inner) / (1 + np.exp(inner))
    act, grad = bind_activation(name).recompute_and_backward(np.ones_like(z), z)
    eps = float(np.finfo(dtype).eps)
    assert_within(act, want, (4.0 + 4.0 * np.abs(inner)) * eps * np.abs(want), name)
    assert (act < 0).all()
    if slope is not None:
        # s (1 + z (1 - s)) against e^z (1 + z): e^z is below 0.14, and less from -5 on.
        deep = z < -40.0
        assert_within(grad[deep], slope[deep], 16 * eps * np.abs(slope[deep]), name)


def test_the_two_gelus_differ() -> None:
    # The greatest difference of x Phi(x) and its tanh form is 4.73e-4, at 2.699.
    z = np.array([[2.7, -2.7, 0.5]])
    erf, tanh = (bind_activation(n).forward(z) for n in ("gelu", "gelu_tanh"))
    difference = z * special.ndtr(z) - 0.5 * z * (
        1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    )
    assert_within(erf - tanh, difference, 1e-15, "gelu - gelu_tanh")
    assert (np.abs(difference) > [4.7e-4, 4.7e-4, 1.7e-5]).all()
    quick = z * special.expit(1.702 * z)
    assert (np.abs(quick - tanh) > 4e-3).all()


def test_the_four_swiglus_differ() -> None:
    pre = np.array([[9.0, 8.0]])
    silu7, silu9 = 7 / (1 + math.exp(-7)), 9 / (1 + math.exp(-9))
    want = {
        "swiglu": silu9 * 8,
        "swiglu_clamp_pre": silu7 * 7,  # 48.955
        "swiglu_clamp_post": 49.0,
        "swiglu_oai": 7 / (1 + math.exp(-1.702 * 7)) * 8,  # 55.9996
    }
    for name, value in want.items():
        limit = None if name == "swiglu" else 7.0
        got = bind_activation(name, limit=limit).forward(pre)
        assert_within(got, np.array([[value]]), 64 * 2.0**-52, name)
    assert min(abs(a - b) for a, b in itertools.combinations(want.values(), 2)) > 0.04
    # Inside the limits three of them are one function.
    inside = np.array([[1.5, -0.5]])
    values = {n: bind_activation(n).forward(inside).tobytes() for n in want}
    assert values["swiglu"] == values["swiglu_clamp_pre"] == values["swiglu_clamp_post"]
    assert values["swiglu"] != values["swiglu_oai"]
    # And the one with + 1 is not zero where u is.
    assert bind_activation("swiglu_oai").forward(np.array([[3.0, 0.0]]))[0, 0] > 2.9


def test_bound_parameters() -> None:
    assert bind_activation("swiglu_oai") is bind_activation("swiglu_oai", 1.702, 7)
    assert bind_activation("swiglu_oai") is not bind_activation("swiglu_oai", alpha=1.0)
    pre = np.array([[2.0, 3.0]])
    other = bind_activation("swiglu_oai", alpha=0.5, limit=1.0).forward(pre)
    assert_within(other, np.array([[2.0 / (1 + math.exp(-0.5))]]), 1e-15, "alpha 0.5, limit 1")


def test_a_numpy_limit_does_not_widen_float32() -> None:
    bound = bind_activation("swiglu_oai", alpha=np.float64(1.625), limit=np.float64(3.25))
    pre = np.ones((1, 2), np.float32)
    act, grad = bound.recompute_and_backward(np.ones((1, 1), np.float32), pre)
    assert act.dtype == grad.dtype == bound.forward(pre).dtype == np.float32


def message(*args: object, **kwargs: object) -> str:
    with pytest.raises(RangeError) as caught:
        bind_activation(*args, **kwargs)
    return str(caught.value)


def test_messages() -> None:
    known = ", ".join(map(repr, NAMES))
    assert message("swigloo") == f"bind_activation: name must be one of {known}, got 'swigloo'."
    assert message("swiglu_clamp_pre", alpha=1.0) == (
        "bind_activation: alpha must be None for 'swiglu_clamp_pre', got 1.0. "
        "Activations with it: 'swiglu_oai'."
    )
    assert message("gelu", limit=7.0) == (
        "bind_activation: limit must be None for 'gelu', got 7.0. "
        "Activations with it: 'swiglu_clamp_pre', 'swiglu_clamp_post', 'swiglu_oai'."
    )
    for value in (0.0, -7.0, math.inf, math.nan, True):
        assert message("swiglu_oai", limit=value) == (
            f"bind_activation: limit must be finite and above 0, got {value!r}. "
            "None is the published 7.0."
        )
    assert message("swiglu_oai", alpha=-1.0) == (
        "bind_activation: alpha must be finite and above 0, got -1.0. None is the published 1.702."
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid(dtype: type) -> None:
    x = np.linspace(-1000, 100, 4001).astype(dtype)
    before = x.copy()
    with np.errstate(all="raise", under="ignore"):
        got = sigmoid(x)
    exact = special.expit(x.astype(np.float64))
    least = {np.float32: -88.0, np.float64: -709.0}[dtype]
    eps = float(np.finfo(dtype).eps)
    assert_within(got[x >= least], exact[x >= least], 4 * eps * exact[x >= least], "sigmoid")
    assert_within(got[x < least], exact[x < least], 1.1 * exact[x < least].max(), "sigmoid")
    assert got.dtype == dtype
    assert ((got >= 0) & (got <= 1)).all()
    np.testing.assert_array_equal(x, before)
