import numpy as np
import pytest
from attention_balls import attention_backward_ball, attention_ball, by_heads, sum_groups

from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.finite_differences import gradcheck
from npmoe.testing.bounds import assert_within, gamma

# B, Hq, Hkv, L, S, D
SHAPES = [
    (1, 1, 1, 1, 1, 2),
    (2, 2, 2, 4, 4, 3),
    (1, 4, 2, 4, 7, 3),  # grouped heads, earlier keys
    (2, 2, 1, 1, 6, 5),  # one query, as in decoding
    (1, 2, 1, 71, 71, 4),  # three blocks, the last one partial
    (1, 2, 2, 33, 80, 3),
]


def drawn(shape, dtype="float64", seed=0, scale=1.0):
    batch, heads, kv_heads, length, num_keys, size = shape
    rng = np.random.default_rng(seed)
    sizes = ((heads, length), (kv_heads, num_keys), (kv_heads, num_keys), (heads, length))
    q, k, v, grad_out = (rng.standard_normal((batch, *s, size)).astype(dtype) for s in sizes)
    return q * np.dtype(dtype).type(scale), k, v, grad_out


def attention_by_loops(q, k, v):
    """Retype the definition: one query at a time, one key at a time."""
    batch, heads, length, size = q.shape
    kv_heads, num_keys = k.shape[1:3]
    out = np.zeros(q.shape)
    for b, h, i in np.ndindex(batch, heads, length):
        seen = num_keys - length + i + 1
        group = h // (heads // kv_heads)
        logits = [float(q[b, h, i] @ k[b, group, j]) / size**0.5 for j in range(seen)]
        powers = [np.exp(x - max(logits)) for x in logits]
        for j in range(seen):
            out[b, h, i] += powers[j] / sum(powers) * v[b, group, j]
    return out


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_the_balls_contain_the_loops(shape):
    q, k, v, _ = drawn(shape)
    ball = by_heads(attention_ball, "float64", q, k, v)[0]
    assert_within(attention_by_loops(q, k, v), ball.mid, ball.rad, "loops")


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_lies_within_the_balls(verbs, shape, dtype, scale):
    q, k, v, _ = drawn(shape, dtype, scale=scale)
    out, probs = verbs.causal_attention(q, k, v)
    want, want_probs = by_heads(attention_ball, dtype, q, k, v)
    dense = probs.dense()
    assert out.dtype == dense.dtype == dtype
    assert_within(out, want.mid, want.rad, "out")
    assert_within(dense, want_probs.mid, want_probs.rad, "probs")
    assert want.rad.max() < 0.01 * np.abs(want.mid).max()


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_lies_within_the_balls(verbs, shape, dtype, scale):
    q, k, v, grad_out = drawn(shape, dtype, scale=scale)
    _, probs = verbs.causal_attention(q, k, v)
    grads = verbs.causal_attention_backward(grad_out, q, k, v, probs)
    want_q, want_k, want_v = by_heads(attention_backward_ball, dtype, q, grad_out, k, v)
    wants = (want_q, sum_groups(want_k, k.shape[1]), sum_groups(want_v, k.shape[1]))
    for name, got, want in zip("qkv", grads, wants, strict=True):
        assert got.dtype == dtype
        assert_within(got, want.mid, want.rad, f"grad_{name}")
        if k.shape[2] > 1:  # one key has probability 1, and no gradient but that of v
            assert want.rad.max() < 0.01 * np.abs(want.mid).max()


def pair_of(verbs):
    """Return the output alone, and the backward of it alone."""

    def attention(q, k, v):
        return verbs.causal_attention(q, k, v)[0]

    def attention_backward(grad_out, q, k, v):
        probs = verbs.causal_attention(q, k, v)[1]
        return verbs.causal_attention_backward(grad_out, q, k, v, probs)

    return attention, attention_backward


@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_gradients(verbs, shape, scale):
    attention, attention_backward = pair_of(verbs)
    args = drawn(shape, scale=scale)[:3]
    report = gradcheck(attention, attention_backward, args, names=("q", "k", "v"))
    assert max(report.elementwise.values()) < 1e-8


def test_gradients_across_blocks(verbs):
    attention, attention_backward = pair_of(verbs)
    args = drawn((1, 2, 1, 40, 45, 2))[:3]
    gradcheck(attention, attention_backward, args, elementwise=False, directions=5)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_later_position_changes_no_bit_of_an_earlier_output(verbs, scale):
    """Also where the later one is so large that its rows need a shift and earlier ones do not.

    Blocks of queries end at 30 or 32.
    """
    q, k, v, _ = drawn((2, 4, 2, 40, 45, 4), "float32", scale=scale)
    out, probs = verbs.causal_attention(q, k, v)
    for position in (0, 13, 29, 32, 39):
        later = [a.copy() for a in (q, k, v)]
        later[0][:, :, position + 1 :] *= 1e3
        later[1][:, :, 45 - 40 + position + 1 :] *= -1e3
        later[2][:, :, 45 - 40 + position + 1 :] = 1e30
        changed, changed_probs = verbs.causal_attention(*later)
        before = np.s_[:, :, : position + 1]
        assert (changed[before] == out[before]).all()
        assert (changed_probs.dense()[before] == probs.dense()[before]).all()
        if position < 39:
            assert (changed[:, :, position + 1 :] != out[:, :, position + 1 :]).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_probabilities_are_zero_above_the_diagonal_and_sum_to_one(verbs, dtype):
    q, k, v, _ = drawn((2, 4, 2, 40, 45, 4), dtype)
    dense = verbs.causal_attention(q, k, v)[1].dense()
    assert dense.shape == (2, 4, 40, 45)
    above = np.triu(np.ones((40, 45), bool), 45 - 40 + 1)
    assert (dense[..., above] == 0).all()
    assert (dense[..., ~above] > 0).all()
    sums = dense.sum(axis=-1, dtype="f8")
    # The program's sum, its reciprocal and each product.
    assert_within(sums, np.ones((2, 4, 40)), gamma(48, dtype), "sums")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_of_ten_thousand_give_a_choice_and_no_overflow(verbs, dtype):
    attention, _ = pair_of(verbs)
    q = np.full((1, 1, 3, 1), 100.0, dtype)
    k = np.array([0.0, 100.0, 50.0], dtype).reshape(1, 1, 3, 1)
    v = np.array([1.0, 2.0, 4.0], dtype).reshape(1, 1, 3, 1)
    out, probs = verbs.causal_attention(q, k, v)
    assert out.reshape(-1).tolist() == [1.0, 2.0, 2.0]
    grads = verbs.causal_attention_backward(np.ones_like(q), q, k, v, probs)
    assert grads[2].reshape(-1).tolist() == [1.0, 2.0, 0.0]
    assert (grads[0] == 0).all()
    assert attention(q[:, :, 1:], k, v).reshape(-1).tolist() == [2.0, 2.0]


def test_equal_keys_are_averaged(verbs):
    """With equal logits the output is the running mean of the values."""
    attention, _ = pair_of(verbs)
    v = np.arange(1.0, 6.0).reshape(1, 1, 5, 1)
    out = attention(np.ones((1, 1, 5, 1)), np.ones((1, 1, 5, 1)), v)
    assert_within(out.reshape(-1), np.arange(2.0, 7.0) / 2, gamma(12, "f8") * 4, "mean")


def test_gradients_can_be_written_into_given_arrays(verbs):
    q, k, v, grad_out = drawn((2, 4, 2, 5, 6, 4))
    _, probs = verbs.causal_attention(q, k, v)
    expected = verbs.causal_attention_backward(grad_out, q, k, v, probs)
    buffer = np.full((2, 8, 6, 4), np.nan)
    out = (buffer[:, :4, 1:], buffer[:, 4:6], buffer[:, 6:])
    got = verbs.causal_attention_backward(grad_out, q, k, v, probs, out=out)
    for given, returned, want in zip(out, got, expected, strict=True):
        assert returned is given
        assert (given == want).all()
    assert np.isnan(buffer[:, :4, 0]).all()


def test_any_strides_are_taken_and_inputs_are_left_alone(verbs):
    attention, attention_backward = pair_of(verbs)
    arrays = drawn((2, 4, 2, 5, 6, 4))
    strided = []
    for array in arrays:
        other = array.transpose(3, 2, 0, 1).copy().transpose(2, 3, 1, 0)
        other.flags.writeable = False
        strided.append(other)
    assert (attention(*strided[:3]) == attention(*arrays[:3])).all()
    for got, want in zip(
        attention_backward(strided[3], *strided[:3]),
        attention_backward(arrays[3], *arrays[:3]),
        strict=True,
    ):
        assert (got == want).all()


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 4, 2), (1, 2, 1, 0, 4, 2), (1, 2, 1, 0, 0, 2)])
def test_empty_batches_and_sequences(verbs, shape):
    q, k, v, grad_out = drawn(shape)
    out, probs = verbs.causal_attention(q, k, v)
    assert out.shape == q.shape
    grads = verbs.causal_attention_backward(grad_out, q, k, v, probs)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert all((g == 0).all() for g in grads)


def test_bad_inputs(verbs):
    q, k, v, grad_out = drawn((2, 4, 2, 5, 6, 4))
    with pytest.raises(
        ShapeError,
        match=r"^causal_attention: q must have a multiple of the 2 key heads, got 3 heads\. "
        r"Every key head serves equally many query heads\.$",
    ):
        verbs.causal_attention(q[:, :3], k, v)
    with pytest.raises(
        ShapeError,
        match=r"^causal_attention: k must hold at least the L = 5 positions of q, got S = 4\. "
        r"The queries are the last L of S positions\.$",
    ):
        verbs.causal_attention(q, k[:, :, :4], v[:, :, :4])
    with pytest.raises(
        ShapeError,
        match=r"^causal_attention: v must have shape \(B, Hkv, S, D\) = \(2, 2, 6, 4\), "
        r"got \(2, 2, 5, 4\)\. B, D are bound by q \(2, 4, 5, 4\)\. "
        r"Hkv, S are bound by k \(2, 2, 6, 4\)\.$",
    ):
        verbs.causal_attention(q, k, v[:, :, 1:])
    probs = verbs.causal_attention(q, k, v)[1]
    with pytest.raises(ShapeError, match=r"^causal_attention_backward: grad_out must have shape"):
        verbs.causal_attention_backward(grad_out[:, :, 1:], q, k, v, probs)
    with pytest.raises(
        ShapeError,
        match=r"^causal_attention_backward: probs must have \(B, Hkv, G, L, D\) = "
        r"\(2, 2, 2, 5, 4\) and S = 6, got \(2, 2, 2, 5, 4\) and 5\. "
        r"The letters are bound by q and k\. Pass what their own forward returned\.$",
    ):
        verbs.causal_attention_backward(
            grad_out, q, k, v, verbs.causal_attention(q, k[:, :, 1:], v[:, :, 1:])[1]
        )
    with pytest.raises(DTypeError, match=r"^causal_attention: k must have dtype float64"):
        verbs.causal_attention(q, k.astype("f4"), v)


def test_arrays_that_cannot_take_the_gradients_are_refused(verbs):
    """Kernels write by strides: what is too small would be written beside."""
    q, k, v, grad_out = drawn((1, 2, 1, 3, 4, 2), "float32")
    _, saved = verbs.causal_attention(q, k, v)

    def run(*out):
        verbs.causal_attention_backward(grad_out, q, k, v, saved, out=out)

    with pytest.raises(
        ShapeError,
        match=r"^causal_attention_backward: out must hold an array of shape \(1, 1, 4, 2\) for "
        r"grad_k, got \(1, 1, 3, 2\)\. It is the shape of k\. Give arrays like q, k and v\.$",
    ):
        run(q.copy(), k[:, :, 1:].copy(), v.copy())
    fixed = v.copy()
    fixed.flags.writeable = False
    before = fixed.copy()
    with pytest.raises(
        RangeError,
        match=r"^causal_attention_backward: out must hold a writable array for grad_v, got a "
        r"read-only one\. Give a copy\.$",
    ):
        run(q.copy(), k.copy(), fixed)
    np.testing.assert_array_equal(fixed, before)


@pytest.mark.parametrize("shape", [(1, 2, 1, 3, 0, 2), (1, 2, 1, 3, 4, 0)])
def test_there_must_be_something_to_attend_to(verbs, shape):
    q, k, v, _ = drawn(shape)
    words = (
        f"q and k must have elements and keys to attend to, got D = {shape[5]} and S = {shape[4]}"
    )
    with pytest.raises(ShapeError, match=rf"^full_attention: {words}\. A mean of no keys"):
        verbs.full_attention(q, k, v)
