"""Cases of `accel/kernels/rows.cu`: rows moved, scaled, added up, activated and cast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from device_sweep import Case, Routes, draw, draw_routes, exactly, judge, put
from sweep_products import (
    EXACT,
    GATED,
    PLAIN,
    TIED_GATED,
    TIED_PLAIN,
    Activation,
    curve,
    has_sign,
    ties,
)

from accel.device import rows
from accel.device.emulated import EmulatedDevice
from accel.device.products import cast
from npmoe.testing.activation_bounds import activation, activation_backward
from npmoe.testing.balls import Ball

# Tokens, K, experts, columns, scale. Loops are unrolled by 4, over lanes, rows and slots. With -k
# experts, slot k - 1 of the first token alone has a row.
Shape = tuple[int, int, int, int, float | None]
SHARP: tuple[Shape, ...] = (
    (5, 2, 3, 7, None), (3, 1, 4, 130, None), (4, 5, 2, 33, 1.0), (2, 9, 3, 262, None),
    (1, 4, 1, 1, 1.0), (9, 3, 7, 128, None), (2, 7, 40, 64, None), (1, 1, 1, 0, None),
    (1, 20, 2, 3, None), (2, 2, 3, 100, None), (21, 1, 1, 5, None), (7, 1, 1, 5, None),
    *((1, 9, -k, 3, None) for k in range(1, 10)),
)  # fmt: skip


def all_shapes() -> list[Shape]:
    """List the sharp ones, and every residue of the columns modulo a warp, and of K modulo 4."""
    more = [
        (1 + k % 5, 1 + k % 9, (1, 2, 5, 50)[k % 4], k + 1 + 32 * (k % 6), (None, 1.0)[k % 2])
        for k in range(64)
    ]
    return [*SHARP, *more]


def _verb(
    name: str,
    act: Callable[[EmulatedDevice, np.random.Generator, Routes, Shape, Any], tuple[Any, Ball, Any]],
) -> Callable[[Shape, str], Case]:
    """Return a maker of cases; `act` returns what was got, what was expected, and where."""

    def make(shape: Shape, real: str) -> Case:
        what = f"{name} T{shape[0]} K{shape[1]} E{shape[2]} N{shape[3]} {real}"

        def run(device: EmulatedDevice) -> None:
            rng = np.random.default_rng([abs(n) for n in shape[:4]])
            if shape[2] > 0:
                routes = draw_routes(rng, *shape[:3])
            else:
                slots = np.arange(shape[0] * shape[1])
                routes = Routes(shape[1], 1, np.where(slots == -shape[2] - 1, 0, -1))
            got, expected, written = act(device, rng, routes, shape, np.dtype(real))
            exact = shape[4] is None or name in ("gather", "spread")
            judge(got, expected, what, exact=exact, written=written)

        return Case(what, run)

    return make


def _first(routes: Routes) -> np.ndarray:
    """Say which of T*K rows mean something."""
    return np.arange(len(routes.owners)) < len(routes.pairs)


def _weights(rng: Any, routes: Routes, real: Any) -> np.ndarray:
    return rng.choice([0.25, 0.5, 1.0, 2.0], (routes.tokens, routes.top_k)).astype(real)


def _gather(device: Any, rng: Any, routes: Routes, shape: Shape, real: Any) -> Any:
    x = draw(rng, (routes.tokens, shape[3]), real, shape[4])
    want = exactly(x[routes.pairs // routes.top_k], real)
    return rows.gather(device, put(x), routes.plan()), want, _first(routes)


def _scale(device: Any, rng: Any, routes: Routes, shape: Shape, real: Any) -> Any:
    x, w = draw(rng, (len(routes.owners), shape[3]), real, shape[4]), _weights(rng, routes, real)
    R = len(routes.pairs)
    want = exactly(x[:R], real) * exactly(w.reshape(-1)[routes.pairs][:, None], real)
    return rows.scale(device, put(x), routes.plan(), put(w)), want, _first(routes)


def _spread(device: Any, rng: Any, routes: Routes, shape: Shape, real: Any) -> Any:
    values = draw(rng, (routes.experts, shape[3]), real, shape[4])
    want = exactly(values[routes.owners[routes.pairs]], real)
    return rows.spread(device, put(values), routes.plan()), want, _first(routes)


def _combined(routes: Routes, x: np.ndarray, w: np.ndarray | None, real: Any) -> Ball:
    """Sum the rows of every token."""
    T, K, R = routes.tokens, routes.top_k, len(routes.pairs)
    terms = np.zeros((T * K, x.shape[1]))
    factor = 1.0 if w is None else w.reshape(-1)[routes.pairs][:, None].astype(np.float64)
    terms[routes.pairs] = x[:R].astype(np.float64) * factor
    split = exactly(terms, real)
    mid, rad = (getattr(split, k).reshape(T, K, -1) for k in ("mid", "rad"))
    found = Ball(mid, rad, split.model).sum(1)
    return Ball(found.mid, 2 * found.rad, split.model)  # products round too


def _combine(device: Any, rng: Any, routes: Routes, shape: Shape, real: Any) -> Any:
    x = draw(rng, (len(routes.owners), shape[3]), real, shape[4])
    return rows.combine(device, put(x), routes.plan()), _combined(routes, x, None, real), None


def _combine_weighted(device: Any, rng: Any, routes: Routes, shape: Shape, real: Any) -> Any:
    x, w = draw(rng, (len(routes.owners), shape[3]), real, shape[4]), _weights(rng, routes, real)
    got = rows.combine(device, put(x), routes.plan(), put(w))
    return got, _combined(routes, x, w, real), None


def _to_routes(routes: Routes, values: Ball) -> Ball:
    """(R,) -> (T, K), 0 where a route has no row."""
    out = []
    for part in (values.mid, values.rad):
        full = np.zeros(len(routes.owners))
        full[routes.pairs] = part
        out.append(full.reshape(routes.tokens, routes.top_k))
    return Ball(out[0], out[1], values.model)


def _dot(device: Any, rng: Any, routes: Routes, shape: Shape, real: Any) -> Any:
    a, b = (draw(rng, (len(routes.owners), shape[3]), real, shape[4]) for _ in "ab")
    R = len(routes.pairs)
    found = (exactly(a[:R], real) * exactly(b[:R], real)).sum(1)
    return rows.dot(device, put(a), put(b), routes.plan()), _to_routes(routes, found), None


def _finish(with_bias: bool) -> Any:
    def act(device: Any, rng: Any, routes: Routes, shape: Shape, real: Any) -> Any:
        N, R = shape[3], len(routes.pairs)
        dots = draw(rng, (len(routes.owners), N), real, shape[4])
        grad = draw(rng, (routes.tokens, N + 3), real, shape[4])
        bias = draw(rng, (routes.experts, N + 3), real, shape[4])
        found = exactly(dots[:R], real).sum(1)
        if with_bias:
            tokens, owners = routes.pairs // routes.top_k, routes.owners[routes.pairs]
            found = found + (exactly(grad[tokens], real) * exactly(bias[owners], real)).sum(1)
        got = rows.finish_weights(
            device, put(dots), routes.plan(), put(grad), put(bias) if with_bias else None
        )
        return got, _to_routes(routes, found), None

    return act


def _segments(weighted: bool, accumulate: bool, operand: Any = None) -> Any:
    def act(device: Any, rng: Any, routes: Routes, shape: Shape, real: Any) -> Any:
        N, stored = shape[3], real if operand is None else operand
        x = draw(rng, (routes.tokens if weighted else len(routes.owners), N), stored, shape[4])
        w, before = _weights(rng, routes, real), draw(rng, (routes.experts, N), real, shape[4])
        R, pairs = len(routes.pairs), routes.pairs
        terms = exactly(x[pairs // routes.top_k] if weighted else x[:R], real)
        if weighted:
            terms = terms * exactly(w.reshape(-1)[pairs][:, None], real)
        own = routes.owners[pairs]
        parts = [terms[own == e].sum(0) for e in range(routes.experts)]
        stacked = [np.stack([getattr(p, k) for p in parts]) for k in ("mid", "rad")]
        found = Ball(stacked[0], stacked[1], terms.model)
        if accumulate:
            found = found + exactly(before, real)
        out = put(before.copy()) if accumulate else device.empty(before.shape, real)
        rows.segment_sum(
            device, put(x), routes.plan(), out, accumulate, put(w) if weighted else None
        )
        return out, found, None

    return act


VERBS: dict[str, tuple[str, Callable[[Shape, str], Case]]] = {
    name: (entry, _verb(name, act))
    for name, entry, act in (
        ("gather", "gather_rows", _gather),
        ("scale", "scale_rows", _scale),
        ("spread", "spread_experts", _spread),
        ("combine", "combine_rows", _combine),
        ("combine weighted", "combine_rows", _combine_weighted),
        ("dot", "row_dot", _dot),
        ("finish", "finish_weights", _finish(False)),
        ("finish with bias", "finish_weights", _finish(True)),
        ("segments", "segment_sum", _segments(False, False)),
        ("segments added", "segment_sum", _segments(False, True)),
        ("segments weighted", "segment_sum", _segments(True, False)),
        ("segments weighted added", "segment_sum", _segments(True, True)),
    )
}
_HALVES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def row_cases(entry: str, real: str, shapes: Any = SHARP) -> Iterator[Case]:
    """Yield the cases of one kernel."""
    for shape in shapes:
        for of, make in VERBS.values():
            if of == entry:
                yield make(shape, real)


EDGE = -1.0  # where exp is about to underflow


def half_segments(stored: str, shapes: Any = SHARP) -> Iterator[Case]:
    """Yield sums of rows that a product on tensor cores has stored."""
    for k, shape in enumerate(shapes):
        act = _segments(k % 3 == 0, k % 2 == 0, _HALVES[stored])
        yield _verb(f"segments of {stored}", act)(shape, "float32")


def _activation(one: Activation, columns: int, real: str, scale: float | None, back: bool) -> Case:
    name = f"activation{'_backward' * back} {one} I{columns} {real} {scale}"

    def run(device: EmulatedDevice) -> None:
        rng = np.random.default_rng([columns, back])
        of = curve(one, real)
        gate_up = draw(rng, (3, columns * (1 + of.gated)), real, scale)
        if scale == EDGE:
            near = np.array([725.0, 38.1, 21.2])  # -x, -x * x / 2, and the cubic are near -725
            gate_up = rng.choice([-1.0, 1.0], gate_up.shape) * rng.choice(near, gate_up.shape)
            gate_up = (gate_up * rng.uniform(0.98, 1.02, gate_up.shape)).astype(real)
        grad = draw(rng, (3, columns), real, 1.0 if scale else None)
        z, g = exactly(gate_up, real), exactly(grad, real)
        if back:
            got = rows.activate_backward(device, put(grad), put(gate_up), of)
            want = activation_backward(g, z, *one)
        else:
            got, want = rows.activate(device, put(gate_up), of), activation(z, *one)
        judge(got, want, name, exact=scale is None and one[0] in EXACT)

    return Case(name, run)


def _tied(one: Activation, real: str, back: bool) -> Case:
    name = f"activation{'_backward' * back} {one} {real} at ties"

    def run(device: EmulatedDevice) -> None:
        of, gate_up = curve(one, real), ties(one, real)[None]
        grad = np.ones((1, gate_up.shape[1] // (1 + of.gated)), real)
        z, g = exactly(gate_up, real), exactly(grad, real)
        if back:
            got = rows.activate_backward(device, put(grad), put(gate_up), of)
            want = activation_backward(g, z, *one)
        else:
            got, want = rows.activate(device, put(gate_up), of), activation(z, *one)
            nothing = rows.activate(device, put(np.full_like(gate_up, np.nan)), of)
            assert np.isnan(nothing._host).all(), f"{name}: NaN is lost"
        judge(got, want, name, exact=one[0] in EXACT or one[2] is not None)
        assert one[0] not in EXACT or not has_sign(got._host), f"{name}: -0.0 of a ReLU"

    return Case(name, run)


def activation_cases(back: bool, real: str) -> Iterator[Case]:
    """Yield all curves: at their kinks and limits, near them, and beyond the range of exp."""
    for k, one in enumerate((*GATED, *PLAIN)):
        for scale in (None, 1.0, 40.0, 900.0, EDGE):
            yield _activation(one, 5 + k, real, scale, back)
        yield _activation(one, 131, real, 3.0, back)
    for one in (*TIED_GATED, *TIED_PLAIN):
        yield _tied(one, real, back)


def cast_cases(given: str, target: str) -> Iterator[Case]:
    """Yield conversions: ties, overflow, signed zeros, subnormals."""
    types = {**_HALVES, "float32": np.float32}

    def make(size: int) -> Case:
        def run(device: EmulatedDevice) -> None:
            rng = np.random.default_rng(size)
            x = rng.standard_normal(size) * 2.0 ** rng.integers(-30, 14, size)
            x[: size // 3] = rng.integers(-4096, 4096, size // 3)  # many ties
            x[size // 3 : size // 3 + 1] = -0.0
            with np.errstate(over="ignore"):
                x = x.astype(types[given])
                want = x.astype(np.float32).astype(types[target])
            got = cast(device, put(x), target)._host
            assert got.dtype == want.dtype
            assert (got.view(np.uint8) == want.view(np.uint8)).all()

        return Case(f"cast {given} to {target} {size}", run)

    for size in (1, 255, 256, 700):
        yield make(size)


CASTS = (
    ("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float16"),
    ("float16", "bfloat16"), ("float16", "float32"), ("bfloat16", "float32"),
)  # fmt: skip
