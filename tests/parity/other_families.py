"""The other MoE blocks of the same transformers release, said with the fields of MoEConfig.

`OTHERS[name]` is like `FAMILIES[name]`: `fields` are fixed, the rest is drawn. A name is a model
type, with a suffix where one model type has two different blocks. What these fields cannot say is
in NOT_EXPRESSIBLE, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import parity_layouts as layouts
import torch
from families import GROUPED_BY_MAX, RENORMALIZED, Family, act, upstream
from parity_upstream import Built, Draw, from_expert_arguments

OTHERS: dict[str, Family] = {}

NOT_EXPRESSIBLE = {
    "diffusion_gemma": "the router normalises its input and scales each expert's weight",
    "doge": "product keys: experts are rank-one and chosen by a sum of two scores",
    "ernie4_5_vl_moe (text and images mixed)": "two layers, chosen by the kind of token",
    "gemma4": "the router normalises its input and scales each expert's weight",
    "gemma4_assistant": "as gemma4",
    "inkling": "weights of routed and shared experts are normalised together",
    "inkling2": "gate and up pass through tanh caps inside the activation",
    "jetmoe (attention)": "the experts are attention projections",
    "longcat_flash (router_bias=True)": "upstream makes the bias and does not add it: see quirks",
    "muse_spark": "projections and norms around the experts, and a multiplier on the logits",
    "nemotron_h (moe_latent_size)": "projections around the experts",
    "nllb_moe": "upstream's block does not follow its router: see quirks",
    "phimoe": "sparsemixer: each choice has its own masked softmax",
    "step3p7 (two different limits)": "experts and shared expert have each their own limit",
    "vitpose_backbone": "no router: the expert is given by the data set, for part of the features",
    "zaya": "the router is an MLP over several layers, one of its choices skips the layer",
}


def other(name: str, *, raised: str = "", **fields: Any):
    """Register a builder under the name of its model type."""

    def register(build: Callable[[Draw], Built]) -> Callable[[Draw], Built]:
        assert name not in OTHERS
        OTHERS[name] = Family(build, fields, frozenset(raised.split()))
        return build

    return register


CHOICE_BIAS = "gate.e_score_correction_bias"


def scaled_afterwards(scale: float):
    """Multiply the captured weights by a factor that the block applies to the routed sum."""

    def extract(args: tuple, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = from_expert_arguments(args, output)
        return ids, weights * scale

    return extract


def sigmoid_with_groups(
    d: Draw,
    model: str,
    prefix: str,
    block: str,
    *,
    experts: str = "n_routed_experts",
    shared: str | None = "n_shared_experts",
    config: str | None = None,
    shared_size: str | None = None,
    limit: bool = False,
    scale_after: bool = False,
) -> Built:
    name, scale, norm = d.activation() if not limit else "silu", d.real(0.3, 3), d.flag()
    groups, kept = d.groups()
    values: dict[str, Any] = {
        "hidden_size": d.H, "moe_intermediate_size": d.I, "hidden_act": name, experts: d.E,
        "num_experts_per_tok": d.K, "n_group": groups, "topk_group": kept,
        "routed_scaling_factor": scale, "norm_topk_prob": norm,
    }  # fmt: skip
    more: dict[str, Any] = {
        "routed_scaling_factor": scale,
        "num_groups": groups,
        "topk_group": kept,
        **RENORMALIZED[norm],
    }
    if shared:
        values[shared] = d.pick(1, 2)
        size = d.I
        if shared_size:
            values[shared_size] = size = d.pick(2, 3, 9)
        more["shared_intermediate_size"] = values[shared] * size
    if limit:
        values["swiglu_limit"] = more["activation_limit"] = d.real(0.3, 2)
    else:
        more |= act(name)
    m, c = upstream(model, config or f"{prefix}Config", **values)
    convert = layouts.fused(shared="shared_experts" if shared else None, choice_bias=CHOICE_BIAS)
    built = Built(getattr(m, block)(c), convert, more)
    if scale_after:
        built.ids_and_weights = scaled_afterwards(scale)
    return built


def register_sigmoid_with_groups() -> None:
    """Register the blocks that are DeepSeek-V3's under another name, or nearly."""
    counted = {"experts": "num_experts", "shared": "num_shared_experts"}
    inner = {"shared_size": "shared_experts_intermediate_size", "config": "Dots3NoteTextConfig"}
    text = {"config": "Glm4vMoeTextConfig"}
    clamped = {"config": "Glm5NextTextConfig", "limit": True}
    rows: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        ("bailing_hybrid", "BailingHybrid", "BailingHybridMoE", {"experts": "num_local_experts"}),
        (
            "beam",
            "Beam",
            "BeamMoE",
            {"experts": "num_experts", "shared": None, "scale_after": True},
        ),
        ("deepseek_v32", "DeepseekV32", "DeepseekV32MoE", {}),
        ("dots1", "Dots1", "Dots1MoE", {}),
        ("dots3_note", "Dots3Note", "Dots3NoteTextMoE", inner),
        ("exaone_moe", "ExaoneMoe", "ExaoneMoeSparseMoEBlock", counted),
        ("glm4_moe_lite", "Glm4MoeLite", "Glm4MoeLiteMoE", {}),
        ("glm4v_moe", "Glm4vMoe", "Glm4vMoeTextMoE", text),
        ("glm5_next", "Glm5Next", "Glm5NextTextMoE", clamped),
        ("glm_moe_dsa", "GlmMoeDsa", "GlmMoeDsaMoE", {}),
        ("hy_v4", "HYV4", "HYV4MoE", {"limit": True}),
        ("kimi_linear", "KimiLinear", "KimiLinearMoE", {"experts": "num_local_experts"}),
        ("mimo_v2_flash", "MiMoV2Flash", "MiMoV2FlashMoE", {"shared": None}),
        ("solar_open", "SolarOpen", "SolarOpenMoE", {}),
    )
    for model, prefix, block, options in rows:

        def build(d: Draw, row=(model, prefix, block), options=options) -> Built:
            return sigmoid_with_groups(d, *row, **options)

        fields = {"score_fn": "sigmoid", "selection_bias": True}
        if options.get("limit"):
            fields["activation"] = "swiglu_clamp_pre"
        if model == "hy_v4":  # the shared expert is not clamped
            fields["shared_activation"] = "swiglu"
        other(model, raised="float" if model == "beam" else "type", **fields)(build)


register_sigmoid_with_groups()


@other("axk1 (without the norm after it)", raised="type", score_fn="sigmoid", selection_bias=True)
def axk1(d: Draw) -> Built:
    built = sigmoid_with_groups(d, "axk1", "AXK1", "AXK1MoE")
    built.block.post_mlp_layernorm = torch.nn.Identity()
    return built


def zero_filled(d: Draw) -> tuple[int, int, bool]:
    """Draw groups; sometimes four experts whose biased scores are all negative.

    Then both experts of the group that was not kept win with their 0.0. Other negative cases
    would leave the choice among several zeros to torch.topk.
    """
    if d.flag():
        d.E, d.K = 4, 2
        return 2, 1, True
    return *d.groups(), False


@other("axk2", raised="type", score_fn="sigmoid", selection_bias=True)
def axk2(d: Draw) -> Built:
    name, scale, norm, shared = d.activation(), d.real(0.3, 3), d.flag(), d.pick(1, 2)
    groups, kept, negative = zero_filled(d)
    m, c = upstream(
        "axk2", "AXK2Config", hidden_size=d.H, moe_intermediate_size=d.I, hidden_act=name,
        n_routed_experts=d.E, num_experts_per_tok=d.K, n_shared_experts=shared,
        n_group=groups if groups > 1 else None, topk_group=kept if groups > 1 else None,
        routed_scaling_factor=scale, norm_topk_prob=norm,
    )  # fmt: skip
    more = {
        "routed_scaling_factor": scale,
        "shared_intermediate_size": shared * d.I,
        "num_groups": groups,
        "topk_group": kept,
        "group_fill": "zero" if groups > 1 else "-inf",
        **RENORMALIZED[norm],
    }
    convert = layouts.fused(shared="shared_experts", choice_bias=CHOICE_BIAS)
    built = Built(m.AXK2MoE(c), convert, act(name) | more)
    built.scale, built.choice_shift = {"correction_bias": 0.1}, -2.0 if negative else 1.0
    return built


def softmax_with_groups(d: Draw, model: str, config: str, block: str, flag: bool) -> Built:
    name, scale, shared, norm = d.activation(), d.real(0.3, 3), d.pick(1, 2), d.flag() or not flag
    groups, kept = d.groups()
    m, c = upstream(
        model, config, hidden_size=d.H, moe_intermediate_size=d.I, hidden_act=name,
        n_routed_experts=d.E, num_experts_per_tok=d.K, n_shared_experts=shared, n_group=groups,
        topk_group=kept, routed_scaling_factor=scale, **({"norm_topk_prob": norm} if flag else {}),
    )  # fmt: skip
    more = {
        "routed_scaling_factor": scale,
        "shared_intermediate_size": shared * d.I,
        "num_groups": groups,
        "topk_group": kept,
        "group_fill": "zero" if groups > 1 else "-inf",
        **RENORMALIZED[norm],
    }
    convert = layouts.fused(shared="shared_experts")
    return Built(getattr(m, block)(c), convert, act(name) | more)


@other("mistral4")
def mistral4(d: Draw) -> Built:
    return softmax_with_groups(d, "mistral4", "Mistral4Config", "Mistral4MoE", True)


@other("mistral_large4", raised="float")
def mistral_large4(d: Draw) -> Built:
    return softmax_with_groups(
        d, "mistral_large4", "MistralLarge4TextConfig", "MistralLarge4TextMoE", False
    )


def scaled_softmax(d: Draw, model: str, prefix: str) -> Built:
    name, scale, shared, limited = d.activation(), d.real(0.3, 3), d.pick(1, 2), d.flag()
    groups, kept = d.groups(least=1) if limited else (1, 1)
    m, c = upstream(
        model, f"{prefix}Config", hidden_size=d.H, moe_intermediate_size=d.I, hidden_act=name,
        n_routed_experts=d.E, num_experts_per_tok=d.K, n_shared_experts=shared,
        routed_scaling_factor=scale, n_group=groups, topk_group=kept,
        topk_method="group_limited_greedy" if limited else "greedy",
    )  # fmt: skip
    more = {
        "routed_scaling_factor": scale,
        "shared_intermediate_size": shared * d.I,
        "num_groups": groups,
        "topk_group": kept,
        **GROUPED_BY_MAX[groups > 1],
    }
    convert = layouts.fused(shared="shared_experts")
    return Built(getattr(m, f"{prefix}Moe")(c), convert, act(name) | more)


@other("deepseek_ocr2", raised="type softmax")
def deepseek_ocr2(d: Draw) -> Built:
    return scaled_softmax(d, "deepseek_ocr2", "DeepseekOcr2Text")


@other("unlimited_ocr", raised="type softmax")
def unlimited_ocr(d: Draw) -> Built:
    return scaled_softmax(d, "unlimited_ocr", "UnlimitedOcrText")


def register_softmax() -> None:
    """Register the blocks that are Qwen's or OLMoE's under another name, or nearly."""
    omni = ("qwen3_omni_moe", "Qwen3OmniMoe")
    # name, model, config, block, has norm_topk_prob, has a gated shared expert, size field
    rows = (
        ("flex_olmo", "flex_olmo", "FlexOlmoConfig", "FlexOlmoSparseMoeBlock",
         True, False, "intermediate_size"),
        ("mellum", "mellum", "MellumConfig", "MellumSparseMoeBlock",
         True, False, "moe_intermediate_size"),
        ("qwen3_omni_moe (thinker)", omni[0], f"{omni[1]}TextConfig",
         f"{omni[1]}ThinkerTextSparseMoeBlock", True, False, "moe_intermediate_size"),
        ("qwen3_omni_moe (talker)", omni[0], f"{omni[1]}TalkerTextConfig",
         f"{omni[1]}TalkerTextSparseMoeBlock", True, True, "moe_intermediate_size"),
        ("qwen3_vl_moe", "qwen3_vl_moe", "Qwen3VLMoeTextConfig", "Qwen3VLMoeTextSparseMoeBlock",
         False, False, "moe_intermediate_size"),
        ("qwen3_5_moe", "qwen3_5_moe", "Qwen3_5MoeTextConfig", "Qwen3_5MoeSparseMoeBlock",
         False, True, "moe_intermediate_size"),
        ("qwen4_exp", "qwen4_exp", "Qwen4ExpTextConfig", "Qwen4ExpTextSparseMoeBlock",
         True, True, "moe_intermediate_size"),
    )  # fmt: skip
    for name, *row in rows:

        def build(d: Draw, row=row) -> Built:
            return softmax_block(d, *row)

        other(name, raised="softmax", **({"shared_gated": True} if row[4] else {}))(build)


def softmax_block(
    d: Draw, model: str, config: str, block: str, flag: bool, shared: bool, size: str
) -> Built:
    name, norm = d.activation(), d.flag() or not flag
    values = {size: d.I} | ({"norm_topk_prob": norm} if flag else {})
    more: dict[str, Any] = {"renormalize": norm}
    if shared:
        more["shared_intermediate_size"] = values["shared_expert_intermediate_size"] = d.pick(2, 9)
    m, c = upstream(
        model, config, hidden_size=d.H, hidden_act=name, num_experts=d.E,
        num_experts_per_tok=d.K, **values,
    )  # fmt: skip
    shared_names = {"shared": "shared_expert", "shared_gate": "shared_expert_gate.weight"}
    convert = layouts.fused(**(shared_names if shared else {}))
    return Built(getattr(m, block)(c), convert, act(name) | more)


register_softmax()
