"""Distillation: a student learns what a teacher finds likely, not only what is right."""

from __future__ import annotations

import math

import numpy as np

from npmoe._checks import check_float, require
from npmoe._typing import HostArray
from npmoe.errors import DTypeError, ShapeError


def distillation_loss(
    student_logits: HostArray,
    teacher_logits: HostArray,
    *,
    temperature: float = 1.0,
    coefficient: float = 1.0,
    mask: HostArray | None = None,
) -> tuple[float, HostArray]:
    """Return the divergence of the student from its teacher, and its gradient.

    ``coefficient * temperature**2 * mean over tokens of KL(p || q)`` with
    ``p = softmax(teacher / temperature)``, ``q = softmax(student / temperature)``; the gradient is
    ``coefficient * temperature * (q - p) / T``. The factor temperature**2 keeps its size beside
    that of a cross entropy when the temperature changes. The teacher is a constant.

    Parameters
    ----------
    student_logits : (..., V) float array
    teacher_logits : (..., V) float array
        May have another float dtype.
    temperature : float
        Above 1 it shows more of what the teacher finds unlikely.
    coefficient : float
        Multiplies value and gradient.
    mask : (...,) bool array, optional
        Which tokens count; all by default. Logits of the others may hold anything.

    Returns
    -------
    value : float
        In nats; 0 if the two agree, and if no token counts.
    grad_student_logits : (..., V) float array
        New, of the dtype of `student_logits`; exact zeros where the mask is False.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit each other.
    RangeError
        If the temperature is not positive, or a number is not finite.

    Notes
    -----
    **Accuracy**: everything is computed in float64 from logits minus their maximum, and the
    gradient is rounded once.

    References
    ----------
    Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", section 2. Their
    cross entropy with soft targets is this divergence plus the teacher's entropy, a constant.

    Examples
    --------
    >>> logits = np.array([[0.0, 1.0], [2.0, 0.0]])
    >>> distillation_loss(logits, logits)[0]
    0.0
    """
    function = "distillation_loss"
    require(
        0 < temperature < math.inf,
        f"{function}: temperature must be positive and finite, got {temperature}.",
    )
    require(
        math.isfinite(coefficient),
        f"{function}: coefficient must be finite, got {coefficient}.",
    )
    counted = _check(function, student_logits, teacher_logits, mask)
    size = student_logits.shape[-1]
    grad = np.zeros((counted.size, size), student_logits.dtype)
    total = int(np.count_nonzero(counted))
    if total == 0:
        return 0.0, grad.reshape(student_logits.shape)
    student = _log_softmax(function, "student_logits", student_logits, counted, temperature)
    teacher = _log_softmax(function, "teacher_logits", teacher_logits, counted, temperature)
    probs = np.exp(teacher)
    divergence = float(np.vdot(probs, teacher - student)) / total
    difference = np.exp(student) - probs
    grad[counted] = difference * (coefficient * temperature / total)
    value = coefficient * temperature**2 * divergence
    return value, grad.reshape(student_logits.shape)


def _log_softmax(
    function: str, name: str, logits: HostArray, counted: HostArray, temperature: float
) -> HostArray:
    """Return the log probabilities of the counted tokens, float64."""
    rows = logits.reshape(-1, logits.shape[-1])[counted].astype(np.float64)
    require(
        bool(np.isfinite(rows).all()),
        f"{function}: {name} must be finite where the mask is True, got NaN or infinity. "
        "A loss of them would be meaningless.",
    )
    rows = (rows - rows.max(axis=1, keepdims=True)) / temperature
    shifted: HostArray = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return shifted


def _check(
    function: str, student: HostArray, teacher: HostArray, mask: HostArray | None
) -> HostArray:
    """Check the arrays; return which tokens count, (T,)."""
    check_float(function, "student_logits", student)
    check_float(function, "teacher_logits", teacher)
    if student.ndim < 1 or student.shape[-1] < 1:
        raise ShapeError(
            f"{function}: student_logits must have shape (..., V) with V >= 1, got {student.shape}."
        )
    if teacher.shape != student.shape:
        raise ShapeError(
            f"{function}: teacher_logits must have shape {student.shape}, got {teacher.shape}. "
            "It is bound by student_logits."
        )
    if mask is None:
        return np.ones(math.prod(student.shape[:-1]), bool)
    if mask.dtype != bool:
        raise DTypeError(f"{function}: mask must have dtype bool, got {mask.dtype}.")
    if mask.shape != student.shape[:-1]:
        raise ShapeError(
            f"{function}: mask must have shape {student.shape[:-1]}, got {mask.shape}. "
            "It is bound by student_logits."
        )
    return mask.reshape(-1)
