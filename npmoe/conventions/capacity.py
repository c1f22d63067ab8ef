"""Rows per expert: what the systems make of the same capacity factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from npmoe.capacity import expert_capacity
from npmoe.config import MoEConfig
from npmoe.losses.conventions import check_choice

# T, E, K and the factor: where float64 goes wrong, where float32 does, where ceil, floor and Tutel
# differ, and where a lower bound is at work.
CAPACITY_EXAMPLES = (
    (400, 8, 1, "1.1"),
    (90, 8, 4, "1.2"),
    (1000, 60, 4, "1.1"),
    (16, 8, 1, "1.1"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityConvention:
    """One meaning of "capacity factor".

    Attributes
    ----------
    formula : str
        cf is the factor.
    source : str
    fields : mapping
        The MoEConfig fields that give it, besides sizes and factor.
    note : str
    """

    formula: str
    source: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


CAPACITY_CONVENTIONS: Mapping[str, CapacityConvention] = MappingProxyType(
    {
        "switch": CapacityConvention(
            formula="ceil(T k cf / E), exact",
            source="Fedus et al. 2021, eq. 3",
        ),
        "megatron": CapacityConvention(
            formula="ceil((T k / E) cf) in float64",
            source="NVIDIA/Megatron-LM: moe_utils.get_capacity",
            fields={"capacity_rounding": "megatron_f64"},
            note="Nothing is dropped above T.",
        ),
        "deepspeed": CapacityConvention(
            formula="max(8, ceil((T / E) (cf k))) in float32",
            source="deepspeedai/DeepSpeed: sharded_moe._capacity, TopKGate",
            fields={"capacity_rounding": "deepspeed_f32", "min_capacity": 8},
        ),
        "megablocks": CapacityConvention(
            formula="floor(cf k T / E)",
            source="databricks/megablocks: ParallelMLP.expert_capacity",
            fields={"capacity_rounding": "floor"},
            note="Exact here; int() of a float64 product there: 21, not 22, for T=275, E=60, k=4, "
            "cf=1.2. There 0 means dropless.",
        ),
        "tutel": CapacityConvention(
            formula="k floor(cf ceil(T / E))",
            source="microsoft/tutel: fast_dispatch.extract_critical",
            fields={"capacity_rounding": "tutel"},
            note="Exact here; int() of a float64 product there. May be aligned upwards.",
        ),
        "v_moe": CapacityConvention(
            formula="ceil(T k cf / E), up to a multiple of 4",
            source="google-research/vmoe: moe.compute_capacity, k inside the factor",
            fields={"capacity_multiple": 4},
            note="Must be at least 1.",
        ),
        "v_moe_round": CapacityConvention(
            formula="round(T k cf / E), up to a multiple of 4",
            source="google-research/vmoe: moe.compute_capacity with 'round'",
            fields={"capacity_rounding": "round", "capacity_multiple": 4},
            note="Halves to even.",
        ),
        "gshard": CapacityConvention(
            formula="2 ceil(T / E), without factor",
            source="facebookresearch/fairseq: top2gating, training",
            fields={"top_k": 2, "capacity_factor": "1", "capacity_rounding": "tutel"},
        ),
        "fairseq_eval": CapacityConvention(
            formula="ceil(T / 4), without factor",
            source="facebookresearch/fairseq: top2gating, evaluation",
            fields={"top_k": 2},
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityRow:
    """A convention and its rows per expert for each of `CAPACITY_EXAMPLES`."""

    name: str
    convention: CapacityConvention
    rows_per_expert: tuple[int, ...]


def capacity_convention(
    name: str, num_experts: int, top_k: int, capacity_factor: str | float | Fraction
) -> MoEConfig:
    """Return a config whose `npmoe.expert_capacity` is that of a named system.

    Parameters
    ----------
    name : str
        A key of `CAPACITY_CONVENTIONS`.
    num_experts, top_k : int
        E and K; "gshard" and "fairseq_eval" always have K = 2.
    capacity_factor : str, float or Fraction
        As in MoEConfig, per choice; "gshard" and "fairseq_eval" have none and do not read it.

    Returns
    -------
    MoEConfig

    Raises
    ------
    RangeError
        For an unknown name or sizes that cannot be.

    Examples
    --------
    >>> from npmoe import expert_capacity
    >>> expert_capacity(400, capacity_convention("megatron", 8, 1, "1.1"))
    56
    """
    check_choice("capacity_convention", "name", name, tuple(CAPACITY_CONVENTIONS))
    fields: dict[str, Any] = {"top_k": top_k, "capacity_factor": capacity_factor}
    fields |= CAPACITY_CONVENTIONS[name].fields
    if name == "fairseq_eval":
        fields["capacity_factor"] = Fraction(num_experts, 4 * fields["top_k"])
    return MoEConfig(**{"num_experts": num_experts} | fields)


def capacity_table() -> tuple[CapacityRow, ...]:
    """Return every capacity convention with its rows per expert on the examples."""
    return tuple(
        CapacityRow(
            name=name,
            convention=entry,
            rows_per_expert=tuple(
                expert_capacity(T, capacity_convention(name, E, K, factor)) or 0
                for T, E, K, factor in CAPACITY_EXAMPLES
            ),
        )
        for name, entry in CAPACITY_CONVENTIONS.items()
    )
