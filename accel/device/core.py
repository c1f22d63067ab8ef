"""The expert core in four products: eq. (3) to (11) of `npmoe.layer`, nothing read back.

Forward: gather + gate_up + activation, down + weight of the route, combine. Backward: down
transposed + activation backward + dots, two weight gradients, gate_up transposed, combine. Saved is
gate_up alone; expert outputs are never stored for the backward pass. Rows are T*K, of which the
first R mean something.
"""

from __future__ import annotations

from npmoe._typing import Array
from npmoe.backends import ExpertGrads
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan
from npmoe.experts import target
from npmoe.params import MoEParams

from ..curve import curve_of
from . import rows
from .kernel import Device
from .products import (
    ACTIVATE,
    ACTIVATE_BACKWARD,
    GATHER_GRAD,
    GATHER_X,
    ROUTED,
    STORE,
    Products,
)
from .tilings import Tiling


def experts_forward(
    device: Device,
    tiling: Tiling,
    x: Array,
    params: MoEParams,
    plan: DispatchPlan,
    topk_weights: Array,
    cfg: MoEConfig,
    save: bool,
) -> tuple[Array, Array | None]:
    """Return the output (T, H) and gate_up (T*K, 2I), whose first R rows are the saved ones."""
    products = Products.of(device, tiling, plan, x.dtype)
    curve = curve_of(cfg, x.dtype)
    num_rows, (_, H, I) = plan.pair_ids.shape[0], params.down_proj.shape
    weights = device.contiguous(topk_weights)
    gate_up = device.empty((num_rows, params.gate_up_proj.shape[1]), x.dtype) if save else None
    act = device.empty((num_rows, I), products.operand_dtype)
    products.multiply(
        products.operand(x), params.gate_up_proj, ACTIVATE, gather=True,
        bias=rows.optional(device, params.gate_up_bias), y=gate_up, act=act, curve=curve,
    )  # fmt: skip
    y = device.empty((num_rows, H), x.dtype)
    products.multiply(
        act, params.down_proj, ROUTED, bias=rows.optional(device, params.down_bias),
        topk_weights=weights, y=y,
    )  # fmt: skip
    return rows.combine(device, y, plan), gate_up


def experts_backward(
    device: Device,
    tiling: Tiling,
    grad_output: Array,
    x: Array,
    gate_up: Array,
    params: MoEParams,
    plan: DispatchPlan,
    topk_weights: Array,
    cfg: MoEConfig,
    out: MoEParams | None,
    accumulate: bool,
) -> ExpertGrads:
    """Return the gradients of the expert core."""
    products = Products.of(device, tiling, plan, x.dtype)
    curve = curve_of(cfg, x.dtype)
    num_rows, (_, H, I) = plan.pair_ids.shape[0], params.down_proj.shape
    grad_output, weights = device.contiguous(grad_output), device.contiguous(topk_weights)
    grad, tokens = products.operand(grad_output), products.operand(x)
    operand, tiles = products.operand_dtype, products.column_tiles(I)
    weighted_act = device.empty((num_rows, I), operand)
    grad_gate_up = device.empty(gate_up.shape, operand)
    dots = device.empty((num_rows, tiles), x.dtype)
    products.multiply(
        grad, params.down_proj, ACTIVATE_BACKWARD, gather=True, transposed=True,
        topk_weights=weights, y=device.contiguous(gate_up), act=weighted_act, grad_y=grad_gate_up,
        dots=dots, curve=curve,
    )  # eq. (6), (7), (9)  # fmt: skip
    grad_weights = rows.finish_weights(device, dots, plan, grad_output, params.down_bias)
    with rows.writable(device, target(out, "down_proj"), params.down_proj, x, accumulate) as goal:
        products.weight_gradient(grad, weighted_act, GATHER_GRAD, goal.array, accumulate)  # (8)
        grad_down = goal.result
    with rows.writable(
        device, target(out, "gate_up_proj"), params.gate_up_proj, x, accumulate
    ) as goal:
        products.weight_gradient(grad_gate_up, tokens, GATHER_X, goal.array, accumulate)  # (10)
        grad_gate_up_proj = goal.result
    grad_down_bias = grad_gate_up_bias = None
    if params.down_bias is not None:
        with rows.writable(
            device, target(out, "down_bias"), params.down_bias, x, accumulate
        ) as goal:
            rows.segment_sum(device, grad_output, plan, goal.array, accumulate, weights=weights)
            grad_down_bias = goal.result
    if params.gate_up_bias is not None:
        with rows.writable(
            device, target(out, "gate_up_bias"), params.gate_up_bias, x, accumulate
        ) as goal:
            rows.segment_sum(device, grad_gate_up, plan, goal.array, accumulate)
            grad_gate_up_bias = goal.result
    grad_rows = device.empty((num_rows, H), x.dtype)
    products.multiply(grad_gate_up, params.gate_up_proj, STORE, transposed=True, y=grad_rows)
    return ExpertGrads(
        hidden_states=rows.combine(device, grad_rows, plan),  # eq. (11)
        topk_weights=grad_weights,
        gate_up_proj=grad_gate_up_proj,
        down_proj=grad_down,
        gate_up_bias=grad_gate_up_bias,
        down_bias=grad_down_bias,
    )
