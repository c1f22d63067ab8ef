"""Runs of the whole layer from a recipe: the keywords of `make_problem` as JSON."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from npmoe.config import MoEConfig
from npmoe.errors import NpmoeError
from npmoe.layer_gradcheck import gradcheck_layers
from npmoe.params import MoEGrads
from npmoe.testing.conformance.case import Case, Effort, Expected
from npmoe.testing.conformance.half_cases import scale_of
from npmoe.testing.conformance.layer_cases import LayerTruth, is_settled, layer_truth
from npmoe.testing.draws import needs_generator
from npmoe.testing.exactness import is_exact
from npmoe.testing.problems import MoEProblem, make_problem

GRADS = tuple(MoEGrads.__dataclass_fields__)
TRIES = 40  # to draw a case that no rounding decides


def make_recipe(cfg: MoEConfig, **keywords: Any) -> str:
    """Return the recipe of a problem as JSON."""
    return json.dumps({"cfg": cfg.to_dict(), **keywords})


@functools.lru_cache(maxsize=64)
def problem_of(recipe: str) -> MoEProblem:
    """Return the problem of a recipe."""
    keywords = json.loads(recipe)
    keywords.pop("operands", None)  # the bounds'
    return make_problem(MoEConfig.from_dict(keywords.pop("cfg")), **keywords)


@functools.lru_cache(maxsize=64)
def truth_of(recipe: str) -> LayerTruth:
    """Return what the definition makes of a recipe."""
    return layer_truth(problem_of(recipe), json.loads(recipe).get("operands"))


def is_usable(recipe: str) -> bool:
    """Return whether the recipe makes a problem that no rounding decides."""
    try:
        problem = problem_of(recipe)
    except NpmoeError:
        return False
    return problem.exact or is_settled(problem, truth_of(recipe))


def layer_case(verb: str, recipe: str) -> Case:
    """Return the case of a run of the layer."""
    keywords = json.loads(recipe)
    cfg = MoEConfig.from_dict(keywords["cfg"])
    sizes = f"T={keywords['num_tokens']} E={cfg.num_experts} K={cfg.top_k} H={cfg.hidden_size}"
    default = MoEConfig().to_dict()
    named = [n for n in default if not n.endswith("_size") and n not in ("num_experts", "top_k")]
    fields = [f"{n}={v}" for n, v in cfg.to_dict().items() if n in named and v != default[n]]
    note = f"{verb} {sizes} I={cfg.intermediate_size} {' '.join(fields)}".strip()
    return Case(
        arguments={"verb": verb, "recipe": recipe},
        note=note,
        options={"exact": keywords.get("values") == "exact"},
    )


def layer_recipes(rng: np.random.Generator, effort: Effort, **fixed: Any) -> Iterator[str]:
    """Yield recipes of the plain layer first, then of every option the layer has."""
    configs = [MoEConfig(hidden_size=2, intermediate_size=1, num_experts=2, top_k=1)]
    configs += list(gradcheck_layers().values())
    for i in range(len(configs) * (1 if effort.quick else 3)):
        cfg = configs[i % len(configs)]
        tokens = int(rng.integers(1, 4 + 2 * (i // len(configs))))
        pairs = bool(rng.random() < 0.3)
        for _ in range(TRIES):
            recipe = make_recipe(
                cfg,
                **{
                    "num_tokens": 2 * tokens if pairs else tokens,
                    "num_sequences": 2 if pairs else 1,
                    "seed": int(rng.integers(2**31)),
                    "dtype": effort.dtype,
                    "mask": str(rng.choice(["none", "some"])),
                    "auxiliary": bool(rng.random() < 0.5),
                    "generator": needs_generator(cfg) or bool(rng.random() < 0.5),
                }
                | effort_keywords(effort, i)
                | fixed,
            )
            if is_usable(recipe):
                yield recipe
                break


def effort_keywords(effort: Effort, index: int = 0) -> dict[str, Any]:
    """Return the keywords of rounded operands, and of expert weights in half precision.

    The latter are tiny and large in turn, but where what they meet is rounded, too.
    """
    if effort.operands is not None:
        return {"operands": effort.operands, "expert_dtype": effort.half}
    if effort.half is None:
        return {}
    # gate_up_proj has the reciprocal size of hidden_states.
    return {"expert_dtype": effort.half, "hidden_exponent": -scale_of(effort.half, index)}


def exact_recipes(rng: np.random.Generator, effort: Effort) -> Iterator[str]:
    """Yield recipes of layers without any rounding."""
    for activation in ("relu", "reglu", "relu2"):
        for top_k, biased in ((1, False), (2, False), (2, True)):
            cfg = MoEConfig(
                hidden_size=3,
                intermediate_size=2,
                num_experts=4,
                top_k=top_k,
                activation=activation,
                expert_bias=biased,
                renormalize=biased,
            )
            for tokens in (1, 3, 7)[: 1 if effort.quick else 3]:
                if is_exact(cfg, tokens):
                    yield make_recipe(
                        cfg,
                        num_tokens=tokens,
                        seed=int(rng.integers(2**31)),
                        dtype=effort.dtype,
                        expert_dtype=effort.half,
                        values="exact",
                    )


def layer_expected(case: Case, *, grads: bool) -> tuple[Expected, ...]:
    """Return the output and the ids, or all gradients that exist."""
    recipe = str(case.arguments["recipe"])
    problem, truth = problem_of(recipe), truth_of(recipe)
    dtype, exact = str(problem.dtype), bool(case.options["exact"])
    if grads:
        pairs = [(getattr(truth.grads, n), getattr(truth.bounds.grads, n)) for n in GRADS]
        return tuple(
            Expected(value=v, bound=None if exact else b, dtype=dtype)
            for v, b in pairs
            if v is not None
        )
    forward = truth.forward
    bound = None if exact else truth.bounds.output
    output = Expected(value=forward.output, bound=bound, dtype=dtype)
    if problem.cfg.routing == "soft":
        return (output,)
    return (output, Expected(value=forward.topk_ids.astype(np.int32), dtype="int32"))


def reduce_recipe(case: Case) -> Iterator[Case]:
    """Yield recipes with fewer tokens, no options, fewer experts and narrower."""
    keywords = json.loads(str(case.arguments["recipe"]))
    cfg, T = keywords["cfg"], keywords["num_tokens"]
    changes: list[dict[str, Any]] = [{"num_tokens": n} for n in (1, 2, T // 2, T - 1) if 0 < n < T]
    plain = {"mask": "none", "num_sequences": 1, "auxiliary": False, "generator": False}
    changes += [{n: v} for n, v in plain.items() if keywords.get(n, v) != v]
    for name, value in MoEConfig().to_dict().items():
        sized = name.endswith("_size") or name in ("num_experts", "top_k")
        if cfg[name] != value and not sized:
            changes.append({"cfg": cfg | {name: value}})
    for name in ("num_experts", "top_k", "hidden_size", "intermediate_size"):
        changes += [{"cfg": cfg | {name: n}} for n in (cfg[name] // 2, cfg[name] - 1) if n > 0]
    for change in changes:
        recipe = json.dumps(keywords | change)
        if is_usable(recipe):
            yield layer_case(str(case.arguments["verb"]), recipe)
