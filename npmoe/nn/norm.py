"""Root-mean-square and layer normalisation of the last axis."""

from __future__ import annotations

import math

import numpy as np

from npmoe._checks import require
from npmoe._typing import HostArray
from npmoe.nn._inputs import Inputs


def rms_norm(x: HostArray, weight: HostArray, eps: float = 1e-6) -> HostArray:
    """Divide each row by its root mean square: y = weight * x / sqrt(mean(x**2) + eps).

    Parameters
    ----------
    x : (..., N) float array
        Rows of zeros are allowed and stay zero.
    weight : (N,) float array
    eps : float
        Positive.

    Returns
    -------
    (..., N) float array
        New, with the dtype of x.

    Raises
    ------
    ShapeError, DTypeError, RangeError

    Notes
    -----
    **Cost**: 3 passes over x. **Accuracy**: gamma_N/2 in the root, all in the dtype of x;
    squares must not overflow.

    References
    ----------
    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
    """
    rows = check_norm("rms_norm", x, weight, None, eps)
    y: HostArray = rows * _inverse_root(rows, eps)[:, None]
    y *= weight
    return y.reshape(x.shape)


def rms_norm_backward(
    grad_y: HostArray, x: HostArray, weight: HostArray, eps: float = 1e-6
) -> tuple[HostArray, HostArray]:
    """Return the gradients of `rms_norm`.

    With r = 1/sqrt(mean(x**2) + eps), per row: grad_x = r w*g - x r**3 <g, w*x> / N;
    grad_weight = sum over rows of r g*x.

    Parameters
    ----------
    grad_y : (..., N) float array
    x, weight, eps
        As given to `rms_norm`.

    Returns
    -------
    grad_x : (..., N) float array
    grad_weight : (N,) float array
        Both new.

    Raises
    ------
    ShapeError, DTypeError, RangeError

    Notes
    -----
    **Cost**: 7 passes over x. **Order**: rows of grad_weight in the BLAS's order.
    """
    rows = check_norm("rms_norm_backward", x, weight, None, eps, grad_y=grad_y)
    grad_rows = grad_y.reshape(rows.shape)
    inverse = _inverse_root(rows, eps)
    work = grad_rows * rows
    grad_weight = inverse @ work
    along = (work @ weight) * inverse**3
    along /= rows.shape[1]
    grad_x = grad_rows * weight
    grad_x *= inverse[:, None]
    np.multiply(rows, along[:, None], out=work)
    grad_x -= work
    return grad_x.reshape(x.shape), grad_weight


def layer_norm(x: HostArray, weight: HostArray, bias: HostArray, eps: float = 1e-5) -> HostArray:
    """Standardise each row: y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias.

    Parameters
    ----------
    x : (..., N) float array
        Rows may be constant.
    weight, bias : (N,) float arrays
    eps : float
        Positive.

    Returns
    -------
    (..., N) float array
        New, with the dtype of x.

    Raises
    ------
    ShapeError, DTypeError, RangeError

    Notes
    -----
    **Cost**: 6 passes over x. **Accuracy**: the variance is that of the centred row (two
    passes), so a large mean costs no digits of it beyond those of the subtraction.

    References
    ----------
    Ba, Kiros and Hinton 2016, "Layer Normalization", eq. 4.
    """
    rows = check_norm("layer_norm", x, weight, bias, eps)
    y = _centre(rows)
    y *= _inverse_root(y, eps)[:, None]
    y *= weight
    y += bias
    return y.reshape(x.shape)


def layer_norm_backward(
    grad_y: HostArray, x: HostArray, weight: HostArray, bias: HostArray, eps: float = 1e-5
) -> tuple[HostArray, HostArray, HostArray]:
    """Return the gradients of `layer_norm`.

    With c = x - mean(x), r = 1/sqrt(mean(c**2) + eps) and h = w*g, per row:
    grad_x = r (h - mean(h)) - c r**3 <h, c> / N; grad_weight = sum over rows of r g*c;
    grad_bias = sum over rows of g.

    Parameters
    ----------
    grad_y : (..., N) float array
    x, weight, bias, eps
        As given to `layer_norm`.

    Returns
    -------
    grad_x : (..., N) float array
    grad_weight, grad_bias : (N,) float arrays
        All new.

    Raises
    ------
    ShapeError, DTypeError, RangeError

    Notes
    -----
    **Cost**: 11 passes over x. **Order**: rows of grad_weight in the BLAS's order.
    """
    rows = check_norm("layer_norm_backward", x, weight, bias, eps, grad_y=grad_y)
    grad_rows = grad_y.reshape(rows.shape)
    size = rows.shape[1]
    centred = _centre(rows)
    inverse = _inverse_root(centred, eps)
    work = grad_rows * centred
    grad_weight = inverse @ work
    along = (work @ weight) * inverse**3
    along /= size
    mean = grad_rows @ weight
    mean /= size
    grad_x = np.multiply(grad_rows, weight, out=work)
    grad_x -= mean[:, None]
    grad_x *= inverse[:, None]
    centred *= along[:, None]
    grad_x -= centred
    return grad_x.reshape(x.shape), grad_weight, grad_rows.sum(axis=0)


def _centre(rows: HostArray) -> HostArray:
    """Return a copy of the rows (T, N) without their means."""
    mean = np.einsum("tn->t", rows)
    mean /= rows.shape[1]
    centred: HostArray = rows - mean[:, None]
    return centred


def _inverse_root(rows: HostArray, eps: float) -> HostArray:
    """Return 1/sqrt(mean of squares + eps) of each row: (T, N) -> (T,)."""
    inverse: HostArray = np.einsum("tn,tn->t", rows, rows)
    inverse /= rows.shape[1]
    inverse += eps
    np.sqrt(inverse, out=inverse)
    return np.reciprocal(inverse, out=inverse)


def check_norm(
    function: str,
    x: HostArray,
    weight: HostArray,
    bias: HostArray | None,
    eps: float,
    *,
    grad_y: HostArray | None = None,
) -> HostArray:
    """Check all arrays and return x as rows (T, N)."""
    inputs = Inputs(function)
    inputs.check("weight", weight, "N")
    if bias is not None:
        inputs.check("bias", bias, "N")
    rows = inputs.rows("x", x, "N")
    if grad_y is not None:
        inputs.rows_like("grad_y", grad_y, x.shape[:-1], "N")
    require(
        math.isfinite(eps) and eps > 0,
        f"{function}: eps must be finite and positive, got {eps!r}. Rows may be zero.",
    )
    return rows
