"""The load-balancing losses in circulation, as one table, and how their coefficients compare."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from npmoe._checks import require
from npmoe.errors import RangeError

BalanceName: TypeAlias = Literal[
    "switch",
    "gshard",
    "hf",
    "flaxformer",
    "megatron",
    "megablocks",
    "deepspeed_topk",
    "deepseek_v3",
    "sonic",
    "unscaled",
    "prob_entropy",
]
CountSource: TypeAlias = Literal["executed", "pre_drop", "post_drop", "unbiased_topk", "top1"]
Scope: TypeAlias = Literal["batch", "sequence", "global"]
Variance: TypeAlias = Literal["population", "bessel"]

COUNT_SOURCES: tuple[CountSource, ...] = get_args(CountSource)
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceConvention:
    """One definition of the load-balancing loss, as `load_balancing_loss` reads it.

    Attributes
    ----------
    formula : str
        n counts, T tokens, E experts, k choices per token, P mean probability, c coefficient.
    uniform : str
        Value at c = 1 when routing and probabilities are uniform.
    counts : str or None
        Where n comes from by default; None where there are no counts.
    scope : str
        What one loss is taken over by default.
    counts_over : {"choices", "tokens", "counted"} or None
        What n is divided by: T*k, T, or the sum of n. None is the entropy of P.
    times_experts : bool
        Whether E is a factor.
    softmax_probs : bool
        P from the softmax of the logits, whatever the router's score function is.
    layers : {"sum", "mean", "joined"}
        What the source does with several layers: adds their losses, averages them, or joins
        their tokens into one loss.
    source : str
        Repository and function, or paper.
    """

    formula: str
    uniform: Literal["1", "k", "1/E", "-E ln E"]
    counts: CountSource | None
    scope: Scope = "batch"
    counts_over: Literal["choices", "tokens", "counted"] | None = "choices"
    times_experts: bool = True
    softmax_probs: bool = False
    layers: Literal["sum", "mean", "joined"] = "sum"
    source: str

    def uniform_value(self, *, num_experts: int, top_k: int) -> float:
        """Return `uniform` as a number."""
        if self.uniform == "k":
            return float(top_k)
        if self.uniform == "1/E":
            return 1.0 / num_experts
        return 1.0 if self.uniform == "1" else -num_experts * math.log(num_experts)


BALANCE_CONVENTIONS: Mapping[BalanceName, BalanceConvention] = MappingProxyType(
    {
        "switch": BalanceConvention(
            formula="c E sum_e n_e/(T k) P_e",
            uniform="1",
            counts="pre_drop",
            source="Fedus et al. 2021, eq. 4-6, with every choice counted and divided by k",
        ),
        "gshard": BalanceConvention(
            formula="c E sum_e n_e/T P_e, first choices only",
            uniform="1",
            counts="top1",
            source="deepspeedai/DeepSpeed: top1gating, top2gating; microsoft/tutel: gshard_loss",
        ),
        "hf": BalanceConvention(
            formula="c E sum_e n_e/T P_e, P of softmax(logits)",
            uniform="k",
            counts="unbiased_topk",
            counts_over="tokens",
            softmax_probs=True,
            layers="joined",
            source="huggingface/transformers: mixtral load_balancing_loss_func",
        ),
        "flaxformer": BalanceConvention(
            formula="c E^2 mean_e(n_e/T P_e)",
            uniform="k",
            counts="pre_drop",
            counts_over="tokens",
            source="google/flaxformer: moe/routing.py _load_balancing_loss, a group = the scope",
        ),
        "megatron": BalanceConvention(
            formula="c E/(k T^2) sum_e n_e sum_t p_te",
            uniform="1",
            counts="unbiased_topk",
            source="NVIDIA/Megatron-LM: switch_load_balancing_loss_func, "
            "compute_routing_scores_for_aux_loss",
        ),
        "megablocks": BalanceConvention(
            formula="c E/(L T k) sum_e n_e P_e, here with L = 1",
            uniform="1",
            counts="pre_drop",
            layers="mean",
            source="databricks/megablocks: batched_load_balancing_loss",
        ),
        "deepspeed_topk": BalanceConvention(
            formula="c E^2/k mean_e(n_e/T P_e)",
            uniform="1",
            counts="pre_drop",
            source="deepspeedai/DeepSpeed: topkgating",
        ),
        "deepseek_v3": BalanceConvention(
            formula="c sum_e f_e P_e, f_e = E/(k T) n_e",
            uniform="1",
            counts="unbiased_topk",
            scope="sequence",
            source="DeepSeek-AI 2024, DeepSeek-V3 Technical Report, eq. 17-20",
        ),
        "sonic": BalanceConvention(
            formula="c E sum_e n_e/sum(n) P_e/sum(P)",
            uniform="1",
            counts="executed",
            counts_over="counted",
            source="Dao-AILab/sonic-moe: MoE._compute_switch_loss",
        ),
        "unscaled": BalanceConvention(
            formula="c sum_e n_e/(T k) P_e",
            uniform="1/E",
            counts="pre_drop",
            times_experts=False,
            source="Fedus et al. 2021, eq. 4, without the factor E",
        ),
        "prob_entropy": BalanceConvention(
            formula="c E sum_e P_e ln P_e",
            uniform="-E ln E",
            counts=None,
            counts_over=None,
            source="the differentiable twin of npmoe.stats.count_entropy",
        ),
    }
)


def check_choice(function: str, name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise RangeError unless `value` is one of the `known` names."""
    names = ", ".join(repr(k) for k in known)
    require(value in known, f"{function}: {name} must be one of {names}, got {value!r}.")


def check_coefficient(function: str, coefficient: float) -> None:
    """Raise RangeError unless the coefficient is finite."""
    require(
        math.isfinite(coefficient),
        f"{function}: coefficient must be finite, got {coefficient}.",
    )


def convert_coeff(
    coefficient: float,
    source: BalanceName,
    target: BalanceName,
    *,
    num_experts: int,
    top_k: int,
    num_layers: int = 1,
) -> float:
    """Return the coefficient that gives `target` the value that `source` has.

    ``coefficient * u_source / u_target`` with u the value of the whole model under uniform
    routing and probabilities: `BalanceConvention.uniform`, times `num_layers` where the source
    adds the losses of its layers.

    Parameters
    ----------
    coefficient : float
        As upstream takes it. `load_balancing_loss` sees one layer at a time: where "megablocks"
        divides by its layers, convert to a convention that adds them, such as "deepspeed_topk".
    source, target : str
        Names in `BALANCE_CONVENTIONS`.
    num_experts, top_k, num_layers : int
        E, K, and the number of layers with experts.

    Returns
    -------
    float

    Raises
    ------
    RangeError
        For unknown names, sizes that cannot be, and where the two are not proportional.

    Warns
    -----
    UserWarning
        If default counts or scope differ, or "hf" joins several layers: then the values agree
        under uniform routing, and elsewhere only nearly.

    Notes
    -----
    "hf" uses the softmax of the logits: with another score function its P differs too.

    Examples
    --------
    >>> convert_coeff(0.5, "deepspeed_topk", "flaxformer", num_experts=8, top_k=2)
    0.25
    """
    function = "convert_coeff"
    known = tuple(BALANCE_CONVENTIONS)
    check_choice(function, "source", source, known)
    check_choice(function, "target", target, known)
    check_coefficient(function, coefficient)
    require(num_experts >= 1, f"{function}: num_experts must be at least 1, got {num_experts}.")
    require(
        1 <= top_k <= num_experts,
        f"{function}: top_k must lie in 1..{num_experts}, got {top_k}. E is bound by num_experts.",
    )
    require(num_layers >= 1, f"{function}: num_layers must be at least 1, got {num_layers}.")
    if source == target:
        return coefficient
    old, new = BALANCE_CONVENTIONS[source], BALANCE_CONVENTIONS[target]
    if old.counts is None or new.counts is None:
        raise RangeError(
            f"{function}: target must be proportional to source, got {target!r} for {source!r}. "
            "'prob_entropy' is no multiple of counts times probabilities. "
            "Tune its coefficient anew."
        )
    differences = []
    # With one choice per token, "top1" and "pre_drop" are the same counts.
    one = {"top1": "pre_drop"} if top_k == 1 else {}
    counts = [one.get(str(entry.counts), str(entry.counts)) for entry in (old, new)]
    if counts[0] != counts[1]:
        differences.append(f"counts ({counts[0]!r} and {counts[1]!r})")
    if old.scope != new.scope:
        differences.append(f"scope ({old.scope!r} and {new.scope!r})")
    if num_layers > 1 and (old.layers == "joined") != (new.layers == "joined"):
        differences.append(f"layers ({old.layers!r} and {new.layers!r})")
    if differences:
        warnings.warn(
            f"convert_coeff: {source!r} and {target!r} differ in {', '.join(differences)}; "
            "the coefficient is exact for uniform routing only.",
            stacklevel=2,
        )
    totals = [
        entry.uniform_value(num_experts=num_experts, top_k=top_k)
        * (num_layers if entry.layers == "sum" else 1)
        for entry in (old, new)
    ]
    return coefficient * totals[0] / totals[1]
