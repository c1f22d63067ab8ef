"""Cases of `grouped_gemm` and `grouped_wgrad`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from device_sweep import Case, Routes, draw, draw_routes, exactly, judge, put

from accel.curve import Curve, curve_of
from accel.device.emulated import EmulatedDevice
from accel.device.products import (
    ACTIVATE,
    ACTIVATE_BACKWARD,
    ROUTED,
    STORE,
    Products,
)
from accel.device.tilings import SIMT, Tiling
from npmoe.config import MoEConfig
from npmoe.testing.activation_bounds import activation, activation_backward
from npmoe.testing.balls import Ball, Model

WEIGHTS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Name, alpha, limit.
Activation = tuple[str, float | None, float | None]
GATED: tuple[Activation, ...] = (
    ("reglu", None, None), ("swiglu", None, None), ("swiglu_clamp_pre", None, 2.0),
    ("swiglu_clamp_post", None, 1.0), ("swiglu_oai", None, 3.0), ("geglu", None, None),
    ("geglu_tanh", None, None), ("swiglu_oai", 1.0, 2.0),
)  # fmt: skip
PLAIN: tuple[Activation, ...] = (
    ("relu", None, None), ("relu2", None, None), ("silu", None, None), ("gelu", None, None),
    ("gelu_tanh", None, None),
)  # fmt: skip
EXACT = ("relu", "relu2", "reglu")
# Curves that decide something, with limits at which SiLU is the identity in every dtype.
TIED_GATED: tuple[Activation, ...] = (
    ("reglu", None, None), ("swiglu_clamp_pre", None, 40.0), ("swiglu_clamp_post", None, 40.0),
    ("swiglu_oai", 1.0, 40.0), ("geglu", None, None), ("geglu_tanh", None, None),
)  # fmt: skip
TIED_PLAIN: tuple[Activation, ...] = tuple(
    (n, None, None) for n in ("relu", "relu2", "gelu", "gelu_tanh")
)
# Where CUDA's erff takes its other polynomial.
ERF_EDGE = np.array(0x3F8060FE, np.uint32).view(np.float32)


def curve(of: Activation, dtype: Any) -> Curve:
    """Return an activation as the host code passes it."""
    name, alpha, limit = of
    cfg = MoEConfig(
        hidden_size=1, intermediate_size=1, num_experts=1, top_k=1, activation=name,
        activation_alpha=alpha, activation_limit=limit,
    )  # fmt: skip
    return curve_of(cfg, dtype)


def ties(of: Activation, real: Any) -> np.ndarray:
    """Return one row of pre-activations (2I,) or (I,) at which a curve takes either side."""
    name, _, limit = of
    gates, ups = [0.0, -0.0], [1.0]
    if limit is not None:
        gates, ups = [*gates, limit], [*ups, limit, -limit]
    if name in ("gelu", "geglu"):
        edge = float(ERF_EDGE) * 2.0**0.5
        gates += [side * edge * (1 + k * 2.0**-24) for side in (1, -1) for k in range(-4, 5)]
    if name in ("gelu_tanh", "geglu_tanh"):
        gates += [21.2, -21.2]  # exp of what lies between -745 and -708, subnormal in float64
    pairs = np.array([(g, u) for g in gates for u in ups], real)
    return pairs.T.reshape(-1) if of in TIED_GATED else pairs[:, 0]


def has_sign(x: np.ndarray) -> bool:
    """Say whether there is a minus sign, be it of a zero."""
    return bool(np.signbit(x).any())


@dataclass(frozen=True, slots=True)
class Form:
    """What the host code compiles apart: an epilogue with what goes with it, types, block size."""

    epilogue: int
    gated: bool = False
    transposed: bool = False
    block: int = 16
    real: str = "float32"
    weight: str | None = None  # None: real

    @property
    def gather(self) -> bool:
        return self.epilogue in (ACTIVATE, ACTIVATE_BACKWARD)

    def __str__(self) -> str:
        name = ("STORE", "ROUTED", "ACTIVATE", "ACTIVATE_BACKWARD")[self.epilogue]
        flags = [n for n in ("gated", "transposed") if getattr(self, n)]
        return "-".join([name, *flags, str(self.block), self.real, *filter(None, [self.weight])])


def forms(real: str = "float32", weight: str | None = None) -> list[Form]:
    """List what the host code asks for in one dtype."""
    kinds = [
        (STORE, False, False), (STORE, False, True), (ROUTED, False, False),
        (ACTIVATE, False, False), (ACTIVATE, True, False), (ACTIVATE_BACKWARD, False, True),
        (ACTIVATE_BACKWARD, True, True),
    ]  # fmt: skip
    return [Form(*kind, block, real, weight) for kind in kinds for block in (16, 64)]


@dataclass(frozen=True)
class Product:
    """One launch of `grouped_gemm`. `columns` are those of y, of a half where it is gated."""

    form: Form
    columns: int
    depth: int
    tokens: int = 9
    top_k: int = 2
    experts: int = 3
    scale: float | None = None  # None: integers
    activation: Activation = ("reglu", None, None)
    bias: bool = True
    keep: bool = True
    foreign: bool = False  # one expert is another rank's
    seed: int = 0
    absent: float = 0.15
    tied: bool = False  # y is `ties` in every row
    tiling: Tiling = SIMT

    @cached_property
    def _data(self) -> dict[str, Any]:
        """Inputs, and what must come out of them."""
        f, I = self.form, self.columns
        rng = np.random.default_rng([self.seed, I, self.depth, self.tokens])
        real = np.dtype(f.real)
        stored = WEIGHTS.get(f.weight or "", real)
        routes = draw_routes(rng, self.tokens, self.top_k, self.experts, self.absent)
        routes.owners[0] = self.experts - 1
        R, T = len(routes.pairs), len(routes.owners)
        backward = f.epilogue == ACTIVATE_BACKWARD
        width = 2 * I if f.gated else I
        columns = I if backward else width
        scale = self.scale
        matrix = (
            (self.experts, self.depth, columns) if f.transposed
            else (self.experts, columns, self.depth)
        )  # fmt: skip
        data: dict[str, Any] = {
            "routes": routes,
            "x": draw(rng, (self.tokens if f.gather else T, self.depth), real, scale),
            "weight": draw(rng, matrix, stored, scale and 1.0),
            "bias": draw(rng, (self.experts, columns), real, scale),
            "topk_weights": rng.choice([0.25, 0.5, 1.0, 2.0], T).astype(real)
            if scale is None
            else rng.random(T).astype(real),
            "y": draw(rng, (T, width), real, scale),
        }
        if not self.bias or backward:
            data["bias"] = None
        if self.tied:
            data["y"][:] = ties(self.activation, real)
            if not backward:  # by the bias, or else by the first step of depth
                data["weight"][:], data["x"][:, 0] = 0, 1
                if self.bias:
                    data["bias"][:] = data["y"][0]
                else:
                    data["weight"][:, :, 0] = data["y"][0]
        data["y"][R:] = np.nan  # what nobody has written
        if not f.gather:
            data["x"][R:] = np.nan
        labels = np.arange(self.experts)
        if self.foreign:
            labels[self.experts - 1] = -1
        data["labels"] = labels
        data["written"] = np.isin(routes.owners[routes.pairs], np.flatnonzero(labels >= 0))
        return data | {"expected": self._expect(data, R)}

    def _expect(self, data: dict[str, Any], R: int) -> dict[str, Ball]:
        f, routes = self.form, data["routes"]
        pairs, real = routes.pairs, f.real
        owners = routes.owners[pairs]
        x = data["x"][pairs // self.top_k] if f.gather else data["x"][:R]
        mids, rads = [], []
        for e in range(self.experts):
            w = data["weight"][e].astype(np.float64)
            ball = exactly(x[owners == e], real).matmul(
                exactly(w if f.transposed else w.T, real), self.depth + 1
            )
            mids.append(ball.mid)
            rads.append(ball.rad)
        sums = Ball(np.concatenate(mids), np.concatenate(rads), Model.of(real))
        weights = exactly(data["topk_weights"][pairs][:, None], real)
        if data["bias"] is not None:
            sums = sums + exactly(data["bias"][owners], real)
        if f.epilogue == STORE:
            return {"y": sums}
        if f.epilogue == ROUTED:
            return {"y": weights * sums}
        if f.epilogue == ACTIVATE:
            return {"y": sums, "act": activation(sums, *self.activation)}
        kept = exactly(data["y"][:R], real)
        plain = activation(kept, *self.activation)
        terms, size = sums * plain, self.tiling.tile_n
        dots = [terms[:, c : c + size].sum(1) for c in range(0, self.columns, size)]
        stacked = (np.stack([getattr(d, k) for d in dots], 1) for k in ("mid", "rad"))
        return {
            "act": weights * plain,
            "grad_y": activation_backward(weights * sums, kept, *self.activation),
            "dots": Ball(*stacked, sums.model),
        }

    def run(self, device: EmulatedDevice) -> None:
        """Launch and judge."""
        f, d = self.form, self._data
        routes, real = d["routes"], np.dtype(f.real)
        T, I = len(routes.owners), self.columns
        products = Products(
            device, self.tiling, routes.plan(), routes.blocks(f.block, d["labels"]), real
        )
        width = 2 * I if f.gated else I
        out: dict[str, Any] = {}
        if f.epilogue in (STORE, ROUTED) or (f.epilogue == ACTIVATE and self.keep):
            out["y"] = device.empty((T, width), real)
        if f.gather:
            out["act"] = device.empty((T, I), real)
        if f.epilogue == ACTIVATE_BACKWARD:
            out["grad_y"] = device.empty((T, width), real)
            out["dots"] = device.empty((T, products.column_tiles(I)), real)
        inputs = {"y": put(d["y"])} if f.epilogue == ACTIVATE_BACKWARD else {}
        needs_weights = f.epilogue in (ROUTED, ACTIVATE_BACKWARD)
        products.multiply(
            put(d["x"]), put(d["weight"]), f.epilogue, gather=f.gather, transposed=f.transposed,
            bias=put(d["bias"]), topk_weights=put(d["topk_weights"]) if needs_weights else None,
            curve=curve(self.activation, real) if f.gather else None, **inputs, **out,
        )  # fmt: skip
        name, _, limit = self.activation
        exact = name in EXACT or (self.tied and limit is not None)
        exact = self.scale is None and (exact or not f.gather)
        for key, array in out.items():
            judge(array, d["expected"][key], f"{self} {key}", exact=exact, written=d["written"])
        if self.tied and name in EXACT:
            rows = np.flatnonzero(d["written"])
            assert not has_sign(out["act"]._host[rows]), f"{self}: -0.0 of a ReLU"

    def __str__(self) -> str:
        shape = f"{self.columns}x{self.depth} T{self.tokens} K{self.top_k} E{self.experts}"
        return f"{self.form} {shape} {self.activation[0] if self.form.gather else ''}".strip()

    @property
    def case(self) -> Case:
        return Case(str(self), self.run)


def sharp_products(form: Form) -> Iterator[Case]:
    """Yield a few cases that together reach every line of a form."""
    named = GATED if form.gated else PLAIN
    tile = 32 if form.gated and form.epilogue == ACTIVATE else 64
    many = 40 if form.block == 16 else 150
    yield Product(form, tile + 3, 17, activation=named[0]).case
    yield Product(form, tile - 1, 16, many, activation=named[0], bias=False, keep=False).case
    yield Product(form, 5, 33, 70, 1, 4, foreign=True, activation=named[0], seed=1).case
    yield Product(form, tile, 3, 3, 1, 5, 1.0, named[-1], seed=2).case
    yield Product(form, 2, 0, 3, activation=named[0]).case
    for k, columns in enumerate((20, 36, 52, 9)):
        tokens = (16, 5, 33, 64)[k]
        yield Product(
            form, columns, (1, 6, 11, 13)[k], tokens, 1, 1, activation=named[0], absent=0.0
        ).case
    if form.gather:
        for k, one in enumerate(named):
            yield Product(form, tile + k % 3 - 1, 4 + k, 6, 2, 3, (1.0, None)[k % 2], one).case
            yield Product(form, 33 - k, 5, 5, 1, 2, 40.0, one, keep=k % 2 == 0).case
            yield Product(form, 9, 5, 9, 2, 2, None, one, bias=False, keep=k % 3 > 0).case
            # Beyond the range of exp.
            yield Product(form, 20, 5, 5, 1, 2, 900.0, one, bias=False).case
        for one in TIED_GATED if form.gated else TIED_PLAIN:
            columns = len(ties(one, form.real)) // (1 + form.gated)
            for bias in (True, False):
                yield Product(form, columns, 5, 5, 1, 2, None, one, bias, tied=True).case


def all_products(form: Form) -> Iterator[Case]:
    """Yield the sharp ones, and every residue of columns and depth modulo the tile."""
    yield from sharp_products(form)
    named = GATED if form.gated else PLAIN
    for k in range(64):
        columns, depth = (k + 1) + 64 * (k % 2), 1 + 7 * k % 37
        tokens = (1, 7, 40, 90)[k % 4] if form.block == 16 else (1, 30, 90, 150)[k % 4]
        yield Product(
            form, columns, depth, tokens, 1 + k % 3, 1 + k % 5, (None, 1.0)[k // 2 % 2],
            named[k % len(named)], k % 3 > 0, k % 4 > 0, k % 7 == 0, k,
        ).case  # fmt: skip
    # Many experts, most of them empty.
    yield Product(form, 9, 20, 5, 2, 300, activation=named[0]).case


@dataclass(frozen=True)
class WeightGradient:
    """One launch of `grouped_wgrad`."""

    gather: int
    M: int
    N: int
    tokens: int = 9
    top_k: int = 2
    experts: int = 3
    accumulate: bool = False
    scale: float | None = None
    real: str = "float32"
    seed: int = 0
    absent: float = 0.15
    tiling: Tiling = SIMT

    @cached_property
    def _data(self) -> tuple[Routes, np.ndarray, np.ndarray, np.ndarray, Ball]:
        rng = np.random.default_rng([self.seed, self.M, self.N, self.tokens])
        routes = draw_routes(rng, self.tokens, self.top_k, self.experts, self.absent)
        T, R = len(routes.owners), len(routes.pairs)
        lengths = [self.tokens if self.gather == g else T for g in (2, 1)]
        grad = draw(rng, (lengths[0], self.M), self.real, self.scale)
        x = draw(rng, (lengths[1], self.N), self.real, self.scale)
        before = draw(rng, (self.experts, self.M, self.N), self.real, self.scale)
        for rows, of_tokens in ((grad, 2), (x, 1)):
            if self.gather != of_tokens:
                rows[R:] = np.nan  # what nobody has written
        balls = []
        for begin, end in zip(routes.offsets, routes.offsets[1:], strict=False):
            rows = np.arange(begin, end)
            tokens = routes.pairs[rows] // self.top_k
            left = exactly(grad[tokens if self.gather == 2 else rows], self.real)
            right = exactly(x[tokens if self.gather == 1 else rows], self.real)
            ball = left.T.matmul(right, len(rows) + 1)
            balls.append(ball)
        found = Ball(*(np.stack([getattr(b, k) for b in balls]) for k in ("mid", "rad")),
                     Model.of(self.real))  # fmt: skip
        if self.accumulate:
            found = found + exactly(before, self.real)
        return routes, grad, x, before, found

    def run(self, device: EmulatedDevice) -> None:
        """Launch and judge."""
        routes, grad, x, before, expected = self._data
        plan, real = routes.plan(), np.dtype(self.real)
        products = Products(device, self.tiling, plan, routes.blocks(16), real)
        out = put(before.copy()) if self.accumulate else device.empty(before.shape, real)
        products.weight_gradient(put(grad), put(x), self.gather, out, self.accumulate)
        judge(out, expected, str(self), exact=self.scale is None)

    def __str__(self) -> str:
        adds = " accumulate" if self.accumulate else ""
        return f"wgrad gather {self.gather} {self.M}x{self.N} E{self.experts} {self.real}{adds}"

    @property
    def case(self) -> Case:
        return Case(str(self), self.run)


def sharp_gradients(gather: int, real: str = "float32") -> Iterator[Case]:
    """Yield a few cases that together reach every line, and every guard from both sides."""
    # The edge of out in each of four groups of columns and rows, and of rows in each copy.
    sizes = [(64, n) for n in (4, 20, 36, 52)] + [(m, 64) for m in (4, 20, 36, 52)]
    for k, (M, N) in enumerate(sizes):
        tokens = (2, 6, 10, 14, 16, 33, 1, 5)[k]
        yield WeightGradient(gather, M, N, tokens, 1, 1, k % 2 == 1, real=real, absent=0.0).case
        yield WeightGradient(gather, M + 1, N + 3, 1 + k, 3, 2, k % 2 == 0, real=real, seed=k).case
    yield WeightGradient(gather, 36, 64, 10, 1, 1, real=real, absent=0.0).case
    yield WeightGradient(gather, 67, 63, real=real).case
    yield WeightGradient(gather, 61, 66, 40, 1, 2, True, real=real).case
    yield WeightGradient(gather, 64, 64, 11, 3, 2, scale=1.0, real=real).case
    yield WeightGradient(gather, 3, 130, 17, 1, 1, True, 1.0, real=real).case


def all_gradients(gather: int, real: str = "float32") -> Iterator[Case]:
    """Yield the sharp ones, and every residue of M and N modulo the tile."""
    yield from sharp_gradients(gather, real)
    for k in range(64):
        yield WeightGradient(
            gather, k + 1 + 64 * (k % 2), 1 + 37 * k % 64 + 64 * (k // 2 % 2),
            (0, 5, 16, 33)[k % 4] or 1, 1 + k % 3, 1 + k % 5, k % 3 == 0,
            (None, 1.0)[k // 2 % 2], real, k,
        ).case  # fmt: skip
    yield WeightGradient(gather, 5, 6, 4, 2, 200, real=real).case
