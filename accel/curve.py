"""The activations of the experts as every kernel takes them: five curves with limits.

Some of the limits are infinite::

    act = min(v(min(g, before)), after) * (clip(u, -clip, clip) + shift)

or v(g) alone. The formulas are those of `npmoe.activations`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.activations import ACTIVATIONS
from npmoe.config import MoEConfig

SILU, GELU, GELU_TANH, RELU, RELU2 = range(5)
_CURVES = {
    **dict.fromkeys(
        ("swiglu", "swiglu_clamp_pre", "swiglu_clamp_post", "swiglu_oai", "silu"), SILU
    ),
    **dict.fromkeys(("geglu", "gelu"), GELU),
    **dict.fromkeys(("geglu_tanh", "gelu_tanh"), GELU_TANH),
    **dict.fromkeys(("reglu", "relu"), RELU),
    "relu2": RELU2,
}


@dataclass(frozen=True, slots=True)
class Curve:
    """An activation as the kernels take it."""

    kind: int
    gated: bool
    settings: HostArray  # alpha, before, after, clip, shift


def curve_of(cfg: MoEConfig, dtype: Any, *, shared: bool = False) -> Curve:
    """Return the activation of a config."""
    name, alpha, limit = cfg.activation_call(shared=shared)
    family = ACTIVATIONS[name]
    alpha = family.default_alpha if alpha is None else alpha
    limit = family.default_limit if limit is None else limit
    none = math.inf
    settings = (
        1.0 if alpha is None else alpha,
        limit if name in ("swiglu_clamp_pre", "swiglu_oai") else none,
        limit if name == "swiglu_clamp_post" else none,
        none if limit is None else limit,
        1.0 if name == "swiglu_oai" else 0.0,
    )
    return Curve(_CURVES[name], family.gated, np.array(settings, dtype))
