"""Images as sequences: patches, their positions on the grid, and the mean over a sequence."""

from __future__ import annotations

import numpy as np

from npmoe._checks import check_float, require
from npmoe._typing import HostArray
from npmoe.errors import ShapeError
from npmoe.nn._inputs import Inputs


def split_patches(images: HostArray, patch_size: int) -> HostArray:
    """Cut images into square patches, in reading order, each flattened by row, column, channel.

    Parameters
    ----------
    images : (B, Y, X, C) float array
    patch_size : int
        P; divides Y and X.

    Returns
    -------
    (B, L, P*P*C) float array
        L = (Y / P) * (X / P); new.

    Raises
    ------
    ShapeError, DTypeError

    Examples
    --------
    >>> import numpy as np
    >>> split_patches(np.arange(8.0).reshape(1, 2, 4, 1), 2).astype(int).tolist()
    [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    """
    Inputs("split_patches").check("images", images, "B", "Y", "X", "C")
    batch, rows, columns, channels = images.shape
    _check_patch_size("split_patches", patch_size, rows, columns)
    size = patch_size
    down, across = rows // size, columns // size
    grid = images.reshape(batch, down, size, across, size, channels)
    shape = (batch, down * across, size**2 * channels)
    return np.array(grid.swapaxes(2, 3), order="C").reshape(shape)


def split_patches_backward(
    grad_patches: HostArray, shape: tuple[int, ...], patch_size: int
) -> HostArray:
    """Return the gradient of the images: the patches put back, which also undoes the cut.

    Parameters
    ----------
    grad_patches : (B, L, P*P*C) float array
    shape : tuple of int
        (B, Y, X, C) of the images.
    patch_size : int
        P.

    Returns
    -------
    (B, Y, X, C) float array
        New.

    Raises
    ------
    ShapeError, DTypeError
    """
    function = "split_patches_backward"
    batch, rows, columns, channels = shape
    _check_patch_size(function, patch_size, rows, columns)
    down, across = rows // patch_size, columns // patch_size
    inputs = Inputs(function)
    inputs.axes.bind(
        f"shape {tuple(shape)} and patch_size {patch_size}",
        B=batch,
        L=down * across,
        N=patch_size**2 * channels,
    )
    inputs.check("grad_patches", grad_patches, "B", "L", "N")
    grid = grad_patches.reshape(batch, down, across, patch_size, patch_size, channels)
    return np.array(grid.swapaxes(2, 3), order="C").reshape(shape)


def grid_positions(rows: int, columns: int, size: int, dtype: str = "float32") -> HostArray:
    """Return fixed vectors that tell the places of a grid apart, in reading order.

    ``[sin(y f), cos(y f), sin(x f), cos(x f)]`` with f_i = 10000**(-i / (size/4)), i < size/4:
    a quarter each, for the place in row y and column x.

    Parameters
    ----------
    rows, columns : int
        Of the grid.
    size : int
        A multiple of 4.
    dtype : {"float32", "float64"}
        Computed in float64 and rounded.

    Returns
    -------
    (rows * columns, size) float array
        New.

    Raises
    ------
    RangeError
        If the size is no multiple of 4.

    References
    ----------
    Vaswani et al. 2017, section 3.5, once for each axis, as in Beyer et al. 2022, "Better plain
    ViT baselines for ImageNet-1k".
    """
    require(
        size > 0 and size % 4 == 0,
        f"grid_positions: size must be a multiple of 4, got {size}. A quarter each is the sine "
        "and cosine of row and column.",
    )
    frequencies = 10000.0 ** (-np.arange(size // 4) / (size // 4))
    y, x = (
        place.reshape(-1, 1) * frequencies
        for place in np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    )
    return np.concatenate([np.sin(y), np.cos(y), np.sin(x), np.cos(x)], axis=1).astype(dtype)


def mean_pool(x: HostArray) -> HostArray:
    """Return the mean over the sequence of x (B, L, H): a new array (B, H).

    Raises
    ------
    ShapeError
        If x has another number of axes, or an empty sequence.
    DTypeError
    """
    _check_sequence("mean_pool", x.shape)
    check_float("mean_pool", "x", x)
    mean: HostArray = x.mean(axis=1)
    return mean


def mean_pool_backward(grad_mean: HostArray, shape: tuple[int, ...]) -> HostArray:
    """Return the gradient of x: grad_mean (B, H) / L at every place of `shape` (B, L, H); new."""
    function = "mean_pool_backward"
    _check_sequence(function, shape)
    inputs = Inputs(function)
    inputs.axes.bind(f"shape {tuple(shape)}", B=shape[0], H=shape[2])
    inputs.check("grad_mean", grad_mean, "B", "H")
    return np.repeat((grad_mean / grad_mean.dtype.type(shape[1]))[:, None], shape[1], axis=1)


def _check_patch_size(function: str, patch_size: int, rows: int, columns: int) -> None:
    if patch_size < 1 or rows % patch_size or columns % patch_size:
        raise ShapeError(
            f"{function}: patch_size must divide the sides Y = {rows} and X = {columns} of the "
            f"images, got {patch_size}. Y and X are bound by images."
        )


def _check_sequence(function: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or not shape[1]:
        raise ShapeError(
            f"{function}: x must have shape (B, L, H) with L of at least 1, got {tuple(shape)}."
        )
