import dataclasses

import numpy as np
import pytest

from npmoe.errors import DTypeError, GradientError, RangeError, ShapeError
from npmoe.finite_differences import check_directions, gradcheck

X = np.random.default_rng(7).standard_normal((2, 3))
W = np.random.default_rng(8).standard_normal((4, 3))


def product(x, w):
    return np.tanh(x @ w.T)


def product_backward(grad_out, x, w):
    grad_pre = grad_out * (1 - np.tanh(x @ w.T) ** 2)
    return grad_pre @ w, grad_pre.T @ x


def planted(change):
    """Return product_backward with `change` applied to the gradient of w."""

    def backward(grad_out, x, w):
        grad_x, grad_w = product_backward(grad_out, x, w)
        return grad_x, change(grad_w)

    return backward


def test_right_gradient_passes_and_is_reported_by_name():
    report = gradcheck(product, product_backward, (X, W), names=("x", "w"))
    for errors in (report.elementwise, report.directional):
        assert list(errors) == ["x", "w"]
        assert 0 < max(errors.values()) < 1e-9
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.tolerance = 1.0


def test_the_stencil_is_of_fourth_order_with_the_known_constant():
    """The stencil of x**5 is 5 x**4 - 4 h**4: the fifth derivative 120 times h**4/30."""
    report = gradcheck(
        lambda x: x**5, lambda g, x: g * 5 * x**4, [np.ones(1)], step=0.1, tolerance=1e-3
    )
    # Errors are relative to the larger derivative, the analytic one, 5.
    assert report.elementwise["args[0]"] == pytest.approx(4e-4 / 5, rel=1e-9)
    quartic = gradcheck(lambda x: x**4, lambda g, x: g * 4 * x**3, [np.ones(1)], step=0.1)
    assert quartic.elementwise["args[0]"] < 1e-14


@pytest.mark.parametrize("elementwise", [True, False])
def test_an_error_of_a_thousandth_is_rejected(elementwise):
    with pytest.raises(
        GradientError,
        match=r"^gradcheck: gradient of w must agree with central differences within 1\.0e-07, "
        r"got relative error 1\.0e-03 at (element \(\d, \d\)|direction \d): "
        r"numerical -?[\d.]+, analytic -?[\d.]+\.$",
    ):
        gradcheck(
            product,
            planted(lambda g: g * 1.001),
            (X, W),
            names=("x", "w"),
            elementwise=elementwise,
        )


def test_an_error_in_one_element_is_found_and_named():
    def change(grad):
        grad[2, 1] += 1e-3 * np.abs(grad).max()
        return grad

    with pytest.raises(GradientError, match=r"1\.0e-03 at element \(2, 1\): "):
        gradcheck(product, planted(change), (X, W))
    with pytest.raises(GradientError, match="at direction"):
        gradcheck(product, planted(change), (X, W), elementwise=False)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nan_or_infinite_gradient_is_rejected(value):
    def change(grad):
        grad[2, 1] = value
        return grad

    with pytest.raises(GradientError, match=r"got relative error nan at element \(2, 1\)"):
        gradcheck(product, planted(change), (X, W))
    with pytest.raises(GradientError, match="got relative error nan at direction 0"):
        gradcheck(product, planted(change), (X, W), elementwise=False)


def test_a_nan_function_is_rejected():
    with pytest.raises(GradientError, match="numerical nan"):
        gradcheck(lambda x: x * np.nan, lambda g, x: g * 1.0, [np.ones(2)])


def test_a_gradient_that_ought_to_be_zero_is_rejected():
    gradcheck(lambda x: 0 * x, lambda g, x: 0 * x, [np.ones(2)])
    with pytest.raises(GradientError, match=r"numerical 0, analytic 1e-11"):
        gradcheck(lambda x: 0 * x, lambda g, x: 0 * x + 1e-11, [np.ones(2)])


def test_rounding_of_a_large_value_is_no_error():
    """A constant of 1e6 hides derivatives below the documented floor, and only those."""

    def f(x):
        return np.sin(x[0]) + 1e6

    def f_backward(grad_out, x):
        return np.array([grad_out * np.cos(x[0])])

    report = gradcheck(f, f_backward, [np.array([np.pi / 2 - 1e-8])])
    assert report.elementwise["args[0]"] < 1e-7
    with pytest.raises(GradientError):
        gradcheck(f, lambda g, x: np.array([g * (np.cos(x[0]) + 1e-5)]), [np.array([1.5])])


def relu(x):
    return np.maximum(x, 0.0)


def relu_backward(grad_out, x):
    return grad_out * (x > 0)


def test_a_kink_without_decisions_is_an_error():
    with pytest.raises(GradientError, match=r"at element \(1,\)"):
        gradcheck(relu, relu_backward, [np.array([1.0, 1e-4, -1.0])])


def test_a_point_on_a_boundary_is_named():
    with pytest.raises(
        GradientError,
        match=r"^gradcheck: x must lie away from a boundary, got decisions that change within "
        r"3\.1e-05 of it along element \(1,\)\. No derivative exists across a boundary\. "
        r"Move the point, or draw it with another seed\.$",
    ):
        gradcheck(
            relu,
            relu_backward,
            [np.array([1.0, 1e-6, -1.0])],
            names=["x"],
            decisions=lambda x: x > 0,
        )


def test_near_a_boundary_smaller_steps_are_taken():
    point = [np.array([1.0, 1e-4, -1.0])]
    report = gradcheck(relu, relu_backward, point, decisions=lambda x: x > 0)
    assert report.elementwise["args[0]"] < 1e-9


def test_decisions_may_be_a_tuple_and_change_in_shape():
    def decisions(x):
        return (x[:1] > 5, np.flatnonzero(x > 0))

    with pytest.raises(GradientError, match="boundary"):
        gradcheck(relu, relu_backward, [np.array([1.0, 0.0])], decisions=decisions)


def test_a_gradient_of_another_shape_is_rejected():
    with pytest.raises(
        ShapeError,
        match=r"^gradcheck: gradient of w must have shape \(4, 3\), got \(3, 4\)\. "
        r"The shape is bound by w\.$",
    ):
        gradcheck(product, planted(lambda g: g.T), (X, W), names=("x", "w"))


def test_a_missing_gradient_is_rejected_unless_left_out():
    with pytest.raises(
        GradientError,
        match=r"^gradcheck: gradient of args\[1\] must exist, got None\. "
        r"Leave args\[1\] out of the check, or return its gradient\.$",
    ):
        gradcheck(product, planted(lambda g: None), (X, W))
    report = gradcheck(product, planted(lambda g: None), (X, W), wrt=[0])
    assert list(report.elementwise) == ["args[0]"]


def test_the_number_of_gradients_is_checked():
    with pytest.raises(
        ShapeError,
        match=r"^gradcheck: f_backward must return one entry for each of 2 args, got 1\. "
        r"Return None where there is no gradient\.$",
    ):
        gradcheck(product, lambda g, x, w: (x,), (X, W))


@pytest.mark.parametrize(
    ("f", "f_backward", "args", "what"),
    [
        (product, product_backward, (X.astype("f4"), W), r"args\[0\]"),
        (lambda x: x.astype("f4"), lambda g, x: x, (X,), r"f\(\*args\)"),
        (lambda x: x, lambda g, x: x.astype("f4"), (X,), r"gradient of args\[0\]"),
    ],
)
def test_float32_is_rejected(f, f_backward, args, what):
    with pytest.raises(
        DTypeError,
        match=rf"^gradcheck: {what} must be a float64 array, got float32\. "
        r"Differences of fewer digits resolve nothing\. Convert it with astype\('float64'\)\.$",
    ):
        gradcheck(f, f_backward, args)


def test_other_arguments_pass_through():
    def f(x, ids, scale):
        return float(scale * x[ids].sum())

    def f_backward(grad_out, x, ids, scale):
        grad = np.zeros_like(x)
        np.add.at(grad, ids, scale * grad_out)
        return grad, None, None

    report = gradcheck(f, f_backward, (X, np.array([1, 1]), 3.0), names=["x", "ids", "scale"])
    assert list(report.directional) == ["x"]
    with pytest.raises(DTypeError, match="ids must be a float64 array, got int64"):
        gradcheck(f, f_backward, (X, np.array([1, 1]), 3.0), names=["x", "ids", "s"], wrt=[1])
    with pytest.raises(DTypeError, match=r"args\[2\] must be a float64 array, got float"):
        gradcheck(f, f_backward, (X, np.array([1, 1]), 3.0), wrt=[2])


def test_names_and_wrt_are_checked():
    with pytest.raises(
        RangeError, match=r"^gradcheck: names must have one entry for each of 2 args, got 1\.$"
    ):
        gradcheck(product, product_backward, (X, W), names=["x"])
    with pytest.raises(
        RangeError, match=r"^gradcheck: wrt must choose at least one argument, got none\.$"
    ):
        gradcheck(lambda n: 1.0, lambda g, n: None, [3])


def test_scalars_and_empty_arrays_are_arguments_too():
    def f(x, empty):
        return x**2 + empty.sum()

    report = gradcheck(
        f, lambda g, x, empty: (np.asarray(2 * g * x), g + empty), (np.array(3.0), np.ones((0, 2)))
    )
    assert report.elementwise["args[1]"] == report.directional["args[1]"] == 0.0
    assert 0 < report.directional["args[0]"] < 1e-9


def test_arguments_are_copied_and_equal_seeds_agree():
    x = X.copy()
    x.flags.writeable = False
    first = gradcheck(product, product_backward, (x, W), rng=3)
    again = gradcheck(product, product_backward, (x, W), rng=np.random.default_rng(3))
    other = gradcheck(product, product_backward, (x, W), rng=4)
    assert first == again != other


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    weight: np.ndarray
    bias: np.ndarray | None = None


def model():
    """Return params, their gradients and the loss sum(tanh(x w^T) + b) of two layers."""
    rng = np.random.default_rng(1)
    params = (
        Layer(weight=rng.standard_normal((4, 3)), bias=rng.standard_normal(4)),
        Layer(weight=W),
    )

    def loss():
        return sum(
            np.tanh(X @ p.weight.T).sum() + (0 if p.bias is None else p.bias.sum()) for p in params
        )

    def grad(p):
        grad_w = (1 - np.tanh(X @ p.weight.T) ** 2).T @ X
        return Layer(weight=grad_w, bias=None if p.bias is None else np.ones(4))

    return params, tuple(grad(p) for p in params), loss


def test_directions_of_a_model_are_measured_by_path():
    params, grads, loss = model()
    errors = check_directions(loss, grads, params, directions=3)
    assert list(errors) == ["0.weight", "0.bias", "1.weight"]
    assert max(errors.values()) < 1e-9


def test_a_planted_error_shows_at_its_path_only():
    params, grads, loss = model()
    grads[1].weight[...] *= 1.001
    errors = check_directions(loss, grads, params)
    assert errors.pop("1.weight") == pytest.approx(1e-3, rel=1e-2)
    assert max(errors.values()) < 1e-9


def test_a_nan_gradient_of_a_model_is_nan():
    params, grads, loss = model()
    grads[0].bias[2] = np.nan
    assert np.isnan(check_directions(loss, grads, params, directions=2)["0.bias"])


def test_parameters_are_put_back_bitwise():
    params, grads, loss = model()
    before = [p.weight.tobytes() for p in params]
    check_directions(loss, grads, params)
    assert [p.weight.tobytes() for p in params] == before
    calls = iter(range(3))

    def failing():
        next(calls)
        return loss()

    with pytest.raises(StopIteration):
        check_directions(failing, grads, params)
    assert [p.weight.tobytes() for p in params] == before


def test_decisions_of_a_model_are_read_after_the_loss():
    params = (Layer(weight=np.array([1.0, 1e-9])),)
    grads = (Layer(weight=np.array([1.0, 0.0])),)
    recorded = []

    def loss():
        recorded.append(params[0].weight > 0)
        return relu(params[0].weight).sum()

    with pytest.raises(
        GradientError,
        match=r"^check_directions: 0\.weight must lie away from a boundary, .* "
        r"along direction 0\. ",
    ):
        check_directions(loss, grads, params, decisions=lambda: recorded[-1], directions=4)
    assert params[0].weight.tolist() == [1.0, 1e-9]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bias": None}, GradientError, r"gradient of 0\.bias must exist, got None"),
        (
            {"bias": np.ones(3)},
            ShapeError,
            r"gradient of 0\.bias must have shape \(4,\), got \(3,\)",
        ),
        ({"bias": np.ones(4, "f4")}, DTypeError, r"gradient of 0\.bias must be a float64 array"),
    ],
)
def test_the_trees_must_agree(change, error, message):
    params, grads, loss = model()
    grads = (dataclasses.replace(grads[0], **change), grads[1])
    with pytest.raises(error, match="^check_directions: " + message):
        check_directions(loss, grads, params)


def test_a_model_of_float32_is_rejected():
    params, grads, loss = model()
    params = (Layer(weight=params[0].weight.astype("f4")),)
    with pytest.raises(DTypeError, match=r"^check_directions: 0\.weight must be a float64 array"):
        check_directions(loss, grads, params)
