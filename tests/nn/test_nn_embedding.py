import numpy as np
import pytest

from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.finite_differences import gradcheck
from npmoe.nn import embedding, embedding_backward

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("leading", [(), (7,), (2, 5), (0,), (3, 0)])
def test_equals_the_loops_exactly_on_integers(leading, dtype):
    ids = RNG.integers(0, 4, leading)
    weight = RNG.integers(-8, 9, (6, 3)).astype(dtype)
    grad_x = RNG.integers(-8, 9, (*leading, 3)).astype(dtype)
    want, want_grad = np.zeros_like(grad_x), np.zeros_like(weight)
    for t in np.ndindex(leading):
        want[t] = weight[ids[t]]
        want_grad[ids[t]] += grad_x[t]
    x = embedding(np.asarray(ids), weight)
    grad_weight = embedding_backward(grad_x, np.asarray(ids), 6)
    assert x.dtype == grad_weight.dtype == dtype
    assert x.shape == want.shape
    assert (x == want).all()
    assert (grad_weight == want_grad).all()
    assert (grad_weight[4:] == 0).all()


def test_gradients():
    ids = np.array([[3, 0, 3], [3, 1, 0]])
    gradcheck(
        embedding,
        lambda g, ids, weight: (None, embedding_backward(g, ids, 5)),
        (ids, RNG.standard_normal((5, 2))),
        tolerance=1e-9,
    )


def test_positions_are_added_in_ascending_order_to_the_bit():
    ids = RNG.integers(0, 5, 500)
    grad_x = RNG.standard_normal((500, 8)).astype("f4")
    ascending = sorted(range(500), key=lambda t: ids[t])
    first = embedding_backward(grad_x, ids, 5)
    assert (embedding_backward(grad_x[ascending], ids[ascending], 5) == first).all()
    assert (embedding_backward(grad_x, ids.astype("i4"), 5) == first).all()


def test_the_result_is_no_view_of_the_table():
    weight = np.ones((4, 2))
    embedding(np.array([1, 2]), weight)[...] = 7.0
    assert (weight == 1).all()


@pytest.mark.parametrize(("bad", "got"), [(6, r"6 at \(1, 0\)"), (-1, r"-1 at \(1, 0\)")])
def test_ids_out_of_range_are_named(bad, got):
    ids = np.array([[0, 5], [bad, 99]])
    with pytest.raises(RangeError, match=rf"^embedding: ids must lie in \[0, 6\), got {got}\.$"):
        embedding(ids, np.ones((6, 2)))
    with pytest.raises(RangeError, match=rf"^embedding_backward: ids must .*, got {got}\.$"):
        embedding_backward(np.ones((2, 2, 3)), ids, 6)


def test_bad_inputs():
    with pytest.raises(DTypeError, match=r"^embedding: ids must be an integer array, got float64"):
        embedding(np.zeros(3), np.ones((6, 2)))
    with pytest.raises(ShapeError, match=r"^embedding: weight must have shape \(V, H\)"):
        embedding(np.zeros(3, int), np.ones(6))
    with pytest.raises(
        ShapeError,
        match=r"^embedding_backward: grad_x must have shape \(3, H\) = \(3, H\), got \(4, 2\)\.$",
    ):
        embedding_backward(np.ones((4, 2)), np.zeros(3, int), 6)
