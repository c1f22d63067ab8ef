import numpy as np
import pytest
from attention_balls import attention_ball

from npmoe.errors import DTypeError, RangeError, ShapeError, UnsupportedError
from npmoe.finite_differences import gradcheck
from npmoe.nn import (
    AttentionParams,
    KeyValueCache,
    init_attention_params,
    multihead_attention,
    multihead_attention_backward,
    rotary_tables,
)
from npmoe.testing.balls import Ball, Model
from npmoe.testing.bounds import assert_within

# B, L, H, Hq, Hkv
SHAPES = [(1, 1, 4, 1, 1), (1, 4, 4, 2, 1), (2, 5, 8, 4, 2), (1, 4, 12, 2, 2), (2, 3, 12, 3, 1)]


def drawn(shape, dtype="float64", seed=0):
    batch, length, hidden, heads, kv_heads = shape
    rng = np.random.default_rng(seed)
    params = init_attention_params(hidden, heads, kv_heads, rng, dtype)
    return rng.standard_normal((batch, length, hidden)).astype(dtype), params


def turn_ball(ball, cos, sin):
    """Rotate (L, D) by the half-split convention of `apply_rotary`."""
    half = cos.mid.shape[1]
    first, second = ball[:, :half], ball[:, half:]
    low, high = first * cos - second * sin, second * cos + first * sin
    return Ball(
        np.concatenate([low.mid, high.mid], axis=1),
        np.concatenate([low.rad, high.rad], axis=1),
        ball.model,
    )


def multihead_ball(x, params, heads, kv_heads, base=10000.0):
    """Return the ball of one sequence's output (L, H), head by head."""
    model = Model.of(x.dtype)
    length, hidden = x.shape
    size = params.output_proj.shape[1] // heads
    cos, sin = (Ball.exact(t, model) for t in rotary_tables(0, length, size, base, dtype=x.dtype))
    weight = Ball.exact(params.qkv_proj, model)
    rows = Ball.exact(x, model)

    def project(index):
        return rows.matmul(weight[index * size : (index + 1) * size].T, hidden)

    outs = []
    for h in range(heads):
        group = h // (heads // kv_heads)
        q, k = (turn_ball(project(i), cos, sin) for i in (h, heads + group))
        outs.append(attention_ball(q, k, project(heads + kv_heads + group))[0])
    attended = Ball(
        np.concatenate([o.mid for o in outs], axis=1),
        np.concatenate([o.rad for o in outs], axis=1),
        model,
    )
    return attended.matmul(Ball.exact(params.output_proj, model).T, heads * size)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_parts_put_together_by_hand(shape, dtype):
    """Above all: neighbouring pairs inside are the half-split convention outside."""
    x, params = drawn(shape, dtype)
    y, _ = multihead_attention(x, params, *shape[3:], rope_base=100.0)
    assert y.dtype == dtype
    for b in range(shape[0]):
        want = multihead_ball(x[b], params, *shape[3:], base=100.0)
        assert_within(y[b], want.mid, want.rad, "multihead_attention")
        assert want.rad.max() < 0.01 * np.abs(want.mid).max()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("pieces", [[1] * 6, [4, 1, 1], [1, 5], [6]])
def test_decoding_with_a_cache_equals_the_whole_sequence(pieces, dtype):
    x, params = drawn((2, 6, 8, 4, 2), dtype)
    cache = KeyValueCache(2, 2, 2, capacity=7, dtype=dtype)
    assert (cache.length, cache.capacity) == (0, 7)
    ys = []
    for stop, count in zip(np.cumsum(pieces), pieces, strict=True):
        ys.append(multihead_attention(x[:, stop - count : stop], params, 4, 2, cache=cache)[0])
        assert cache.length == stop
    for b in range(2):
        want = multihead_ball(x[b], params, 4, 2)
        assert_within(np.concatenate(ys, axis=1)[b], want.mid, want.rad, "cached")


def test_a_later_position_changes_no_bit_of_an_earlier_output():
    x, params = drawn((2, 40, 8, 4, 2), "float32")
    y = multihead_attention(x, params, 4, 2)[0]
    for position in (0, 31, 38):
        changed = x.copy()
        changed[:, position + 1 :] *= -100
        other = multihead_attention(changed, params, 4, 2)[0]
        assert (other[:, : position + 1] == y[:, : position + 1]).all()
        assert (other[:, position + 1 :] != y[:, position + 1 :]).any()


KINDS = [{}, {"causal": False, "rope_base": None}, {"causal": False}, {"rope_base": None}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape, kind):
    x, params = drawn(shape)

    def f(x, qkv_proj, output_proj):
        params = AttentionParams(qkv_proj=qkv_proj, output_proj=output_proj)
        return multihead_attention(x, params, *shape[3:], **kind)[0]

    def f_backward(grad_y, x, qkv_proj, output_proj):
        params = AttentionParams(qkv_proj=qkv_proj, output_proj=output_proj)
        saved = multihead_attention(x, params, *shape[3:], **kind)[1]
        grad_x, grads = multihead_attention_backward(grad_y, saved, params)
        return grad_x, grads.qkv_proj, grads.output_proj

    args = (x, params.qkv_proj, params.output_proj)
    small = params.qkv_proj.size <= 64
    report = gradcheck(f, f_backward, args, elementwise=small, directions=5)
    assert max(report.directional.values()) < 1e-7


def test_gradients_keep_float32_and_inputs_are_left_alone():
    x, params = drawn((2, 5, 8, 4, 2), "float32")
    for array in (x, params.qkv_proj, params.output_proj):
        array.flags.writeable = False
    y, saved = multihead_attention(x, params, 4, 2)
    y.flags.writeable = False
    first = multihead_attention_backward(y, saved, params)
    again = multihead_attention_backward(y, saved, params)
    for one, other in (
        (first[0], again[0]),
        (first[1].qkv_proj, again[1].qkv_proj),
        (first[1].output_proj, again[1].output_proj),
    ):
        assert one.dtype == np.float32
        assert (one == other).all()


def test_no_backward_with_a_cache():
    x, params = drawn((2, 5, 8, 4, 2))
    saved = multihead_attention(x, params, 4, 2, cache=KeyValueCache(2, 2, 2, 5, "float64"))[1]
    with pytest.raises(
        UnsupportedError,
        match=r"^multihead_attention_backward: saved must come from a forward without a cache, "
        r"got one with a cache\. The inputs of cached positions are gone\. "
        r"Run the whole sequence at once\.$",
    ):
        multihead_attention_backward(x, saved, params)


def test_a_full_cache_refuses_and_stays_as_it_was():
    cache = KeyValueCache(1, 2, 4, capacity=3)
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 2, 2, 4), "f4")
    keys, values = cache.append(k, v)
    assert (keys == k).all()
    assert (values == v).all()
    with pytest.raises(
        RangeError,
        match=r"^KeyValueCache\.append: k must have at most 1 positions, got 2\. "
        r"2 of 3 are taken\. Make the cache with a larger capacity\.$",
    ):
        cache.append(k, v)
    assert cache.length == 2
    keys, _ = cache.append(k[:, :, :1], v[:, :, :1])
    assert (keys == np.concatenate([k, k[:, :, :1]], axis=2)).all()


def test_a_cache_of_another_model_refuses():
    k = np.ones((1, 2, 1, 4), "f4")
    with pytest.raises(
        ShapeError,
        match=r"^KeyValueCache\.append: k must have shape \(B, Hkv, L, D\) = \(1, 2, L, 8\), "
        r"got \(1, 2, 1, 4\)\. B, Hkv, D are bound by the cache \(1, 2, 3, 8\)\.$",
    ):
        KeyValueCache(1, 2, 8, 3).append(k, k)
    with pytest.raises(
        DTypeError,
        match=r"^KeyValueCache\.append: k must have dtype float64, got float32\. "
        r"The dtype is bound by the cache\. Convert one of them with astype\.$",
    ):
        KeyValueCache(1, 2, 4, 3, "float64").append(k, k)


def test_initial_weights_have_the_documented_deviation():
    params = init_attention_params(64, 4, 2, 0, "float64", output_scale=0.5)
    assert params.qkv_proj.shape == (128, 64)
    assert params.output_proj.shape == (64, 64)
    for weight, deviation in ((params.qkv_proj, 1 / 8), (params.output_proj, 0.5 / 8)):
        # The mean square of n normals has relative deviation sqrt(2/n): five of them.
        mean_square = (weight**2).mean()
        assert abs(mean_square / deviation**2 - 1) < 5 * np.sqrt(2 / weight.size)
    narrow = init_attention_params(64, 4, 2, 0, output_scale=0.5)
    assert narrow.qkv_proj.dtype == np.float32
    assert (narrow.output_proj == params.output_proj.astype("f4")).all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 4, 2), r"hidden_size must be a multiple of num_heads = 4, got 10\. "
         r"Every head has D = H / Hq elements\."),
        ((12, 4, 3), r"num_heads must be a multiple of num_kv_heads = 3, got 4\. "
         r"Every key head serves equally many query heads\."),
        ((12, 4, 0), r"num_heads must be a multiple of num_kv_heads = 0, got 4\. "
         r"Every key head serves equally many query heads\."),
        ((12, 4, 2), r"the head size D must be even, got 3\. "
         r"Rotary positions turn pairs of elements\."),
    ],
)  # fmt: skip
def test_impossible_heads(sizes, message):
    with pytest.raises(ShapeError, match=f"^init_attention_params: {message}$"):
        init_attention_params(*sizes, 0)


def test_bad_inputs():
    x, params = drawn((2, 5, 8, 4, 2))
    with pytest.raises(
        ShapeError,
        match=r"^multihead_attention: params\.output_proj must have a multiple of num_heads = 3 "
        r"columns, got 8\. They are the heads' outputs, one after another\.$",
    ):
        multihead_attention(x, params, 3, 1)
    with pytest.raises(
        ShapeError,
        match=r"^multihead_attention: params\.qkv_proj must have shape \(N\*D, H\) = \(12, 8\), "
        r"got \(16, 8\)\. N is bound by num_heads and num_kv_heads\. "
        r"D is bound by params\.output_proj and num_heads\. "
        r"H is bound by params\.output_proj \(8, 8\)\.$",
    ):
        multihead_attention(x, params, 4, 1)
    with pytest.raises(ShapeError, match=r"^multihead_attention: x must have shape \(B, L, H\)"):
        multihead_attention(x[..., :4], params, 4, 2)
    with pytest.raises(DTypeError, match=r"^multihead_attention: x must have dtype float64"):
        multihead_attention(x.astype("f4"), params, 4, 2)
    saved = multihead_attention(x, params, 4, 2)[1]
    with pytest.raises(
        ShapeError,
        match=r"^multihead_attention_backward: grad_y must have shape \(B, L, H\) = \(2, 5, 8\), "
        r"got \(2, 4, 8\)\.",
    ):
        multihead_attention_backward(x[:, 1:], saved, params)


def test_without_positions_the_order_of_the_others_does_not_matter():
    """Full attention without a turn is a function of sets; the causal or turned kinds are not."""
    shape = (2, 5, 8, 4, 2)
    x, params = drawn(shape)
    order = np.array([3, 0, 4, 1, 2])
    for kind in KINDS:
        y = multihead_attention(x, params, 4, 2, **kind)[0]
        moved = multihead_attention(x[:, order], params, 4, 2, **kind)[0]
        same = np.abs(moved - y[:, order]).max() < 1e-13 * np.abs(y).max()
        assert same == (kind == KINDS[1]), kind


def test_full_attention_takes_no_cache():
    x, params = drawn((1, 2, 4, 2, 1))
    cache = KeyValueCache(batch_size=1, num_kv_heads=1, capacity=4, head_dim=2, dtype="float64")
    with pytest.raises(
        RangeError,
        match=r"^multihead_attention: cache must be None with causal=False, got one\. "
        r"Positions that are gone would have to see the new ones\.$",
    ):
        multihead_attention(x, params, 2, 1, causal=False, cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_later_position_is_seen_unless_causal(kind):
    x, params = drawn((1, 4, 8, 2, 1))
    changed = x.copy()
    changed[:, 3] += 1
    one, two = (multihead_attention(a, params, 2, 1, **kind)[0][:, 0] for a in (x, changed))
    assert (one == two).all() == kind.get("causal", True)
