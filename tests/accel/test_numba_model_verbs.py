"""Attention and norms: shapes around blocks and registers, any arrays, the same bits."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from needs import need_numba

need_numba()

from attention_balls import attention_balls
from numba_problems import CANARY, LAYOUTS, foreign

import npmoe
from accel.numba_cpu.model_verbs import _Strided
from npmoe import nn
from npmoe.testing.balls import Ball, Model
from npmoe.testing.bounds import assert_within

DTYPES = ("float32", "float64")
KINDS = ("causal", "full")
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
# B, Hq, Hkv, L, S, D: blocks of 30 queries, panels of 4 to 32 keys or columns, registers of 2 to 16
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (1, 1, 1, 2, 3, 130),
    (2, 6, 3, 2, 17, 5),
    (1, 4, 2, 7, 16, 8),
    (1, 2, 1, 29, 29, 15),
    (2, 1, 1, 30, 30, 16),
    (1, 1, 1, 31, 31, 17),
    (1, 1, 1, 32, 32, 32),
    (1, 3, 1, 30, 61, 2),
    (1, 2, 1, 5, 48, 64),
    (1, 1, 1, 60, 64, 33),
    (1, 2, 2, 61, 65, 1),
    (1, 1, 1, 1, 33, 130),
    (1, 1, 1, 91, 97, 31),
]
FEW_KEYS = [(1, 2, 1, 64, 3, 17), (1, 1, 1, 31, 1, 2), (1, 4, 4, 33, 31, 7)]
# Work enough for several threads.
LARGE = (2, 4, 2, 70, 75, 17)


def drawn(shape: tuple[int, ...], dtype: str, seed: int = 0) -> list[np.ndarray]:
    """Return q, k, v and grad_out."""
    batch, heads, kv_heads, length, num_keys, size = shape
    rng = np.random.default_rng((seed, *shape))
    sizes = ((heads, length), (kv_heads, num_keys), (kv_heads, num_keys), (heads, length))
    return [rng.standard_normal((batch, *s, size)).astype(dtype) for s in sizes]


def verbs(**options: int) -> Any:
    backend: Any = npmoe.get_backend("numba", **options)
    return backend.nn


def attend(run: Any, kind: str, q: Any, k: Any, v: Any) -> Any:
    return getattr(run, f"{kind}_attention")(q, k, v)


def attend_backward(run: Any, kind: str, *args: Any, **options: Any) -> Any:
    return getattr(run, f"{kind}_attention_backward")(*args, **options)


def everything(run: Any, kind: str, arrays: list[np.ndarray]) -> list[bytes]:
    """Return the bytes of output, probabilities and gradients."""
    *qkv, grad_out = arrays
    out, saved = attend(run, kind, *qkv)
    grads = attend_backward(run, kind, grad_out, *qkv, saved)
    return [np.ascontiguousarray(a).tobytes() for a in (out, saved.dense(), *grads)]


@dtypes
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(k, s) for k in KINDS for s in SHAPES] + [("full", s) for s in FEW_KEYS],
)
def test_all_shapes_lie_within_the_balls(kind: str, shape: tuple[int, ...], dtype: str) -> None:
    q, k, v, grad_out = drawn(shape, dtype)
    out, saved = attend(verbs(), kind, q, k, v)
    grads = attend_backward(verbs(), kind, grad_out, q, k, v, saved)
    wants = attention_balls(dtype, q, k, v, grad_out, causal=kind == "causal")
    names = ("out", "probs", "grad_q", "grad_k", "grad_v")
    for name, got, want in zip(names, (out, saved.dense(), *grads), wants, strict=True):
        assert got.dtype == dtype
        assert_within(got, want.mid, want.rad, name)
        if shape[4] > 1:  # one key has probability 1, and no gradient but that of v
            assert want.rad.max() < 0.01 * np.abs(want.mid).max()


@kinds
@dtypes
@pytest.mark.parametrize("count", [1, 16, 33, 97])
def test_the_largest_logit_is_found_wherever_it_is(count: int, dtype: str, kind: str) -> None:
    """Without it the exponential would overflow; with it a query takes one value, exactly."""
    k = np.eye(count, dtype=dtype)[None, None]
    v = drawn((1, 1, 1, count, count, count), dtype)[2]
    for sign in (1, -1):  # queries in order, and the last first, which sees all keys
        q = k[:, :, ::sign] * np.dtype(dtype).type(1e4)
        if kind == "causal" and sign < 0:
            q, want = q[:, :, -1:], v[:, :, :1]
        else:
            want = v[:, :, ::sign]
        out, _ = attend(verbs(), kind, q, k, v)
        np.testing.assert_array_equal(out, want)


def rms_balls(grad: Any, x: Any, weight: Any, eps: float) -> Iterator[Ball]:
    """Yield y, grad_x and grad_weight of rows (T, N)."""
    model = Model.of(x.dtype)
    g, rows, w = (Ball.exact(a, model) for a in (grad, x, weight[None]))
    one, width = Ball.exact(np.ones((1, 1)), model), Ball.exact(np.full((1, 1), x.shape[1]), model)
    mean = (rows * rows).sum(1, keepdims=True) / width
    inverse = one / (mean + Ball.drawn(np.full((1, 1), eps), model)).sqrt()
    yield rows * inverse * w
    along = (g * rows * w).sum(1, keepdims=True) / width * inverse * inverse * inverse
    yield g * w * inverse - rows * along
    yield (g * rows * inverse).sum(0)


@dtypes
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 130), (63, 15), (64, 16), (65, 17), (129, 33), (200, 1), (2, 2)]
)
def test_rms_norm_lies_within_the_balls(shape: tuple[int, int], dtype: str) -> None:
    """Also with more rows than one task has, and with a large and a small row."""
    rng = np.random.default_rng(shape)
    grad, x = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    weight = rng.standard_normal(shape[1]).astype(dtype)
    x[0] *= 1e15
    x[-1] *= 1e-4
    found = (verbs().rms_norm(x, weight, 1e-5), *verbs().rms_norm_backward(grad, x, weight, 1e-5))
    names = ("y", "grad_x", "grad_weight")
    for name, got, want in zip(names, found, rms_balls(grad, x, weight, 1e-5), strict=True):
        assert got.dtype == dtype
        assert_within(got, want.mid, want.rad, name)


# Bits.


@kinds
@dtypes
def test_threads_and_runs_change_no_bit_of_attention(dtype: str, kind: str) -> None:
    arrays = drawn(LARGE, dtype)
    want = everything(verbs(num_threads=1), kind, arrays)
    for num_threads in (1, 2, 3):
        run = verbs(num_threads=num_threads)
        for _ in range(3):
            assert everything(run, kind, arrays) == want, num_threads


@dtypes
def test_threads_and_runs_change_no_bit_of_norms(dtype: str) -> None:
    rng = np.random.default_rng(0)
    grad, x = (rng.standard_normal((300, 900)).astype(dtype) for _ in range(2))
    weight = x[0].copy()

    def run(num_threads: int) -> list[bytes]:
        v = verbs(num_threads=num_threads)
        found = (v.rms_norm(x, weight), *v.rms_norm_backward(grad, x, weight))
        return [a.tobytes() for a in found]

    assert all(run(n) == run(1) for n in (1, 2, 3))


def test_two_callers_at_once() -> None:
    """Of different sizes, so that scratch of the one would not do for the other."""
    run = verbs(num_threads=2)
    problems = [drawn(LARGE, "float32"), drawn((1, 2, 1, 100, 300, 40), "float32")]
    wants = [everything(run, "causal", p) for p in problems]
    found: list[bool] = []
    start = threading.Barrier(4)

    def work(i: int) -> None:
        start.wait()
        found.extend(everything(run, "causal", problems[i]) == wants[i] for _ in range(5))

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 20


# Arrays as callers have them.


def heads_of_rows(array: np.ndarray) -> np.ndarray:
    """Return a view of (B, L, N, D), with other heads before and behind, as models have it."""
    batch, heads, length, size = array.shape
    room = np.full((batch, length, heads + 3, size), CANARY, array.dtype)
    room[:, :, 1:-2] = array.transpose(0, 2, 1, 3)
    return room[:, :, 1:-2].transpose(0, 2, 1, 3)


def permuted(array: np.ndarray) -> np.ndarray:
    """Return a view whose last axis has the largest stride."""
    return array.transpose(3, 2, 0, 1).copy().transpose(2, 3, 1, 0)


ALL_LAYOUTS = LAYOUTS | {
    "heads_of_rows": heads_of_rows,
    "permuted": permuted,
    "upside_down": lambda a: a[:, ::-1, ::-1].copy()[:, ::-1, ::-1],
}


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@kinds
@dtypes
def test_attention_takes_any_layout(dtype: str, kind: str, layout: str) -> None:
    """With the same bits, from copies that live as long as they are read, and none written to."""
    arrays = drawn(LARGE, dtype)
    want = everything(verbs(), kind, arrays)
    changed = [ALL_LAYOUTS[layout](a) for a in arrays]
    for i, one in enumerate(changed):
        assert everything(verbs(), kind, [*arrays[:i], one, *arrays[i + 1 :]]) == want, i
    assert everything(verbs(), kind, changed) == want
    for one, array in zip(changed, arrays, strict=True):
        np.testing.assert_array_equal(one, array)


def test_one_array_for_all_heads() -> None:
    """Strides of 0."""
    q, k, v, grad_out = drawn((2, 3, 1, 33, 40, 5), "float32")
    many = [np.broadcast_to(a, (2, 3, 40, 5)) for a in (k, v)]
    want = everything(verbs(), "causal", [q, *(a.copy() for a in many), grad_out])
    assert everything(verbs(), "causal", [q, *many, grad_out]) == want


@pytest.mark.parametrize("layout", LAYOUTS)
@dtypes
def test_norms_take_any_layout(dtype: str, layout: str) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(dtype) for s in ((5, 7, 9), (5, 7, 9), (9,))]

    def run(grad: Any, x: Any, weight: Any) -> list[bytes]:
        found = (verbs().rms_norm(x, weight), *verbs().rms_norm_backward(grad, x, weight))
        return [a.tobytes() for a in found]

    want = run(*arrays)
    changed = [LAYOUTS[layout](a) for a in arrays]
    for i, one in enumerate(changed):
        assert run(*arrays[:i], one, *arrays[i + 1 :]) == want, i
    for one, array in zip(changed, arrays, strict=True):
        np.testing.assert_array_equal(one, array)


def test_a_copy_lives_as_long_as_what_kernels_are_given() -> None:
    """A thread may go on after an interrupted call has dropped everything else."""
    want = np.arange(2.0**20).reshape(1, 2, 2**17, 4)
    memory, _ = _Strided(want[..., ::-1], want.dtype).parts
    others = [np.full(want.size, CANARY) for _ in range(3)]
    assert (memory == want[..., ::-1].reshape(-1)).all()
    assert len(others) == 3


# How long an axis of so many places is made, and which of them are meant.
AXES: dict[str, Any] = {
    "inside": lambda n: (n + 4, slice(2, n + 2)),
    "each second": lambda n: (2 * n + 3, slice(1, 2 * n + 1, 2)),
    "backwards": lambda n: (n + 4, slice(n + 1, 1, -1)),
}
# Of heads, positions and the elements of a head.
ROOMS = [
    ("inside", "inside", "inside"),
    ("each second", "inside", "inside"),
    ("inside", "each second", "inside"),
    ("inside", "inside", "each second"),
    ("backwards", "backwards", "backwards"),
]


def room_for(
    array: np.ndarray, where: tuple[str, ...], dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return memory full of canaries, and a view of it with the shape of `array`."""
    axes = [AXES[name](size) for name, size in zip(where, array.shape[1:], strict=True)]
    room = np.full((array.shape[0], *(length for length, _ in axes)), CANARY, dtype)
    return room, room[:, *(part for _, part in axes)]


@pytest.mark.parametrize("where", ROOMS, ids=", ".join)
@kinds
@dtypes
def test_gradients_into_views_leave_their_neighbours(dtype: str, kind: str, where: Any) -> None:
    for shape in ((2, 4, 2, 31, 34, 17), (1, 2, 1, 5, 5, 1), (1, 1, 1, 1, 40, 32)):
        q, k, v, grad_out = drawn(shape, dtype)
        _, saved = attend(verbs(), kind, q, k, v)
        want = attend_backward(verbs(), kind, grad_out, q, k, v, saved)
        for given in (dtype, np.dtype(dtype).newbyteorder("S")):
            rooms = [room_for(a, where, given) for a in (q, k, v)]
            out = tuple(view for _, view in rooms)
            got = attend_backward(verbs(), kind, grad_out, q, k, v, saved, out=out)
            for (room, view), returned, expected in zip(rooms, got, want, strict=True):
                assert returned is view
                np.testing.assert_array_equal(view, expected)
                assert (room != CANARY).sum() == view.size


@kinds
def test_gradients_of_a_wider_dtype_and_into_one_array(kind: str) -> None:
    """The heads of one array, as models give them: they interleave in memory."""
    q, k, v, grad_out = drawn((2, 4, 2, 31, 31, 6), "float32")
    _, saved = attend(verbs(), kind, q, k, v)
    want = attend_backward(verbs(), kind, grad_out, q, k, v, saved)
    for dtype in DTYPES:
        room = np.full((2, 31, 8, 6), CANARY, dtype).transpose(0, 2, 1, 3)
        out = (room[:, :4], room[:, 4:6], room[:, 6:])
        attend_backward(verbs(), kind, grad_out, q, k, v, saved, out=out)
        np.testing.assert_array_equal(room, np.concatenate(want, axis=1))


# What is refused.


def test_integers_cannot_take_the_gradients() -> None:
    q, k, v, grad_out = drawn((1, 2, 1, 3, 4, 2), "float32")
    _, saved = verbs().causal_attention(q, k, v)

    def run(*out: Any) -> None:
        verbs().causal_attention_backward(grad_out, q, k, v, saved, out=out)

    with pytest.raises(TypeError, match="Cannot cast"):
        run(q.copy(), k.astype(int), v.copy())


def test_what_another_dtype_saved_is_refused() -> None:
    q, k, v, grad_out = drawn((1, 2, 1, 3, 4, 2), "float32")
    _, saved = verbs().causal_attention(*(a.astype("float64") for a in (q, k, v)))
    with pytest.raises(
        npmoe.DTypeError,
        match=r"^causal_attention_backward: probs must have dtype float32, got float64\. The dtype "
        r"is bound by q\.",
    ):
        verbs().causal_attention_backward(grad_out, q, k, v, saved)


@pytest.mark.parametrize("dtype", ["float16", "longdouble", "int64", "complex64", "foreign"])
def test_other_dtypes_are_refused_as_by_npmoe_nn(dtype: str) -> None:
    arrays = drawn((1, 2, 1, 3, 4, 2), "float32")
    q, k, v, grad_out = (foreign(a) if dtype == "foreign" else a.astype(dtype) for a in arrays)
    saved = verbs().causal_attention(*arrays[:3])[1]
    for call in (
        lambda run: run.causal_attention(q, k, v),
        lambda run: run.full_attention(q, k, v),
        lambda run: run.causal_attention_backward(grad_out, q, k, v, saved),
        lambda run: run.rms_norm(q, q[0, 0, 0]),
        lambda run: run.rms_norm_backward(q, q, q[0, 0, 0]),
    ):
        said = []
        for run in (verbs(), nn):
            with pytest.raises(npmoe.DTypeError, match="must have dtype float32 or float64") as e:
                call(run)
            said.append(str(e.value))
        assert said[0] == said[1]


@kinds
def test_what_npmoe_nn_saved_goes_back_to_it(kind: str) -> None:
    q, k, v, grad_out = drawn((1, 4, 2, 33, 33, 5), "float32")
    _, saved = attend(nn, kind, q, k, v)
    want = attend_backward(nn, kind, grad_out, q, k, v, saved)
    got = attend_backward(verbs(), kind, grad_out, q, k, v, saved)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 4, 2), (1, 2, 1, 0, 4, 2), (2, 2, 1, 0, 0, 2)])
@kinds
def test_empty_arrays(kind: str, shape: tuple[int, ...]) -> None:
    q, k, v, grad_out = drawn(shape, "float32")
    out, saved = attend(verbs(), kind, q, k, v)
    assert isinstance(saved, nn.AttentionProbs)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    grads = attend_backward(verbs(), kind, grad_out, q, k, v, saved)
    for grad, array in zip(grads, (q, k, v), strict=True):
        assert grad.shape == array.shape
        assert not grad.any()
    saved = attend(verbs(), kind, *drawn((1, 2, 1, 3, 4, 2), "float32")[:3])[1]
    with pytest.raises(npmoe.ShapeError, match="probs must have"):
        attend_backward(verbs(), kind, grad_out, q, k, v, saved)


# NaN and infinity.


@kinds
@dtypes
@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 13, 29, 30, 31, 34])
def test_nan_reaches_the_queries_that_see_it(
    at: int, bad: float, name: str, dtype: str, kind: str
) -> None:
    """And not one bit of the others; what `npmoe.nn` makes NaN is NaN here."""
    arrays = drawn((1, 2, 1, 35, 35, 3), dtype)
    clean, _ = attend(verbs(), kind, *arrays[:3])
    arrays["qk".index(name)][0, 0, at, 1] = bad
    with np.errstate(invalid="ignore"):
        want, _ = attend(nn, kind, *arrays[:3])
    out, saved = attend(verbs(), kind, *arrays[:3])
    np.testing.assert_array_equal(np.isnan(out), np.isnan(want))
    assert np.isnan(out).any() or np.isinf(bad)
    dense = saved.dense()
    touched = np.isnan(out).any(axis=-1)
    assert (np.isnan(dense).any(axis=-1) == touched).all()
    if np.isnan(bad):  # an infinite key may also get nothing, and the others its share
        assert (out[~touched] == clean[~touched]).all()
        if kind == "causal":
            assert not touched[:, :, :at].any()
            assert touched[:, 0, at].all()


@dtypes
def test_a_key_infinitely_far_away_gets_nothing(dtype: str) -> None:
    q, k, v, _ = drawn((1, 1, 1, 33, 40, 1), dtype)
    q, k[0, 0, 5] = np.abs(q), -np.inf
    out, saved = verbs().full_attention(q, k, v)
    assert (saved.dense()[..., 5] == 0).all()
    assert np.isfinite(out).all()
    others = [np.delete(a, 5, axis=2) for a in (k, v)]
    want = attention_balls(dtype, q, *others, q, causal=False)[0]
    assert_within(out, want.mid, want.rad, "out")
