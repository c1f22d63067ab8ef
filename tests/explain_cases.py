"""Small layers of every kind, for the tests of `npmoe.explain`."""

from __future__ import annotations

import numpy as np

import npmoe
from npmoe import MoEConfig

H, T = 8, 12


def problem(tokens=T, dtype="float64", scale=1.0, **fields):
    cfg = MoEConfig(hidden_size=H, intermediate_size=4, **fields)
    rng = np.random.default_rng(7)
    params = npmoe.init_params(cfg, rng, dtype)
    params.router_weight[...] = scale * rng.standard_normal(params.router_weight.shape)
    for name in ("router_bias", "selection_bias"):
        if getattr(params, name) is not None:
            getattr(params, name)[...] = 0.1 * rng.standard_normal(cfg.router_size)
    return rng.standard_normal((2, tokens // 2, H)).astype(dtype), params, cfg


def generator():
    return np.random.default_rng(3)


CASES = {
    "plain": {"num_experts": 6, "top_k": 2},
    "capacity": {"num_experts": 4, "top_k": 2, "renormalize": True, "capacity_factor": "1/2"},
    "deepseek": {
        **{"num_experts": 12, "top_k": 4, "num_groups": 4, "topk_group": 2},
        **{"score_fn": "sigmoid", "selection_bias": True, "renormalize": True},
        **{"renorm_eps": 1e-20, "routed_scaling_factor": 2.5},
    },
    "groups": {
        **{"num_experts": 12, "top_k": 5, "num_groups": 3, "topk_group": 2},
        **{"group_score": "topk_div", "group_fill": "zero"},
    },
    "gpt_oss": {
        **{"num_experts": 6, "top_k": 3, "router_order": "topk_score", "router_bias": True},
        **{"logit_softcap": 3.0, "router_noise_std": 0.5, "router_jitter": 0.1},
    },
    "after": {
        **{"num_experts": 4, "top_k": 3, "renormalize": True, "renormalize_drop": "after"},
        **{"capacity_factor": "1/2", "drop_policy": "probability", "slot_order": "token"},
    },
    "gshard": {
        **{"num_experts": 4, "renormalize": True, "second_expert_policy": "random"},
        **{"capacity_factor": "1", "drop_policy": "k_major"},
    },
    "sampling": {
        **{"num_experts": 6, "second_expert_policy": "sampling", "expert_capacity": 2},
        **{"drop_policy": "random", "capacity_scope": "sequence", "expert_dropout": 0.1},
    },
    "priority": {
        **{"num_experts": 4, "expert_capacity": 1, "drop_policy": "batch_priority"},
        "capacity_scope": "sequence",
    },
    "identity": {"num_experts": 3, "num_identity_experts": 2, "top_k": 3},
    "dense": {"num_experts": 4, "routing": "dense", "router_dtype": "float32"},
    "expert_choice": {"num_experts": 4, "routing": "expert_choice", "capacity_factor": "1"},
    "expert_choice per sequence": {
        **{"num_experts": 4, "routing": "expert_choice", "expert_capacity": 2},
        "capacity_scope": "sequence",
    },
}
