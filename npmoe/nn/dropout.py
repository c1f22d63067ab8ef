"""Inverted dropout."""

from __future__ import annotations

import numpy as np

from npmoe._checks import check_float, require
from npmoe._typing import HostArray
from npmoe.errors import ShapeError


def dropout(x: HostArray, p: float, rng: np.random.Generator) -> tuple[HostArray, HostArray]:
    """Set elements to zero with probability p: y = mask * x / (1 - p).

    Parameters
    ----------
    x : (...) float array
    p : float
        In [0, 1). With 0, nothing is drawn.
    rng : Generator
        One float32 is drawn for each element, whatever the dtype of x.

    Returns
    -------
    y : (...) float array
        New, with the dtype of x.
    mask : (...) bool array
        True where x was kept.

    Raises
    ------
    DTypeError, RangeError

    References
    ----------
    Srivastava et al. 2014, "Dropout", section 10, for the scaling at training time.
    """
    check_float("dropout", "x", x)
    _check_p("dropout", p)
    if p == 0:
        return x.copy(), np.ones(x.shape, bool)
    mask = rng.random(x.shape, dtype=np.float32) >= p
    return _scale(x, mask, p), mask


def dropout_backward(grad_y: HostArray, mask: HostArray, p: float) -> HostArray:
    """Return the gradient of x of `dropout`: mask * grad_y / (1 - p).

    Parameters
    ----------
    grad_y : (...) float array
    mask : (...) bool array
        As returned by `dropout`.
    p : float
        As given to it.

    Returns
    -------
    (...) float array
        New, with the dtype of grad_y.

    Raises
    ------
    ShapeError, DTypeError, RangeError
    """
    check_float("dropout_backward", "grad_y", grad_y)
    _check_p("dropout_backward", p)
    if grad_y.shape != mask.shape:
        raise ShapeError(
            f"dropout_backward: grad_y must have the shape of mask {mask.shape}, "
            f"got {grad_y.shape}."
        )
    return _scale(grad_y, mask, p)


def _scale(x: HostArray, mask: HostArray, p: float) -> HostArray:
    y: HostArray = x * mask
    y *= 1 / (1 - p)
    return y


def _check_p(function: str, p: float) -> None:
    require(0 <= p < 1, f"{function}: p must lie in [0, 1), got {p!r}.")
