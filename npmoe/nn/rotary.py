"""Rotary position embedding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npmoe._checks import require
from npmoe._typing import HostArray
from npmoe.errors import ShapeError
from npmoe.nn._inputs import Inputs


def rotary_tables(
    start: int,
    length: int,
    head_dim: int,
    base: float = 10000.0,
    dtype: npt.DTypeLike = "float32",
) -> tuple[HostArray, HostArray]:
    """Return the cosines and sines of p * base**(-2i/D) for positions p from `start`.

    Parameters
    ----------
    start : int
        First position, not negative.
    length : int
        L, the number of positions.
    head_dim : int
        D, even.
    base : float
        Positive.
    dtype : dtype
        Of the tables.

    Returns
    -------
    cos, sin : (L, D/2) float arrays
        New.

    Raises
    ------
    ShapeError
        If `head_dim` is odd.
    RangeError

    Notes
    -----
    **Accuracy**: angles are float64, so a table is right within an ulp of its dtype.

    References
    ----------
    Su et al. 2021, "RoFormer", eq. 15.
    """
    if head_dim % 2 != 0:
        raise ShapeError(
            f"rotary_tables: head_dim must be even, got {head_dim}. "
            "Rotation pairs element i with element i + D/2."
        )
    require(
        start >= 0 and length >= 0,
        f"rotary_tables: start and length must not be negative, got {start} and {length}.",
    )
    require(base > 0, f"rotary_tables: base must be positive, got {base!r}.")
    frequencies = base ** (-2.0 / head_dim * np.arange(head_dim // 2))
    angles = np.arange(start, start + length)[:, None] * frequencies  # (L, D/2)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def apply_rotary(x: HostArray, cos: HostArray, sin: HostArray) -> HostArray:
    """Rotate the pairs (x[i], x[i + D/2]) of every head by its position's angles.

    y[i] = x[i] cos - x[i + D/2] sin;  y[i + D/2] = x[i + D/2] cos + x[i] sin.

    Parameters
    ----------
    x : (B, heads, L, D) float array
    cos, sin : (L, D/2) float arrays
        From `rotary_tables`.

    Returns
    -------
    (B, heads, L, D) float array
        New, with the dtype of x.

    Raises
    ------
    ShapeError, DTypeError

    Notes
    -----
    **Cost**: 5 passes over x. **Accuracy**: 3 roundings of the two products.

    References
    ----------
    The half-split convention of GPT-NeoX and Llama (transformers, `apply_rotary_pos_emb`); the
    paper pairs neighbours instead, which is the same map up to an order of the rows of the
    query and key projections.
    """
    _check("apply_rotary", "x", x, cos, sin)
    return _rotate(x, cos, sin)


def apply_rotary_backward(grad_y: HostArray, cos: HostArray, sin: HostArray) -> HostArray:
    """Return grad_x (B, heads, L, D) of `apply_rotary`: the rotation by the negative angles."""
    _check("apply_rotary_backward", "grad_y", grad_y, cos, sin)
    return _rotate(grad_y, cos, -sin)


def _rotate(x: HostArray, cos: HostArray, sin: HostArray) -> HostArray:
    half = cos.shape[1]
    # Whole rows and tables of width D keep the inner loops of the ufuncs long.
    swapped = np.empty(x.shape, x.dtype)
    swapped[..., :half] = x[..., half:]
    swapped[..., half:] = x[..., :half]
    swapped *= np.concatenate([-sin, sin], axis=1)
    y: HostArray = np.multiply(x, np.concatenate([cos, cos], axis=1), order="C")
    y += swapped
    return y


def _check(function: str, name: str, x: HostArray, cos: HostArray, sin: HostArray) -> None:
    inputs = Inputs(function)
    inputs.check("cos", cos, "L", "P")
    inputs.check("sin", sin, "L", "P")
    inputs.check(name, x, "B", "heads", "L", "2*P")
