"""Hypothesis strategies that draw structure and a seed; values come from the seed.

The defaults draw everything that is legal: no tokens at all, more experts than tokens, K = E,
empty experts, ties, everything on one expert, masks over NaN, strided and read-only arrays.
Needs the package hypothesis; `npmoe.testing.problems` does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.testing.problems import MoEProblem, Values, is_exact, make_problem

__all__ = ["MoEProblem", "make_problem", "moe_configs", "moe_problems", "topk_ids_arrays"]

_NEEDS_FACTOR = (
    "capacity_factor",
    "eval_capacity_factor",
    "capacity_rounding",
    "capacity_count_top_k",
    "min_capacity",
    "capacity_multiple",
)
_FACTORS = ("1/4", "1/2", "0.75", "1", "1.25", "1.1", "2", "100")


@st.composite
def moe_configs(draw: st.DrawFn, /, **fixed: Any) -> MoEConfig:
    """Draw a legal MoEConfig; keywords fix fields.

    Fields that would contradict a fixed one keep their default, unless they are fixed too.
    """
    fields = dict(fixed)

    def pick(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        if name not in fields:
            fields[name] = draw(strategy, label=name)
        return fields[name]

    pick("hidden_size", st.sampled_from([1, 2, 3, 5, 8]))
    pick("intermediate_size", st.sampled_from([1, 2, 4, 7, 8]))
    least = fields.get("top_k", 1)
    num_experts = pick(
        "num_experts", st.sampled_from([e for e in (1, 2, 3, 4, 8, 11) if e >= least])
    )
    pick("top_k", st.integers(1, min(num_experts, 4)) | st.just(num_experts))
    if fields.get("renormalize") or fields.get("renormalize_drop") == "after":
        fields.setdefault("router_order", "score_topk")
    if fields.get("renormalize_drop") == "after":
        fields.setdefault("renormalize", True)
    if fields["top_k"] == 1 and fields.get("drop_policy") == "probability":
        # One weight, normalised before the drop, is 1: there would be nothing to rank by.
        fields.setdefault("router_order", "score_topk")
        if fields.get("renormalize_drop") != "after":
            fields.setdefault("renormalize", False)
    pick("router_order", st.sampled_from(["score_topk", "topk_score"]))
    pick("renormalize", st.booleans() if fields["router_order"] == "score_topk" else st.just(False))
    pick("routed_scaling_factor", st.sampled_from([1.0, 0.5, 2.5]))
    pick("router_noise_std", st.sampled_from([0.0, 0.5]))
    pick("router_bias", st.booleans())
    pick("nan_policy", st.sampled_from(["raise", "clamp", "drop"]))
    pick("activation", st.sampled_from(["swiglu", "gelu", "relu"]))
    pick("expert_bias", st.booleans())
    kind = _capacity_kind(draw, fields)
    if kind == "factor":
        pick("capacity_factor", st.sampled_from(_FACTORS))
        pick("eval_capacity_factor", st.none() | st.sampled_from(_FACTORS))
        pick("capacity_rounding", st.sampled_from(["ceil", "floor", "round"]))
        pick("capacity_count_top_k", st.booleans() if fields["top_k"] > 1 else st.just(True))
        pick("min_capacity", st.sampled_from([0, 0, 1, 3]))
        pick("capacity_multiple", st.sampled_from([1, 1, 2, 4]))
    elif kind == "rows":
        pick("expert_capacity", st.integers(0, 6))
    if kind != "dropless":
        after = ["before", "after"] if fields["renormalize"] else ["before"]
        pick("renormalize_drop", st.sampled_from(after))
        normalised = fields["router_order"] == "topk_score" or (
            fields["renormalize"] and fields["renormalize_drop"] == "before"
        )
        ranked = not normalised or fields["top_k"] > 1
        pick("drop_policy", st.sampled_from(["position", "probability"][: 1 + ranked]))
    return MoEConfig(**fields)


def _capacity_kind(draw: st.DrawFn, fields: dict[str, Any]) -> str:
    """Return "dropless", "factor" or "rows", whichever the fixed fields leave open."""
    if any(fields.get(name) is not None for name in _NEEDS_FACTOR):
        return "factor"
    if fields.get("expert_capacity") is not None:
        return "rows"
    needs = "drop_policy" in fields or "renormalize_drop" in fields
    kinds = ["dropless", "factor", "rows"]
    closed = {
        "dropless": needs,
        "factor": "capacity_factor" in fields,
        "rows": "expert_capacity" in fields,
    }
    return draw(st.sampled_from([k for k in kinds if not closed[k]] or ["dropless"]))


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
        num_tokens = draw(st.sampled_from([0, 1, 2]) | st.integers(0, max_tokens))
    allowed = [v for v in values if v != "exact" or is_exact(cfg, num_tokens)]
    if "exact" in allowed and cfg.activation == "relu" and len(allowed) > 1:
        allowed = ["exact", *allowed]
    arguments: dict[str, Any] = {
        "seed": st.integers(0, 2**32 - 1),
        "dtype": st.sampled_from(list(dtypes)),
        "values": st.sampled_from(allowed),
        "load": st.sampled_from(["spread", "spread", "one_expert", "tied"]),
        "replay": st.sampled_from(["none", "none", "full", "holes", "same"]),
        "mask": st.sampled_from(["none", "none", "some", "some", "all_valid", "nothing_valid"]),
        "layout": st.sampled_from(["contiguous", "read_only", "strided", "reversed", "fortran"]),
        "auxiliary": st.booleans(),
    }
    drawn = {n: draw(s, label=n) for n, s in arguments.items() if n not in fixed} | fixed
    if drawn["values"] == "integer" and "logit_exponent" not in drawn:
        # With 10, logits that differ at all differ by so much that probabilities underflow.
        drawn["logit_exponent"] = draw(st.sampled_from([0, 0, 10]), label="logit_exponent")
    if drawn["values"] == "normal":
        for name, least, most in (
            ("hidden_exponent", -20, 20),
            ("logit_exponent", -6, 3),
            ("gate_up_exponent", -6, 4),
            ("grad_exponent", -20, 20),
        ):
            if name not in drawn:
                drawn[name] = draw(st.just(0) | st.integers(least, most), label=name)
    return make_problem(cfg, num_tokens=num_tokens, **drawn)


def _configs_for(kind: Values) -> st.SearchStrategy[MoEConfig]:
    if kind != "exact":
        return moe_configs()
    return st.sampled_from([1, 2, 4, 8]).flatmap(
        lambda e: st.integers(1, min(e, 2)).flatmap(
            lambda k: st.sampled_from([0.5, 1.0]).flatmap(
                lambda s: moe_configs(
                    num_experts=e, top_k=k, activation="relu", routed_scaling_factor=s
                )
            )
        )
    )


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
