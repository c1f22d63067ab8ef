"""The definition of the layer: float64 loops over tokens, slots and experts, nothing clever."""

from npmoe.naive.capacity import assign_slots, expert_capacity, keep_routes
from npmoe.naive.draws import Draws
from npmoe.naive.layer import moe_backward, moe_forward
from npmoe.naive.losses import entropy_loss, load_balancing_loss, z_loss
from npmoe.naive.results import NaiveForward, NaiveGrads
from npmoe.naive.routing import NaiveRouting, route, route_backward
from npmoe.naive.variation import importance_loss, load_loss
from npmoe.naive.weights import renormalize, renormalize_backward

__all__ = [
    "Draws",
    "NaiveForward",
    "NaiveGrads",
    "NaiveRouting",
    "assign_slots",
    "entropy_loss",
    "expert_capacity",
    "importance_loss",
    "keep_routes",
    "load_balancing_loss",
    "load_loss",
    "moe_backward",
    "moe_forward",
    "renormalize",
    "renormalize_backward",
    "route",
    "route_backward",
    "z_loss",
]
