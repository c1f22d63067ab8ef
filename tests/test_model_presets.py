"""Presets: published values, what follows an override, and every message."""

from __future__ import annotations

from typing import Any

import pytest

import npmoe
from npmoe import RangeError

SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 6}
# Defaults of the config classes of transformers 5.23, and of the papers; H, I, E, K and the rest.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_experts": 8, "top_k": 2, "renormalize": True},
    "qwen2_moe": {"num_experts": 60, "top_k": 4, "renormalize": False, "shared_gated": True}
    | {"shared_intermediate_size": 5632},
    "qwen3_moe": {"num_experts": 128, "top_k": 8, "renormalize": True},
    "qwen3_next": {"num_experts": 512, "top_k": 10, "renormalize": True, "shared_gated": True}
    | {"shared_intermediate_size": 512},
    "olmoe": {"num_experts": 64, "top_k": 8, "renormalize": False},
    "deepseek_v2": {"num_experts": 64, "num_groups": 1, "shared_intermediate_size": 2814},
    "deepseek_v3": {"num_experts": 256, "top_k": 8, "num_groups": 8, "topk_group": 4}
    | {"routed_scaling_factor": 2.5, "renorm_eps": 1e-20, "shared_intermediate_size": 2048},
    "deepseek_v4": {"num_experts": 256, "top_k": 6, "score_fn": "sqrtsoftplus"}
    | {"routed_scaling_factor": 1.5, "renorm_eps": 1e-20, "activation": "swiglu_clamp_pre"},
    "glm4_moe": {"num_experts": 128, "top_k": 8, "num_groups": 1, "renorm_eps": 1e-20},
    "gpt_oss": {"num_experts": 128, "top_k": 4, "activation": "swiglu_oai", "expert_bias": True},
    "llama4": {"num_experts": 16, "top_k": 1, "weight_position": "input"}
    | {"shared_intermediate_size": 8192},
    "switch_transformers": {"num_experts": 8, "top_k": 1, "expert_capacity": 64}
    | {"capacity_scope": "sequence", "activation": "relu"},
    "ernie4_5_moe": {"num_experts": 64, "top_k": 6, "renorm_eps": 1e-12}
    | {"renorm_eps_mode": "max", "shared_intermediate_size": 3072},
    "hunyuan_v1_moe": {"num_experts": 1, "top_k": 1, "shared_intermediate_size": 11008},
    "dbrx": {"num_experts": 4, "top_k": 1, "renormalize": True, "renorm_p": 1},
    "granitemoe": {"num_experts": 8, "top_k": 2, "router_order": "topk_score"},
    "aria": {"num_experts": 8, "top_k": 2, "shared_intermediate_size": 8192},
    "minimax": {"num_experts": 8, "top_k": 2, "renormalize": True},
    "minimax_m2": {"num_experts": 256, "top_k": 8, "renorm_eps": 0.0, "score_fn": "sigmoid"},
    "jamba": {"num_experts": 16, "top_k": 2, "renormalize": False},
    "switch": {"top_k": 1, "router_jitter": 0.01, "activation": "relu"},
    "gshard": {"top_k": 2, "second_expert_policy": "random", "drop_policy": "k_major"},
    "glam": {"num_experts": 64, "top_k": 2, "renormalize": True},
    "v_moe": {"num_experts": 32, "top_k": 2, "router_noise_std": 1 / 32}
    | {"drop_policy": "batch_priority", "capacity_rounding": "round"},
    "deepspeed_top2": {"top_k": 2, "second_expert_policy": "sampling", "min_capacity": 8}
    | {"renormalize_drop": "after", "renorm_eps": 2.0**-23, "capacity_rounding": "deepspeed_f32"},
    "soft_moe": {"routing": "soft", "expert_capacity": 1},
    "expert_choice": {"routing": "expert_choice", "top_k": 2},
}


def test_every_preset_is_held_to_something() -> None:
    assert npmoe.presets().keys() == PUBLISHED.keys()
    assert all(len(line) < 95 and "\n" not in line for line in npmoe.presets().values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    cfg = npmoe.preset(name)
    assert {n: getattr(cfg, n) for n in PUBLISHED[name]} == PUBLISHED[name]
    assert npmoe.MoEConfig.from_json(cfg.to_json()) == cfg


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_ones_own(name: str) -> None:
    top_k = 1 if name in ("switch", "switch_transformers", "llama4") else 2
    cfg = npmoe.preset(name, **SIZES, num_experts=4, top_k=top_k)
    assert (cfg.hidden_size, cfg.intermediate_size, cfg.num_experts) == (8, 6, 4)
    assert cfg.num_groups == 1
    assert cfg.shared_intermediate_size % 6 == 0


def test_what_goes_with_an_override() -> None:
    plain = npmoe.preset("deepseek_v3", **SIZES, num_experts=8, top_k=2, renormalize=False)
    assert (plain.renorm_eps, plain.group_score) == (0.0, "top2_sum")
    grouped = npmoe.preset("deepseek_v2", **SIZES, num_experts=8, top_k=2, num_groups=4)
    assert (grouped.group_score, grouped.group_fill) == ("max", "zero")
    assert npmoe.preset("qwen2_moe", **SIZES, shared_intermediate_size=0).shared_gated is False
    assert npmoe.preset("deepseek_v4", **SIZES, routing="hash").selection_bias is False
    assert npmoe.preset("deepseek_v3", **SIZES).shared_intermediate_size == 6
    assert npmoe.preset("v_moe", num_experts=4).router_noise_std == 0.25


def message(*arguments: Any, **overrides: Any) -> str:
    with pytest.raises(RangeError) as caught:
        npmoe.preset(*arguments, **overrides)
    return str(caught.value)


def test_messages() -> None:
    assert message("mixtrall").startswith(
        "preset: name must be a known preset, got 'mixtrall'. Did you mean 'mixtral'? Known: aria, "
    )
    assert message("zzz").startswith("preset: name must be a known preset, got 'zzz'. Known: aria,")
    assert message("mixtral", zeta=1, alpha=2) == (
        "preset: overrides must be fields of MoEConfig, got alpha, zeta."
    )
    # What the caller asks for is never dropped.
    assert "renorm_eps must stay 0.0" in message("mixtral", renormalize=False, renorm_eps=1e-9)
    assert "second_expert_policy" in message("gshard", top_k=3)
    for wrong in ("6", None, 2.5):
        assert "intermediate_size must be an integer" in message("llama4", intermediate_size=wrong)
        assert "num_experts must be an integer" in message("v_moe", num_experts=wrong)
