"""The twenty presets of npmoe as blocks of transformers: settings, and a random block for a seed.

`FAMILIES[name].fields` are the MoEConfig fields every model of the family has; what a model may
choose (`overrides` of a case) comes on top, and both together are the whole configuration.
`FAMILIES[name].raised` names the torch calls in which upstream asks for float32 inside a float64
model (see RaiseToFloat64); the tests pin it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import parity_layouts as layouts
import torch
from parity_upstream import ACTIVATIONS, Built, Draw


@dataclass(frozen=True)
class Family:
    build: Callable[[Draw], Built]
    fields: dict[str, Any]
    raised: frozenset[str]


FAMILIES: dict[str, Family] = {}


def family(name: str, *, raised: str = "", **fields: Any):
    """Register a builder under the name of its preset."""

    def register(build: Callable[[Draw], Built]) -> Callable[[Draw], Built]:
        FAMILIES[name] = Family(build, fields, frozenset(raised.split()))
        return build

    return register


# read by the block, but missing in the class: a checkpoint's JSON has to bring it
UNLISTED = {("Qwen3OmniMoeTalkerTextConfig", "shared_expert_intermediate_size")}


def upstream(model: str, config: str, **values: Any) -> tuple[Any, Any]:
    """Return the modeling module and a default configuration with these values set.

    They are set afterwards because the constructors also check the attention, which is not here.
    """
    modeling = import_module(f"transformers.models.{model}.modeling_{model}")
    configuration = import_module(f"transformers.models.{model}.configuration_{model}")
    made = getattr(configuration, config)()
    for name, value in values.items():
        assert hasattr(made, name) or (config, name) in UNLISTED, f"{config} has no {name}"
        setattr(made, name, value)
    made._experts_implementation = "eager"  # grouped_mm does not take float64 on the CPU
    return modeling, made


def act(name: str) -> dict[str, str]:
    return {"activation": ACTIVATIONS[name][0]}


@family("mixtral", raised="float", renormalize=True)
def mixtral(d: Draw) -> Built:
    name = d.activation()
    m, c = upstream(
        "mixtral", "MixtralConfig", hidden_size=d.H, intermediate_size=d.I, hidden_act=name,
        num_local_experts=d.E, num_experts_per_tok=d.K,
    )  # fmt: skip
    return Built(m.MixtralSparseMoeBlock(c), layouts.fused(), act(name))


@family("minimax", raised="float", renormalize=True)
def minimax(d: Draw) -> Built:
    name = d.activation()
    m, c = upstream(
        "minimax", "MiniMaxConfig", hidden_size=d.H, intermediate_size=d.I, hidden_act=name,
        num_local_experts=d.E, num_experts_per_tok=d.K,
    )  # fmt: skip
    return Built(m.MiniMaxSparseMoeBlock(c), layouts.fused(), act(name))


def qwen_with_shared(d: Draw, model: str, prefix: str) -> Built:
    name, norm, shared = d.activation(), d.flag(), d.pick(2, 3, 9)
    m, c = upstream(
        model, f"{prefix}Config", hidden_size=d.H, moe_intermediate_size=d.I, hidden_act=name,
        num_experts=d.E, num_experts_per_tok=d.K, norm_topk_prob=norm,
        shared_expert_intermediate_size=shared,
    )  # fmt: skip
    convert = layouts.fused(shared="shared_expert", shared_gate="shared_expert_gate.weight")
    more = {"renormalize": norm, "shared_intermediate_size": shared}
    return Built(getattr(m, f"{prefix}SparseMoeBlock")(c), convert, act(name) | more)


@family("qwen2_moe", raised="softmax", shared_gated=True)
def qwen2_moe(d: Draw) -> Built:
    return qwen_with_shared(d, "qwen2_moe", "Qwen2Moe")


@family("qwen3_next", raised="softmax", shared_gated=True)
def qwen3_next(d: Draw) -> Built:
    return qwen_with_shared(d, "qwen3_next", "Qwen3Next")


@family("qwen3_moe", raised="softmax")
def qwen3_moe(d: Draw) -> Built:
    name, norm = d.activation(), d.flag()
    m, c = upstream(
        "qwen3_moe", "Qwen3MoeConfig", hidden_size=d.H, moe_intermediate_size=d.I, hidden_act=name,
        num_experts=d.E, num_experts_per_tok=d.K, norm_topk_prob=norm,
    )  # fmt: skip
    return Built(m.Qwen3MoeSparseMoeBlock(c), layouts.fused(), act(name) | {"renormalize": norm})


@family("olmoe", raised="softmax")
def olmoe(d: Draw) -> Built:
    name, norm = d.activation(), d.flag()
    m, c = upstream(
        "olmoe", "OlmoeConfig", hidden_size=d.H, intermediate_size=d.I, hidden_act=name,
        num_experts=d.E, num_experts_per_tok=d.K, norm_topk_prob=norm,
    )  # fmt: skip
    return Built(m.OlmoeSparseMoeBlock(c), layouts.fused(), act(name) | {"renormalize": norm})


@family("deepseek_v2", raised="type softmax")
def deepseek_v2(d: Draw) -> Built:
    name, scale, shared, ignored = d.activation(), d.real(0.3, 3), d.pick(1, 2), d.flag()
    limited = d.flag()
    groups, kept = d.groups(least=1) if limited else (1, 1)
    m, c = upstream(
        "deepseek_v2", "DeepseekV2Config", hidden_size=d.H, moe_intermediate_size=d.I,
        hidden_act=name, n_routed_experts=d.E, num_experts_per_tok=d.K, n_shared_experts=shared,
        routed_scaling_factor=scale, norm_topk_prob=ignored,
        topk_method="group_limited_greedy" if limited else "greedy",
        n_group=groups, topk_group=kept,
    )  # fmt: skip
    more = {
        "routed_scaling_factor": scale,
        "shared_intermediate_size": shared * d.I,
        "num_groups": groups,
        "topk_group": kept,
        **GROUPED_BY_MAX[groups > 1],
    }
    return Built(m.DeepseekV2Moe(c), layouts.fused(shared="shared_experts"), act(name) | more)


GROUPED_BY_MAX = {
    True: {"group_score": "max", "group_fill": "zero"},
    False: {"group_score": "top2_sum", "group_fill": "-inf"},  # without groups: the defaults
}
RENORMALIZED = {
    True: {"renormalize": True, "renorm_eps": 1e-20},
    False: {"renormalize": False, "renorm_eps": 0.0},
}


def sigmoid_with_groups(d: Draw, model: str, prefix: str, block: str) -> Built:
    name, scale, shared, norm = d.activation(), d.real(0.3, 3), d.pick(1, 2), d.flag()
    groups, kept = d.groups()
    m, c = upstream(
        model, f"{prefix}Config", hidden_size=d.H, moe_intermediate_size=d.I, hidden_act=name,
        n_routed_experts=d.E, num_experts_per_tok=d.K, n_shared_experts=shared, n_group=groups,
        topk_group=kept, routed_scaling_factor=scale, norm_topk_prob=norm,
    )  # fmt: skip
    more = {
        "routed_scaling_factor": scale,
        "shared_intermediate_size": shared * d.I,
        "num_groups": groups,
        "topk_group": kept,
        **RENORMALIZED[norm],
    }
    convert = layouts.fused(shared="shared_experts", choice_bias="gate.e_score_correction_bias")
    return Built(getattr(m, block)(c), convert, act(name) | more)


@family("deepseek_v3", raised="type", score_fn="sigmoid", selection_bias=True)
def deepseek_v3(d: Draw) -> Built:
    return sigmoid_with_groups(d, "deepseek_v3", "DeepseekV3", "DeepseekV3MoE")


@family("glm4_moe", raised="type", score_fn="sigmoid", selection_bias=True)
def glm4_moe(d: Draw) -> Built:
    return sigmoid_with_groups(d, "glm4_moe", "Glm4Moe", "Glm4MoeMoE")


@family(
    "deepseek_v4",
    score_fn="sqrtsoftplus",
    renormalize=True,
    renorm_eps=1e-20,
    activation="swiglu_clamp_pre",
)
def deepseek_v4(d: Draw) -> Built:
    scale, limit, ignored, hashed = d.real(0.3, 3), d.real(0.3, 2), d.flag(), d.pick(0, 0, 1)
    m, c = upstream(
        "deepseek_v4", "DeepseekV4Config", hidden_size=d.H, moe_intermediate_size=d.I,
        n_routed_experts=d.E, num_experts_per_tok=d.K, routed_scaling_factor=scale,
        swiglu_limit=limit, norm_topk_prob=ignored, vocab_size=16, num_hidden_layers=1,
        mlp_layer_types=["hash_moe" if hashed else "moe"],
    )  # fmt: skip
    block = m.DeepseekV4SparseMoeBlock(c, 0)
    more = {
        "routed_scaling_factor": scale,
        "activation_limit": limit,
        "shared_intermediate_size": d.I,
        "selection_bias": not hashed,
    }
    convert = layouts.fused(shared="shared_experts", choice_bias="gate.e_score_correction_bias")
    if not hashed:
        return Built(block, convert, more)
    table = [d.rng.permutation(d.E)[: d.K] for _ in range(16)]
    block.gate.tid2eid.copy_(torch.from_numpy(np.stack(table)))
    words = torch.from_numpy(d.rng.integers(0, 16, (d.B, d.S)))

    def call(module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return module(hidden, words)

    more |= {"routing": "hash"}
    return Built(block, convert, more, call=call, replay=True)


@family(
    "gpt_oss",
    router_order="topk_score",
    router_bias=True,
    expert_bias=True,
    activation="swiglu_oai",
)
def gpt_oss(d: Draw) -> Built:
    alpha, limit = d.real(0.5, 2), d.real(0.3, 2)
    m, c = upstream(
        "gpt_oss", "GptOssConfig", hidden_size=d.H, intermediate_size=d.I,
        num_local_experts=d.E, num_experts_per_tok=d.K, swiglu_alpha=alpha, swiglu_limit=limit,
    )  # fmt: skip
    more = {"activation_alpha": alpha, "activation_limit": limit}
    return Built(m.GptOssMLP(c), layouts.gpt_oss, more, call=lambda block, hidden: block(hidden)[0])


def chosen_of_all(args: tuple, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the chosen experts, ascending, from weights (T, E) that are 0 elsewhere."""
    all_weights = output[0]
    chosen = all_weights > 0
    ids = chosen.nonzero()[:, 1].reshape(len(all_weights), -1)
    return ids, all_weights.gather(1, ids)


@family(
    "llama4", raised="float", router_order="topk_score", score_fn="sigmoid", weight_position="input"
)
def llama4(d: Draw) -> Built:
    name = d.activation()
    m, c = upstream(
        "llama4", "Llama4TextConfig", hidden_size=d.H, intermediate_size=d.I, hidden_act=name,
        num_local_experts=d.E, num_experts_per_tok=d.K,
    )  # fmt: skip
    convert = layouts.fused("router.weight", shared="shared_expert", transposed=True)
    return Built(
        m.Llama4TextMoe(c), convert, act(name) | {"shared_intermediate_size": d.I},
        ids_and_weights=chosen_of_all, watch="router", call=lambda block, hidden: block(hidden)[0],
    )  # fmt: skip


def kept_of_switch(args: tuple, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the expert of each token from its one-hot row, or -1 where the row is empty: dropped."""
    one_hot, weights, _ = output
    ids = torch.where(one_hot.sum(-1) > 0, one_hot.argmax(-1), -1)
    return ids.reshape(-1, 1), weights.reshape(-1, 1)


@family("switch_transformers", raised="_parse_to softmax to", capacity_scope="sequence")
def switch_transformers(d: Draw) -> Built:
    name, bias, capacity = d.activation(), d.flag(), int(d.rng.integers(1, 4))
    d.K, d.S = 1, d.S + 3
    m, c = upstream(
        "switch_transformers", "SwitchTransformersConfig", d_model=d.H, d_ff=d.I, num_experts=d.E,
        dense_act_fn=name, router_bias=bias, expert_capacity=capacity,
    )  # fmt: skip
    more = {
        "activation": ACTIVATIONS[name][1],
        "router_bias": bias,
        "expert_capacity": capacity,
    }
    return Built(
        m.SwitchTransformersSparseMLP(c), layouts.switch, more,
        ids_and_weights=kept_of_switch, watch="router", drops=True,
    )  # fmt: skip


@family(
    "ernie4_5_moe",
    raised="float softmax",
    selection_bias=True,
    renormalize=True,
    renorm_eps_mode="max",
)
def ernie4_5_moe(d: Draw) -> Built:
    name, shared, least = d.activation(), d.pick(0, 1, 2), d.pick(1e-12, 0.3, 0.9)
    m, c = upstream(
        "ernie4_5_moe", "Ernie4_5_MoeConfig", hidden_size=d.H, moe_intermediate_size=d.I,
        hidden_act=name, moe_num_experts=d.E, moe_k=d.K, moe_num_shared_experts=shared,
        moe_norm_min=least,
    )  # fmt: skip
    convert = layouts.fused(
        shared="shared_experts" if shared else None,
        choice_bias="gate.moe_statics.e_score_correction_bias",
    )
    more = {"shared_intermediate_size": shared * d.I, "renorm_eps": least}
    scale = {"correction_bias": 0.15}  # beside probabilities, so that tokens still differ
    return Built(m.Ernie4_5_MoeSparseMoeBlock(c), convert, act(name) | more, scale=scale)


@family("hunyuan_v1_moe", raised="softmax", renormalize=True)
def hunyuan_v1_moe(d: Draw) -> Built:
    name = d.activation()
    m, c = upstream(
        "hunyuan_v1_moe", "HunYuanMoEV1Config", hidden_size=d.H, intermediate_size=d.I,
        hidden_act=name, num_experts=d.E, moe_topk=d.pick(d.K, [d.K]),
    )  # fmt: skip
    convert = layouts.fused("gate.wg.weight", shared="shared_mlp")
    more = {"shared_intermediate_size": d.I}
    return Built(m.HunYuanMoEV1Moe(c, layer_idx=0), convert, act(name) | more)


@family("dbrx")
def dbrx(d: Draw) -> Built:
    name, norm = d.activation(), d.pick(None, 1.0, 2.0)
    _, ffn = upstream(
        "dbrx", "DbrxFFNConfig", hidden_size=d.H, ffn_hidden_size=d.I, moe_num_experts=d.E,
        moe_top_k=d.K, moe_normalize_expert_weights=norm, ffn_act_fn={"name": name},
    )  # fmt: skip
    m, c = upstream("dbrx", "DbrxConfig", ffn_config=ffn)
    more = {"renormalize": norm is not None, "renorm_p": 2 if norm == 2 and d.K > 1 else 1}
    return Built(m.DbrxFFN(c), layouts.dbrx(d.E), act(name) | more)


@family("granitemoe", raised="float", router_order="topk_score")
def granitemoe(d: Draw) -> Built:
    name = d.activation()
    m, c = upstream(
        "granitemoe", "GraniteMoeConfig", hidden_size=d.H, intermediate_size=d.I, hidden_act=name,
        num_local_experts=d.E, num_experts_per_tok=d.K,
    )  # fmt: skip
    return Built(m.GraniteMoeMoE(c), layouts.fused("router.weight"), act(name))


@family("aria", router_order="topk_score")
def aria(d: Draw) -> Built:
    name, shared = d.activation(), d.pick(1, 2)
    m, c = upstream(
        "aria", "AriaTextConfig", hidden_size=d.H, intermediate_size=d.I, hidden_act=name,
        moe_num_experts=d.E, moe_topk=d.K, moe_num_shared_experts=shared,
    )  # fmt: skip
    convert = layouts.fused("router.weight", shared="shared_experts", transposed=True)
    more: dict[str, Any] = {"shared_intermediate_size": shared * d.I}
    if name != "silu":  # the routed experts are SwiGLU whatever hidden_act says
        more["shared_activation"] = ACTIVATIONS[name][0]
    return Built(m.AriaTextMoELayer(c), convert, more)


@family("minimax_m2", raised="float", score_fn="sigmoid", selection_bias=True, renormalize=True)
def minimax_m2(d: Draw) -> Built:
    name = d.activation()
    m, c = upstream(
        "minimax_m2", "MiniMaxM2Config", hidden_size=d.H, intermediate_size=d.I, hidden_act=name,
        num_local_experts=d.E, num_experts_per_tok=d.K,
    )  # fmt: skip
    return Built(
        m.MiniMaxM2SparseMoeBlock(c),
        layouts.fused(choice_bias="e_score_correction_bias"),
        act(name),
    )


@family("jamba", raised="softmax")
def jamba(d: Draw) -> Built:
    name = d.activation()
    m, c = upstream(
        "jamba", "JambaConfig", hidden_size=d.H, intermediate_size=d.I, hidden_act=name,
        num_experts=d.E, num_experts_per_tok=d.K,
    )  # fmt: skip
    return Built(m.JambaSparseMoeBlock(c), layouts.fused("router.weight"), act(name))
