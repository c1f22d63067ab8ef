"""Auxiliary losses, by every convention, computed on one small routing."""

from __future__ import annotations

from dataclasses import dataclass

from npmoe.config import MoEConfig
from npmoe.conventions.example import (
    LOGITS,
    NUM_EXPERTS,
    SELECTION_BIAS,
    TOP_K,
    FixedDraws,
)
from npmoe.dispatch import DispatchPlan, plan_dispatch
from npmoe.losses import (
    BALANCE_CONVENTIONS,
    importance_loss,
    load_balancing_loss,
    load_loss,
    z_loss,
)
from npmoe.routing import Routing, route

_SEQUENCE = 2
_NOISE_STD = 1.0 / NUM_EXPERTS


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceRow:
    """A loss with coefficient 1, and its value on the example.

    Attributes
    ----------
    name : str
        The `convention` of `load_balancing_loss`, or another loss of `npmoe.losses`.
    formula : str
        n counts, T tokens, E experts, k choices per token, P mean probability, c coefficient.
    uniform : str
        Value when routing and probabilities are uniform.
    uniform_value : float
        The same for the example's E = 8 and k = 2.
    counts, scope : str
        What n counts, and what one loss is taken over.
    value : float
    source : str
    """

    name: str
    formula: str
    uniform: str
    uniform_value: float
    counts: str
    scope: str
    value: float
    source: str


def example_routing() -> tuple[Routing, DispatchPlan]:
    """Return the example's choices, two sequences of two tokens, and a plan of one row per expert.

    The choices are biased, so that counts of what ran differ from those of a fresh top-k.
    """
    cfg = MoEConfig(
        num_experts=NUM_EXPERTS, top_k=TOP_K, selection_bias=True, capacity_factor="1/2"
    )
    routing = route(LOGITS, cfg, selection_bias=SELECTION_BIAS, sequence_length=_SEQUENCE)
    return routing, plan_dispatch(routing.topk_ids, num_experts=NUM_EXPERTS, capacity=1)


def balance_table() -> tuple[BalanceRow, ...]:
    """Return every load-balancing convention, and the other losses, with values."""
    routing, plan = example_routing()
    rows = [
        BalanceRow(
            name=name,
            formula=entry.formula,
            uniform=entry.uniform,
            uniform_value=entry.uniform_value(num_experts=NUM_EXPERTS, top_k=TOP_K),
            counts="-" if entry.counts is None else entry.counts,
            scope=entry.scope,
            value=load_balancing_loss(routing, plan=plan, convention=name)[0],
            source=entry.source,
        )
        for name, entry in BALANCE_CONVENTIONS.items()
    ]
    return (*rows, *_other_losses(routing))


def _other_losses(routing: Routing) -> list[BalanceRow]:
    """Return the losses that count no choices."""
    noisy_cfg = MoEConfig(num_experts=NUM_EXPERTS, top_k=TOP_K, router_noise_std=_NOISE_STD)
    noisy = route(LOGITS, noisy_cfg, rng=FixedDraws())
    variation = "c Var(I)/mean(I)^2, I_e = sum_t p_te"
    values = [
        (
            *("importance", variation, "Shazeer et al. 2017, eq. 6-7; google-research/vmoe"),
            importance_loss(routing)[0],
        ),
        (
            *("importance, bessel", f"{variation}, Var over E-1", "microsoft/tutel"),
            importance_loss(routing, variance="bessel")[0],
        ),
        (
            "load",
            "c Var(L)/mean(L)^2, L_e = chance that fresh noise chooses e",
            "google-research/vmoe: _load_auxiliary_loss, noise 1/E",
            load_loss(noisy, noise_std=_NOISE_STD)[0],
        ),
        ("z", "c mean_t logsumexp(x_t)^2", "Zoph et al. 2022, ST-MoE, eq. 5", z_loss(routing)[0]),
    ]
    uniform = {"z": ("(ln E)^2", z_loss(_uniform())[0])}
    return [
        BalanceRow(
            name=name,
            formula=formula,
            uniform=uniform.get(name, ("0", 0.0))[0],
            uniform_value=uniform.get(name, ("0", 0.0))[1],
            counts="-",
            scope="batch",
            value=value,
            source=source,
        )
        for name, formula, source, value in values
    ]


def _uniform() -> Routing:
    """Return a routing of equal logits, 0."""
    return route(LOGITS * 0.0, MoEConfig(num_experts=NUM_EXPERTS, top_k=TOP_K))
