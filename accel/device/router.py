"""The usual router as one launch: `accel/kernels/router.cu`."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmoe._typing import Array
from npmoe.config import MoEConfig

from .kernel import Device, InOut, Kernel, Out
from .tilings import real_name

# What four warps keep in 48 KB of shared memory, in float64.
MOST_EXPERTS = 1024
_SCORES = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}
_POLICIES = {"raise": 0, "clamp": 1, "drop": 2}
_I = np.int32


def has_fast_route(cfg: MoEConfig) -> bool:
    """Return whether the kernel knows the config's rules; the others are the reference's."""
    return (
        cfg.routing == "token_choice"
        and cfg.router_size <= MOST_EXPERTS
        and cfg.num_groups == 1
        and cfg.renorm_p == 1
        and cfg.second_expert_policy == "all"
        and cfg.renormalize_drop == "before"
    )


def route_rows(
    device: Device,
    logits: Array,
    cfg: MoEConfig,
    selection_bias: Array | None,
    token_mask: Array | None,
    broken: Array,
) -> dict[str, Array | None]:
    """Return probs, topk_ids, topk_weights and token_mask of a `Routing`; sets ``broken[0]``."""
    T, E = logits.shape
    K, real = cfg.top_k, np.dtype(logits.dtype).type
    probs, valid = device.empty((T, E), logits.dtype), device.empty(T, np.bool_)
    ids, weights = device.empty((T, K), _I), device.empty((T, K), logits.dtype)
    softmax, after = cfg.score_fn == "softmax", cfg.router_order == "topk_score"
    bias: Any = None
    if selection_bias is not None:
        bias = device.contiguous(selection_bias.astype(logits.dtype, copy=False))
    device.launch(
        Kernel("router", "route_rows", (("REAL", real_name(logits.dtype)),)), (-(-T // 4),), 128,
        [
            device.contiguous(logits), bias,
            None if token_mask is None else device.contiguous(token_mask),
            _I(T), _I(E), _I(K), _I(_SCORES[cfg.score_fn]),
            _I(after or cfg.selection_bias_on == "logits"), _I(softmax and after),
            _I(cfg.renormalize and (cfg.renorm_single or K > 1)), real(cfg.renorm_eps),
            _I(cfg.renorm_eps_mode == "max"), real(cfg.routed_scaling_factor),
            _I(_POLICIES[cfg.nan_policy]), Out(probs), Out(ids), InOut(weights), Out(valid),
            InOut(broken),
        ],
        shared_mem=4 * E * logits.dtype.itemsize,
    )  # fmt: skip
    return {
        "probs": probs,
        "topk_ids": ids,
        "topk_weights": weights,
        "token_mask": valid if cfg.nan_policy == "drop" else token_mask,
    }
