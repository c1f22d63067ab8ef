from __future__ import annotations

import math

import numpy as np
import pytest

from npmoe.craft import distillation_loss
from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.finite_differences import gradcheck
from npmoe.nn import cross_entropy, cross_entropy_backward
from npmoe.testing.bounds import assert_within, gamma


def drawn(shape=(2, 3, 5), dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    return (3 * rng.standard_normal(shape)).astype(dtype), (3 * rng.standard_normal(shape)).astype(
        dtype
    )


def test_two_classes_by_hand():
    # p = (1/2, 1/2), q = (3/4, 1/4) at temperature 2: logits of the student 2 ln 3 apart.
    student, teacher = np.array([[2 * math.log(3), 0.0]]), np.zeros((1, 2))
    value, grad = distillation_loss(student, teacher, temperature=2.0)
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert value == pytest.approx(4 * divergence, rel=gamma(40, "f8"))
    np.testing.assert_allclose(grad, [[2 * 0.25, -2 * 0.25]], rtol=gamma(40, "f8"))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient(temperature, masked):
    student, teacher = drawn()
    mask = np.array([[True, False, True], [True, True, False]]) if masked else None

    def f(student):
        return np.float64(
            distillation_loss(student, teacher, temperature=temperature, mask=mask)[0]
        )

    def f_backward(grad_out, student):
        return grad_out * distillation_loss(student, teacher, temperature=temperature, mask=mask)[1]

    report = gradcheck(f, f_backward, (student,))
    assert max(report.elementwise.values()) < 1e-8
    grad = distillation_loss(student, teacher, temperature=temperature, mask=mask)[1]
    if masked:
        assert not grad[~mask].any()
    # The gradient is orthogonal to a shift of all logits.
    assert np.abs(grad.sum(axis=-1)).max() <= gamma(20, "f8") * np.abs(grad).sum()


def test_a_sure_teacher_at_temperature_one_is_the_cross_entropy():
    student, _ = drawn((4, 5))
    targets = np.array([0, 3, 4, 1])
    teacher = np.full((4, 5), -1000.0)
    teacher[np.arange(4), targets] = 0.0
    value, grad = distillation_loss(student, teacher)
    loss, log_sum_exp = cross_entropy(student, targets)
    want = cross_entropy_backward(1.0, student, targets, log_sum_exp)
    assert value == pytest.approx(loss, rel=gamma(40, "f8"))
    assert_within(grad, want, gamma(40, "f8") * (np.abs(want) + 1), "distillation_loss")


def test_agreement_is_exactly_zero_and_shifts_do_not_matter():
    student, _ = drawn(dtype="float32")
    value, grad = distillation_loss(student, student.astype("float64"), temperature=3.0)
    assert value == 0.0
    assert not grad.any()
    assert grad.dtype == np.float32
    shifted, _ = distillation_loss(np.round(student) + 64, np.round(student), temperature=3.0)
    assert shifted == 0.0


def test_value_is_never_negative_beyond_rounding_and_coefficient_multiplies():
    for seed in range(20):
        student, teacher = drawn(seed=seed)
        value, grad = distillation_loss(student, teacher)
        twice, grad_twice = distillation_loss(student, teacher, coefficient=2.0)
        assert value > 0
        assert twice == 2 * value
        np.testing.assert_array_equal(grad_twice, 2 * grad)


def test_large_logits_and_no_tokens():
    student = np.array([[1e30, -1e30]], np.float32)
    value, grad = distillation_loss(student, -student)
    assert math.isfinite(value)
    np.testing.assert_array_equal(grad, [[1, -1]])
    value, grad = distillation_loss(student, student, mask=np.array([False]))
    assert (value, grad.any()) == (0.0, False)
    value, grad = distillation_loss(np.empty((0, 4)), np.empty((0, 4)))
    assert (value, grad.shape) == (0.0, (0, 4))


def test_masked_logits_may_hold_anything():
    student, teacher = drawn((3, 4))
    mask = np.array([True, False, True])
    clean = distillation_loss(student, teacher, mask=mask)
    student[1], teacher[1] = np.nan, np.inf
    value, grad = distillation_loss(student, teacher, mask=mask)
    assert value == clean[0]
    np.testing.assert_array_equal(grad, clean[1])


def test_messages():
    student, teacher = drawn((2, 3))
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(
            RangeError, match=r"^distillation_loss: temperature must be positive and finite"
        ):
            distillation_loss(student, teacher, temperature=temperature)
    with pytest.raises(RangeError, match=r"coefficient must be finite, got nan"):
        distillation_loss(student, teacher, coefficient=math.nan)
    with pytest.raises(ShapeError, match=r"teacher_logits must have shape \(2, 3\), got \(2, 2\)"):
        distillation_loss(student, teacher[:, :2])
    with pytest.raises(ShapeError, match=r"mask must have shape \(2,\), got \(3,\)"):
        distillation_loss(student, teacher, mask=np.ones(3, bool))
    with pytest.raises(DTypeError, match=r"mask must have dtype bool, got int64"):
        distillation_loss(student, teacher, mask=np.ones(2, int))
    with pytest.raises(DTypeError, match=r"teacher_logits must have dtype float32 or float64"):
        distillation_loss(student, teacher.astype(int))
    with pytest.raises(ShapeError, match=r"student_logits must have shape \(\.\.\., V\)"):
        distillation_loss(np.empty((2, 0)), np.empty((2, 0)))
    student[0, 1] = np.nan
    with pytest.raises(RangeError, match=r"student_logits must be finite where the mask is True"):
        distillation_loss(student, teacher)
