import math

import numpy as np
import pytest

from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.finite_differences import gradcheck
from npmoe.nn import layer_norm, layer_norm_backward
from npmoe.testing.bounds import assert_within, gamma

RNG = np.random.default_rng(0)


def drawn(*shape, dtype="float64", offset=0.0):
    return (RNG.standard_normal(shape) + offset).astype(dtype)


def row_rms_norm(row, weight, eps):
    root = math.sqrt(math.fsum(float(v) ** 2 for v in row) / len(row) + eps)
    return [float(w) * float(v) / root for v, w in zip(row, weight, strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 2, 33])
def test_rms_norm_equals_its_definition(verbs, size, dtype):
    x, weight = drawn(3, 5, size, dtype=dtype), drawn(size, dtype=dtype)
    y = verbs.rms_norm(x, weight, eps=1e-5)
    want = np.array([row_rms_norm(r, weight, 1e-5) for r in x.reshape(-1, size)]).reshape(x.shape)
    # Squares, their sum and mean, eps, root and reciprocal, two products; float64 reference.
    bound = gamma(size // 2 + 7, dtype) * np.abs(want) + gamma(10, "float64") * np.abs(want)
    assert_within(y, want, bound, "rms_norm")
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_layer_norm_equals_its_definition(dtype, offset):
    size, eps = 33, 1e-5
    x = drawn(4, size, dtype=dtype, offset=offset)
    weight, bias = drawn(size, dtype=dtype), drawn(size, dtype=dtype)
    y = layer_norm(x, weight, bias, eps)
    assert y.dtype == dtype
    for t in range(4):
        row = [float(v) for v in x[t]]
        mean = math.fsum(row) / size
        centred = np.array([v - mean for v in row])
        root = math.sqrt(math.fsum(c * c for c in centred) / size + eps)
        want = weight * centred / root + bias
        # The mean's error and the subtraction's move every element, and the root with them.
        moved = gamma(size + 2, dtype) * math.fsum(map(abs, row)) / size
        moved = moved + gamma(2, dtype) * np.abs(centred)
        relative = math.sqrt((moved**2).sum() / size) / root + gamma(size // 2 + 7, dtype)
        bound = np.abs(weight) * (moved + np.abs(centred) * relative) / root * (1 + relative)
        bound = bound + gamma(2, dtype) * (np.abs(want) + np.abs(want - bias))
        assert_within(y[t].astype("f8"), want, bound, "layer_norm")
        assert bound.max() < 0.01 * np.abs(want).max()


@pytest.mark.parametrize("shape", [(1, 4), (3, 1, 5), (6, 2)])
def test_rms_norm_gradients(verbs, shape):
    args = (drawn(*shape), drawn(shape[-1]))
    report = gradcheck(verbs.rms_norm, verbs.rms_norm_backward, args, names=("x", "weight"))
    assert max(report.elementwise.values()) < 1e-8


@pytest.mark.parametrize("shape", [(1, 4), (3, 1, 5), (6, 3)])
def test_layer_norm_gradients(shape):
    args = (drawn(*shape, offset=1.0), drawn(shape[-1]), drawn(shape[-1]))
    report = gradcheck(layer_norm, layer_norm_backward, args, names=("x", "weight", "bias"))
    assert max(report.elementwise.values()) < 1e-7


def test_zero_and_constant_rows(verbs):
    """A zero row stays zero; a constant row becomes the bias. Both have gradients."""
    weight, bias, eps = drawn(4), drawn(4), 0.25
    x = np.array([[0.0] * 4, [3.0] * 4, [1.0, 2.0, 3.0, 4.0]])
    assert (verbs.rms_norm(x, weight)[0] == 0).all()
    assert (layer_norm(x, weight, bias)[:2] == bias).all()
    gradcheck(
        lambda x, w: verbs.rms_norm(x, w, eps),
        lambda g, x, w: verbs.rms_norm_backward(g, x, w, eps),
        (x, weight),
    )
    gradcheck(
        lambda *args: layer_norm(*args, eps),
        lambda g, *args: layer_norm_backward(g, *args, eps),
        (x, weight, bias),
    )


def test_gradients_keep_float32_and_agree_with_float64(verbs):
    x, weight, bias, grad_y = drawn(7, 16), drawn(16), drawn(16), drawn(7, 16)
    narrow = [a.astype("f4") for a in (grad_y, x, weight, bias)]
    wide = [a.astype("f8") for a in narrow]
    for backward, count in ((verbs.rms_norm_backward, 3), (layer_norm_backward, 4)):
        for got, want in zip(backward(*narrow[:count]), backward(*wide[:count]), strict=True):
            assert got.dtype == np.float32
            # No row is nearly constant here, so all terms are of the size of the gradients.
            assert_within(got, want, gamma(64, "f4") * np.abs(want).max(), backward.__name__)


def test_a_row_depends_on_itself_only(verbs):
    x, weight, bias = drawn(3, 8), drawn(8), drawn(8)
    changed = x.copy()
    changed[2] = 1e3
    assert (verbs.rms_norm(x, weight)[:2] == verbs.rms_norm(changed, weight)[:2]).all()
    assert (layer_norm(x, weight, bias)[:2] == layer_norm(changed, weight, bias)[:2]).all()


def test_inputs_are_left_alone_and_no_rows_are_legal(verbs):
    arrays = [drawn(3, 4), drawn(3, 4), drawn(4), drawn(4)]
    for array in arrays:
        array.flags.writeable = False
    layer_norm(*arrays[1:])
    layer_norm_backward(*arrays)
    verbs.rms_norm(*arrays[1:3])
    verbs.rms_norm_backward(*arrays[:3])
    empty = np.ones((0, 4))
    assert verbs.rms_norm(empty, arrays[2]).shape == (0, 4)
    grads = verbs.rms_norm_backward(empty, empty, arrays[2])
    assert [g.shape for g in grads] == [(0, 4), (4,)]
    assert (grads[1] == 0).all()
    grads = layer_norm_backward(empty, empty, *arrays[2:])
    assert [g.shape for g in grads] == [(0, 4), (4,), (4,)]
    assert (grads[1] == 0).all()


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan, math.inf])
def test_eps_must_be_positive(verbs, eps):
    with pytest.raises(
        RangeError,
        match=rf"^rms_norm: eps must be finite and positive, got {eps}\. Rows may be zero\.$",
    ):
        verbs.rms_norm(np.ones((2, 3)), np.ones(3), eps)
    with pytest.raises(RangeError, match=r"^layer_norm: eps"):
        layer_norm(np.ones((2, 3)), np.ones(3), np.ones(3), eps)


def test_wrong_shapes_and_dtypes(verbs):
    with pytest.raises(
        ShapeError,
        match=r"^rms_norm: x must have shape \(2, N\) = \(2, 3\), got \(2, 4\)\. "
        r"N is bound by weight \(3,\)\.$",
    ):
        verbs.rms_norm(np.ones((2, 4)), np.ones(3))
    with pytest.raises(ShapeError, match=r"^layer_norm: bias must have shape \(N,\) = \(3,\)"):
        layer_norm(np.ones((2, 3)), np.ones(3), np.ones(4))
    with pytest.raises(ShapeError, match=r"^rms_norm_backward: grad_y must have shape \(2, N\)"):
        verbs.rms_norm_backward(np.ones((3, 3)), np.ones((2, 3)), np.ones(3))
    with pytest.raises(DTypeError, match=r"^layer_norm_backward: grad_y must have dtype float64"):
        layer_norm_backward(np.ones((2, 3), "f4"), np.ones((2, 3)), np.ones(3), np.ones(3))
