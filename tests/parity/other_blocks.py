"""Blocks of `other_families` that differ in more than names, one builder each."""

from __future__ import annotations

from typing import Any

import parity_layouts as layouts
import torch
from families import act, upstream
from other_families import CHOICE_BIAS, other, scaled_afterwards
from parity_upstream import ACTIVATIONS, Arrays, Built, Draw


class WithShared(torch.nn.Module):
    """A routed block plus a shared MLP that upstream adds in the decoder layer."""

    def __init__(self, routed: torch.nn.Module, shared: torch.nn.Module) -> None:
        super().__init__()
        self.routed, self.shared = routed, shared

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.routed(hidden) + self.shared(hidden)


def granite_with_shared(d: Draw, model: str, prefix: str) -> Built:
    name, shared = d.activation(), d.pick(2, 3, 9)
    m, c = upstream(
        model, f"{prefix}Config", hidden_size=d.H, intermediate_size=d.I, hidden_act=name,
        num_local_experts=d.E, num_experts_per_tok=d.K, shared_intermediate_size=shared,
    )  # fmt: skip
    block = WithShared(getattr(m, f"{prefix}MoE")(c), getattr(m, f"{prefix}MLP")(c))
    routed = layouts.fused("routed.router.weight", experts="routed.experts")

    def convert(p: Arrays) -> Arrays:
        return routed(p) | {
            "shared_gate_up_proj": p["shared.input_linear.weight"],
            "shared_down_proj": p["shared.output_linear.weight"],
        }

    more = {"shared_intermediate_size": shared}
    return Built(block, convert, act(name) | more, watch="routed.experts")


for _model, _prefix in (
    ("granitemoe_swa", "GraniteMoeSWA"),
    ("granitemoehybrid", "GraniteMoeHybrid"),
    ("granitemoeshared", "GraniteMoeShared"),
):

    def _build(d: Draw, model: str = _model, prefix: str = _prefix) -> Built:
        return granite_with_shared(d, model, prefix)

    other(_model, raised="float", router_order="topk_score")(_build)


@other(
    "afmoe",
    raised="to",
    score_fn="sigmoid",
    selection_bias=True,
    renormalize=True,
    renorm_eps=1e-20,
)
def afmoe(d: Draw) -> Built:
    name, scale, shared = d.activation(), d.real(0.3, 3), d.pick(1, 2)
    m, c = upstream(
        "afmoe", "AfmoeConfig", hidden_size=d.H, moe_intermediate_size=d.I, hidden_act=name,
        num_experts=d.E, num_experts_per_tok=d.K, num_shared_experts=shared, route_scale=scale,
    )  # fmt: skip
    convert = layouts.fused(
        "router.gate.weight", shared="shared_experts", choice_bias="expert_bias"
    )
    more = {"routed_scaling_factor": scale, "shared_intermediate_size": shared * d.I}
    return Built(m.AfmoeSparseMoeBlock(c), convert, act(name) | more)


@other("cohere2_moe", raised="softmax", router_order="topk_score")
def cohere2_moe(d: Draw) -> Built:
    name, shared, norm = d.activation(), d.pick(0, 1, 2), d.flag()
    score, combine = d.pick("softmax", "sigmoid"), d.pick("sum", "average")
    m, c = upstream(
        "cohere2_moe", "Cohere2MoeConfig", hidden_size=d.H, intermediate_size=d.I,
        hidden_act=name, num_experts=d.E, num_experts_per_tok=d.K, num_shared_experts=shared,
        norm_topk_prob=norm, expert_selection_fn=score, shared_expert_combination_strategy=combine,
    )  # fmt: skip
    more = {
        "score_fn": score,
        "renormalize": norm and score == "sigmoid",
        "shared_intermediate_size": shared * d.I,
        "shared_combine": combine if shared else "sum",
    }
    convert = layouts.fused(shared="shared_experts" if shared else None)
    return Built(m.Cohere2MoeSparseMoeBlock(c), convert, act(name) | more)


@other(
    "ernie4_5_vl_moe (text)",
    raised="float softmax",
    selection_bias=True,
    renormalize=True,
    renorm_eps_mode="max",
)
def ernie4_5_vl_moe(d: Draw) -> Built:
    name, shared, least = d.activation(), d.pick(0, 1, 2), d.pick(1e-12, 0.3, 0.9)
    m, c = upstream(
        "ernie4_5_vl_moe", "Ernie4_5_VLMoeTextConfig", hidden_size=d.H, hidden_act=name,
        moe_intermediate_size=[d.I, d.I + 1], moe_num_experts=d.E, moe_k=d.K,
        moe_num_shared_experts=shared, moe_norm_min=least,
    )  # fmt: skip
    convert = layouts.fused(
        "text_moe.gate.weight",
        experts="text_moe.experts",
        shared="shared_experts" if shared else None,
        choice_bias="text_moe.gate.moe_statics.e_score_correction_bias",
    )
    more = {"shared_intermediate_size": shared * d.I, "renorm_eps": least}
    return Built(
        m.Ernie4_5_VLMoeMoeBlock(c), convert, act(name) | more, watch="text_moe.experts",
        call=lambda block, hidden: block(hidden)[0], scale={"correction_bias": 0.15},
    )  # fmt: skip


@other("flint", raised="float", score_fn="sigmoid")
def flint(d: Draw) -> Built:
    name, norm, shared = d.activation(), d.flag(), d.pick(2, 3, 9)
    m, c = upstream(
        "flint", "FlintConfig", hidden_size=d.H, moe_intermediate_size=d.I, hidden_act=name,
        num_experts=d.E, num_experts_per_tok=d.K, norm_topk_prob=norm,
        shared_expert_intermediate_size=shared,
    )  # fmt: skip
    more = {"renormalize": norm, "shared_intermediate_size": shared}
    return Built(m.FlintSparseMoeBlock(c), layouts.fused(shared="shared_expert"), act(name) | more)


@other(
    "hy_v3",
    raised="float",
    score_fn="sigmoid",
    selection_bias=True,
    renormalize=True,
    renorm_eps=1e-20,
)
def hy_v3(d: Draw) -> Built:
    name, scale, shared = d.activation(), d.real(0.3, 3), d.pick(1, 2)
    m, c = upstream(
        "hy_v3", "HYV3Config", hidden_size=d.H, moe_intermediate_size=d.I, hidden_act=name,
        num_experts=d.E, num_experts_per_tok=d.K, num_shared_experts=shared,
        router_scaling_factor=scale, enable_moe_fp32_combine=d.flag(),
    )  # fmt: skip
    convert = layouts.fused(shared="shared_experts", choice_bias="e_score_correction_bias")
    more = {"routed_scaling_factor": scale, "shared_intermediate_size": shared * d.I}
    return Built(m.HYV3MoE(c), convert, act(name) | more)


@other("jetmoe", raised="float", router_order="topk_score", output_bias=True)
def jetmoe(d: Draw) -> Built:
    name = d.activation()
    m, c = upstream(
        "jetmoe", "JetMoeConfig", hidden_size=d.H, intermediate_size=d.I,
        activation_function=name, num_local_experts=d.E, num_experts_per_tok=d.K,
    )  # fmt: skip

    def convert(p: Arrays) -> Arrays:
        return {
            "router_weight": p["router.layer.weight"],
            "gate_up_proj": p["input_linear.weight"],
            "down_proj": p["output_linear.weight"],
            "output_bias": p["bias"],
        }

    def ids_and_weights(args: tuple, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
        order, _, sorted_weights, _, logits = output  # routes sorted by expert
        weights = torch.empty_like(sorted_weights)
        weights[order] = sorted_weights
        return logits.topk(d.K).indices, weights.reshape(-1, d.K)

    return Built(
        m.JetMoeMoE(c), convert, act(name), watch="router", ids_and_weights=ids_and_weights
    )


@other(
    "kolibri1",
    raised="type",
    router_order="topk_score",
    score_fn="sigmoid",
    selection_bias=True,
    selection_bias_on="logits",
)
def kolibri1(d: Draw) -> Built:
    name, norm, shared = d.activation(), d.flag(), d.pick(2, 3, 9)
    m, c = upstream(
        "kolibri1", "Kolibri1Config", hidden_size=d.H, moe_intermediate_size=d.I, hidden_act=name,
        num_experts=d.E, num_experts_per_tok=d.K, norm_topk_prob=norm,
        shared_expert_intermediate_size=shared,
    )  # fmt: skip
    convert = layouts.fused(shared="shared_experts", choice_bias=CHOICE_BIAS)
    more = {"renormalize": norm, "shared_intermediate_size": shared}
    return Built(m.Kolibri1SparseMoeBlock(c), convert, act(name) | more)


@other("laguna", raised="float", score_fn="sigmoid", selection_bias=True, renormalize=True)
def laguna(d: Draw) -> Built:
    name, shared, scale = d.activation(), d.pick(2, 3, 9), d.real(0.3, 3)
    cap = d.pick(0.0, 0.7, 2.5)
    m, c = upstream(
        "laguna", "LagunaConfig", hidden_size=d.H, moe_intermediate_size=d.I, hidden_act=name,
        num_experts=d.E, num_experts_per_tok=d.K, shared_expert_intermediate_size=shared,
        moe_routed_scaling_factor=scale, moe_router_logit_softcapping=cap,
    )  # fmt: skip
    more = {
        "logit_softcap": cap or None,
        "routed_scaling_factor": scale,
        "shared_intermediate_size": shared,
    }
    return Built(
        m.LagunaSparseMoeBlock(c),
        layouts.fused(shared="shared_experts", choice_bias=CHOICE_BIAS),
        act(name) | more,
        ids_and_weights=scaled_afterwards(scale),
    )


@other("lfm2_moe", score_fn="sigmoid", activation="swiglu")
def lfm2_moe(d: Draw) -> Built:
    bias, norm, scale = d.flag(), d.pick(True, True, False), d.real(0.3, 3)
    m, c = upstream(
        "lfm2_moe", "Lfm2MoeConfig", hidden_size=d.H, moe_intermediate_size=d.I,
        num_experts=d.E, num_experts_per_tok=d.K, use_expert_bias=bias, norm_topk_prob=norm,
        routed_scaling_factor=scale,
    )  # fmt: skip
    more = {
        "selection_bias": bias,
        "renormalize": norm,
        "renorm_eps": 1e-6 if norm else 0.0,
        "routed_scaling_factor": scale,
    }
    return Built(m.Lfm2MoeSparseMoeBlock(c), layouts.fused(choice_bias="expert_bias"), more)


@other("longcat_flash", raised="type", selection_bias=True)
def longcat_flash(d: Draw) -> Built:
    name, scale, identity = d.activation(), d.real(0.3, 7), d.pick(0, 1, 3)
    d.K = max(d.K, 2)  # upstream's loop fails for 1: see quirks
    m, c = upstream(
        "longcat_flash", "LongcatFlashConfig", hidden_size=d.H, expert_ffn_hidden_size=d.I,
        hidden_act=name, n_routed_experts=d.E, moe_topk=d.K, zero_expert_num=identity,
        routed_scaling_factor=scale,
    )  # fmt: skip
    fused = layouts.fused("router.classifier.weight", choice_bias="router.e_score_correction_bias")

    def convert(p: Arrays) -> Arrays:
        out = fused(p)
        out["gate_up_proj"] = out["gate_up_proj"][: d.E]  # upstream allocates them for identities
        return out

    more = {"routed_scaling_factor": scale, "num_identity_experts": identity}
    built = Built(m.LongcatFlashMoE(c), convert, act(name) | more)
    built.scale = {"correction_bias": 0.15}
    return built


@other(
    "minimax_m3_vl",
    raised="float",
    score_fn="sigmoid",
    selection_bias=True,
    renormalize=True,
    activation="swiglu_oai",
)
def minimax_m3_vl(d: Draw) -> Built:
    scale, shared = d.real(0.3, 3), d.pick(2, 3, 9)
    alpha, limit = d.real(0.5, 2), d.real(0.3, 2)
    m, c = upstream(
        "minimax_m3_vl", "MiniMaxM3VLTextConfig", hidden_size=d.H, intermediate_size=d.I,
        num_local_experts=d.E, num_experts_per_tok=d.K, shared_intermediate_size=shared,
        routed_scaling_factor=scale, swiglu_alpha=alpha, swiglu_limit=limit,
    )  # fmt: skip
    routed = layouts.fused(choice_bias=CHOICE_BIAS)

    def convert(p: Arrays) -> Arrays:
        return routed(p) | {
            "shared_gate_up_proj": p["shared_experts.gate_up_proj.weight"],
            "shared_down_proj": p["shared_experts.down_proj.weight"],
        }

    more = {
        "routed_scaling_factor": scale,
        "shared_intermediate_size": shared,
        "activation_alpha": alpha,
        "activation_limit": limit,
    }
    return Built(
        m.MiniMaxM3VLSparseMoeBlock(c), convert, more, ids_and_weights=scaled_afterwards(scale)
    )


@other("nemotron_h", raised="type", score_fn="sigmoid", selection_bias=True)
def nemotron_h(d: Draw) -> Built:
    scale, shared, norm = d.real(0.3, 3), d.pick(2, 3, 9), d.flag()
    name = d.pick("relu2", "relu2", "gelu", "relu", "silu")
    groups, kept = d.groups()
    m, c = upstream(
        "nemotron_h", "NemotronHConfig", hidden_size=d.H, moe_intermediate_size=d.I,
        mlp_hidden_act=name, n_routed_experts=d.E, num_experts_per_tok=d.K,
        moe_shared_expert_intermediate_size=shared, n_group=groups, topk_group=kept,
        routed_scaling_factor=scale, norm_topk_prob=norm,
    )  # fmt: skip
    more = {
        "activation": name if name == "relu2" else ACTIVATIONS[name][1],
        "routed_scaling_factor": scale,
        "shared_intermediate_size": shared,
        "num_groups": groups,
        "topk_group": kept,
        "renormalize": norm,
        "renorm_eps": 1e-20 if norm else 0.0,
    }
    convert = layouts.fused(shared="shared_experts", choice_bias=CHOICE_BIAS, gated=False)
    return Built(m.NemotronHMoE(c), convert, more)


@other(
    "openai_privacy_filter",
    raised="float zeros_like",
    router_order="topk_score",
    router_bias=True,
    expert_bias=True,
    activation="swiglu_oai",
)
def openai_privacy_filter(d: Draw) -> Built:
    alpha, limit = d.real(0.5, 2), d.real(0.3, 2)
    m, c = upstream(
        "openai_privacy_filter", "OpenAIPrivacyFilterConfig", hidden_size=d.H,
        intermediate_size=d.I, num_local_experts=d.E, num_experts_per_tok=d.K,
        swiglu_alpha=alpha, swiglu_limit=limit,
    )  # fmt: skip
    fused = layouts.fused("router.weight", transposed=True)

    def convert(p: Arrays) -> Arrays:
        return fused(p) | {
            "router_bias": p["router.bias"],
            "gate_up_bias": p["experts.gate_up_proj_bias"],
            "down_bias": p["experts.down_proj_bias"],
        }

    more = {"activation_alpha": alpha, "activation_limit": limit}
    # weights are divided by K, and the sum is multiplied by K
    return Built(
        m.OpenAIPrivacyFilterMLP(c), convert, more,
        call=lambda block, hidden: block(hidden)[0], ids_and_weights=scaled_afterwards(d.K),
    )  # fmt: skip


@other("step3p7", raised="float", score_fn="sigmoid", selection_bias=True, renormalize=True)
def step3p7(d: Draw) -> Built:
    scale, shared, limit = d.real(0.3, 3), d.pick(2, 3, 9), d.real(0.3, 2)
    experts_limited, shared_limited = d.flag(), d.flag()
    m, c = upstream(
        "step3p7", "Step3p7TextConfig", hidden_size=d.H, moe_intermediate_size=d.I,
        n_routed_experts=d.E, num_experts_per_tok=d.K, share_expert_dim=shared,
        moe_router_scaling_factor=scale, swiglu_limits=[limit if experts_limited else None],
        swiglu_limits_shared=[limit if shared_limited else 0],
    )  # fmt: skip
    names = {True: "swiglu_clamp_post", False: "swiglu"}
    more: dict[str, Any] = {
        "routed_scaling_factor": scale,
        "shared_intermediate_size": shared,
        "activation": names[experts_limited],
        "shared_activation": names[shared_limited],
        "activation_limit": limit if experts_limited or shared_limited else None,
    }
    return Built(
        m.Step3p7SparseMoeBlock(c, 0),
        layouts.fused(shared="shared_experts", choice_bias=CHOICE_BIAS),
        more,
        ids_and_weights=scaled_afterwards(scale),
    )
