"""Shape, dtype and range checks: their messages, character by character."""

from __future__ import annotations

import numpy as np
import pytest

from npmoe import errors
from npmoe._checks import Axes, check_float, check_integer_ids, check_same_dtype, require


def shape_message(axes: Axes, name: str, shape: tuple[int, ...], *letters: str) -> str:
    with pytest.raises(errors.ShapeError) as caught:
        axes.check(name, np.empty(shape), *letters)
    return str(caught.value)


def test_axes_bound_by_an_array() -> None:
    axes = Axes("moe_forward")
    axes.check("gate_up_proj", np.empty((8, 512, 64)), "E", "2I", "H")
    axes = Axes("moe_forward")
    axes.check("gate_up_proj", np.empty((8, 256, 64)), "E", "I", "H")
    assert shape_message(axes, "params.down_proj", (8, 256, 64), "E", "H", "I") == (
        "moe_forward: params.down_proj must have shape (E, H, I) = (8, 64, 256), "
        "got (8, 256, 64). E, H, I are bound by gate_up_proj (8, 256, 64). It looks transposed."
    )


def test_axes_bound_by_several_sources() -> None:
    axes = Axes("f")
    axes.bind("cfg", E=4, I=3)
    axes.check("x", np.empty((7, 5)), "T", "H")
    assert shape_message(axes, "w", (4, 6, 6), "E", "2*I", "H") == (
        "f: w must have shape (E, 2*I, H) = (4, 6, 5), got (4, 6, 6). "
        "E, I are bound by cfg. H is bound by x (7, 5)."
    )


def test_one_axis_and_free_letters() -> None:
    axes = Axes("f")
    axes.bind("cfg", E=4)
    assert shape_message(axes, "b", (5,), "E") == (
        "f: b must have shape (E,) = (4,), got (5,). E is bound by cfg."
    )
    assert shape_message(axes, "w", (5,), "E", "H") == (
        "f: w must have shape (E, H) = (4, H), got (5,). E is bound by cfg."
    )
    assert shape_message(Axes("f"), "w", (5,), "A", "B") == (
        "f: w must have shape (A, B) = (A, B), got (5,)."
    )
    assert shape_message(Axes("f"), "w", (2, 5), "1", "B") == (
        "f: w must have shape (1, B) = (1, B), got (2, 5)."
    )


def test_transposed_only_when_it_is() -> None:
    axes = Axes("f")
    axes.bind("cfg", A=2, B=3)
    assert shape_message(axes, "w", (3, 2), "A", "B").endswith("It looks transposed.")
    assert shape_message(axes, "w", (3, 3), "A", "B").endswith("A, B are bound by cfg.")
    assert "transposed" not in shape_message(axes, "w", (3,), "A")
    axes.check("w", np.empty((2, 3)), "A", "B")


def test_failed_check_binds_nothing() -> None:
    axes = Axes("f")
    axes.bind("cfg", E=4)
    shape_message(axes, "w", (5, 7), "E", "H")
    axes.check("w", np.empty((4, 8)), "E", "H")
    shape_message(axes, "v", (7,), "H")


def test_product_with_one_free_factor_binds_nothing() -> None:
    axes = Axes("f")
    axes.check("w", np.empty((6,)), "2*I")
    axes.check("v", np.empty((3,)), "I")
    assert shape_message(axes, "w", (5,), "2*I") == (
        "f: w must have shape (2*I,) = (6,), got (5,). I is bound by v (3,)."
    )


def test_check_float() -> None:
    for dtype in ("float32", "float64"):
        check_float("f", "x", np.empty(2, dtype))
    for dtype in ("float16", "int64", "complex128", "bool", ">f4", "O"):
        with pytest.raises(errors.DTypeError) as caught:
            check_float("f", "x", np.empty(2, dtype))
        assert str(caught.value) == (
            f"f: x must have dtype float32 or float64, got {np.dtype(dtype)}. "
            "Convert it with x.astype('float32')."
        )
    with pytest.raises(errors.DTypeError) as caught:
        check_float("f", "x", [1.0])
    assert str(caught.value) == (
        "f: x must be an array, got list. Convert it with numpy.asarray or the backend's asarray."
    )


def test_check_same_dtype() -> None:
    x = np.empty(2, np.float32)
    check_same_dtype("f", "x", x, np.dtype("float32"), "y")
    with pytest.raises(errors.DTypeError) as caught:
        check_same_dtype("f", "x", x, np.dtype("float64"), "y")
    assert str(caught.value) == (
        "f: x must have dtype float64, got float32. The dtype is bound by y. "
        "Convert one of them with astype."
    )


def test_check_integer_ids() -> None:
    for dtype in ("int8", "uint16", "int64"):
        check_integer_ids("f", "ids", np.empty(2, dtype))
    for value, got in (([1], "list"), (np.ones(2), "float64"), (np.ones(2, bool), "bool")):
        with pytest.raises(errors.DTypeError) as caught:
            check_integer_ids("f", "ids", value)
        assert str(caught.value) == f"f: ids must be an integer array, got {got}."


def test_require() -> None:
    require(True, "never")
    with pytest.raises(errors.RangeError, match=r"^why$"):
        require(False, "why")


@pytest.mark.parametrize(
    ("name", "standard"),
    [
        ("ShapeError", ValueError),
        ("RangeError", ValueError),
        ("PlanError", ValueError),
        ("CheckpointError", ValueError),
        ("DataError", ValueError),
        ("DTypeError", TypeError),
        ("BackendUnavailableError", ImportError),
        ("UnsupportedError", NotImplementedError),
        ("GradientError", AssertionError),
    ],
)
def test_error_classes(name: str, standard: type[Exception]) -> None:
    import npmoe

    cls = getattr(errors, name)
    assert cls.__bases__ == (errors.NpmoeError, standard)
    assert getattr(npmoe, name) is cls
    assert errors.NpmoeError.__bases__ == (Exception,)


def test_every_error_class_is_listed() -> None:
    import npmoe

    classes = {n for n, v in vars(errors).items() if isinstance(v, type)}
    assert classes <= set(npmoe.__all__)
    assert len(classes) == 10
