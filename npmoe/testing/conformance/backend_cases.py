"""Cases of a backend: its verbs, the routing ones among them, and the expert core."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from npmoe import naive
from npmoe._half import is_half
from npmoe._typing import Array, HostArray
from npmoe.config import MoEConfig
from npmoe.testing.balls import Ball, Model
from npmoe.testing.conformance.case import Case, Effort, Expected
from npmoe.testing.conformance.expert_cases import (
    Sizes,
    expected_experts,
    make_experts,
    reduce_experts,
)
from npmoe.testing.conformance.half_cases import halve
from npmoe.testing.conformance.layer_cases import (
    is_settled,
    layer_truth,
    plain_problem,
)
from npmoe.testing.conformance.recipes import TRIES, reduce_recipe
from npmoe.testing.conformance.verb_truths import Arrays, Draw, plan_of, router_params
from npmoe.testing.conformance.verbs import VERBS
from npmoe.testing.problems import MoEProblem
from npmoe.testing.router_bounds import router_backward
from npmoe.testing.soft_bounds import soft_balls

_ROUTERS: tuple[dict[str, Any], ...] = (
    {},
    {"renormalize": True},
    {"router_order": "topk_score"},
    {"router_order": "topk_score", "score_fn": "sigmoid"},
    {"score_fn": "sigmoid", "selection_bias": True, "renormalize": True, "renorm_eps": 1e-20},
    {"score_fn": "sqrtsoftplus", "renormalize": True, "routed_scaling_factor": 1.5},
    {"renormalize": True, "renorm_p": 2, "top_k": 2},
    {"renormalize": True, "renorm_eps": 0.4, "renorm_eps_mode": "max"},
    {"num_experts": 8, "num_groups": 4, "topk_group": 2, "top_k": 2, "group_score": "top2_sum"},
    {"num_experts": 6, "num_groups": 3, "topk_group": 2, "top_k": 2, "group_score": "max"},
)


def draws(rng: np.random.Generator, effort: Effort) -> Iterator[Draw]:
    """Yield sizes that grow from 1, with integers and normal values in turn."""
    for i in range(effort.cases):
        reach = (i / effort.cases) ** 2
        E = int(rng.integers(1, 4 + int(6 * reach)))
        yield Draw(
            rng=rng,
            index=i,
            dtype=effort.dtype,
            integers=i % 2 == 0,
            T=int(rng.integers(1, 4 + int(25 * reach))) if i else 0,
            E=E,
            K=int(rng.integers(1, min(E, 4) + 1)),
            H=int(rng.integers(1, 4 + int(16 * reach))),
            I=int(rng.integers(1, 4 + int(16 * reach))),
            half=effort.half,
        )


def verb_case(
    verb: str,
    cfg: MoEConfig,
    arrays: dict[str, HostArray],
    *,
    exact: bool = False,
    tied: bool = False,
    tokens: int = 0,
) -> Case:
    """Return the case of one call of a verb."""
    shapes = ", ".join(f"{n} {'x'.join(map(str, a.shape))}" for n, a in arrays.items())
    return Case(
        arguments={"verb": verb, "recipe": json.dumps(cfg.to_dict()), **arrays},
        note=f"{verb} of {shapes}",
        options={"exact": exact, "tied": tied, "tokens": tokens},
    )


def drawn_case(verb: str, d: Draw) -> Case:
    """Return a case of a verb of the table."""
    cfg, arrays = VERBS[verb].draw(d)
    return verb_case(verb, cfg, arrays, exact=d.integers and VERBS[verb].exact, tokens=d.T)


def arrays_of(case: Case) -> tuple[MoEConfig, tuple[HostArray, ...]]:
    """Return the config and the arrays of a verb's case."""
    _, recipe, *arrays = case.arguments.values()
    return MoEConfig.from_dict(json.loads(recipe)), tuple(arrays)


# The routing verbs: the definition's router, told its logits by an identity matrix.


def run_route(
    b: Any, cfg: MoEConfig, logits: Array, mask: Array, bias: Array, grad: Array
) -> Arrays:
    """Route, and back."""
    routing = b.route(
        logits,
        cfg,
        selection_bias=bias if cfg.selection_bias else None,
        token_mask=mask,
        sequence_length=logits.shape[0],
    )
    plan = None
    if cfg.renormalize_drop == "after":
        plan = plan_of(b, cfg, routing.topk_ids, routing.topk_weights)
        weights = b.renormalize_kept(routing, plan, cfg)
        routing = dataclasses.replace(routing, topk_weights=weights)
    back = b.route_backward(grad, routing, cfg, plan)
    return routing.topk_ids, routing.topk_weights, routing.probs, back


def route_truth(
    cfg: MoEConfig,
    dtype: str,
    logits: HostArray,
    mask: HostArray,
    bias: HostArray,
    grad: HostArray,
) -> tuple[tuple[Expected, ...], bool]:
    """Return the outputs of `run_route`, and whether rounding leaves every choice alone."""
    problem = _router_problem(cfg, logits, mask, bias)
    truth = layer_truth(problem)
    forward, router = truth.forward, truth.bounds.router
    if router is None:
        raise AssertionError("only soft routing has no router")
    model = Model.of(dtype)
    back = router_backward(problem, forward, truth.draws, router, Ball.exact(grad, model))[0]
    kept_grad = np.where(forward.kept, grad, 0.0).astype(np.float64)
    value = naive.route_backward(
        kept_grad, forward.logits, forward.topk_ids, cfg, forward.kept, forward.summed_ids
    )
    outputs = (
        Expected(value=forward.topk_ids.astype(np.int32), dtype="int32"),
        Expected(value=forward.topk_weights, bound=truth.bounds.topk_weights, dtype=dtype),
        Expected(value=forward.probs, bound=truth.bounds.probs, dtype=dtype),
        Expected(value=value, bound=back.rad, dtype=dtype),
    )
    return outputs, is_settled(problem, truth)


def _router_problem(
    cfg: MoEConfig, logits: HostArray, mask: HostArray, bias: HostArray
) -> MoEProblem:
    params = router_params(cfg, logits.shape[1], bias if cfg.selection_bias else None)
    problem = plain_problem(cfg, logits, np.zeros_like(logits), params)
    return dataclasses.replace(problem, token_mask=mask)


def route_cases(
    rng: np.random.Generator, effort: Effort, *, after: bool, ties: bool = False
) -> Iterator[Case]:
    """Yield routers of every kind whose choices are settled; with `after`, a drop before the norm.

    With `ties` several logits are equal and the largest, exactly.
    """
    for i, d in enumerate(draws(rng, effort)):
        fields = dict(_ROUTERS[i % len(_ROUTERS)])
        if after:
            fields = {
                "renormalize": True,
                "renormalize_drop": "after",
                "expert_capacity": 1 + d.T // 3,
            }
        if ties:
            fields = dict(_ROUTERS[i % 3])
        E = max(2, d.E)
        sizes = {"num_experts": E, "top_k": min(E, max(d.K, 2 if after else 1))} | fields
        cfg = MoEConfig(hidden_size=sizes["num_experts"], intermediate_size=1, **sizes)
        T = max(1, d.T)
        for _ in range(TRIES):
            logits = rng.standard_normal((T, cfg.num_experts)).astype(d.dtype)
            if ties:
                logits = (rng.random(logits.shape) < 0.7).astype(d.dtype)
                logits[:, -cfg.top_k :] = 1.0
            arrays = {
                "logits": logits,
                "mask": np.ones(T, bool) if i % 2 == 0 else d.rng.random(T) < 0.7,
                "bias": (0.3 * rng.standard_normal(cfg.num_experts)).astype(d.dtype),
                "grad": rng.standard_normal((T, cfg.top_k)).astype(d.dtype),
            }
            case = verb_case("renormalize_kept" if after else "route", cfg, arrays, tied=ties)
            if ties or route_truth(cfg, d.dtype, *arrays.values())[1]:
                yield case
                break


def run_soft_route(b: Any, _: MoEConfig, x: Array, phi: Array, scale: Array, mask: Array) -> Arrays:
    """Return logits and both assignments."""
    soft = b.soft_route(b_masked(b, x, mask), phi, scale, token_mask=mask)
    return soft.router_logits, soft.dispatch, soft.combine


def b_masked(b: Any, x: Array, mask: Array) -> Array:
    """Return x (B, L, H) with zeros where masked."""
    B, L, H = x.shape
    return b.mask_rows(x.reshape(B * L, H), mask.reshape(B * L)).reshape(B, L, H)


def soft_truth(
    cfg: MoEConfig, dtype: str, x: HostArray, phi: HostArray, scale: HostArray, mask: HostArray
) -> tuple[Expected, ...]:
    """Return the outputs of `run_soft_route`."""
    B, L, H = x.shape
    flat = x.reshape(B * L, H)
    params = dataclasses.replace(router_params(cfg, H), router_weight=phi, soft_scale=scale)
    problem = dataclasses.replace(
        plain_problem(cfg, flat, np.zeros_like(flat), params),
        token_mask=mask.reshape(-1),
        num_sequences=B,
    )
    forward = naive.moe_forward(flat, params, cfg, token_mask=problem.token_mask, sequence_length=L)
    rows = problem.valid[:, None]
    balls = soft_balls(problem, Ball.exact(np.where(rows, flat, 0.0), Model.of(dtype)))
    found = ((forward.logits, balls.logits), (forward.dispatch, balls.dispatch))
    return tuple(
        Expected(
            value=np.asarray(value).reshape(B, L, -1),
            bound=ball.rad.reshape(B, L, -1),
            free=np.broadcast_to(~mask[:, :, None], (B, L, ball.mid.shape[1])) if i == 0 else None,
            dtype=dtype,
        )
        for i, (value, ball) in enumerate((*found, (forward.probs, balls.combine)))
    )


def soft_cases(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """Yield soft routers of two sequences, some tokens masked."""
    for d in draws(rng, effort):
        cfg = MoEConfig(
            hidden_size=d.H, intermediate_size=1, num_experts=d.E, routing="soft", expert_capacity=2
        )
        T = max(1, d.T)
        arrays = {
            "x": rng.standard_normal((2, T, d.H)).astype(d.dtype),
            "phi": rng.standard_normal((cfg.router_size, d.H)).astype(d.dtype),
            "scale": np.asarray(1.5, d.dtype),
            "mask": rng.random((2, T)) < 0.8,
        }
        yield verb_case("soft_route", cfg, arrays)


# The expert core.


def expert_case(case: Case) -> tuple[Case, Case]:
    """Return the forward and the backward case of the expert core with the same arrays."""
    given = {n: a for n, a in case.arguments.items() if n not in ("verb", "recipe")}
    forward = {n: a for n, a in given.items() if n != "grad_output"}
    return (
        Case(arguments=forward, note=case.note, options=case.options),
        Case(arguments=given, note=case.note, options=case.options),
    )


@functools.lru_cache(maxsize=16)
def experts_truth(case: Case) -> tuple[Expected, ...]:
    """Return the output and the four gradients."""
    forward, backward = expert_case(case)
    return (*expected_experts(forward), *expected_experts(backward))


def experts_cases(rng: np.random.Generator, effort: Effort, verb: str) -> Iterator[Case]:
    """Yield expert cores with holes, empty experts, and NaN in matrices that nobody uses."""
    loads = ("spread", "holes", "every-other", "one-expert", "empty-last")
    for i, d in enumerate(draws(rng, effort)):
        given = dict(_experts(d, d.I, loads[i % len(loads)]).arguments)
        unused = np.setdiff1d(np.arange(d.E), given["topk_ids"])
        for name in ("gate_up_proj", "down_proj"):
            given[name] = given[name].copy()
            given[name][unused] = np.nan
        yield core_case(verb, given)


def square_cases(rng: np.random.Generator, effort: Effort, verb: str) -> Iterator[Case]:
    """Yield verbs and expert cores with M = N, where a transposed matrix still fits."""
    for d in draws(rng, effort):
        if verb in VERBS:
            square = dataclasses.replace(d, H=max(2, d.H), I=max(2, d.H), T=max(1, d.T))
            cfg, arrays = VERBS[verb].draw(square)
            exact = d.integers and VERBS[verb].exact
            yield verb_case(verb, cfg, arrays, exact=exact, tokens=square.T)
        else:
            wide = dataclasses.replace(d, H=2 * d.I, T=max(1, d.T))
            yield core_case(verb, dict(_experts(wide, d.I * (1 + d.index % 2), "spread").arguments))


def _experts(d: Draw, I: int, load: str) -> Case:
    sizes = Sizes(d.T, d.E, d.K, d.H, I)
    case = make_experts(d.rng, sizes, d.dtype, backward=True, load=load)
    return case.replace(**halve(case.arguments, d.half, d.index))


def half_case(verb: str, given: dict[str, Any], exact: bool) -> Case:
    """Return the case of a grouped product, or of an expert core."""
    if verb != "grouped_gemm":
        return core_case(verb, given, exact=exact)
    E, I, H = given["weight"].shape
    cfg = MoEConfig(hidden_size=H, intermediate_size=I, num_experts=E, top_k=1)
    return verb_case(verb, cfg, given, exact=exact)


def core_case(verb: str, given: dict[str, Any], *, exact: bool = False) -> Case:
    """Return the case of an expert core with these arrays."""
    E, H, I = given["down_proj"].shape
    K = given["topk_ids"].shape[1]
    cfg = MoEConfig(hidden_size=H, intermediate_size=I, num_experts=E, top_k=min(K, E))
    return verb_case(verb, cfg, given, exact=exact)


def reduce_backend(case: Case) -> Iterator[Case]:
    """Yield smaller recipes, expert cores and routers; other verbs begin small."""
    yield from _smaller_verbs(case) if len(case.arguments) > 2 else reduce_recipe(case)


def _smaller_verbs(case: Case) -> Iterator[Case]:
    """Yield smaller expert cores, and routers with fewer tokens; other verbs begin small."""
    verb, recipe, *_ = case.arguments.values()
    if verb.startswith("experts-"):
        for smaller in reduce_experts(expert_case(case)[1]):
            yield core_case(verb, smaller.arguments, exact=bool(case.options["exact"]))
    elif verb in ("route", "renormalize_kept"):
        given = {n: a for n, a in case.arguments.items() if n not in ("verb", "recipe")}
        cfg, dtype = MoEConfig.from_dict(json.loads(recipe)), str(given["logits"].dtype)
        for t in range(len(given["logits"])):
            fewer = {n: a if n == "bias" else np.delete(a, t, axis=0) for n, a in given.items()}
            if case.options["tied"] or route_truth(cfg, dtype, *fewer.values())[1]:
                yield verb_case(verb, cfg, fewer, tied=case.options["tied"])
    elif verb in VERBS:
        # Arrays of a plan depend on each other: smaller ones are drawn anew.
        dtypes = [a.dtype for a in arrays_of(case)[1]]
        dtype = str(next(t for t in dtypes if t.kind == "f"))
        half = next((t.name for t in dtypes if is_half(t)), None)
        for T in range(1, min(4, case.options["tokens"])):
            for seed in range(6):
                rng = np.random.default_rng(seed)
                E = 1 + seed % 3
                sizes = {"T": T, "E": E, "K": min(E, 2), "H": 2, "I": 2}
                draw = Draw(rng, seed, dtype, case.options["exact"], **sizes, half=half)
                yield drawn_case(verb, draw)


def verb_truth(case: Case) -> tuple[Expected, ...]:
    """Return the truth of a verb's case."""
    verb = str(case.arguments["verb"])
    cfg, arrays = arrays_of(case)
    floats = [a for a in arrays if a.dtype.kind == "f"]
    dtype = str(floats[0].dtype)
    if verb in ("route", "renormalize_kept"):
        return route_truth(cfg, dtype, *arrays)[0]
    if verb == "soft_route":
        return soft_truth(cfg, dtype, *arrays)
    return VERBS[verb].truth(cfg, dtype, bool(case.options["exact"]), *arrays)
