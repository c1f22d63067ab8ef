import numpy as np
import pytest

from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.finite_differences import gradcheck
from npmoe.nn import (
    grid_positions,
    mean_pool,
    mean_pool_backward,
    split_patches,
    split_patches_backward,
)
from npmoe.testing.bounds import assert_within, gamma

# B, Y, X, C, P
SHAPES = [(1, 1, 1, 1, 1), (2, 4, 6, 3, 2), (3, 6, 6, 1, 3), (2, 4, 4, 2, 4), (0, 4, 4, 1, 2)]


def drawn(shape, dtype="float64"):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_patches_by_loops(shape, dtype):
    *sizes, size = shape
    images = drawn(sizes, dtype)
    batch, rows, columns, channels = sizes
    want = []
    for image in images:
        for y in range(0, rows, size):
            for x in range(0, columns, size):
                want.append(
                    [
                        image[y + i, x + j, c]
                        for i in range(size)
                        for j in range(size)
                        for c in range(channels)
                    ]
                )
    images.flags.writeable = False
    patches = split_patches(images, size)
    length = rows * columns // size**2
    assert patches.dtype == dtype
    assert np.array_equal(patches, np.array(want, dtype).reshape(batch, length, size**2 * channels))
    assert not np.shares_memory(patches, images)
    patches.flags.writeable = False
    back = split_patches_backward(patches, tuple(sizes), size)
    assert np.array_equal(back, images)
    assert not np.shares_memory(back, patches)


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_gradients(shape):
    *sizes, size = shape

    def backward(grad, images):
        return split_patches_backward(grad, images.shape, size)

    gradcheck(lambda images: split_patches(images, size), backward, (drawn(sizes),))


def test_positions_by_their_formula():
    found = grid_positions(2, 3, 8, "float64")
    for place in range(6):
        y, x = divmod(place, 3)
        want = [f(n * w) for n in (y, x) for f in (np.sin, np.cos) for w in (1.0, 10000**-0.5)]
        # A frequency and its product are rounded, and sine and cosine pass their error on.
        assert_within(found[place], np.array(want), gamma(8, "float64"), "position")
    assert grid_positions(2, 3, 8).dtype == np.float32
    assert len(np.unique(grid_positions(8, 8, 16).round(6), axis=0)) == 64


@pytest.mark.parametrize("size", [0, 2, 6, -4])
def test_positions_need_four_quarters(size):
    with pytest.raises(
        RangeError, match=f"^grid_positions: size must be a multiple of 4, got {size}"
    ):
        grid_positions(2, 2, size)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mean_pool(dtype):
    x = drawn((2, 5, 3), dtype)
    mean = mean_pool(x)
    assert mean.dtype == dtype
    wide = x.astype("f8")
    assert_within(mean, wide.mean(axis=1), gamma(5, dtype) * np.abs(wide).mean(axis=1), "mean")
    grad = mean_pool_backward(mean, x.shape)
    assert grad.shape == x.shape
    assert np.array_equal(grad, np.repeat((mean / x.dtype.type(5))[:, None], 5, axis=1))
    args = (drawn((2, 5, 3)),)
    gradcheck(mean_pool, lambda grad, x: mean_pool_backward(grad, x.shape), args)


def test_bad_inputs():
    images = drawn((2, 4, 6, 1))
    with pytest.raises(
        ShapeError,
        match=r"^split_patches: patch_size must divide the sides Y = 4 and X = 6 of the images, "
        r"got 3\. Y and X are bound by images\.$",
    ):
        split_patches(images, 3)
    with pytest.raises(ShapeError, match=r"patch_size must divide .* got 0\."):
        split_patches(images, 0)
    with pytest.raises(ShapeError, match=r"^split_patches: images must have shape \(B, Y, X, C\)"):
        split_patches(images[0], 2)
    with pytest.raises(DTypeError, match=r"^split_patches: images must have dtype float32 or"):
        split_patches(np.zeros((1, 4, 4, 1), np.uint8), 2)
    with pytest.raises(
        ShapeError,
        match=r"^split_patches_backward: grad_patches must have shape \(B, L, N\) = \(2, 6, 4\), "
        r"got \(2, 5, 4\)\. .* bound by shape \(2, 4, 6, 1\) and patch_size 2\.$",
    ):
        split_patches_backward(np.zeros((2, 5, 4)), (2, 4, 6, 1), 2)
    with pytest.raises(ShapeError, match=r"^split_patches_backward: patch_size must divide"):
        split_patches_backward(np.zeros((2, 6, 4)), (2, 4, 6, 1), 5)
    for shape in ((2, 3), (2, 0, 3)):
        with pytest.raises(
            ShapeError, match=r"^mean_pool: x must have shape \(B, L, H\) with L of at least 1, got"
        ):
            mean_pool(np.zeros(shape))
    with pytest.raises(DTypeError, match=r"^mean_pool: x must have dtype"):
        mean_pool(np.zeros((1, 2, 3), int))
    with pytest.raises(
        ShapeError, match=r"^mean_pool_backward: grad_mean must have shape \(B, H\) = \(2, 3\)"
    ):
        mean_pool_backward(np.zeros((2, 4)), (2, 5, 3))
