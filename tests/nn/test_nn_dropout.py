import math

import numpy as np
import pytest

from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.nn import dropout, dropout_backward


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kept_elements_are_scaled_and_the_others_zero(dtype):
    x = np.random.default_rng(0).standard_normal((40, 50)).astype(dtype)
    x.flags.writeable = False
    y, mask = dropout(x, 0.25, np.random.default_rng(1))
    assert y.dtype == dtype
    assert mask.dtype == bool
    assert (y == np.where(mask, x * np.dtype(dtype).type(1 / 0.75), 0)).all()
    # A binomial share deviates by sqrt(p(1-p)/n); the seed is fixed, so five of them is no chance.
    assert abs(mask.mean() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / x.size)


def test_backward_is_the_same_linear_map():
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 9, (6, 7)).astype("f4")
    grad_y = rng.integers(-8, 9, (6, 7)).astype("f4")
    y, mask = dropout(x, 0.5, rng)
    grad_x = dropout_backward(grad_y, mask, 0.5)
    assert grad_x.dtype == np.float32
    assert (grad_y * y).sum() == (grad_x * x).sum() != 0
    assert (dropout_backward(x, mask, 0.5) == y).all()


def test_the_mask_is_that_of_the_seed_in_either_dtype():
    x = np.ones((5, 6))
    first = dropout(x, 0.5, np.random.default_rng(3))[1]
    assert (dropout(x.astype("f4"), 0.5, np.random.default_rng(3))[1] == first).all()
    assert (dropout(x, 0.5, np.random.default_rng(4))[1] != first).any()


def test_zero_draws_nothing_and_copies():
    x = np.ones(3)
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    y, mask = dropout(x, 0.0, rng)
    assert rng.bit_generator.state == before
    assert mask.all()
    assert (y == x).all()
    assert not np.shares_memory(x, y)
    assert (dropout_backward(x, mask, 0.0) == x).all()


@pytest.mark.parametrize("p", [1.0, -0.1, 1.5, math.nan])
def test_p_must_be_a_probability_below_one(p):
    with pytest.raises(RangeError, match=rf"^dropout: p must lie in \[0, 1\), got {p}\.$"):
        dropout(np.ones(3), p, np.random.default_rng(0))
    with pytest.raises(RangeError, match=r"^dropout_backward: p must lie in \[0, 1\)"):
        dropout_backward(np.ones(3), np.ones(3, bool), p)


def test_bad_arrays():
    with pytest.raises(DTypeError, match=r"^dropout: x must have dtype float32 or float64"):
        dropout(np.ones(3, int), 0.5, np.random.default_rng(0))
    with pytest.raises(
        ShapeError,
        match=r"^dropout_backward: grad_y must have the shape of mask \(2, 3\), got \(3,\)\.$",
    ):
        dropout_backward(np.ones(3), np.ones((2, 3), bool), 0.5)
