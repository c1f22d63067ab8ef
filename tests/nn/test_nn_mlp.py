import numpy as np
import pytest

from npmoe.activations import ACTIVATIONS, kink_sides
from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.finite_differences import gradcheck
from npmoe.nn import MLPParams, init_mlp_params, mlp, mlp_backward
from npmoe.testing.bounds import assert_within, gamma


def drawn(activation, dtype="float64", bias=True):
    rng = np.random.default_rng(0)
    params = init_mlp_params(3, 4, activation, rng, dtype, bias=bias)
    for array in (params.gate_up_bias, params.down_bias):
        if array is not None:
            array[...] = rng.standard_normal(array.shape)
    return rng.standard_normal((2, 2, 3)).astype(dtype), params


def fields(params):
    return [getattr(params, name) for name in MLPParams.__dataclass_fields__]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_relu_equals_the_loops_exactly_on_integers(dtype):
    rng = np.random.default_rng(0)
    x, w1, w2, b1, b2 = (
        rng.integers(-4, 5, s).astype(dtype) for s in ((2, 5, 3), (4, 3), (3, 4), (4,), (3,))
    )
    params = MLPParams(gate_up_proj=w1, down_proj=w2, gate_up_bias=b1, down_bias=b2)
    y, gate_up = mlp(x, params, "relu")
    assert y.dtype == gate_up.dtype == dtype
    assert gate_up.shape == (10, 4)
    for t, row in enumerate(x.reshape(-1, 3)):
        pre = [sum(w1[i, h] * row[h] for h in range(3)) + b1[i] for i in range(4)]
        assert gate_up[t].tolist() == pre
        act = [max(z, 0) for z in pre]
        want = [sum(w2[h, i] * act[i] for i in range(4)) + b2[h] for h in range(3)]
        assert y.reshape(-1, 3)[t].tolist() == want


def test_swiglu_has_the_gate_in_the_first_half():
    x, params = drawn("swiglu", bias=False)
    y, gate_up = mlp(x, params, "swiglu")
    gate_rows, up_rows = params.gate_up_proj[:4], params.gate_up_proj[4:]
    g, u = x @ gate_rows.T, x @ up_rows.T
    act = g / (1 + np.exp(-g)) * u
    # Two products of 3 and 4 terms, and an activation of a dozen roundings, each term of its size.
    slopes = np.abs(x) @ np.abs(gate_rows.T) * (np.abs(u) + 1) * 1.1
    size = (np.abs(act) + slopes + np.abs(x) @ np.abs(up_rows.T) * np.abs(g)) @ np.abs(
        params.down_proj.T
    )
    assert_within(y, act @ params.down_proj.T, gamma(40, "f8") * size, "mlp")
    assert gate_up.shape == (4, 8)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradients(activation, bias):
    x, params = drawn(activation, bias=bias)
    arrays = [a for a in fields(params) if a is not None]

    def pack(arrays):
        return MLPParams(**dict(zip(MLPParams.__dataclass_fields__, arrays, strict=False)))

    def f_backward(grad_y, x, *arrays):
        gate_up = mlp(x, pack(arrays), activation)[1]
        grad_x, grads = mlp_backward(grad_y, x, gate_up, pack(arrays), activation)
        assert [g is None for g in fields(grads)] == [a is None for a in fields(params)]
        return (grad_x, *(g for g in fields(grads) if g is not None))

    report = gradcheck(
        lambda x, *arrays: mlp(x, pack(arrays), activation)[0],
        f_backward,
        (x, *arrays),
        decisions=lambda x, *arrays: kink_sides(mlp(x, pack(arrays), activation)[1], activation),
    )
    assert max(report.elementwise.values()) < 1e-8


def test_gradients_keep_float32_and_inputs_are_left_alone():
    x, params = drawn("swiglu", "float32")
    y, gate_up = mlp(x, params, "swiglu")
    for array in (x, y, gate_up, *fields(params)):
        array.flags.writeable = False
    grad_x, grads = mlp_backward(y, x, gate_up, params, "swiglu")
    assert grad_x.shape == x.shape
    for grad, array in zip([grad_x, *fields(grads)], [x, *fields(params)], strict=True):
        assert grad.dtype == np.float32
        assert grad.shape == array.shape


def test_initial_weights_have_the_documented_deviation():
    params = init_mlp_params(64, 100, "swiglu", 0, "float64", bias=True, output_scale=0.5)
    assert params.gate_up_proj.shape == (200, 64)
    assert (params.gate_up_bias == 0).all()
    assert params.gate_up_bias.shape == (200,)
    assert (params.down_bias == 0).all()
    for weight, deviation in ((params.gate_up_proj, 1 / 8), (params.down_proj, 0.5 / 10)):
        # The mean square of n normals has relative deviation sqrt(2/n): five of them.
        assert abs((weight**2).mean() / deviation**2 - 1) < 5 * np.sqrt(2 / weight.size)
    plain = init_mlp_params(64, 100, "relu", 0)
    assert plain.gate_up_proj.shape == (100, 64)
    assert plain.gate_up_proj.dtype == np.float32
    assert plain.down_bias is None


def test_bad_inputs():
    x, params = drawn("swiglu")
    known = ", ".join(map(repr, ACTIVATIONS))
    for call in (
        lambda: mlp(x, params, "swigloo"),
        lambda: init_mlp_params(3, 4, "swigloo", 0),
    ):
        with pytest.raises(
            RangeError, match=rf"mlp(_params)?: activation must be one of {known}, got 'swigloo'\.$"
        ):
            call()
    with pytest.raises(
        ShapeError,
        match=r"^mlp: params\.gate_up_proj must have shape \(I, H\) = \(4, 3\), got \(8, 3\)\. "
        r"I, H are bound by params\.down_proj \(3, 4\)\.$",
    ):
        mlp(x, params, "gelu")
    with pytest.raises(ShapeError, match=r"^mlp: x must have shape \(2, 2, H\) = \(2, 2, 3\)"):
        mlp(x[..., :2], params, "swiglu")
    gate_up = mlp(x, params, "swiglu")[1]
    with pytest.raises(
        ShapeError,
        match=r"^mlp_backward: gate_up must have shape \(T, 2\*I\) = \(4, 8\), got \(3, 8\)\. "
        r"T is bound by x \(2, 2, 3\)\. I is bound by params\.down_proj \(3, 4\)\.$",
    ):
        mlp_backward(x, x, gate_up[1:], params, "swiglu")
    with pytest.raises(ShapeError, match=r"^mlp_backward: grad_y must have shape \(2, 2, H\)"):
        mlp_backward(x[:1], x, gate_up, params, "swiglu")
    with pytest.raises(DTypeError, match=r"^mlp: x must have dtype float64, got float32"):
        mlp(x.astype("f4"), params, "swiglu")
