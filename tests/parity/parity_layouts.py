"""Upstream parameter names to npmoe fields: rearrangements, for weights and gradients alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from parity_upstream import Arrays

Convert = Callable[[Arrays], Arrays]


def shared_mlp(p: Arrays, prefix: str, gated: bool = True) -> Arrays:
    """Stack gate over up of a plain MLP."""
    if not gated:
        return {
            "shared_gate_up_proj": p[f"{prefix}.up_proj.weight"],
            "shared_down_proj": p[f"{prefix}.down_proj.weight"],
        }
    gate, up = p[f"{prefix}.gate_proj.weight"], p[f"{prefix}.up_proj.weight"]
    return {
        "shared_gate_up_proj": np.concatenate([gate, up]),
        "shared_down_proj": p[f"{prefix}.down_proj.weight"],
    }


def fused(
    router: str = "gate.weight",
    *,
    experts: str = "experts",
    shared: str | None = None,
    shared_gate: str | None = None,
    choice_bias: str | None = None,
    transposed: bool = False,
    gated: bool = True,
) -> Convert:
    """Convert the v5 layout: gate_up_proj (E, 2I, H), gate half first, and down_proj (E, H, I)."""

    def convert(p: Arrays) -> Arrays:
        first = p[f"{experts}.gate_up_proj" if gated else f"{experts}.up_proj"]
        second = p[f"{experts}.down_proj"]
        if transposed:
            first, second = first.swapaxes(1, 2), second.swapaxes(1, 2)
        out = {"router_weight": p[router], "gate_up_proj": first, "down_proj": second}
        if shared:
            out |= shared_mlp(p, shared, gated)
        if shared_gate:
            out["shared_gate_weight"] = p[shared_gate]
        if choice_bias and choice_bias in p:
            out["selection_bias"] = p[choice_bias].reshape(-1)
        return out

    return convert


def gpt_oss(p: Arrays) -> Arrays:
    """Undo the transposition and the interleaving of gate and up; biases move with the weights."""
    first = p["experts.gate_up_proj"].swapaxes(1, 2)
    bias = p["experts.gate_up_proj_bias"]
    return {
        "router_weight": p["router.weight"],
        "router_bias": p["router.bias"],
        "gate_up_proj": np.concatenate([first[:, ::2], first[:, 1::2]], axis=1),
        "gate_up_bias": np.concatenate([bias[:, ::2], bias[:, 1::2]], axis=1),
        "down_proj": p["experts.down_proj"].swapaxes(1, 2),
        "down_bias": p["experts.down_proj_bias"],
    }


def switch(p: Arrays) -> Arrays:
    """Stack the experts of a ModuleDict."""
    count = sum(name.endswith(".wi.weight") for name in p)
    out = {
        "router_weight": p["router.classifier.weight"],
        "gate_up_proj": np.stack([p[f"experts.expert_{e}.wi.weight"] for e in range(count)]),
        "down_proj": np.stack([p[f"experts.expert_{e}.wo.weight"] for e in range(count)]),
    }
    if "router.classifier.bias" in p:
        out["router_bias"] = p["router.classifier.bias"]
    return out


def dbrx(experts: int) -> Convert:
    """Split the flat (E*I, H) matrices; w2 is stored as (I, H) per expert."""

    def convert(p: Arrays) -> Arrays:
        w1, v1, w2 = (
            a.reshape(experts, -1, a.shape[-1])
            for a in (p[f"experts.mlp.{n}"] for n in ("w1", "v1", "w2"))
        )
        return {
            "router_weight": p["router.layer.weight"],
            "gate_up_proj": np.concatenate([w1, v1], axis=1),
            "down_proj": w2.swapaxes(1, 2),
        }

    return convert
