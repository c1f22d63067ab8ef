import numpy as np
import pytest
from attention_balls import attention_balls

from npmoe.errors import ShapeError
from npmoe.finite_differences import gradcheck
from npmoe.testing.bounds import assert_within

# B, Hq, Hkv, L, S, D
SHAPES = [
    (1, 1, 1, 1, 1, 2),
    (2, 2, 2, 4, 4, 3),
    (1, 4, 2, 3, 7, 3),
    (1, 2, 1, 5, 2, 4),  # more queries than keys
    (1, 2, 1, 70, 70, 4),  # three blocks, the last one partial
]


def drawn(shape, dtype="float64", scale=1.0):
    batch, heads, kv_heads, length, num_keys, size = shape
    rng = np.random.default_rng(0)
    sizes = ((heads, length), (kv_heads, num_keys), (kv_heads, num_keys), (heads, length))
    q, k, v, grad_out = (rng.standard_normal((batch, *s, size)).astype(dtype) for s in sizes)
    return q * np.dtype(dtype).type(scale), k, v, grad_out


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_lies_within_the_balls(verbs, shape, dtype, scale):
    q, k, v, _ = drawn(shape, dtype, scale)
    out, probs = verbs.full_attention(q, k, v)
    want, want_probs, *_ = attention_balls(dtype, q, k, v, q, causal=False)
    assert out.dtype == probs.dense().dtype == dtype
    assert_within(out, want.mid, want.rad, "out")
    assert_within(probs.dense(), want_probs.mid, want_probs.rad, "probs")
    assert want.rad.max() < 0.01 * np.abs(want.mid).max()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_lies_within_the_balls(verbs, shape, dtype):
    q, k, v, grad_out = drawn(shape, dtype)
    grads = verbs.full_attention_backward(grad_out, q, k, v, verbs.full_attention(q, k, v)[1])
    wants = attention_balls(dtype, q, k, v, grad_out, causal=False)[2:]
    for name, got, want in zip("qkv", grads, wants, strict=True):
        assert_within(got, want.mid, want.rad, f"grad_{name}")


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_gradients(verbs, shape):
    def backward(grad_out, q, k, v):
        return verbs.full_attention_backward(grad_out, q, k, v, verbs.full_attention(q, k, v)[1])

    report = gradcheck(lambda *a: verbs.full_attention(*a)[0], backward, drawn(shape)[:3])
    assert max(report.elementwise.values()) < 1e-8


def test_one_large_key_at_the_end_is_seen_by_all(verbs):
    """The shift that keeps exponentials finite looks at every key, not at the earlier ones."""
    q, k, v, _ = drawn((1, 1, 1, 40, 40, 3), "float32")
    k[:, :, -1] *= 1e4
    out, probs = verbs.full_attention(q, k, v)
    assert np.isfinite(out).all()
    towards = np.einsum("bhld,bhd->bhl", q, k[:, :, -1]) > 0
    assert 5 < towards.sum() < 35
    assert (probs.dense()[..., -1][towards] > 0.999).all()


def test_probabilities_of_the_other_kind_are_refused(verbs):
    q, k, v, grad_out = drawn((1, 2, 1, 3, 3, 2))
    with pytest.raises(
        ShapeError,
        match=r"^full_attention_backward: probs must come from full_attention, got those of the "
        r"other kind\. Pass what their own forward returned\.$",
    ):
        verbs.full_attention_backward(grad_out, q, k, v, verbs.causal_attention(q, k, v)[1])
    with pytest.raises(ShapeError, match=r"^causal_attention_backward: probs must come from caus"):
        verbs.causal_attention_backward(grad_out, q, k, v, verbs.full_attention(q, k, v)[1])
    with pytest.raises(ShapeError, match=r"^full_attention: q must have a multiple of the 2 key"):
        verbs.full_attention(q[:, :1], np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1))
