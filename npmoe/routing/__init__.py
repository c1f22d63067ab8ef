"""Routing: hidden states to experts and weights, every convention by name, and back."""

from npmoe.routing.assignment import quantile_balance, sinkhorn
from npmoe.routing.result import Routing
from npmoe.routing.router import route, route_backward
from npmoe.routing.scoring import score, score_slope, softcap, softcap_backward
from npmoe.routing.selection import group_scores, limit_groups, stable_topk
from npmoe.routing.soft import SoftRouting
from npmoe.routing.weights import normalize_weights, normalize_weights_backward, renormalize_kept

__all__ = [
    "Routing",
    "SoftRouting",
    "group_scores",
    "limit_groups",
    "normalize_weights",
    "normalize_weights_backward",
    "quantile_balance",
    "renormalize_kept",
    "route",
    "route_backward",
    "score",
    "score_slope",
    "sinkhorn",
    "softcap",
    "softcap_backward",
    "stable_topk",
]
