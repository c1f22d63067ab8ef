"""The affine map, for arrays with any leading dimensions."""

from __future__ import annotations

from typing import overload

from npmoe import ops
from npmoe._typing import HostArray
from npmoe.nn._inputs import Inputs


def linear(x: HostArray, weight: HostArray, bias: HostArray | None = None) -> HostArray:
    """Map the last axis: y = x weight^T + bias.

    Parameters
    ----------
    x : (..., N) float array
    weight : (M, N) float array
    bias : (M,) float array, optional

    Returns
    -------
    (..., M) float array
        New, with the dtype of x.

    Raises
    ------
    ShapeError, DTypeError

    Notes
    -----
    **Cost**: 2*T*M*N flops for T rows. **Accuracy**: gamma_N. **Order**: the BLAS's.
    """
    rows = _check("linear", x, weight, bias)
    y: HostArray = ops.linear(rows, weight, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@overload
def linear_backward(
    grad_y: HostArray, x: HostArray, weight: HostArray, bias: HostArray
) -> tuple[HostArray, HostArray, HostArray]: ...


@overload
def linear_backward(
    grad_y: HostArray, x: HostArray, weight: HostArray, bias: HostArray | None = None
) -> tuple[HostArray, HostArray, HostArray | None]: ...


def linear_backward(
    grad_y: HostArray, x: HostArray, weight: HostArray, bias: HostArray | None = None
) -> tuple[HostArray, HostArray, HostArray | None]:
    """Return the gradients of `linear`.

    grad_x = grad_y weight, grad_weight = grad_y^T x, grad_bias = sum of the rows of grad_y.

    Parameters
    ----------
    grad_y : (..., M) float array
    x, weight, bias : float arrays
        As given to `linear`.

    Returns
    -------
    grad_x : (..., N) float array
    grad_weight : (M, N) float array
    grad_bias : (M,) float array or None
        None where the bias is None. All new.

    Raises
    ------
    ShapeError, DTypeError
    """
    rows = _check("linear_backward", x, weight, bias, grad_y)
    grad_rows = grad_y.reshape(-1, weight.shape[0])
    grad_x, grad_weight, grad_bias = ops.linear_backward(grad_rows, rows, weight, bias)
    return grad_x.reshape(x.shape), grad_weight, grad_bias


def _check(
    function: str,
    x: HostArray,
    weight: HostArray,
    bias: HostArray | None,
    grad_y: HostArray | None = None,
) -> HostArray:
    """Check all arrays and return x as rows (T, N)."""
    inputs = Inputs(function)
    inputs.check("weight", weight, "M", "N")
    if bias is not None:
        inputs.check("bias", bias, "M")
    rows = inputs.rows("x", x, "N")
    if grad_y is not None:
        inputs.rows_like("grad_y", grad_y, x.shape[:-1], "M")
    return rows
