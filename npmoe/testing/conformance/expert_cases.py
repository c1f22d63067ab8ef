"""Cases of the expert core: how they are drawn, what is right, and how they become smaller."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive.experts import run_expert, run_expert_backward
from npmoe.naive.results import ExpertGrads
from npmoe.params import MoEParams
from npmoe.testing.balls import Ball, Model
from npmoe.testing.conformance.case import Case, Effort, Expected
from npmoe.testing.conformance.common import float_expected
from npmoe.testing.conformance.draw import EXPERTS, WIDTHS, Values
from npmoe.testing.expert_bounds import expert_balls

Weighting = Literal["plain", "wide", "by-slot", "zeros"]
# silu(g) == g and silu'(g) == 1, exactly, in either dtype and however it is computed.
_LINEAR_GATE = 80
# Arguments with one row per token.
PER_TOKEN = ("grad_output", "hidden_states", "topk_weights", "topk_ids")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The axes of one case."""

    T: int
    E: int
    K: int
    H: int
    I: int


def growing(rng: np.random.Generator, effort: Effort, *, widest: int = 17) -> Iterator[Sizes]:
    """Yield sizes from 1 on; H, I and 2I differ as often as not."""
    widths = tuple(w for w in WIDTHS if w <= widest)
    for i in range(effort.cases):
        reach = (i + 1) / effort.cases
        experts = EXPERTS[int(rng.integers(0, max(2, int((len(EXPERTS) - 1) * reach))))]
        allowed = widths[: max(3, int(len(widths) * reach))]
        yield Sizes(
            T=int(rng.integers(1, 3 + int(20 * reach))),
            E=experts,
            K=int(rng.integers(1, min(experts, 5) + 1)),
            H=int(rng.choice(allowed)),
            I=int(rng.choice(allowed)),
        )


def make_experts(
    rng: np.random.Generator,
    sizes: Sizes,
    dtype: str,
    *,
    backward: bool,
    values: Values = "normal",
    load: str = "spread",
    weighting: Weighting = "plain",
) -> Case:
    """Return a case; integer values are such that every result is exact in float32."""
    T, E, K, H, I = sizes.T, sizes.E, sizes.K, sizes.H, sizes.I

    def draw(*shape: int, fan_in: int = 1) -> HostArray:
        if values == "integers":
            return rng.integers(-2, 3, shape).astype(dtype)
        return np.asarray(rng.standard_normal(shape) * (1.5 / np.sqrt(fan_in)), dtype)

    hidden, gate_up, down = draw(T, H), draw(E, 2 * I, H, fan_in=H), draw(E, H, I, fan_in=I)
    if values == "integers":
        hidden[:, 0] = 1.0
        gate_up[:, :I, 0] = _LINEAR_GATE
    arguments: dict[str, Any] = {"grad_output": draw(T, H)} if backward else {}
    arguments |= {
        "hidden_states": hidden,
        "gate_up_proj": gate_up,
        "down_proj": down,
        "topk_weights": _draw_weights(rng, (T, K), weighting, values, dtype),
        "topk_ids": _draw_ids(rng, sizes, load),
    }
    return describe(arguments, {"exact": values == "integers"})


def describe(arguments: dict[str, Any], options: dict[str, Any]) -> Case:
    """Return the case with a note of its sizes and loads."""
    ids, w2 = arguments["topk_ids"], arguments["down_proj"]
    counts = np.bincount(ids[ids >= 0].ravel(), minlength=len(w2))
    loads = " ".join(map(str, counts[:12])) + (" ..." if len(counts) > 12 else "")
    T, K = ids.shape
    note = f"T={T} E={len(w2)} K={K} H={w2.shape[1]} I={w2.shape[2]}, rows per expert {loads}"
    return Case(arguments=arguments, note=note, options=options)


def _draw_weights(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    weighting: Weighting,
    values: Values,
    dtype: str,
) -> HostArray:
    """Return weights (T, K) that do not sum to 1: plain; 1/8 to 8; 1, 2, 4 by slot; some 0."""
    if weighting == "wide":
        drawn = 2.0 ** rng.integers(-3, 4, shape)
    elif weighting == "by-slot":
        drawn = np.broadcast_to(2.0 ** np.arange(shape[1]), shape)
    elif values == "integers":
        drawn = rng.choice([0.5, 1.0, 2.0], shape)
    else:
        drawn = rng.uniform(0.25, 1.75, shape)
    if weighting == "zeros":
        drawn = np.where(rng.random(shape) < 0.5, 0.0, drawn)
        drawn[:, 0] = 0.0
    return drawn.astype(dtype)


def _draw_ids(rng: np.random.Generator, sizes: Sizes, load: str) -> HostArray:
    """Return ids (T, K), distinct within a token; "falling" sorts them, "holes" leaves some out."""
    T, E, K = sizes.T, sizes.E, sizes.K
    usable = np.arange(E)
    room = E - K
    if load == "empty-first":
        usable = usable[min(room, (E + 1) // 2) :]
    elif load == "empty-last":
        usable = usable[: E - min(room, (E + 1) // 2)]
    elif load == "every-other":
        odd = usable[1::2]
        usable = np.setdiff1d(usable, odd[: min(room, len(odd))])
    elif load == "one-expert":
        usable = rng.permutation(E)[:K]
    ids = np.zeros((T, K), np.int32)
    for row in ids:
        row[:] = rng.permutation(usable)[:K]
    if load == "falling":
        ids = -np.sort(-ids, axis=1)
    elif load == "holes" and ids.size:
        ids[rng.random(ids.shape) < 0.4] = -1
        ids[int(rng.integers(T)), int(rng.integers(K))] = -1
    return ids


@functools.lru_cache(maxsize=32)
def expected_experts(case: Case) -> tuple[Expected, ...]:
    """Return the truth, route by route in float64, and bounds from balls.

    A token that holds NaN may make anything of its own rows, and of the gradients of its experts.
    """
    given = case.arguments
    ids = np.asarray(given["topk_ids"])
    dtype = str(given["hidden_states"].dtype)
    routed = ids >= 0
    x, g, broken = _finite_rows(given)
    w = np.where(routed, given["topk_weights"], 0.0).astype(np.float64)
    params = MoEParams(
        router_weight=np.zeros((len(given["down_proj"]), x.shape[1])),
        gate_up_proj=np.asarray(given["gate_up_proj"], np.float64),
        down_proj=np.asarray(given["down_proj"], np.float64),
    )
    E, H, I = params.down_proj.shape
    cfg = MoEConfig(hidden_size=H, intermediate_size=I, num_experts=E, top_k=min(ids.shape[1], E))
    output, grad_x, grad_w = np.zeros(x.shape), np.zeros(x.shape), np.zeros(ids.shape)
    grads = ExpertGrads.zeros(params)
    t, k = np.nonzero(routed)
    backward = "grad_output" in given
    for i, j in zip(t, k, strict=True):
        e = int(ids[i, j])
        if backward:
            one, grad_w[i, j] = run_expert_backward(g[i], x[i], w[i, j], params, e, cfg, grads)
            grad_x[i] += one
        else:
            output[i] += run_expert(x[i], w[i, j], params, e, cfg)
    model = Model.of(dtype)
    balls = expert_balls(
        Ball.exact(x[t], model),
        Ball.exact(w[t, k], model),
        Ball.exact(g[t], model),
        ids[t, k],
        params,
        cfg,
        None,
        num_sums=0,
    )

    def summed(rows: Ball) -> HostArray:
        spread = Ball(np.zeros((*ids.shape, H)), np.zeros((*ids.shape, H)), model)
        spread.mid[t, k], spread.rad[t, k] = rows.mid, rows.rad
        return spread.sum(axis=1).rad

    if not backward:
        return (_float(output, summed(balls.rows), case, dtype, broken[:, None]),)
    grad_w_bound = np.zeros(ids.shape)
    grad_w_bound[t, k] = balls.grad_weights.rad
    spoiled = np.isin(np.arange(E), ids[broken])[:, None, None]
    return (
        _float(grad_x, summed(balls.grad_inputs), case, dtype, broken[:, None]),
        _float(grads.gate_up_proj, balls.gate_up_proj, case, dtype, spoiled),
        _float(grads.down_proj, balls.down_proj, case, dtype, spoiled),
        _float(grad_w, grad_w_bound, case, dtype, broken[:, None]),
    )


def _finite_rows(given: dict[str, Any]) -> tuple[HostArray, HostArray, HostArray]:
    """Return x and g with NaN tokens zeroed, and which of them are routed (T,)."""
    x = np.asarray(given["hidden_states"], np.float64)
    g = np.asarray(given.get("grad_output", np.zeros_like(x)), np.float64)
    finite = np.asarray(np.isfinite(x).all(axis=1) & np.isfinite(g).all(axis=1))
    rows = finite[:, None]
    routed = (given["topk_ids"] >= 0).any(axis=1)
    return np.where(rows, x, 0.0), np.where(rows, g, 0.0), routed & ~finite


def _float(value: HostArray, bound: HostArray, case: Case, dtype: str, free: HostArray) -> Expected:
    plain = float_expected(value, bound, case, dtype=dtype)
    if not free.any():
        return plain
    wide = np.broadcast_to(free, value.shape)
    return Expected(value=value, bound=plain.bound, free=wide, dtype=dtype)


def reduce_experts(case: Case) -> Iterator[Case]:
    """Yield fewer tokens, slots, unused experts, then narrower matrices; big steps first."""
    given, ids = case.arguments, case.arguments["topk_ids"]

    def change(**arguments: Any) -> Case:
        return describe(given | arguments, dict(case.options))

    T, K = ids.shape
    E, H, I = given["down_proj"].shape
    for size in dict.fromkeys((T // 2, T // 4, 1)):
        for start in range(0, T, size) if size > 0 else ():
            keep = np.ones(T, bool)
            keep[start : start + size] = False
            yield change(**{n: given[n][keep] for n in PER_TOKEN if n in given})
    for k in range(K) if K > 1 else ():
        fewer = {n: np.delete(given[n], k, axis=1) for n in ("topk_weights", "topk_ids")}
        yield change(**fewer)
    unused = np.setdiff1d(np.arange(E), ids)
    if len(unused) == E:
        unused = unused[1:]
    for size in dict.fromkeys((len(unused), len(unused) // 2, 1)):
        for start in range(0, len(unused), size) if size else ():
            gone = unused[start : start + size]
            lower = np.searchsorted(gone, ids)
            weights = {n: np.delete(given[n], gone, axis=0) for n in ("gate_up_proj", "down_proj")}
            yield change(topk_ids=np.where(ids < 0, ids, ids - lower).astype(np.int32), **weights)
    w1, w2 = given["gate_up_proj"], given["down_proj"]
    if H > 1:
        h = H // 2
        rows = {n: given[n][:, :h] for n in ("grad_output", "hidden_states") if n in given}
        yield change(gate_up_proj=w1[:, :, :h], down_proj=w2[:, :h], **rows)
    if I > 1:
        kept = np.arange(I // 2)
        yield change(gate_up_proj=w1[:, np.r_[kept, I + kept]], down_proj=w2[:, :, kept])
