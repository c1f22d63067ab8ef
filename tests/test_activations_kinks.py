"""Kinks of the activations: values and one-sided gradients at, above and below each of them."""

from __future__ import annotations

import numpy as np
import pytest
from activation_curves import curve

from npmoe.activations import ACTIVATIONS, bind_activation, kink_sides
from npmoe.testing.bounds import assert_within

LIMITED = ["swiglu_clamp_pre", "swiglu_clamp_post", "swiglu_oai"]
SMOOTH = ["swiglu", "geglu", "geglu_tanh", "silu", "gelu", "gelu_tanh"]
DTYPES = [np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [None, 1.5])
@pytest.mark.parametrize("name", LIMITED)
def test_limits_of_the_up_half_are_inside(name: str, limit: float | None, dtype: type) -> None:
    bound = bind_activation(name, limit=limit)
    c = dtype(ACTIVATIONS[name].default_limit if limit is None else limit)
    over = np.nextafter(c, dtype(np.inf))
    under = np.nextafter(c, dtype(0))
    u = np.array([c, over, 2 * c, under, -c, -over, -2 * c, -under], dtype)[:, None]
    g = np.ones_like(u)
    act, grad = bound.recompute_and_backward(np.full_like(u, 4.0), np.hstack([g, u]))
    value = bind_activation(name).forward(np.array([[1.0, 1.0]], dtype))[0, 0]
    value = value / 2 if name == "swiglu_oai" else value
    assert grad[:, 1].tolist() == [4 * value, 0, 0, 4 * value] * 2
    shift = dtype(name == "swiglu_oai")
    clipped = np.array([c, c, c, under, -c, -c, -c, -under], dtype)
    assert act[:, 0].tolist() == (value * (clipped + shift)).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [None, 1.5])
@pytest.mark.parametrize("name", ["swiglu_clamp_pre", "swiglu_oai"])
def test_the_limit_before_silu_is_inside_and_only_above(
    name: str, limit: float | None, dtype: type
) -> None:
    bound = bind_activation(name, limit=limit)
    c = dtype(ACTIVATIONS[name].default_limit if limit is None else limit)
    g = np.array([c, np.nextafter(c, dtype(np.inf)), 3 * c, -c, -3 * c], dtype)
    pre = np.stack([g, np.full_like(g, 0.5)], axis=1)
    act, grad = bound.recompute_and_backward(np.ones((5, 1), dtype), pre)
    plain = {"swiglu_oai": 1.5}.get(name, 0.5)
    value, slope = curve(name, g.astype(np.float64))
    want = plain * np.array([value[0], value[0], value[0], value[3], value[4]])
    want_grad = plain * np.array([slope[0], 0, 0, slope[3], slope[4]])
    size = 32 * float(np.finfo(dtype).eps)
    assert_within(act[:, 0], want, size * (1 + np.abs(want)), name)
    assert_within(grad[:, 0], want_grad, size * (1 + np.abs(g)), name)
    assert grad[1:3, 0].tolist() == [0, 0]
    assert act[0] == act[1] == act[2]
    assert grad[0, 0] > 0.3


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_limit_after_silu_is_inside(dtype: type) -> None:
    g = dtype(3.0)
    value = bind_activation("silu").forward(np.array([g]))[0]
    bound = bind_activation("swiglu_clamp_post", limit=float(value))
    before = np.nextafter(value, dtype(0))
    tight = bind_activation("swiglu_clamp_post", limit=float(before))
    pre = np.array([[g, 0.5], [3.5, 0.5], [2.5, 0.5], [-3.0, 0.5]], dtype)
    ones = np.ones((4, 1), dtype)
    act, grad = bound.recompute_and_backward(ones, pre)
    slope = curve("silu", pre[:, 0].astype(np.float64))[1]
    size = 32 * float(np.finfo(dtype).eps)
    assert_within(grad[:, 0], 0.5 * slope * [1, 0, 1, 1], size, "inside")
    assert grad[1, 0] == 0.0
    assert act[:2, 0].tolist() == [value / 2, value / 2]
    act, grad = tight.recompute_and_backward(ones, pre)
    assert grad[:2, 0].tolist() == [0.0, 0.0]
    assert act[:2, 0].tolist() == [before / 2, before / 2]


def test_the_limit_after_silu_is_only_above() -> None:
    pre = np.array([[-1.25, 1.0]])  # silu: -0.278
    bound = bind_activation("swiglu_clamp_post", limit=0.125)
    plain = bind_activation("swiglu").recompute_and_backward(np.ones((1, 1)), pre)
    act, grad = bound.recompute_and_backward(np.ones((1, 1)), pre)
    assert act[0, 0] == bound.forward(pre)[0, 0] == plain[0][0, 0] / 8
    assert grad[0, 0] == plain[1][0, 0] / 8


@pytest.mark.parametrize("name", LIMITED)
def test_at_a_limit_the_gradient_is_the_one_sided_difference_from_inside(name: str) -> None:
    limit, h = 1.5, 2.0**-24
    bound = bind_activation(name, limit=limit)
    kinks = [(0.5, limit, 1, -h), (0.5, -limit, 1, h)]
    if name != "swiglu_clamp_post":  # its limit is met at no float exactly
        kinks.append((limit, 0.5, 0, -h))
    for g, u, half, inward in kinks:
        at, inner, outer = (np.array([[g, u]]) for _ in range(3))
        inner[0, half] += inward
        outer[0, half] -= inward
        here = bound.forward(at)
        grad = bound.backward(np.ones((1, 1)), at)[0, half]
        # The second derivative is below 1, values below 4.
        quotient = ((bound.forward(inner) - here) / inward).item()
        assert_within(quotient, grad, 2 * h + 2.0**-26, name)
        assert bound.forward(outer) == here
        assert grad > 0.2


@pytest.mark.parametrize("name", ["relu", "reglu", "relu2"])
def test_relus_at_zero(name: str) -> None:
    z = np.array([0.0, -0.0, 2.0**-500, -(2.0**-500), 3.0])[:, None]
    pre = np.hstack([z, np.full_like(z, 2.0)]) if name == "reglu" else z
    act, grad = bind_activation(name).recompute_and_backward(np.ones((5, 1)), pre)
    factor = 2.0 if name == "reglu" else 1.0
    positive = [0.0, 0.0, 2.0**-500, 0.0, 3.0]
    squares = [0.0, 0.0, 2.0**-1000, 0.0, 9.0]
    twice = [2 * p for p in positive]
    step = [0.0, 0.0, 1.0, 0.0, 1.0]
    assert (act[:, 0] / factor).tolist() == (squares if name == "relu2" else positive)
    assert (grad[:, 0] / factor).tolist() == (twice if name == "relu2" else step)
    if name == "reglu":
        assert grad[:, 1].tolist() == positive


def test_kink_sides() -> None:
    pre = np.array([[-1.0, 0.0, 2.0, 3.0]])
    for name in SMOOTH:
        sides = kink_sides(pre, name)
        assert sides.shape == (1, 0)
        assert sides.dtype == bool
    assert kink_sides(pre, "relu").tolist() == [[False, False, True, True]]
    assert kink_sides(pre, "relu2").tolist() == [[False, False, True, True]]
    assert kink_sides(pre, "reglu").tolist() == [[False, False]]
    # g <= 1.9, then u >= -1.9, then u <= 1.9; silu(2) is 1.76, silu(3) is 2.86.
    pre = np.array([[2.0, 3.0, -2.0, 2.0], [-9.0, 1.9, -1.9, 1.9]])
    before = [[False, False, False, True, True, False], [True] * 6]
    after = [[True, False, False, True, True, False], [True] * 6]
    assert kink_sides(pre, "swiglu_clamp_pre", limit=1.9).tolist() == before
    assert kink_sides(pre, "swiglu_oai", alpha=9.0, limit=1.9).tolist() == before
    assert kink_sides(pre, "swiglu_clamp_post", limit=1.9).tolist() == after
    assert kink_sides(pre, "swiglu_oai").all()
    assert kink_sides(np.zeros((2, 0, 4)), "swiglu_oai").shape == (2, 0, 6)
