import math

import numpy as np
import pytest

from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.finite_differences import gradcheck
from npmoe.nn import apply_rotary, apply_rotary_backward, rotary_tables
from npmoe.testing.bounds import assert_within, gamma

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tables_equal_their_definition(dtype):
    cos, sin = rotary_tables(3, 5, 8, 100.0, dtype)
    assert cos.shape == sin.shape == (5, 4)
    assert cos.dtype == sin.dtype == dtype
    for row, position in enumerate(range(3, 8)):
        for i in range(4):
            angle = position * 100.0 ** (-2 * i / 8)
            # The angle and the function err in float64; the rounding to dtype comes last.
            bound = gamma(8, "f8") * (angle + 1) + gamma(1, dtype)
            assert_within(cos[row, i], np.float64(math.cos(angle)), bound, "cos")
            assert_within(sin[row, i], np.float64(math.sin(angle)), bound, "sin")


def test_tables_continue_where_others_stop():
    whole = rotary_tables(0, 7, 4)
    for part, table in zip(rotary_tables(3, 4, 4), whole, strict=True):
        assert (part == table[3:]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 8)])
def test_rotation_equals_complex_multiplication(shape, dtype):
    x = RNG.standard_normal(shape).astype(dtype)
    half = shape[-1] // 2
    cos, sin = rotary_tables(2, shape[2], shape[3], dtype=dtype)
    turned = (x[..., :half].astype("c16") + 1j * x[..., half:]) * (cos.astype("f8") + 1j * sin)
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    size = np.abs(x[..., :half].astype("f8")) + np.abs(x[..., half:])
    bound = (gamma(2, dtype) + gamma(2, "f8")) * np.concatenate([size, size], axis=-1)
    y = apply_rotary(x, cos, sin)
    assert y.dtype == dtype
    assert y.flags.c_contiguous
    assert_within(y, want, bound, "apply_rotary")


def test_backward_is_the_adjoint_and_the_inverse():
    x = RNG.standard_normal((2, 2, 3, 6))
    cos, sin = rotary_tables(5, 3, 6)
    cos, sin = cos.astype("f8"), sin.astype("f8")
    gradcheck(
        lambda x: apply_rotary(x, cos, sin),
        lambda g, x: apply_rotary_backward(g, cos, sin),
        [x],
        tolerance=1e-9,
    )
    exact = np.zeros((3, 3)), np.array([[1.0] * 3, [-1.0] * 3, [1.0] * 3])
    assert (apply_rotary_backward(apply_rotary(x, *exact), *exact) == x).all()
    # A quarter turn: the first half becomes minus the second, and the second the first.
    assert (apply_rotary(x, *exact)[:, :, 0] == np.concatenate(
        [-x[:, :, 0, 3:], x[:, :, 0, :3]], axis=-1)).all()  # fmt: skip


def test_dot_products_depend_on_the_distance_only():
    q, k = RNG.standard_normal((2, 1, 1, 1, 8))

    def turned(x, position):
        return apply_rotary(x, *rotary_tables(position, 1, 8, dtype="float64"))[0, 0, 0]

    near = turned(q, 7) @ turned(k, 4)
    far = turned(q, 507) @ turned(k, 504)
    # An angle near 507 is rounded to 507 u; the products are at most |q||k|.
    bound = gamma(2 * 507 + 40, "f8") * np.abs(q).sum() * np.abs(k).sum()
    assert_within(far, near, bound, "distance")
    assert abs(turned(q, 7) @ turned(k, 5) - near) > 1e-3


def test_strided_inputs_are_left_alone():
    base = RNG.standard_normal((2, 5, 3, 8))
    base.flags.writeable = False
    cos, sin = rotary_tables(0, 5, 8, dtype="float64")
    x = base.transpose(0, 2, 1, 3)
    assert (apply_rotary(x, cos, sin) == apply_rotary(x.copy(), cos, sin)).all()


def test_bad_inputs():
    with pytest.raises(
        ShapeError,
        match=r"^rotary_tables: head_dim must be even, got 7\. "
        r"Rotation pairs element i with element i \+ D/2\.$",
    ):
        rotary_tables(0, 4, 7)
    with pytest.raises(
        RangeError,
        match=r"^rotary_tables: start and length must not be negative, got -1 and 4\.$",
    ):
        rotary_tables(-1, 4, 8)
    with pytest.raises(RangeError, match=r"^rotary_tables: base must be positive, got 0\.0\.$"):
        rotary_tables(0, 4, 8, 0.0)
    cos, sin = rotary_tables(0, 4, 8)
    with pytest.raises(
        ShapeError,
        match=r"^apply_rotary: x must have shape \(B, heads, L, 2\*P\) = \(B, heads, 4, 8\), "
        r"got \(2, 1, 3, 8\)\. L, P are bound by cos \(4, 4\)\.$",
    ):
        apply_rotary(np.ones((2, 1, 3, 8), "f4"), cos, sin)
    with pytest.raises(ShapeError, match=r"^apply_rotary_backward: grad_y must have shape"):
        apply_rotary_backward(np.ones((2, 1, 4, 7), "f4"), cos, sin)
    with pytest.raises(DTypeError, match=r"^apply_rotary: x must have dtype float32, got float64"):
        apply_rotary(np.ones((2, 1, 4, 8)), cos, sin)
