"""No option silently does nothing: every pair of options is tried, in several surroundings."""

from __future__ import annotations

import dataclasses
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest

import npmoe
from npmoe import MoEConfig, RangeError
from npmoe.activations import ACTIVATIONS
from npmoe.tree import map_arrays

# Values away from the default for every field, chosen so that each can show an effect.
OTHER: dict[str, tuple[Any, ...]] = {
    "hidden_size": (5,),
    "intermediate_size": (7,),
    "num_experts": (16,),
    "top_k": (4, 1),
    "routing": ("expert_choice", "soft", "dense", "hash"),
    "score_fn": ("sigmoid", "sqrtsoftplus"),
    "router_order": ("topk_score",),
    "renormalize": (True,),
    "renorm_eps": (0.4,),
    "renorm_eps_mode": ("max",),
    "renorm_p": (2,),
    "renorm_single": (False,),
    "routed_scaling_factor": (2.5,),
    "logit_softcap": (1.5,),
    "selection_bias": (True,),
    "selection_bias_on": ("logits",),
    "num_groups": (4,),
    "topk_group": (2,),
    "group_score": ("max", "topk_div"),
    "group_fill": ("zero",),
    "second_expert_policy": ("sampling", "random"),
    "router_noise_std": (0.5,),
    "router_jitter": (0.3,),
    "router_bias": (True,),
    "router_dtype": ("float32",),
    "num_identity_experts": (4,),
    "nan_policy": ("drop", "clamp"),
    "weight_position": ("mid", "input"),
    "activation": tuple(n for n in ACTIVATIONS if n != "swiglu"),
    "activation_alpha": (0.7,),
    "activation_limit": (0.6,),
    "expert_bias": (True,),
    "expert_dropout": (0.4,),
    "output_bias": (True,),
    "shared_intermediate_size": (6,),
    "shared_gated": (True,),
    "shared_activation": ("gelu", "swiglu_clamp_pre"),
    "shared_combine": ("average",),
    "capacity_factor": ("0.7",),
    "eval_capacity_factor": ("0.4",),
    "expert_capacity": (9,),
    "capacity_scope": ("sequence",),
    "capacity_rounding": ("floor", "round", "tutel", "megatron_f64", "deepspeed_f32"),
    "capacity_count_top_k": (False,),
    "min_capacity": (4,),
    "capacity_multiple": (3,),
    "drop_policy": ("k_major", "batch_priority", "probability", "random"),
    "slot_order": ("token",),
    "renormalize_drop": ("after",),
}
BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "factor": {"capacity_factor": "1.1"},
    "factor and renormalize": {"capacity_factor": "1.1", "renormalize": True},
    "rows and renormalize with eps": {
        "expert_capacity": 6,
        "renormalize": True,
        "renorm_eps": 0.4,
    },
    "one choice, renormalized": {"top_k": 1, "renormalize": True},
    "groups and bias": {
        "num_experts": 16,
        "top_k": 4,
        "selection_bias": True,
        "num_groups": 4,
        "topk_group": 2,
    },
    "shared": {"shared_intermediate_size": 6, "activation": "swiglu_oai"},
    "expert choice": {"routing": "expert_choice", "capacity_factor": "1.1"},
    "soft": {"routing": "soft", "expert_capacity": 2},
    "dense": {"routing": "dense"},
    "hash": {"routing": "hash", "capacity_factor": "1.1"},
}
TOKENS = 20
SMALL = {"hidden_size": 4, "intermediate_size": 3}


def capacity_fields(cfg: MoEConfig, factor: Any) -> dict[str, Any]:
    """Return the fields that a capacity depends on."""
    names = ("num_experts", "top_k", "capacity_rounding", "min_capacity", "capacity_multiple")
    fields = {name: getattr(cfg, name) for name in names}
    if cfg.top_k > 1:
        fields["capacity_count_top_k"] = cfg.capacity_count_top_k
    return fields | {"capacity_factor": factor}


@cache
def capacities_of(cfg: MoEConfig) -> tuple[int | None, ...]:
    tokens = (*range(1, 200, 7), *range(40, 3201, 40))
    return tuple(npmoe.expert_capacity(t, cfg) for t in tokens)


@cache
def function_of(cfg: MoEConfig) -> tuple[Any, ...]:
    """Return what the layer computes: in training, in evaluation, with NaN, far from zero."""
    rng = np.random.default_rng(11)
    params = map_arrays(
        lambda n, leaf: (
            leaf + (0.03 if n == "selection_bias" else 0.3) * rng.standard_normal(leaf.shape)
        ),
        npmoe.init_params(cfg, rng=3, dtype="float64"),
    )
    ids = np.array([rng.permutation(cfg.router_size)[: cfg.top_k] for _ in range(2 * TOKENS)])
    results: list[Any] = []
    for used in (cfg, cfg.for_evaluation()):
        if used.capacity_factor is not None:
            # Float roundings differ from the exact ones for some factors only.
            for factor in (used.capacity_factor, "1.1", "1.2"):
                results.append(capacities_of(MoEConfig(**capacity_fields(used, factor))))
    for kind in ("plain", "broken", "far"):
        x = np.random.default_rng(5).standard_normal((2, TOKENS, cfg.hidden_size))
        far = params
        if kind == "far":
            far = map_arrays(lambda n, leaf: leaf * (1e4 if n == "router_weight" else 30.0), params)
            if params.selection_bias is not None:
                far = dataclasses.replace(far, selection_bias=params.selection_bias - 1e3)
        if kind == "broken":
            x[0, 2, 1] = np.nan
        for used in {cfg: None, cfg.for_evaluation(): None}:
            replay = ids.reshape(2, TOKENS, -1) if cfg.routing == "hash" else None
            try:
                output, saved = npmoe.moe_forward(
                    x, far, used, "reference", np.random.default_rng(7), topk_ids=replay
                )
            except RangeError as error:
                results.append(str(error))
                continue
            assert saved is not None
            routing, plan = saved.routing, saved.plan
            arrays = [output, routing.topk_ids, routing.topk_weights, routing.probs]
            arrays += [routing.router_logits, plan.row_ids]
            if plan.slot_ids is not None:
                arrays.append(plan.slot_ids)
            results += [a.tobytes() for a in arrays]
    return (*results, tuple(f for f in params.__dataclass_fields__ if getattr(params, f) is None))


def reads(cfg: MoEConfig, name: str) -> bool:
    """Return False for the one size that some kinds of routing have no use for."""
    if name != "top_k":
        return True
    counted = cfg.capacity_factor is not None and cfg.capacity_count_top_k
    return cfg.chooses_top_k or (cfg.routing == "expert_choice" and counted)


def changed(cfg: MoEConfig) -> dict[str, Any]:
    """Return the fields that are not at their default."""
    return {
        f.name: getattr(cfg, f.name)
        for f in dataclasses.fields(cfg)
        if getattr(cfg, f.name) != f.default
    }


def coincides(cfg: MoEConfig, name: str) -> bool:
    """Return whether a legal choice of groups is the same as another one.

    The K best experts lie in the K groups with the best maxima; top_k // topk_group may be 2; and
    a single choice never falls on a fill of 0 below positive scores. Published models have such
    settings, so the config takes them.
    """
    if cfg.num_groups == 1:
        return False
    if name in ("num_groups", "topk_group", "group_fill") and cfg.group_score == "max":
        return cfg.top_k <= cfg.topk_group
    if name == "group_score":
        return cfg.group_score == "topk_div" and cfg.top_k // cfg.topk_group == 2
    return name == "group_fill" and cfg.top_k == 1 and not cfg.selection_bias


def test_every_field_has_another_value() -> None:
    assert list(OTHER) == [f.name for f in dataclasses.fields(MoEConfig)]


@pytest.mark.parametrize("name", BASES)
def test_no_option_silently_does_nothing(name: str) -> None:
    base = BASES[name]
    defaults = {f.name: f.default for f in dataclasses.fields(MoEConfig)} | SMALL | base
    values = [(n, value) for n, some in OTHER.items() if n not in base for value in some]
    legal = 0
    for (first, value), (second, other) in combinations(values, 2):
        if first == second:
            continue
        fields = defaults | {first: value, second: other}
        try:
            cfg = MoEConfig(**fields)
        except RangeError as error:
            if not any(field in str(error) for field in (first, second, *base)):
                raise
            continue
        legal += 1
        for undone in (first, second):
            try:
                without = MoEConfig(**fields | {undone: defaults[undone]})
            except RangeError:
                continue  # the other option needs this one
            if not reads(cfg, undone) or coincides(cfg, undone):
                continue
            if function_of(cfg) == function_of(without):
                pytest.fail(f"{undone}={fields[undone]!r} does nothing in {changed(cfg)}")
    assert legal > 50
