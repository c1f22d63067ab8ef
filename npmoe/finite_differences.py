"""Compare a hand-written backward with fourth-order central differences, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.errors import DTypeError, GradientError, RangeError, ShapeError
from npmoe.tree import named_arrays

_STENCIL = ((-2, 1.0), (-1, -8.0), (1, 8.0), (2, -1.0))  # over 12 * step
_ATTEMPTS = 4  # steps tried where decisions change: step, step/4, step/16, step/64
_UNIT_ROUNDOFF = 2.0**-53
_ROUNDINGS = 8  # errors allowed in each sample of f, relative to max(1, |f|)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradcheckReport:
    """Worst relative errors of each checked argument, by its name."""

    elementwise: dict[str, float]
    directional: dict[str, float]
    tolerance: float


def gradcheck(
    f: Callable[..., Any],
    f_backward: Callable[..., Any],
    args: Sequence[Any],
    *,
    wrt: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    elementwise: bool = True,
    directions: int = 3,
    step: float = 1e-3,
    tolerance: float = 1e-7,
    decisions: Callable[..., Any] | None = None,
    rng: int | np.random.Generator = 0,
) -> GradcheckReport:
    """Raise unless `f_backward` is the adjoint of `f` at `args`.

    With v a seeded normal array and s(x) = <v, f(x)>, compares f_backward(v, x) with
    (s(x - 2hd) - 8 s(x - hd) + 8 s(x + hd) - s(x + 2hd)) / 12h.

    Parameters
    ----------
    f : callable
        ``f(*args)`` returns one float64 array or scalar.
    f_backward : callable
        ``f_backward(grad_out, *args)`` returns a tuple with an entry per argument, None where
        there is no gradient; with one argument the bare array will do.
    args : sequence
        The point. Arrays are copied, and never changed.
    wrt : sequence of int, optional
        Which arguments to check; all floating arrays by default.
    names : sequence of str, optional
        A name for every argument, for messages and the report; ``args[i]`` by default.
    elementwise : bool
        Whether to move every element alone; its error is relative to the largest gradient of
        its argument.
    directions : int
        How many seeded random directions of norm 1 to move each argument along; the error is
        relative to the derivative itself.
    step : float
        h. Where `decisions` change inside the stencil it is divided by 4, three times at most.
    tolerance : float
        Largest relative error that passes.
    decisions : callable, optional
        ``decisions(*args)`` returns the discrete choices of f (for example expert ids), as an
        array or a tuple of arrays. f must be smooth where they are constant.
    rng : int or Generator
        Seed of the directions and of v.

    Returns
    -------
    GradcheckReport
        Worst errors by name.

    Raises
    ------
    GradientError
        If a gradient is missing, disagrees, is NaN, or the point lies on a boundary.
    ShapeError
        If a gradient has another shape than its argument.
    DTypeError
        If an argument, f or a gradient is not float64.
    RangeError
        If `names` has another length than `args`, or nothing is to be checked.

    Notes
    -----
    Cost: 4 evaluations of f per element and per direction.

    Accuracy: truncation is h**4/30 times the fifth derivative. A sample of f is taken to be
    right within 8 u max(1, abs(f)), u = 2**-53, so the differences resolve r = 12 u
    max(1, abs(f)) / h. No error is measured relative to less than r / tolerance, which is
    1.3e-5 max(1, abs(f)) by default.
    """
    point = [np.array(a, order="C") if isinstance(a, np.ndarray) else a for a in args]
    labels = [f"args[{i}]" for i in range(len(point))] if names is None else list(names)
    if len(labels) != len(point):
        raise RangeError(
            f"gradcheck: names must have one entry for each of {len(point)} args, "
            f"got {len(labels)}."
        )
    chosen = [i for i, a in enumerate(point) if _is_floating(a)] if wrt is None else list(wrt)
    if not chosen:
        raise RangeError("gradcheck: wrt must choose at least one argument, got none.")
    for i in chosen:
        _check_float64("gradcheck", labels[i], point[i])
    generator = np.random.default_rng(rng)
    output = f(*point)
    _check_float64("gradcheck", "f(*args)", np.asarray(output))
    grad_out = generator.standard_normal(np.shape(output))
    grads = _gradients(f_backward(grad_out, *point), labels)
    probe = _Probe(
        "gradcheck",
        lambda: np.vdot(grad_out, f(*point)),
        None if decisions is None else lambda: decisions(*point),
        step=step,
        tolerance=tolerance,
    )
    report = GradcheckReport(elementwise={}, directional={}, tolerance=tolerance)
    for i in chosen:
        name = labels[i]
        grad = _check_gradient("gradcheck", name, point[i], grads[i])
        if elementwise:
            worst = _worst(probe.along_elements(name, point[i], grad))
            report.elementwise[name] = _accept(name, worst, tolerance)
        worst = _worst(probe.along_directions(name, point[i], grad, directions, generator))
        report.directional[name] = _accept(name, worst, tolerance)
    return report


def check_directions(
    loss: Callable[[], Any],
    grads: Any,
    params: Any,
    *,
    directions: int = 1,
    step: float = 1e-3,
    decisions: Callable[[], Any] | None = None,
    rng: int | np.random.Generator = 0,
) -> dict[str, float]:
    """Measure the error of a whole model's gradients along seeded random directions.

    Parameters
    ----------
    loss : callable
        ``loss()`` reads `params` and returns a float.
    grads, params : trees of float64 arrays
        As `npmoe.tree.named_arrays` walks them, with the same paths. The arrays of `params` are
        moved in place and put back bitwise, also when `loss` raises.
    directions : int
        How many directions of norm 1 for each array.
    step : float
        As in `gradcheck`.
    decisions : callable, optional
        ``decisions()`` is called after ``loss()``, so it may return what the loss recorded.
    rng : int or Generator
        Seed of the directions.

    Returns
    -------
    dict of str to float
        Worst relative error for each path; NaN if it is NaN anywhere. Errors are measured as in
        `gradcheck` at its default tolerance.

    Raises
    ------
    GradientError
        If `grads` lacks a path, or the point lies on a boundary.
    ShapeError, DTypeError
        If a gradient has another shape than its parameter, or an array is not float64.
    """
    generator = np.random.default_rng(rng)
    by_path = dict(named_arrays(grads))
    checked = [
        (path, array, _check_gradient("check_directions", path, array, by_path.get(path)))
        for path, array in named_arrays(params)
    ]
    probe = _Probe("check_directions", loss, decisions, step=step, tolerance=1e-7)
    return {
        path: _worst(probe.along_directions(path, array, grad, directions, generator)).error
        for path, array, grad in checked
    }


@dataclass(frozen=True, slots=True)
class _Difference:
    """One comparison: two derivatives, and what their difference is relative to."""

    where: str
    numerical: float
    analytic: float
    scale: float

    @property
    def error(self) -> float:
        return abs(self.numerical - self.analytic) / self.scale


class _Probe:
    """Differences of a scalar function of arrays that are moved in place and put back."""

    def __init__(
        self,
        function: str,
        loss: Callable[[], Any],
        decide: Callable[[], Any] | None,
        *,
        step: float,
        tolerance: float,
    ) -> None:
        self._function = function
        self._loss = loss
        self._decide = decide
        self._step = step
        self._tolerance = tolerance
        loss()
        self._here = self._decisions()

    def along_elements(self, name: str, array: HostArray, grad: HostArray) -> list[_Difference]:
        """Move each element of a C-contiguous array alone."""
        flat, flat_grad, one = array.reshape(-1), grad.reshape(-1), np.ones(1)
        where = [f"element {tuple(map(int, i))}" for i in np.ndindex(array.shape)]
        found = [self._derivative(name, where[i], flat[i : i + 1], one) for i in range(array.size)]
        # fmax passes over NaN, which must not spread from one element to all.
        largest = float(np.fmax.reduce(np.abs([*flat_grad, *(n for n, _ in found), 0.0])))
        return [
            _Difference(where[i], numerical, float(flat_grad[i]), max(largest, floor))
            for i, (numerical, floor) in enumerate(found)
        ]

    def along_directions(
        self,
        name: str,
        array: HostArray,
        grad: HostArray,
        directions: int,
        generator: np.random.Generator,
    ) -> list[_Difference]:
        """Move the whole array along random directions of norm 1."""
        found = []
        for count in range(directions if array.size else 0):
            where = f"direction {count}"
            direction = np.asarray(generator.standard_normal(array.shape))
            direction /= np.sqrt(np.vdot(direction, direction))
            numerical, floor = self._derivative(name, where, array, direction)
            analytic = float(np.vdot(grad, direction))
            scale = max(abs(numerical), abs(analytic), floor)
            found.append(_Difference(where, numerical, analytic, scale))
        return found

    def _derivative(
        self, name: str, where: str, array: HostArray, direction: HostArray
    ) -> tuple[float, float]:
        """Return the derivative along `direction` and the floor of its error's denominator."""
        saved = array.copy()
        try:
            for attempt in range(_ATTEMPTS):
                h = self._step / 4**attempt
                total, largest = 0.0, 1.0
                for k, weight in _STENCIL:
                    np.multiply(direction, k * h, out=array)
                    np.add(array, saved, out=array)
                    value = float(self._loss())
                    if self._decisions() != self._here:
                        break
                    total += weight * value
                    largest = max(largest, abs(value))
                else:
                    # The weights' sizes add up to 18: 18 / 12 errors of f over the step.
                    resolution = 1.5 * _ROUNDINGS * _UNIT_ROUNDOFF * largest / h
                    return total / (12 * h), resolution / self._tolerance
        finally:
            array[...] = saved
        raise GradientError(
            f"{self._function}: {name} must lie away from a boundary, got decisions that change "
            f"within {2 * h:.1e} of it along {where}. No derivative exists across a boundary. "
            "Move the point, or draw it with another seed."
        )

    def _decisions(self) -> object:
        return None if self._decide is None else _fingerprint(self._decide())


def _worst(found: list[_Difference]) -> _Difference:
    """Return the difference of largest error; NaN counts as largest."""
    if not found:
        return _Difference("nothing", 0.0, 0.0, 1.0)
    return found[int(np.argmax([d.error for d in found]))]


def _accept(name: str, worst: _Difference, tolerance: float) -> float:
    """Return the error, or raise GradientError unless it is within the tolerance."""
    if not (worst.error <= tolerance):
        raise GradientError(
            f"gradcheck: gradient of {name} must agree with central differences within "
            f"{tolerance:.1e}, got relative error {worst.error:.1e} at {worst.where}: "
            f"numerical {worst.numerical:.12g}, analytic {worst.analytic:.12g}."
        )
    return worst.error


def _gradients(returned: Any, labels: list[str]) -> tuple[Any, ...]:
    """Return f_backward's result as a tuple with one entry for each argument."""
    grads = returned if isinstance(returned, tuple) else (returned,)
    if len(grads) != len(labels):
        raise ShapeError(
            f"gradcheck: f_backward must return one entry for each of {len(labels)} args, "
            f"got {len(grads)}. Return None where there is no gradient."
        )
    return grads


def _check_gradient(function: str, name: str, array: HostArray, grad: Any) -> HostArray:
    """Return the gradient as an array of the argument's shape, or raise."""
    _check_float64(function, name, array)
    if grad is None:
        raise GradientError(
            f"{function}: gradient of {name} must exist, got None. "
            f"Leave {name} out of the check, or return its gradient."
        )
    values: HostArray = np.asarray(grad)
    if values.shape != array.shape:
        raise ShapeError(
            f"{function}: gradient of {name} must have shape {array.shape}, got {values.shape}. "
            f"The shape is bound by {name}."
        )
    _check_float64(function, f"gradient of {name}", values)
    return values


def _is_floating(value: Any) -> bool:
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)


def _check_float64(function: str, name: str, array: Any) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != np.float64:
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise DTypeError(
            f"{function}: {name} must be a float64 array, got {got}. "
            "Differences of fewer digits resolve nothing. Convert it with astype('float64')."
        )


def _fingerprint(decisions: Any) -> object:
    """Return a value that equals another's exactly where all decisions are equal."""
    if isinstance(decisions, tuple | list):
        return tuple(_fingerprint(d) for d in decisions)
    return np.asarray(decisions).tobytes()
