"""Error bounds of floating-point sums, and the comparison that uses them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npmoe._typing import HostArray
from npmoe.errors import RangeError


def unit_roundoff(dtype: npt.DTypeLike) -> float:
    """Return u = eps / 2: rounding to nearest changes a number by at most u times itself."""
    return float(np.finfo(dtype).eps) / 2.0


def gamma(n: int, dtype: npt.DTypeLike) -> float:
    """Return ``gamma_n = n*u / (1 - n*u)``, the relative error of n roundings in a row.

    Parameters
    ----------
    n : int
        Number of roundings, not negative.
    dtype : dtype
        Float dtype in which they happen; u is its unit roundoff.

    Returns
    -------
    float

    Raises
    ------
    RangeError
        If n*u is not below 1, where the bound does not hold.

    References
    ----------
    Higham 2002, "Accuracy and Stability of Numerical Algorithms", lemma 3.1.

    Examples
    --------
    >>> gamma(2, "float32") == 2**-23 / (1 - 2**-23)
    True
    """
    product = n * unit_roundoff(dtype)
    if not 0.0 <= product < 1.0:
        raise RangeError(
            f"gamma: n must be at least 0 and n*u below 1, got n = {n} for {np.dtype(dtype)}. "
            "Accumulate in a wider dtype."
        )
    return product / (1.0 - product)


def dot_bound(abs_product: HostArray, n: int, dtype: npt.DTypeLike) -> HostArray:
    """Return ``gamma_n * |x|.|w|``, which bounds the error of a dot product of length n.

    It holds for every order of summation, with or without fused multiply-add. `abs_product` is
    the product of the absolute values, of any shape, for example ``abs(x) @ abs(w).T``.

    References
    ----------
    Higham 2002, equation 3.5.
    """
    return np.asarray(gamma(n, dtype) * abs_product)


def assert_within(
    actual: HostArray, reference: HostArray, bound: HostArray | float, what: str
) -> None:
    """Raise AssertionError unless ``|actual - reference| <= bound`` in every element.

    NaN anywhere fails, and so does a bound that is not finite. Arrays are compared in float64.

    Parameters
    ----------
    actual, reference : float array
        Of one shape; nothing is broadcast.
    bound : float array of that shape, or float
        Not negative; 0 demands equality.
    what : str
        Begins the message.

    Raises
    ------
    AssertionError
        With the worst element: its index, both values, error and bound.
    """
    actual, reference = np.asarray(actual), np.asarray(reference)
    if actual.shape != reference.shape or np.shape(bound) not in ((), actual.shape):
        raise AssertionError(
            f"{what}: shapes must agree, got {actual.shape}, reference {reference.shape}, "
            f"bound {np.shape(bound)}."
        )
    error = np.abs(actual.astype(np.float64) - reference.astype(np.float64))
    allowed = np.broadcast_to(np.asarray(bound, dtype=np.float64), error.shape)
    good = (error <= allowed) & np.isfinite(allowed)
    if not good.all():
        excess = np.where(good, -np.inf, np.nan_to_num(error - allowed, nan=np.inf))
        worst = np.unravel_index(int(excess.argmax()), error.shape)
        index = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {good.size} elements are out of bound; worst at "
            f"{index}: got {actual[index]!r}, reference {reference[index]!r}, "
            f"error {error[index]:.3e}, bound {allowed[index]:.3e}."
        )
