"""What the verbs of a backend are called with, and the truth of each kind of verb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe import naive
from npmoe._half import is_float
from npmoe._typing import Array, HostArray
from npmoe.activations import ACTIVATIONS
from npmoe.backends import ReferenceBackend
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan
from npmoe.params import MoEParams
from npmoe.testing import score_bounds, soft_bounds
from npmoe.testing.balls import Ball, Model
from npmoe.testing.bounds import gamma
from npmoe.testing.conformance.case import Expected
from npmoe.testing.conformance.draw import draw_ids, draw_values
from npmoe.testing.conformance.half_cases import round_weights, scale_of
from npmoe.testing.draws import rows_of

Arrays = tuple[Any, ...]
Run = Callable[..., tuple[Array, ...]]
_REFERENCE = ReferenceBackend()


@dataclass(frozen=True, slots=True)
class Draw:
    """What one case of a verb is drawn with: sizes, values and a config."""

    rng: np.random.Generator
    index: int
    dtype: str
    integers: bool
    T: int
    E: int
    K: int
    H: int
    I: int
    half: str | None = None

    def values(self, *shape: int) -> HostArray:
        """Return integers from -2 to 2, or normal numbers."""
        return draw_values(self.rng, shape, "integers" if self.integers else "normal", self.dtype)

    def weights(self, *shape: int) -> HostArray:
        """Return values of expert weights: in half precision large and tiny ones, too."""
        # Beside a bias only sums of unscaled integers are exact.
        scale = 0 if self.integers else scale_of(self.half, self.index)
        return round_weights(self.values(*shape), self.half, scale)

    def ids(self) -> HostArray:
        """Return ids (T, K), a third of them -1."""
        ids = draw_ids(self.rng, self.T, self.E, self.K)
        ids[self.rng.random(ids.shape) < 0.3] = -1
        return ids

    def rows(self, ids: HostArray, width: int) -> HostArray:
        """Return values for every routed row (R, width)."""
        return self.values(int((ids >= 0).sum()), width)

    def mask(self) -> HostArray:
        """Return a mask (T,), some False."""
        return np.asarray(self.rng.random(self.T) < 0.7)

    def config(self, **fields: Any) -> MoEConfig:
        """Return a config of these sizes."""
        sizes = {
            "hidden_size": self.H,
            "intermediate_size": self.I,
            "num_experts": self.E,
            "top_k": self.K,
        }
        return MoEConfig(**(sizes | fields))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """How a verb is held to the truth.

    Attributes
    ----------
    run : callable
        ``run(backend, cfg, *arrays)`` on the backend's arrays.
    truth : callable
        ``truth(cfg, dtype, exact, *arrays)`` on the host's.
    draw : callable
        ``draw(d)`` returns a config and the arrays by name.
    exact : bool
        Whether integers give results without rounding.
    """

    run: Run
    truth: Callable[..., tuple[Expected, ...]]
    draw: Callable[[Draw], tuple[MoEConfig, dict[str, HostArray]]]
    exact: bool = False


def plan_of(backend: Any, cfg: MoEConfig, ids: Array, weights: Array | None = None) -> DispatchPlan:
    """Return the backend's plan of a config's experts and capacity."""
    plan: DispatchPlan = backend.plan_dispatch(
        ids,
        num_experts=cfg.num_experts,
        num_identity_experts=cfg.num_identity_experts,
        capacity=cfg.expert_capacity,
        drop_policy=cfg.drop_policy,
        slot_order=cfg.slot_order,
        topk_weights=weights,
    )
    return plan


def kept_rows(plan: DispatchPlan, rows: Array) -> Array:
    """Return the first R rows; a device backend may have more, which mean nothing."""
    return rows[: plan.num_rows]


def multilinear(run: Run) -> Callable[..., tuple[Expected, ...]]:
    """Bound sums of products: gamma_n of the same verb on absolute values.

    n counts every axis that may be summed over, and a few roundings more.
    """

    def truth(cfg: MoEConfig, dtype: str, exact: bool, *arrays: HostArray) -> tuple[Expected, ...]:
        wide = [a.astype(np.float64) if is_float(a.dtype) else a for a in arrays]
        sizes = [np.abs(a) if a.dtype.kind == "f" else a for a in wide]
        n = 4 + sum(max(a.shape, default=1) for a in arrays)
        factor = gamma(n, dtype) + gamma(n, np.float64)
        values, bounds = run(_REFERENCE, cfg, *wide), run(_REFERENCE, cfg, *sizes)
        return tuple(
            Expected(value=v, bound=None if exact else factor * b, dtype=dtype)
            for v, b in zip(values, bounds, strict=True)
        )

    return truth


def balls(compute: Callable[..., tuple[Ball, ...]]) -> Callable[..., tuple[Expected, ...]]:
    """Bound whatever else: run it in balls."""

    def truth(cfg: MoEConfig, dtype: str, exact: bool, *arrays: HostArray) -> tuple[Expected, ...]:
        del exact
        model = Model.of(dtype)
        return tuple(
            Expected(value=b.mid, bound=b.rad, dtype=dtype)
            for b in compute(cfg, *(Ball.exact(a, model) for a in arrays))
        )

    return truth


def linear(run: Run, draw: Any) -> Verb:
    """Return a verb that is linear in each of its arrays."""
    return Verb(run=run, truth=multilinear(run), draw=draw, exact=True)


# Runs of several calls, or with something to make first.


def run_wgrad(b: Any, cfg: MoEConfig, x: Array, g: Array, into: Array, ids: Array) -> Arrays:
    """Return the weight gradient, what `out` holds of it, and what it was added to."""
    plan = plan_of(b, cfg, ids)
    out, total = b.scale(into, 1.0), b.scale(into, 1.0)
    b.grouped_gemm_wgrad(x, g, plan, out=out)
    b.grouped_gemm_wgrad(x, g, plan, out=total, accumulate=True)
    return b.grouped_gemm_wgrad(x, g, plan), out, total


def run_gather(b: Any, cfg: MoEConfig, x: Array, ids: Array) -> Arrays:
    """Return the rows of a plan."""
    plan = plan_of(b, cfg, ids)
    return (kept_rows(plan, b.gather_rows(x, plan)),)


def run_spread(b: Any, cfg: MoEConfig, values: Array, ids: Array) -> Arrays:
    """Return what each row's expert has."""
    plan = plan_of(b, cfg, ids)
    return (kept_rows(plan, b.spread_experts(values, plan)),)


def run_store(b: Any, _: MoEConfig, value: Array, into: Array) -> Arrays:
    """Return the value kept, put into an array, and added to one."""
    first, second = b.scale(into, 1.0), b.scale(into, 1.0)
    return (
        b.store(value, None, False),
        b.store(value, first, False),
        b.store(value, second, True),
    )


def run_plan(b: Any, cfg: MoEConfig, ids: Array, weights: Array) -> Arrays:
    """Return the arrays of the plan."""
    plan = plan_of(b, cfg, ids, weights)
    R = plan.num_rows
    found = (plan.pair_ids[:R], plan.token_ids[:R], plan.row_ids, plan.expert_offsets)
    return found if plan.slot_ids is None else (*found, plan.slot_ids)


def plan_truth(
    cfg: MoEConfig, dtype: str, exact: bool, ids: HostArray, weights: HostArray
) -> tuple[Expected, ...]:
    """Return the arrays of the plan, from the definition's slots."""
    del dtype, exact
    valid = [True] * len(ids)
    kept, slots = naive.keep_routes(ids, weights.astype(np.float64), valid, cfg, None, None)
    row_ids = rows_of(ids, kept, cfg.num_experts)
    routed = row_ids >= 0
    pair_ids = np.zeros(int(routed.sum()), np.int32)
    pair_ids[row_ids[routed]] = np.flatnonzero(routed.ravel())
    counts = np.bincount(ids[routed], minlength=cfg.num_experts)
    found = [pair_ids, pair_ids // ids.shape[1], row_ids, np.append(0, np.cumsum(counts))]
    if cfg.has_capacity and slots is not None:
        found.append(slots)
    return tuple(Expected(value=a.astype(np.int32), dtype="int32") for a in found)


def draw_plan(d: Draw) -> tuple[MoEConfig, dict[str, HostArray]]:
    """Return ids with holes, often with a capacity, and weights with ties."""
    policies = ["position", "k_major", "batch_priority", "probability"][: 4 if d.K > 1 else 1]
    fields: dict[str, Any] = {}
    if d.index % 3:
        # Seldom enough for all.
        fields = {"expert_capacity": int(d.rng.integers(0, max(1, d.T * d.K // (2 * d.E)) + 1))}
        fields["drop_policy"] = policies[d.index % len(policies)]
    weights = d.rng.choice([0.125, 0.25, 0.5, 0.75], (d.T, d.K)).astype(d.dtype)
    return d.config(**fields), {"topk_ids": d.ids(), "topk_weights": weights}


def run_dropout(b: Any, cfg: MoEConfig, ids: Array, like: Array) -> Arrays:
    """Return the dropout factors of a seeded generator."""
    plan = plan_of(b, cfg, ids)
    factors = b.draw_dropout(plan, cfg, np.random.default_rng(7), str(like.dtype))
    return (kept_rows(plan, factors),)


def dropout_truth(
    cfg: MoEConfig, dtype: str, exact: bool, ids: HostArray, like: HostArray
) -> tuple[Expected, ...]:
    """Return what that generator gives."""
    del exact, like
    R = int((ids >= 0).sum())
    kept = np.random.default_rng(7).random((R, cfg.intermediate_size)) >= 0.5
    return (Expected(value=kept * 2.0, dtype=dtype),)


def cast_truth(cfg: MoEConfig, dtype: str, exact: bool, x: HostArray) -> tuple[Expected, ...]:
    """Return both conversions."""
    del cfg, dtype, exact
    return tuple(Expected(value=x.astype(d), dtype=d) for d in ("float32", "float64"))


def soft_weights_truth(
    cfg: MoEConfig,
    dtype: str,
    exact: bool,
    gd: HostArray,
    gc: HostArray,
    d: HostArray,
    c: HostArray,
) -> tuple[Expected, ...]:
    """Return the gradient of both softmaxes."""
    del cfg, exact
    gd, gc, d, c = (a.astype(np.float64) for a in (gd, gc, d, c))
    value, size = np.zeros(gd.shape), np.zeros(gd.shape)
    for grad, share, axis in ((gd, d, 1), (gc, c, 2)):
        inner, wide = (share * grad).sum(axis, keepdims=True), np.abs(share * grad)
        value += share * (grad - inner)
        size += wide + np.abs(share) * wide.sum(axis, keepdims=True)
    return (Expected(value=value, bound=gamma(sum(gd.shape) + 8, dtype) * size, dtype=dtype),)


def soft_route_backward_balls(_: MoEConfig, grad: Ball, x: Ball, phi: Ball, scale: Ball) -> Arrays:
    """Return the three gradients of soft routing's logits."""
    (B, L, N), H = grad.mid.shape, x.mid.shape[2]
    flat = Ball(grad.mid.reshape(-1, N), grad.rad.reshape(-1, N), grad.model)
    rows = Ball(x.mid.reshape(-1, H), x.rad.reshape(-1, H), x.model)
    unit_x, unit_phi = soft_bounds.unit(rows), soft_bounds.unit(phi)
    by_x = soft_bounds.unit_backward((flat * scale).matmul(unit_phi, N + H + 6), rows)
    weighted = flat.T.matmul(unit_x, B * L + H + 6)
    products = weighted * unit_phi
    error = x.model.rounding(products.size.sum(), N * max(B * L, H))
    by_scale = Ball(products.mid.sum(), products.rad.sum() + error, x.model)
    by_x = Ball(by_x.mid.reshape(x.mid.shape), by_x.rad.reshape(x.mid.shape), x.model)
    return by_x, soft_bounds.unit_backward(weighted * scale, phi), by_scale


def gate_backward_balls(_: MoEConfig, grad_act: Ball, act: Ball, logit: Ball) -> Arrays:
    """Return the gradient of the logit."""
    negative = Ball(-logit.mid, logit.rad, logit.model)
    inner = (grad_act * act).sum(axis=1, keepdims=True)
    return (inner * score_bounds.score(negative, "sigmoid"),)


def draw_activation(d: Draw) -> tuple[MoEConfig, dict[str, HostArray]]:
    """Return pre-activations and a gradient, one activation after the other."""
    cfg = d.config(activation=sorted(ACTIVATIONS)[d.index % len(ACTIVATIONS)])
    gate_up = 3.0 * d.rng.standard_normal((d.T, cfg.gate_up_size))
    return cfg, {"gate_up": gate_up.astype(d.dtype), "grad_act": d.values(d.T, d.I)}


def run_activation(b: Any, cfg: MoEConfig, gate_up: Array, grad: Array) -> Arrays:
    """Return the activation and its backward."""
    return b.activation(gate_up, cfg), b.activation_backward(grad, gate_up, cfg)


def draw_soft(d: Draw, *shapes: str) -> dict[str, HostArray]:
    """Return arrays (B, L, H) "x", (B, L, N) "n", (B*N, H) "y", with B = 2 and N = E."""
    sizes = {"x": (2, d.T, d.H), "n": (2, d.T, d.E), "y": (2 * d.E, d.H)}
    return {f"{s}{i}": d.values(*sizes[s]) for i, s in enumerate(shapes)}


def with_rows(d: Draw, *widths: int, **more: tuple[int, ...]) -> dict[str, HostArray]:
    """Return rows of given widths, more arrays (`weight` is experts'), and the ids of the rows."""
    ids = d.ids()
    rows = {f"rows{i}": d.rows(ids, w) for i, w in enumerate(widths)}
    drawn = {n: (d.weights if n == "weight" else d.values)(*s) for n, s in more.items()}
    return rows | drawn | {"topk_ids": ids}


def identity_ids(d: Draw) -> tuple[MoEConfig, dict[str, HostArray]]:
    """Return ids of which some are identity experts."""
    ids = draw_ids(d.rng, d.T, d.E + 2, d.K)
    ids[d.rng.random(ids.shape) < 0.2] = -1
    arrays = {"grad": d.values(d.T, d.H), "x": d.values(d.T, d.H)}
    arrays |= {"topk_ids": ids, "topk_weights": d.values(d.T, d.K)}
    return d.config(num_identity_experts=2), arrays


def matrix(d: Draw, *shapes: tuple[int, ...]) -> tuple[MoEConfig, dict[str, HostArray]]:
    """Return arrays of these shapes."""
    return d.config(), {f"x{i}": d.values(*s) for i, s in enumerate(shapes)}


def router_params(cfg: MoEConfig, size: int, bias: HostArray | None = None) -> MoEParams:
    """Return the parameters of a layer whose router weight is the identity: h are the logits."""
    E, I = cfg.num_experts, cfg.intermediate_size
    return MoEParams(
        router_weight=np.eye(size),
        gate_up_proj=np.zeros((E, cfg.gate_up_size, size)),
        down_proj=np.zeros((E, size, I)),
        selection_bias=bias,
    )
