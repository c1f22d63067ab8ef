"""Every option runs through the verbs alone: the layer on a device that refuses the host."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import npmoe
from accel import loopback
from npmoe import MoEConfig
from npmoe.tree import map_arrays, named_arrays

SIZES: dict[str, Any] = {"hidden_size": 4, "intermediate_size": 3, "num_experts": 8}
# Each option at least once, in combinations that mean something.
OPTIONS: list[dict[str, Any]] = [
    *({"preset": name} for name in npmoe.presets()),
    {"num_identity_experts": 2, "router_jitter": 0.1, "router_noise_std": 0.2},
    {"num_identity_experts": 2, "expert_capacity": 2, "renormalize": True}
    | {"renormalize_drop": "after", "renorm_p": 2},
    {"logit_softcap": 2.0, "selection_bias": True, "selection_bias_on": "logits"},
    {"num_groups": 4, "topk_group": 2, "group_score": "topk_div", "router_dtype": "float64"},
    {"weight_position": "mid", "expert_bias": True, "expert_dropout": 0.5},
    {"weight_position": "input", "expert_bias": True, "expert_dropout": 0.5},
    {"shared_intermediate_size": 5, "shared_gated": True, "shared_combine": "average"}
    | {"output_bias": True},
    {"expert_capacity": 2, "capacity_scope": "sequence", "drop_policy": "random"}
    | {"slot_order": "token"},
    {"capacity_factor": "0.5", "capacity_scope": "sequence", "drop_policy": "batch_priority"},
    {"routing": "dense", "score_fn": "sigmoid", "renormalize": True},
    {"routing": "hash", "router_order": "topk_score"},
    {"routing": "expert_choice", "expert_capacity": 1, "capacity_scope": "sequence"},
    {"routing": "soft", "expert_capacity": 2, "nan_policy": "drop"},
]


def config(options: dict[str, Any]) -> MoEConfig:
    fields = dict(options)
    if "preset" not in fields:
        return MoEConfig(**SIZES, **fields)
    name = fields.pop("preset")
    return npmoe.preset(name, **SIZES, top_k=1 if name.startswith(("switch", "llama4")) else 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(map(str, o.values())))
def test_every_option_computes_in_verbs(options: dict[str, Any], masked: bool) -> None:
    cfg = config(options)
    rng = np.random.default_rng(1)
    params = map_arrays(
        lambda _, leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(leaf.dtype),
        npmoe.init_params(cfg, 2),
    )
    host: dict[str, Any] = {
        "x": rng.standard_normal((2, 6, 4)).astype(np.float32),
        "grad": rng.standard_normal((2, 6, 4)).astype(np.float32),
    }
    if masked:
        host["token_mask"] = rng.random((2, 6)) < 0.6
        host["x"][~host["token_mask"]] = np.nan
        host["grad"][~host["token_mask"]] = np.nan
    if cfg.routing == "hash":
        host["topk_ids"] = np.stack([rng.permutation(8)[:2] for _ in range(12)]).reshape(2, 6, 2)
    found = {}
    for name in ("reference", "loopback"):
        backend = npmoe.get_backend(name)
        moved = {n: backend.asarray(a) for n, a in host.items()}
        there = map_arrays(lambda _, a, move=backend.asarray: move(a), params)
        x, grad = moved.pop("x"), moved.pop("grad")
        with loopback.verbs_only():
            output, saved = npmoe.moe_forward(
                x, there, cfg, backend, np.random.default_rng(5), **moved
            )
            assert saved is not None
            grads = npmoe.moe_backward(grad, saved, there)
        results = {f.name: getattr(grads, f.name) for f in dataclasses.fields(grads)}
        results |= {"output": output, "ids": saved.routing.topk_ids, "rows": saved.plan.row_ids}
        found[name] = {
            n: backend.asnumpy(a).tobytes() for n, a in results.items() if a is not None
        } | {"stats": str(saved.stats())}
        present = {n for n, _ in named_arrays(params)} - {"selection_bias"}
        assert present | {"hidden_states", "output", "ids", "rows", "stats"} == set(found[name])
    assert found["loopback"] == found["reference"]
    values = np.frombuffer(found["reference"]["output"], np.float32)
    assert np.isfinite(values).all()
    if masked:
        assert not values.reshape(12, 4)[~host["token_mask"].ravel()].any()
