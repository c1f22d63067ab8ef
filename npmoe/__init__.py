"""Mixture of Experts in NumPy, with hand-written forward and backward.

Public names are loaded at their first use.

>>> import npmoe, numpy as np
>>> cfg = npmoe.MoEConfig(hidden_size=8, intermediate_size=16, num_experts=4, top_k=2)
>>> params = npmoe.init_params(cfg, rng=0)
>>> x = np.ones((3, 8), np.float32)
>>> output, saved = npmoe.moe_forward(x, params, cfg)
>>> grads = npmoe.moe_backward(np.ones_like(output), saved, params)
>>> output.shape, grads.gate_up_proj.shape
((3, 8), (4, 32, 8))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy  # noqa: F401  # fails here and now where NumPy is missing

from npmoe._version import __version__

if TYPE_CHECKING:
    from npmoe import losses
    from npmoe.backends import available_backends, get_backend, use_backend
    from npmoe.balancing import LoadCounter, update_selection_bias
    from npmoe.capacity import expert_capacity
    from npmoe.config import MoEConfig
    from npmoe.dispatch import DispatchPlan
    from npmoe.errors import (
        BackendUnavailableError,
        CheckpointError,
        DataError,
        DTypeError,
        GradientError,
        NpmoeError,
        PlanError,
        RangeError,
        ShapeError,
        UnsupportedError,
    )
    from npmoe.explanation import Explanation, explain
    from npmoe.finite_differences import GradcheckReport, gradcheck
    from npmoe.layer import MoELayer, moe_backward, moe_forward
    from npmoe.model_presets import preset, presets
    from npmoe.params import MoEGrads, MoEParams, init_params
    from npmoe.plans.blocks import BlockPlan, align_block_size, align_block_size_batched
    from npmoe.plans.validation import PlanFinding, validate_batched_plan, validate_plan
    from npmoe.routing import Routing
    from npmoe.saved import SavedTensors
    from npmoe.stats import LoadStats

__all__ = [
    "BackendUnavailableError",
    "BlockPlan",
    "CheckpointError",
    "DTypeError",
    "DataError",
    "DispatchPlan",
    "Explanation",
    "GradcheckReport",
    "GradientError",
    "LoadCounter",
    "LoadStats",
    "MoEConfig",
    "MoEGrads",
    "MoELayer",
    "MoEParams",
    "NpmoeError",
    "PlanError",
    "PlanFinding",
    "RangeError",
    "Routing",
    "SavedTensors",
    "ShapeError",
    "UnsupportedError",
    "__version__",
    "align_block_size",
    "align_block_size_batched",
    "available_backends",
    "expert_capacity",
    "explain",
    "get_backend",
    "gradcheck",
    "init_params",
    "losses",
    "moe_backward",
    "moe_forward",
    "preset",
    "presets",
    "update_selection_bias",
    "use_backend",
    "validate_batched_plan",
    "validate_plan",
]

# Where each public name lives; a test holds this table to the imports above, made for checkers.
_HOMES = {
    "balancing": ("LoadCounter", "update_selection_bias"),
    "backends": ("available_backends", "get_backend", "use_backend"),
    "plans.blocks": ("BlockPlan", "align_block_size", "align_block_size_batched"),
    "capacity": ("expert_capacity",),
    "config": ("MoEConfig",),
    "dispatch": ("DispatchPlan",),
    "errors": (
        *("BackendUnavailableError", "CheckpointError", "DataError", "DTypeError"),
        *("GradientError", "NpmoeError", "PlanError", "RangeError", "ShapeError"),
        "UnsupportedError",
    ),
    "explanation": ("Explanation", "explain"),
    "finite_differences": ("GradcheckReport", "gradcheck"),
    "layer": ("MoELayer", "moe_backward", "moe_forward"),
    "params": ("MoEGrads", "MoEParams", "init_params"),
    "plans.validation": ("PlanFinding", "validate_batched_plan", "validate_plan"),
    "model_presets": ("preset", "presets"),
    "routing": ("Routing",),
    "saved": ("SavedTensors",),
    "stats": ("LoadStats",),
}


def __getattr__(name: str) -> Any:
    """Load a public name at its first use."""
    if name == "losses":
        return import_module("npmoe.losses")
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"npmoe.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'npmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
