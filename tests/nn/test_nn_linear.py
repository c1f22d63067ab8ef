import numpy as np
import pytest

from npmoe.errors import DTypeError, ShapeError
from npmoe.finite_differences import gradcheck
from npmoe.nn import linear, linear_backward

RNG = np.random.default_rng(0)


def integers(*shape, dtype="float64"):
    return RNG.integers(-8, 9, shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,), (2, 0, 3)])
def test_equals_the_loops_exactly_on_integers(leading, dtype):
    x, weight, bias = (integers(*s, dtype=dtype) for s in ((*leading, 4), (3, 4), (3,)))
    grad_y = integers(*leading, 3, dtype=dtype)
    expected = np.zeros(grad_y.shape, dtype)
    expected_x, expected_w, expected_b = np.zeros_like(x), np.zeros_like(weight), np.zeros(3)
    for t in np.ndindex(leading):
        for m in range(3):
            expected[(*t, m)] = bias[m]
            expected_b[m] += grad_y[(*t, m)]
            for n in range(4):
                expected[(*t, m)] += x[(*t, n)] * weight[m, n]
                expected_x[(*t, n)] += grad_y[(*t, m)] * weight[m, n]
                expected_w[m, n] += grad_y[(*t, m)] * x[(*t, n)]
    y = linear(x, weight, bias)
    grad_x, grad_w, grad_b = linear_backward(grad_y, x, weight, bias)
    for got, want in (
        (y, expected),
        (grad_x, expected_x),
        (grad_w, expected_w),
        (grad_b, expected_b),
    ):
        assert got.dtype == dtype
        assert got.shape == want.shape
        assert (got == want).all()
    assert (linear(x, weight) == expected - bias).all()
    assert linear_backward(grad_y, x, weight)[2] is None


def test_gradients():
    args = (RNG.standard_normal((2, 1, 3)), RNG.standard_normal((4, 3)), RNG.standard_normal(4))
    gradcheck(linear, linear_backward, args, tolerance=1e-9)


def test_strided_and_read_only_inputs_are_left_alone():
    base = integers(6, 8)
    base.flags.writeable = False
    x = base[::2, ::2]
    assert (linear(x, integers(3, 4)).shape) == (3, 3)
    assert np.shares_memory(x, base)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((2, 5), (3, 4), None, r"x must have shape \(2, N\) = \(2, 4\), got \(2, 5\)\. "
         r"N is bound by weight \(3, 4\)\."),
        ((), (3, 4), None, r"x must have shape \(N,\) = \(4,\), got \(\)\. "
         r"N is bound by weight \(3, 4\)\."),
        ((2, 4), (3, 4), (4,), r"bias must have shape \(M,\) = \(3,\), got \(4,\)\. "
         r"M is bound by weight \(3, 4\)\."),
    ],
)  # fmt: skip
def test_wrong_shapes(x, weight, bias, message):
    arrays = [None if s is None else np.ones(s) for s in (x, weight, bias)]
    with pytest.raises(ShapeError, match=f"^linear: {message}$"):
        linear(*arrays)


def test_wrong_gradient_shape():
    with pytest.raises(
        ShapeError,
        match=r"^linear_backward: grad_y must have shape \(2, M\) = \(2, 3\), got \(3, 3\)\. "
        r"M is bound by weight \(3, 4\)\.$",
    ):
        linear_backward(np.ones((3, 3)), np.ones((2, 4)), np.ones((3, 4)))


def test_mixed_dtypes():
    with pytest.raises(
        DTypeError,
        match=r"^linear: x must have dtype float64, got float32\. The dtype is bound by weight\. "
        r"Convert one of them with astype\.$",
    ):
        linear(np.ones((2, 4), "f4"), np.ones((3, 4)))
    with pytest.raises(DTypeError, match=r"^linear: weight must have dtype float32 or float64"):
        linear(np.ones((2, 4), int), np.ones((3, 4), int))
