"""The definition of the layer: float64 loops over tokens, slots and experts, nothing clever."""

from npmoe.naive.capacity import (
    expert_capacity,
    keep_routes,
    renormalize_kept,
    renormalize_kept_backward,
)
from npmoe.naive.layer import NaiveForward, NaiveGrads, moe_backward, moe_forward
from npmoe.naive.losses import entropy_loss, load_balancing_loss, z_loss
from npmoe.naive.routing import route, route_backward

__all__ = [
    "NaiveForward",
    "NaiveGrads",
    "entropy_loss",
    "expert_capacity",
    "keep_routes",
    "load_balancing_loss",
    "moe_backward",
    "moe_forward",
    "renormalize_kept",
    "renormalize_kept_backward",
    "route",
    "route_backward",
    "z_loss",
]
