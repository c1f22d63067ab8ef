"""A shared expert as routed experts that every token goes to, and back.

An expert of size S = n*I is the sum of n experts of size I, since the activation works on every
unit alone. Serving programs run them in the same grouped products as the routed ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from npmoe._checks import Axes, check_integer_ids, check_same_dtype, require
from npmoe._typing import HostArray
from npmoe.errors import PlanError, RangeError
from npmoe.params import MoEParams


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutedExperts:
    """Parameters of a layer and the routes of its tokens.

    params : MoEParams
    topk_ids : (T, K) integer array
        -1 where there is no route.
    topk_weights : (T, K) float array
    """

    params: MoEParams
    topk_ids: HostArray
    topk_weights: HostArray


def fuse_shared_experts(
    params: MoEParams,
    topk_ids: HostArray,
    topk_weights: HostArray,
    *,
    token_mask: HostArray | None = None,
    later_scale: float = 1.0,
) -> RoutedExperts:
    """Turn a shared expert of size S = n*I into the experts E, ..., E+n-1 of every token.

    Parameters
    ----------
    params : MoEParams
        With a shared expert that is added as it is: no shared_gate_weight. Its arrays have the
        dtype of the routed experts', also if that is half precision. That it has their
        activation, and that the two are summed, is not checked.
    topk_ids : (T, K) integer array
        Below E, or -1.
    topk_weights : (T, K) float array
    token_mask : (T,) bool array, optional
        False for tokens that get nothing: their new ids are -1, their new weights 0.
    later_scale : float
        By what the caller still multiplies all weights, as `routed_scaling_factor` in programs
        that scale the output; the new weights are 1 / later_scale.

    Returns
    -------
    RoutedExperts
        Expert arrays with E+n experts, biases of the new ones 0, no shared expert, and n columns
        more. The arrays named are new; the router's are those given.

    Raises
    ------
    ShapeError, DTypeError
    RangeError
        If there is no shared expert, or it is gated, or I does not divide S, or later_scale is 0
        or not finite.
    PlanError
        If an id is E or above, as of an identity expert.

    Notes
    -----
    A capacity must be applied before: the new routes would count, and could be dropped.

    References
    ----------
    SGLang, biased_grouped_topk with num_fused_shared_experts.
    """
    function = "fuse_shared_experts"
    gate_up, down, gated = _check_shared(function, params)
    E, I = params.gate_up_proj.shape[0], params.down_proj.shape[2]
    H, n, halves = len(down), down.shape[1] // I, 2 if gated else 1
    _check_routes(function, topk_ids, topk_weights, E)
    require(
        bool(np.isfinite(later_scale)) and later_scale != 0.0,
        f"{function}: later_scale must be finite and not 0, got {later_scale!r}.",
    )
    tokens = len(topk_ids)
    mask = np.ones(tokens, bool) if token_mask is None else np.asarray(token_mask)
    axes = Axes(function)
    axes.bind(f"topk_ids {topk_ids.shape}", T=tokens)
    axes.check("token_mask", mask, "T")
    rows = gate_up.reshape(halves, n, I, H).swapaxes(0, 1)
    columns = down.reshape(H, n, I).swapaxes(0, 1)
    biases = {
        name: np.concatenate([bias, np.zeros((n, bias.shape[1]), bias.dtype)])
        for name in ("gate_up_bias", "down_bias")
        if (bias := getattr(params, name)) is not None
    }
    fused = replace(
        params,
        gate_up_proj=np.concatenate([params.gate_up_proj, rows.reshape(n, halves * I, H)]),
        down_proj=np.concatenate([params.down_proj, columns]),
        shared_gate_up_proj=None,
        shared_down_proj=None,
        **biases,
    )
    ids = np.where(mask[:, None], np.arange(E, E + n), -1).astype(topk_ids.dtype)
    weights = np.where(np.repeat(mask[:, None], n, axis=1), 1.0 / later_scale, 0.0)
    return RoutedExperts(
        params=fused,
        topk_ids=np.hstack([topk_ids, ids]),
        topk_weights=np.hstack([topk_weights, weights.astype(topk_weights.dtype)]),
    )


def unfuse_shared_experts(fused: RoutedExperts, num_shared: int) -> RoutedExperts:
    """Invert `fuse_shared_experts`: make the last experts one shared expert again.

    Parameters
    ----------
    fused : RoutedExperts
    num_shared : int
        n, at least 1 and below the number of experts.

    Returns
    -------
    RoutedExperts
        As it was given to `fuse_shared_experts`, new arrays but for the router's.

    Raises
    ------
    RangeError
        If num_shared is out of range, or a bias of the last experts is not 0, which a shared
        expert does not have.
    PlanError
        If the last columns do not hold the last experts.
    """
    function = "unfuse_shared_experts"
    params, n = fused.params, num_shared
    E = params.gate_up_proj.shape[0] - n
    require(
        n >= 1 and E >= 1,
        f"{function}: num_shared must be at least 1 and below the {E + n} experts, got {n}.",
    )
    own, extra = np.split(fused.topk_ids, [max(fused.topk_ids.shape[1] - n, 0)], axis=1)
    expected = np.broadcast_to(np.arange(E, E + n), (len(own), n))
    if extra.shape[1] != n or ((extra != expected) & (extra != -1)).any() or (own >= E).any():
        raise PlanError(
            f"{function}: topk_ids must hold the ids {E} to {E + n - 1} in the last {n} columns "
            "and nowhere else, or -1."
        )
    biases = {}
    for name in ("gate_up_bias", "down_bias"):
        bias = getattr(params, name)
        if bias is not None:
            require(
                not bias[E:].any(),
                f"{function}: params.{name} must be 0 for the last {n} experts, got "
                f"{float(np.abs(bias[E:]).max())!r}. A shared expert has no bias.",
            )
            biases[name] = bias[:E].copy()
    H, I = params.down_proj.shape[1:]
    halves = params.gate_up_proj.shape[1] // I
    rows = params.gate_up_proj[E:].reshape(n, halves, I, H).swapaxes(0, 1)
    split = replace(
        params,
        gate_up_proj=params.gate_up_proj[:E].copy(),
        down_proj=params.down_proj[:E].copy(),
        shared_gate_up_proj=rows.reshape(halves * n * I, H),
        shared_down_proj=params.down_proj[E:].swapaxes(0, 1).reshape(H, n * I),
        **biases,
    )
    return RoutedExperts(
        params=split, topk_ids=own.copy(), topk_weights=fused.topk_weights[:, : own.shape[1]].copy()
    )


def _check_shared(function: str, params: MoEParams) -> tuple[HostArray, HostArray, bool]:
    """Return the shared expert, and whether it is gated; raise unless it fits the others."""
    gate_up, down = params.shared_gate_up_proj, params.shared_down_proj
    if gate_up is None or down is None:
        raise RangeError(
            f"{function}: params must have a shared expert, got None for shared_gate_up_proj or "
            "shared_down_proj."
        )
    if params.shared_gate_weight is not None:
        raise RangeError(
            f"{function}: params.shared_gate_weight must be None, got an array. A gated shared "
            "expert has a weight of its own for every token, which no route carries."
        )
    axes = Axes(function)
    axes.check("params.down_proj", params.down_proj, "E", "H", "I")
    I = params.down_proj.shape[2]
    gated = params.gate_up_proj.ndim != 3 or params.gate_up_proj.shape[1] != I
    axes.check("params.gate_up_proj", params.gate_up_proj, "E", "2*I" if gated else "I", "H")
    axes.check("params.shared_down_proj", down, "H", "S")
    axes.check("params.shared_gate_up_proj", gate_up, "2*S" if gated else "S", "H")
    for name, array in (("shared_gate_up_proj", gate_up), ("shared_down_proj", down)):
        routed = name.removeprefix("shared_")
        dtype, source = getattr(params, routed).dtype, f"params.{routed}"
        check_same_dtype(function, f"params.{name}", array, dtype, source)
    S = down.shape[1]
    if I < 1 or S < 1 or S % I:
        raise RangeError(
            f"{function}: the shared expert's size must be a multiple of I = {I}, got {S}."
        )
    return gate_up, down, gated


def _check_routes(
    function: str, topk_ids: HostArray, topk_weights: HostArray, num_experts: int
) -> None:
    """Raise unless ids and weights are (T, K) and every id is -1 or one of an expert."""
    check_integer_ids(function, "topk_ids", topk_ids)
    axes = Axes(function)
    axes.check("topk_ids", topk_ids, "T", "K")
    axes.check("topk_weights", topk_weights, "T", "K")
    if topk_ids.size and (topk_ids.min() < -1 or topk_ids.max() >= num_experts):
        raise PlanError(
            f"{function}: topk_ids must lie in [-1, {num_experts}), got "
            f"{int(topk_ids.min())} to {int(topk_ids.max())}. Identity experts cannot be fused."
        )
