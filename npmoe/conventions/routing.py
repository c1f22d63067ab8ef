"""From logits to experts and weights: the conventions in use, computed side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from npmoe._checks import require
from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.conventions.example import (
    LOGITS,
    NUM_EXPERTS,
    SELECTION_BIAS,
    TABLE,
    TOP_K,
    FixedDraws,
)
from npmoe.losses.conventions import check_choice
from npmoe.routing import quantile_balance, route, sinkhorn, stable_topk
from npmoe.routing.soft import soft_route


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConvention:
    """One way from logits x to experts and weights.

    Attributes
    ----------
    key : str
        By what experts are chosen; p = softmax(x), b = selection bias.
    weight : str
        The combine weight before normalisation, w_i of the chosen i.
    renormalized : str
        By what the weights are divided.
    scale : str
        What multiplies them last.
    used_by : str
    fields : mapping
        The MoEConfig fields that give it.
    single : mapping
        Fields that are different with top_k=1.
    sizes : mapping
        Further fields in the computed example: groups and scales, which belong to a model.
    note : str
    """

    key: str
    weight: str
    used_by: str
    renormalized: str = "no"
    scale: str = "-"
    fields: Mapping[str, Any] = field(default_factory=dict)
    single: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


_EPS = {"renormalize": True, "renorm_eps": 1e-20}
ROUTING_CONVENTIONS: Mapping[str, RoutingConvention] = MappingProxyType(
    {
        "softmax_topk": RoutingConvention(
            key="p",
            weight="p_i",
            scale="in DeepSeek-V2",
            used_by="Switch, OLMoE, Qwen2-MoE, V-MoE, Megatron pre-softmax, DeepSeek-V2",
        ),
        "softmax_topk_renorm": RoutingConvention(
            key="p",
            weight="p_i",
            renormalized="sum w",
            used_by="Mixtral, Qwen3-MoE",
            fields={"renormalize": True},
            note="Without eps in transformers and vLLM; max(sum, eps) in llama.cpp, Tutel and "
            "DeepSpeed.",
        ),
        "topk_softmax": RoutingConvention(
            key="x",
            weight="exp(x_i)",
            renormalized="sum w",
            used_by="gpt-oss, Granite, Megatron default, SonicMoE",
            fields={"router_order": "topk_score"},
            note="softmax_topk_renorm in exact arithmetic.",
        ),
        "sigmoid_bias_renorm": RoutingConvention(
            key="sigmoid(x) + b, in groups",
            weight="sigmoid(x_i)",
            renormalized="sum w + 1e-20",
            scale="s",
            used_by="DeepSeek-V3, GLM-4.5, Kimi-K2",
            fields={"score_fn": "sigmoid", "selection_bias": True, **_EPS},
            sizes={"num_groups": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
            note="vLLM has no eps.",
        ),
        "sigmoid_topk": RoutingConvention(
            key="sigmoid(x)",
            weight="sigmoid(x_i)",
            renormalized="sum w + 1e-20",
            scale="optional",
            used_by="Megatron; as an option torchtitan",
            fields={"score_fn": "sigmoid", **_EPS},
            single={"renormalize": False, "renorm_eps": 0.0},
            note="Megatron leaves a single weight as it is. MiniMax-M2 adds a bias to the key.",
        ),
        "sqrtsoftplus_bias": RoutingConvention(
            key="sqrt(softplus(x)) + b",
            weight="sqrt(softplus(x_i))",
            renormalized="sum w + 1e-20",
            scale="s",
            used_by="DeepSeek-V4",
            fields={"score_fn": "sqrtsoftplus", "selection_bias": True, **_EPS},
            sizes={"routed_scaling_factor": 1.5},
        ),
        "llama4": RoutingConvention(
            key="x",
            weight="sigmoid(x_i)",
            used_by="Llama 4, with top_k=1",
            fields={
                "score_fn": "sigmoid",
                "router_order": "topk_score",
                "weight_position": "input",
            },
            note="The weight multiplies the expert's input, not its output.",
        ),
        "hash": RoutingConvention(
            key="table[token id]",
            weight="sqrt(softplus(x_i))",
            renormalized="sum w + 1e-20",
            scale="s",
            used_by="DeepSeek-V4, first layers",
            fields={"routing": "hash", "score_fn": "sqrtsoftplus", **_EPS},
            sizes={"routed_scaling_factor": 1.5},
            note="The caller looks the ids up.",
        ),
        "noisy_topk": RoutingConvention(
            key="softmax(x + N(0, 1/E^2))",
            weight="of the noisy x",
            used_by="V-MoE; Shazeer et al. 2017 and Tutel with other choices of the rest",
            note="Shazeer et al. take the softmax of the chosen: router_order='topk_score'.",
        ),
        "gshard_top2": RoutingConvention(
            key="p; 2nd kept if 2 w_2 > U(0, 1)",
            weight="p_i",
            renormalized="max(sum w, 2^-23)",
            used_by="GShard; DeepSpeed and fairseq with other choices of the rest",
            fields={
                "second_expert_policy": "random",
                "renormalize": True,
                "renorm_eps": 2.0**-23,
                "renorm_eps_mode": "max",
                "capacity_factor": "1",
                "capacity_rounding": "tutel",
                "drop_policy": "k_major",
            },
            note="Normalised before the second is refused, as in Tutel and, by a flag, fairseq; "
            "DeepSpeed normalises after the drop: renormalize_drop='after'.",
        ),
        "expert_choice": RoutingConvention(
            key="each expert: its C largest p",
            weight="p_i",
            used_by="Zhou et al. 2022, V-MoE, Flaxformer",
            fields={"routing": "expert_choice", "capacity_factor": "1"},
            note="Not causal. -1 pads tokens that fewer experts took.",
        ),
        "soft_moe": RoutingConvention(
            key="-",
            weight="softmax over slots",
            scale="learned, inside",
            used_by="Puigcerver et al. 2023, V-MoE",
            fields={"routing": "soft", "expert_capacity": 1},
            note="Not causal. The example's hidden states are its logits, each slot's vector is a "
            "unit vector, and the scale is 1.",
        ),
        "sinkhorn": RoutingConvention(
            key="sinkhorn(exp x)",
            weight="p_i",
            used_by="Megatron, in training",
            fields={"routing": "hash"},
            single={"score_fn": "sigmoid"},
            note="ids from npmoe.routing.sinkhorn, passed as topk_ids. top_k=1: sigmoid(x_i).",
        ),
        "quantile_balance": RoutingConvention(
            key="x - beta",
            weight="exp(x_i)",
            renormalized="sum w",
            used_by="Megatron",
            fields={"routing": "hash", "router_order": "topk_score"},
            note="ids from npmoe.routing.quantile_balance, passed as topk_ids; any score function.",
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingRow:
    """A convention, its config in the example, and what it makes of the example's logits.

    `topk_ids` and `topk_weights` are (4, K), by selection key; for soft_moe ids are slots.
    """

    name: str
    convention: RoutingConvention
    cfg: MoEConfig
    topk_ids: HostArray
    topk_weights: HostArray


def routing_convention(name: str, num_experts: int, top_k: int, **overrides: Any) -> MoEConfig:
    """Return the config of a routing convention.

    Parameters
    ----------
    name : str
        A key of `ROUTING_CONVENTIONS`.
    num_experts, top_k : int
        E and K.
    **overrides
        Further fields of MoEConfig: sizes, groups, the scale of a model.

    Returns
    -------
    MoEConfig

    Raises
    ------
    RangeError
        For an unknown name, "gshard_top2" with top_k other than 2, or fields without meaning.

    Examples
    --------
    >>> routing_convention("softmax_topk_renorm", 8, 2).renormalize
    True
    """
    function = "routing_convention"
    check_choice(function, "name", name, tuple(ROUTING_CONVENTIONS))
    require(
        name != "gshard_top2" or top_k == 2,
        f"{function}: top_k must be 2 with name='gshard_top2', got {top_k}.",
    )
    entry = ROUTING_CONVENTIONS[name]
    fields = dict(entry.fields)
    if name == "noisy_topk" and num_experts > 0:
        fields["router_noise_std"] = 1.0 / num_experts
    if top_k == 1:
        fields |= entry.single
    return MoEConfig(**{"num_experts": num_experts, "top_k": top_k} | fields | overrides)


def routing_table() -> tuple[RoutingRow, ...]:
    """Return every routing convention with its ids and weights on the example."""
    return tuple(_row(name, entry) for name, entry in ROUTING_CONVENTIONS.items())


def _row(name: str, entry: RoutingConvention) -> RoutingRow:
    cfg = routing_convention(name, NUM_EXPERTS, TOP_K, **entry.sizes)
    if cfg.routing == "soft":
        soft = soft_route(LOGITS[None], np.eye(NUM_EXPERTS), np.ones(()))
        slots = np.broadcast_to(np.arange(cfg.router_size, dtype=np.int32), LOGITS.shape)
        ids, weights = slots, soft.combine[0]
    else:
        routing = route(
            LOGITS,
            cfg,
            selection_bias=SELECTION_BIAS if cfg.selection_bias else None,
            topk_ids=_given_ids(name),
            rng=FixedDraws(),
        )
        ids, weights = routing.topk_ids, routing.topk_weights
    return RoutingRow(name=name, convention=entry, cfg=cfg, topk_ids=ids, topk_weights=weights)


def _given_ids(name: str) -> HostArray | None:
    """Return the ids that the caller of the layer must bring, if any."""
    if name == "sinkhorn":
        ids: HostArray = stable_topk(sinkhorn(LOGITS), TOP_K)
        return ids
    if name == "quantile_balance":
        return quantile_balance(LOGITS, TOP_K)[0]
    return TABLE if name == "hash" else None
