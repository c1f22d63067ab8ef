"""Configs of published models and designs, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from npmoe.config import MoEConfig
from npmoe.errors import RangeError

# A field of a preset makes sense only beside another one: where an override takes the other one
# away, the preset's field goes with it. Fields given by the caller are never touched.
_GOES_WITH = {
    "renorm_eps": ("renormalize", False),
    "renorm_eps_mode": ("renormalize", False),
    "renorm_p": ("renormalize", False),
    "renormalize_drop": ("renormalize", False),
    "group_score": ("num_groups", 1),
    "group_fill": ("num_groups", 1),
    "topk_group": ("num_groups", 1),
    "shared_gated": ("shared_intermediate_size", 0),
    "selection_bias": ("routing", "hash"),
}
# Sizes that belong together: with another number of experts, groups are the caller's to give.
_GROUPS = ("num_groups", "topk_group")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One published model: what it is, its sizes and its other fields."""

    summary: str
    source: str
    sizes: tuple[int, int, int, int]  # H, I, E, K
    shared: int = 0  # size of the shared expert, in units of I
    fields: dict[str, Any] = field(default_factory=dict)


_HF = "transformers 5.23, models/{0}/modeling_{0}.py"
_DEEPSEEK = {
    "score_fn": "sigmoid",
    "selection_bias": True,
    "group_score": "top2_sum",
    "group_fill": "-inf",
    "renormalize": True,
    "renorm_eps": 1e-20,
}

PRESETS: dict[str, Preset] = {
    "mixtral": Preset(
        summary="softmax, top-k, renormalised",
        source=_HF.format("mixtral"),
        sizes=(4096, 14336, 8, 2),
        fields={"renormalize": True},
    ),
    "qwen2_moe": Preset(
        summary="softmax, top-k, not renormalised; shared expert behind a sigmoid",
        source=_HF.format("qwen2_moe"),
        sizes=(2048, 1408, 60, 4),
        shared=4,
        fields={"shared_gated": True},
    ),
    "qwen3_moe": Preset(
        summary="softmax, top-k, renormalised (as published; the config class defaults to not)",
        source=_HF.format("qwen3_moe"),
        sizes=(2048, 768, 128, 8),
        fields={"renormalize": True},
    ),
    "qwen3_next": Preset(
        summary="softmax, top-k, renormalised; shared expert behind a sigmoid",
        source=_HF.format("qwen3_next"),
        sizes=(2048, 512, 512, 10),
        shared=1,
        fields={"renormalize": True, "shared_gated": True},
    ),
    "olmoe": Preset(
        summary="softmax, top-k, not renormalised",
        source=_HF.format("olmoe"),
        sizes=(2048, 1024, 64, 8),
    ),
    "deepseek_v2": Preset(
        summary="softmax, optional groups by best score filled with 0, scaled; shared expert",
        source=_HF.format("deepseek_v2"),
        sizes=(4096, 1407, 64, 6),
        shared=2,
        fields={"group_score": "max", "group_fill": "zero"},
    ),
    "deepseek_v3": Preset(
        summary="sigmoid, selection bias, groups by best two, renormalised, scaled; shared expert",
        source=_HF.format("deepseek_v3"),
        sizes=(7168, 2048, 256, 8),
        shared=1,
        fields=_DEEPSEEK | {"num_groups": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
    ),
    "deepseek_v4": Preset(
        summary="sqrt(softplus), selection bias, renormalised, scaled; clamped SwiGLU, also shared",
        source=_HF.format("deepseek_v4"),
        sizes=(4096, 2048, 256, 6),
        shared=1,
        fields={
            "score_fn": "sqrtsoftplus",
            "selection_bias": True,
            "renormalize": True,
            "renorm_eps": 1e-20,
            "routed_scaling_factor": 1.5,
            "activation": "swiglu_clamp_pre",
        },
    ),
    "glm4_moe": Preset(
        summary="as deepseek_v3, without groups and scale",
        source=_HF.format("glm4_moe"),
        sizes=(4096, 1408, 128, 8),
        shared=1,
        fields=_DEEPSEEK,
    ),
    "gpt_oss": Preset(
        summary="top-k of logits, softmax of the chosen; biases everywhere; clamped SwiGLU",
        source=_HF.format("gpt_oss"),
        sizes=(2880, 2880, 128, 4),
        fields={
            "router_order": "topk_score",
            "router_bias": True,
            "expert_bias": True,
            "activation": "swiglu_oai",
        },
    ),
    "llama4": Preset(
        summary="top-k of logits, sigmoid of the chosen, applied to the input; shared expert",
        source=_HF.format("llama4"),
        sizes=(5120, 8192, 16, 1),
        shared=1,
        fields={
            "router_order": "topk_score",
            "score_fn": "sigmoid",
            "weight_position": "input",
        },
    ),
    "switch_transformers": Preset(
        summary="softmax, top-1, ReLU; 64 rows per expert and sequence, by position",
        source=_HF.format("switch_transformers"),
        sizes=(768, 2048, 8, 1),
        fields={"activation": "relu", "expert_capacity": 64, "capacity_scope": "sequence"},
    ),
    "ernie4_5_moe": Preset(
        summary="softmax, selection bias, divided by max(sum, 1e-12); shared expert",
        source=_HF.format("ernie4_5_moe"),
        sizes=(2560, 1536, 64, 6),
        shared=2,
        fields={
            "selection_bias": True,
            "renormalize": True,
            "renorm_eps": 1e-12,
            "renorm_eps_mode": "max",
        },
    ),
    "hunyuan_v1_moe": Preset(
        summary="softmax, top-k, renormalised; shared expert",
        source=_HF.format("hunyuan_v1_moe"),
        sizes=(4096, 11008, 1, 1),
        shared=1,
        fields={"renormalize": True},
    ),
    "dbrx": Preset(
        summary="softmax, top-k, divided by the norm of the chosen (renorm_p)",
        source=_HF.format("dbrx"),
        sizes=(6144, 3584, 4, 1),
        fields={"renormalize": True},
    ),
    "granitemoe": Preset(
        summary="top-k of logits, softmax of the chosen",
        source=_HF.format("granitemoe"),
        sizes=(4096, 11008, 8, 2),
        fields={"router_order": "topk_score"},
    ),
    "aria": Preset(
        summary="top-k of logits, softmax of the chosen; shared expert",
        source=_HF.format("aria"),
        sizes=(4096, 4096, 8, 2),
        shared=2,
        fields={"router_order": "topk_score"},
    ),
    "minimax": Preset(
        summary="softmax, top-k, renormalised",
        source=_HF.format("minimax"),
        sizes=(4096, 14336, 8, 2),
        fields={"renormalize": True},
    ),
    "minimax_m2": Preset(
        summary="sigmoid, selection bias, renormalised",
        source=_HF.format("minimax_m2"),
        sizes=(3072, 1536, 256, 8),
        fields={"score_fn": "sigmoid", "selection_bias": True, "renormalize": True},
    ),
    "jamba": Preset(
        summary="softmax, top-k, not renormalised",
        source=_HF.format("jamba"),
        sizes=(4096, 14336, 16, 2),
    ),
    "switch": Preset(
        summary="softmax, top-1, ReLU, jitter; capacity 1.25 in training and 2 in evaluation",
        source="Fedus et al. 2021, Switch Transformers, section 2",
        sizes=(768, 2048, 128, 1),
        fields={
            "activation": "relu",
            "router_jitter": 0.01,
            "capacity_factor": "1.25",
            "eval_capacity_factor": "2",
        },
    ),
    "gshard": Preset(
        summary="softmax, top-2, renormalised, second expert at random; first choices first",
        source="Lepikhin et al. 2020, GShard, section 2.2 and algorithm 1",
        sizes=(1024, 8192, 128, 2),
        fields={
            "activation": "relu",
            "renormalize": True,
            "second_expert_policy": "random",
            "capacity_factor": "1",
            "drop_policy": "k_major",
        },
    ),
    "glam": Preset(
        summary="softmax, top-2 of 64, renormalised; GELU",
        source="Du et al. 2022, GLaM, section 4 (gating as in GShard)",
        sizes=(4096, 16384, 64, 2),
        fields={
            "activation": "gelu",
            "renormalize": True,
            "capacity_factor": "1",
            "drop_policy": "k_major",
        },
    ),
    "v_moe": Preset(
        summary="softmax with noise 1/E, top-2, not renormalised; batch-priority routing; GELU",
        source="Riquelme et al. 2021, V-MoE, sections 2 and 4.1",
        sizes=(768, 3072, 32, 2),
        fields={
            "activation": "gelu_tanh",
            "expert_bias": True,
            "capacity_factor": "1.05",
            "capacity_rounding": "round",
            "drop_policy": "batch_priority",
        },
    ),
    "deepspeed_top2": Preset(
        summary="softmax, second expert drawn, renormalised after the drop; first choices first",
        source="DeepSpeed, deepspeed/moe/sharded_moe.py, top2gating",
        sizes=(768, 3072, 8, 2),
        fields={
            "activation": "gelu",
            "expert_bias": True,
            "renormalize": True,
            "renorm_eps": 2.0**-23,
            "renorm_eps_mode": "max",
            "renormalize_drop": "after",
            "second_expert_policy": "sampling",
            "capacity_factor": "1",
            "capacity_rounding": "deepspeed_f32",
            "min_capacity": 8,
            "drop_policy": "k_major",
        },
    ),
    "soft_moe": Preset(
        summary="slots of weighted tokens, one per expert; GELU",
        source="Puigcerver et al. 2023, From Sparse to Soft Mixtures of Experts",
        sizes=(768, 3072, 128, 1),
        fields={
            "routing": "soft",
            "expert_capacity": 1,
            "activation": "gelu_tanh",
            "expert_bias": True,
        },
    ),
    "expert_choice": Preset(
        summary="every expert takes its best tokens, top_k experts per token on average; GELU",
        source="Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing",
        sizes=(4096, 16384, 64, 2),
        fields={"routing": "expert_choice", "capacity_factor": "1", "activation": "gelu"},
    ),
}


def preset(name: str, **overrides: Any) -> MoEConfig:
    """Return the config of a published model, with some fields changed.

    Parameters
    ----------
    name : str
        A key of `presets()`.
    **overrides
        Fields of MoEConfig. Sizes default to the published ones; the shared expert follows
        intermediate_size; groups default to none if num_experts is given without them.
        A field of the preset that an override makes meaningless (renorm_eps under
        renormalize=False) is left out; contradictions between overrides raise.

    Returns
    -------
    MoEConfig

    Raises
    ------
    RangeError
        For an unknown name or field, or a combination that means nothing.

    Examples
    --------
    >>> preset("mixtral", hidden_size=64, intermediate_size=128).renormalize
    True
    """
    if name not in PRESETS:
        import difflib  # noqa: PLC0415  # needed for a message only

        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RangeError(
            f"preset: name must be a known preset, got {name!r}.{hint} "
            f"Known: {', '.join(sorted(PRESETS))}."
        )
    known = MoEConfig.__dataclass_fields__
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise RangeError(
            f"preset: overrides must be fields of MoEConfig, got {', '.join(unknown)}."
        )
    chosen = PRESETS[name]
    names = ("hidden_size", "intermediate_size", "num_experts", "top_k")
    fields = dict(zip(names, chosen.sizes, strict=True)) | chosen.fields
    size = overrides.get("intermediate_size", chosen.sizes[1])
    if chosen.shared and isinstance(size, int):
        fields["shared_intermediate_size"] = chosen.shared * size
    experts = overrides.get("num_experts", chosen.sizes[2])
    if name == "v_moe" and isinstance(experts, int) and experts > 0:
        fields["router_noise_std"] = 1.0 / experts
    if "num_experts" in overrides and "num_groups" not in overrides:
        for group in _GROUPS:
            fields.pop(group, None)
    merged: dict[str, Any] = fields | overrides
    for dependent, (other, without) in _GOES_WITH.items():
        if dependent in fields and dependent not in overrides:
            value = merged.get(other, known[other].default)
            if value == without:
                merged.pop(dependent, None)
    return MoEConfig(**merged)


def presets() -> dict[str, str]:
    """Return every preset's name and what it is, in one line.

    Examples
    --------
    >>> presets()["jamba"]
    'softmax, top-k, not renormalised'
    """
    return {name: entry.summary for name, entry in PRESETS.items()}
