"""Craft around a trained layer: distil, upcycle, adapt, and replay what was chosen."""

from npmoe.craft.adapters import (
    AdaptedMatrix,
    AdapterBackend,
    ExpertAdapters,
    attach_adapters,
    init_adapters,
    merge_adapters,
    merge_adapters_backward,
    unmerge_adapters,
)
from npmoe.craft.distillation import distillation_loss
from npmoe.craft.routing_cache import RoutingCache
from npmoe.craft.upcycling import upcycle_mlp, upcycle_model

__all__ = [
    "AdaptedMatrix",
    "AdapterBackend",
    "ExpertAdapters",
    "RoutingCache",
    "attach_adapters",
    "distillation_loss",
    "init_adapters",
    "merge_adapters",
    "merge_adapters_backward",
    "unmerge_adapters",
    "upcycle_mlp",
    "upcycle_model",
]
