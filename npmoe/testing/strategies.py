"""Hypothesis strategies that draw structure and a seed; values come from the seed.

The defaults draw everything that is legal: no tokens at all, more experts than tokens, K = E,
empty experts, ties, everything on one expert, masks over NaN, strided and read-only arrays.
Needs the package hypothesis; `npmoe.testing.problems` does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from npmoe._config_rules import LITERALS, default_of
from npmoe._typing import HostArray
from npmoe.activations import ACTIVATIONS
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.testing.draws import needs_generator
from npmoe.testing.exactness import EXACT_FIELDS, INTEGER_ACTIVATIONS, is_exact
from npmoe.testing.problems import MoEProblem, Values, make_problem

__all__ = ["MoEProblem", "make_problem", "moe_configs", "moe_problems", "topk_ids_arrays"]

_FACTORS = ("1/4", "1/2", "0.75", "1", "1.25", "1.1", "2", "100")

# What to draw from, enabling fields first; a value that the config refuses is not taken.
_CANDIDATES: dict[str, tuple[Any, ...]] = {
    "routing": (*["token_choice"] * 5, "expert_choice", "soft", "dense"),
    "expert_capacity": (None, None, 0, 1, 2, 3, 6),
    "capacity_factor": (None, *_FACTORS),
    "num_identity_experts": (0, 0, 1, 3),
    "score_fn": ("softmax", "softmax", "sigmoid", "sqrtsoftplus"),
    "router_order": ("score_topk", "topk_score"),
    "renormalize": (False, True),
    "renorm_single": (True, False),
    "renorm_eps": (0.0, 0.0, 1e-20, 0.25),
    "renorm_eps_mode": ("add", "max"),
    "renorm_p": (1, 1, 2),
    "routed_scaling_factor": (1.0, 0.5, 2.5),
    "logit_softcap": (None, None, 0.5, 2.0),
    "selection_bias": (False, True),
    "selection_bias_on": ("scores", "logits"),
    "num_groups": (1, 1, 2, 4),
    "topk_group": (1, 2, 3),
    "group_score": ("max", "top2_sum", "topk_div"),
    "group_fill": ("-inf", "zero"),
    "second_expert_policy": ("all", "all", "sampling", "random"),
    "router_noise_std": (0.0, 0.5),
    "router_jitter": (0.0, 0.25),
    "router_bias": (False, True),
    "router_dtype": (None, None, None, "float32", "float64"),
    "nan_policy": ("raise", "clamp", "drop"),
    "weight_position": ("output", "output", "mid", "input"),
    "activation": tuple(ACTIVATIONS),
    "shared_intermediate_size": (0, 0, 1, 3, 8),
    "shared_gated": (False, True),
    "shared_activation": (None, None, *ACTIVATIONS),
    "shared_combine": ("sum", "average"),
    "activation_alpha": (None, 0.5, 1.0),
    "activation_limit": (None, 0.5, 2.0),
    "expert_bias": (False, True),
    "expert_dropout": (0.0, 0.0, 0.5),
    "output_bias": (False, False, True),
    "capacity_scope": ("batch", "sequence"),
    "eval_capacity_factor": (None, *_FACTORS),
    "capacity_rounding": LITERALS["capacity_rounding"],
    "capacity_count_top_k": (True, False),
    "min_capacity": (0, 0, 1, 3),
    "capacity_multiple": (1, 1, 2, 4),
    "renormalize_drop": ("before", "after"),
    "drop_policy": LITERALS["drop_policy"],
    "slot_order": ("priority", "token"),
}
# What a fixed field needs beside it to mean anything.
_CAPACITY = {"capacity_factor": "0.75"}
_NEEDS: dict[str, dict[str, Any]] = {
    "renormalize_drop": {"renormalize": True, "router_order": "score_topk"},
    "renormalize": {"router_order": "score_topk"},
    "renorm_eps": {"renormalize": True, "router_order": "score_topk"},
    "renorm_p": {"renormalize": True, "router_order": "score_topk", "top_k": 2, "num_experts": 4},
    "second_expert_policy": {"top_k": 2, "num_experts": 4},
    "group_fill": {"num_groups": 2, "num_experts": 4, "top_k": 2},
    "group_score": {"num_groups": 2, "num_experts": 4, "top_k": 2},
    "selection_bias_on": {"selection_bias": True},
    "shared_gated": {"shared_intermediate_size": 3},
    "shared_combine": {"shared_intermediate_size": 3},
}
_NEED_CAPACITY = ("drop_policy", "renormalize_drop", "capacity_scope", "slot_order")


@st.composite
def moe_configs(draw: st.DrawFn, /, **fixed: Any) -> MoEConfig:
    """Draw a legal MoEConfig; keywords fix fields.

    Every other field is drawn in turn and keeps its default where the config would refuse the
    value, so that the rules live in the config alone. Routing "hash" needs ids from outside and
    is not drawn.
    """
    return _draw_config(draw, _CANDIDATES, fixed)


def _draw_config(
    draw: st.DrawFn, candidates: dict[str, tuple[Any, ...]], fixed: dict[str, Any]
) -> MoEConfig:
    fields = dict(fixed)
    for name, value in fixed.items():
        if name in _CANDIDATES and value != default_of(name):
            for needed, needed_value in _NEEDS.get(name, {}).items():
                fields.setdefault(needed, needed_value)
    free = draw(st.sampled_from([False, True])) or fields.get("expert_capacity") is not None
    if not free and any(fixed.get(n, default_of(n)) != default_of(n) for n in _NEED_CAPACITY):
        fields.setdefault("capacity_factor", draw(st.sampled_from(_FACTORS)))
    elif any(fixed.get(n, default_of(n)) != default_of(n) for n in _NEED_CAPACITY):
        fields.setdefault("expert_capacity", draw(st.integers(0, 6)))
    if "num_experts" not in fields:
        least = fields.get("top_k", 1)
        fields["num_experts"] = draw(
            st.sampled_from([e for e in (1, 2, 3, 4, 8, 11, 12) if e >= least]), label="num_experts"
        )
    if "top_k" not in fields:
        most = fields["num_experts"]
        fields["top_k"] = draw(st.integers(1, min(most, 4)) | st.just(most), label="top_k")
    fields.setdefault("hidden_size", draw(st.sampled_from([1, 2, 3, 5, 8])))
    fields.setdefault("intermediate_size", draw(st.sampled_from([1, 2, 4, 7, 8])))
    if fields.get("routing") in ("soft", "expert_choice") and "capacity_factor" not in fields:
        fields.setdefault("expert_capacity", draw(st.integers(1, 3)))
    for name, values in candidates.items():
        if name in fields:
            continue
        value = draw(st.sampled_from(values), label=name)
        if value == default_of(name):
            continue
        trial = fields | {name: value}
        if value in ("soft", "expert_choice") and not {"expert_capacity", "capacity_factor"} & set(
            fields
        ):
            trial = trial | {"expert_capacity": draw(st.integers(1, 3))}
        with contextlib.suppress(RangeError):
            MoEConfig(**trial)
            fields = trial
    return MoEConfig(**fields)


@st.composite
def moe_problems(
    draw: st.DrawFn,
    /,
    configs: st.SearchStrategy[MoEConfig] | None = None,
    *,
    dtypes: Sequence[str] = ("float32", "float64"),
    values: Sequence[Values] = ("normal", "integer", "exact"),
    max_tokens: int = 12,
    **fixed: Any,
) -> MoEProblem:
    """Draw the arguments of `make_problem`; keywords fix arguments.

    Parameters
    ----------
    configs : strategy of MoEConfig, optional
        `moe_configs()` if omitted. "exact" values are drawn only for configs that allow them.
    dtypes, values : sequence
        What to draw from.
    max_tokens : int
        Largest T.
    **fixed
        Arguments of `make_problem`.

    Returns
    -------
    strategy of MoEProblem
        Its repr is a line that makes the problem again.
    """
    if configs is None:
        configs = _configs_for(draw(st.sampled_from(list(values)), label="kind of config"))
    cfg = draw(configs)
    num_tokens = fixed.pop("num_tokens", None)
    if num_tokens is None:
        num_tokens = draw(st.sampled_from([0, 1, 2]) | st.integers(3, max_tokens))
    allowed = [v for v in values if v != "exact" or is_exact(cfg, num_tokens)]
    if "exact" in allowed and len(allowed) > 1:
        allowed = ["exact", *allowed]
    replays = ["none"] * 4 + ["full", "holes", "same", "wide"]
    if cfg.routing in ("dense", "soft"):
        replays = ["none"]
    elif cfg.routing == "hash":
        replays = replays[4:]
    lengths = [n for n in (1, 2, 3, 4) if num_tokens % n == 0]
    arguments: dict[str, Any] = {
        "seed": st.integers(0, 2**32 - 1),
        "dtype": st.sampled_from(list(dtypes)),
        "values": st.sampled_from(allowed),
        "load": st.sampled_from(["spread", "spread", "one_expert", "tied"]),
        "replay": st.sampled_from(replays),
        "mask": st.sampled_from(["none", "none", "some", "some", "all_valid", "nothing_valid"]),
        "layout": st.sampled_from(["contiguous", "read_only", "strided", "reversed", "fortran"]),
        "auxiliary": st.booleans(),
        "num_sequences": st.sampled_from(lengths),
        "generator": st.just(True)
        if needs_generator(cfg)
        else st.sampled_from([True, True, False]),
    }
    drawn = {n: draw(s, label=n) for n, s in arguments.items() if n not in fixed} | fixed
    if drawn["values"] == "integer" and "logit_exponent" not in drawn:
        # With 10, logits that differ at all differ by so much that a softmax underflows.
        sizes = [0, 0, 10] if cfg.score_fn == "softmax" and not cfg.renormalize else [0]
        drawn["logit_exponent"] = draw(st.sampled_from(sizes), label="logit_exponent")
    if drawn["values"] == "normal":
        for name, least, most in (
            ("hidden_exponent", -20, 20),
            # Chosen weights that all underflow leave nothing to divide by.
            ("logit_exponent", -6, 2 if cfg.renormalize else 3),
            ("gate_up_exponent", -6, 4),
            ("grad_exponent", -20, 20),
        ):
            if name not in drawn:
                drawn[name] = draw(st.just(0) | st.integers(least, most), label=name)
    return make_problem(cfg, num_tokens=num_tokens, **drawn)


@st.composite
def _configs_for(draw: st.DrawFn, kind: Values) -> MoEConfig:
    """Draw a config; for exact values one of those that allow them, if its size does."""
    if kind != "exact":
        return draw(moe_configs())
    experts = draw(st.sampled_from([1, 2, 4, 8]), label="num_experts")
    fixed = {"num_experts": experts, "top_k": draw(st.integers(1, min(experts, 2)))}
    candidates = {n: v for n, v in _CANDIDATES.items() if n not in EXACT_FIELDS} | {
        "routing": ("token_choice", "token_choice", "token_choice", "dense", "expert_choice"),
        "num_identity_experts": (0, 0, experts if experts < 8 else 0),
        "activation": INTEGER_ACTIVATIONS,
        "shared_activation": (None, *INTEGER_ACTIVATIONS),
        "routed_scaling_factor": (1.0, 0.5),
    }
    cfg = _draw_config(draw, candidates, fixed)
    assume(is_exact(cfg, 0))
    return cfg


@st.composite
def topk_ids_arrays(
    draw: st.DrawFn,
    /,
    *,
    num_tokens: int | None = None,
    top_k: int | None = None,
    num_experts: int | None = None,
    holes: bool = True,
) -> HostArray:
    """Draw choices (T, K) int32, distinct within a token; with `holes` some are -1."""
    experts = draw(st.integers(1, 9)) if num_experts is None else num_experts
    slots = draw(st.integers(1, experts)) if top_k is None else top_k
    tokens = draw(st.integers(0, 9)) if num_tokens is None else num_tokens
    rows = []
    for _ in range(tokens):
        row = draw(st.permutations(range(experts)))[:slots]
        if holes:
            row = [e if draw(st.integers(0, 3)) else -1 for e in row]
        rows.append(row)
    return np.array(rows, dtype=np.int32).reshape(tokens, slots)
