"""The expert core: eq. (3) to (11) of `npmoe.layer`, group by group.

A group is a few experts whose rows fit the intermediate buffers, so that these stay small: the
activations of one group, in the forward pass of three, are all that exists of size (rows, I)
beside gate_up.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from npmoe._typing import HostArray
from npmoe.backends import ExpertGrads
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan
from npmoe.params import MoEParams

from ..curve import curve_of
from . import rows
from .launch import NO_IDS, Engine, Group, flat

# A group of the backward pass has at least rows for so many numbers: smaller ones cost calls.
_LEAST_NUMBERS = 2**19


def experts_forward(
    engine: Engine, x: HostArray, params: MoEParams, plan: DispatchPlan, topk_weights: HostArray,
    cfg: MoEConfig, dropout: HostArray | None, save: bool,
) -> tuple[HostArray, HostArray | None]:  # fmt: skip
    """Return the output (T, H), and gate_up (R, 2I) if it is saved."""
    gate_up = engine.empty(plan.num_rows, params.gate_up_proj.shape[1]) if save else None
    out = np.empty(x.shape, engine.dtype)
    engine.run_experts(
        x, plan, params, curve_of(cfg, engine.dtype), row_weights(topk_weights, plan),
        cfg.weight_position, topk_weights, dropout, gate_up, out,
    )  # fmt: skip
    return out, gate_up


def experts_backward(
    engine: Engine, grad_output: HostArray, x: HostArray, gate_up: HostArray, params: MoEParams,
    plan: DispatchPlan, topk_weights: HostArray, cfg: MoEConfig, dropout: HostArray | None,
    out: MoEParams | None, accumulate: bool,
) -> ExpertGrads:  # fmt: skip
    """Return the gradients of the expert core."""
    num_rows, hidden = plan.num_rows, x.shape[1]
    wide, inner = params.gate_up_proj.shape[1], params.down_proj.shape[2]
    on_input = cfg.weight_position == "input"
    curve = curve_of(cfg, engine.dtype)
    token_ids, offsets = flat(plan.token_ids), plan.expert_offsets
    weights = row_weights(topk_weights, plan)
    grads = _Gradients(engine, params, out, accumulate)
    grad_down, grad_gate_up_proj = grads.of("down_proj"), grads.of("gate_up_proj")
    groups = _groups(engine, plan, params)
    most = max(g.num_rows for g in groups)
    partial = np.zeros((max(engine.num_ranges(inner), 1), num_rows), engine.dtype)
    grad_flat, x_flat, gate_up_flat = flat(grad_output), flat(x), flat(gate_up)
    on_grad, on_x = (None, weights) if on_input else (weights, None)
    with engine.temporary(most * inner, most * wide, num_rows * hidden) as temporary:
        act, grad_pre, grad_rows = temporary
        for group in groups:
            engine.project_back_and_activate(
                grad_flat, token_ids, params.down_proj, group, curve, gate_up_flat, act, grad_pre,
                partial, row_weights=on_grad, dropout=dropout,
            )  # fmt: skip  # eq. (6), (4), (7), (9)
            engine.weight_gradient(
                grad_flat, act, group, grad_down, accumulate=accumulate, a_tokens=token_ids,
                a_scale=on_grad,
            )  # fmt: skip  # eq. (8)
            engine.weight_gradient(
                grad_pre, x_flat, group, grad_gate_up_proj, accumulate=accumulate,
                b_tokens=token_ids, b_scale=on_x,
            )  # fmt: skip  # eq. (10)
            engine.project_back(grad_pre, group.base, params.gate_up_proj, group, grad_rows)
            if params.gate_up_bias is not None:
                sum_segments(engine, grad_pre, wide, group, grads.of("gate_up_bias"), accumulate,
                             base=group.base)  # fmt: skip
            if params.down_bias is not None:
                sum_segments(engine, grad_flat, hidden, group, grads.of("down_bias"), accumulate,
                             token_ids=token_ids, row_weights=on_grad)  # fmt: skip
        numbers = num_rows * hidden
        grad_weights = partial.sum(axis=0)
        if on_input:
            engine.over_rows(rows.dot_rows, grad_rows, NO_IDS, x_flat, token_ids, hidden, False,
                             grad_weights, numbers=numbers)  # fmt: skip
            engine.over_rows(rows.scale, grad_rows, hidden, weights, grad_rows, numbers=numbers)
        elif params.down_bias is not None:
            owners = np.repeat(np.arange(plan.num_experts, dtype=np.int32), np.diff(offsets))
            engine.over_rows(rows.dot_rows, grad_flat, token_ids, flat(params.down_bias), owners,
                             hidden, True, grad_weights, numbers=numbers)  # fmt: skip
        grad_hidden = combine(engine, grad_rows, plan, None, hidden)  # eq. (11)
    return ExpertGrads(
        hidden_states=grad_hidden,
        topk_weights=scatter_routes(grad_weights, plan),
        gate_up_proj=grads.finish("gate_up_proj"),
        down_proj=grads.finish("down_proj"),
        gate_up_bias=grads.finish("gate_up_bias"),
        down_bias=grads.finish("down_bias"),
    )


class _Gradients:
    """Where parameter gradients are written: the caller's arrays where kernels can use them."""

    def __init__(
        self, engine: Engine, params: MoEParams, out: MoEParams | None, accumulate: bool
    ) -> None:
        self._arrays: dict[str, HostArray] = {}
        self._given: dict[str, HostArray] = {}
        for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
            value = getattr(params, name)
            if value is None:
                continue
            given = None if out is None else getattr(out, name)
            if given is not None and given.flags.c_contiguous and given.flags.aligned:
                self._arrays[name] = given
                continue
            self._arrays[name] = engine.empty(*value.shape)
            if given is not None:
                self._given[name] = given
                if accumulate:
                    self._arrays[name][...] = given

    def of(self, name: str) -> HostArray:
        """Return the C-ordered array to write."""
        return self._arrays[name]

    def finish(self, name: str) -> HostArray | None:
        """Return the gradient: the caller's array if there is one."""
        if name not in self._given:
            return self._arrays.get(name)
        self._given[name][...] = self._arrays[name]
        return self._given[name]


def combine(
    engine: Engine, y: HostArray, plan: DispatchPlan, topk_weights: HostArray | None, width: int
) -> HostArray:
    """Return ``out[t] = sum over k of w[t, k] * y[row_ids[t, k]]`` (T, width) of flat y."""
    out = np.empty((plan.num_tokens, width), engine.dtype)
    weights = engine.none if topk_weights is None else flat(topk_weights)
    engine.over_rows(
        rows.combine, y, width, flat(plan.row_ids), plan.num_tokens, plan.top_k, weights,
        out.reshape(-1), numbers=plan.num_tokens * (plan.top_k + 1) * width,
    )  # fmt: skip
    return out


def sum_segments(
    engine: Engine, values: HostArray, width: int, group: Group, out: HostArray, accumulate: bool,
    *, base: int = 0, token_ids: HostArray = NO_IDS, row_weights: HostArray | None = None,
) -> None:  # fmt: skip
    """Sum the rows of each expert of a group into out (E, width)."""
    weights = engine.none if row_weights is None else row_weights
    engine.over_rows(
        rows.sum_segments, values, width, token_ids, weights, group.first, group.last, base,
        group.offsets, accumulate, out.reshape(-1), numbers=group.num_rows * width,
    )  # fmt: skip


def row_weights(topk_weights: HostArray, plan: DispatchPlan) -> HostArray:
    """Return the weight of every row (R,)."""
    return flat(topk_weights)[plan.pair_ids]


def scatter_routes(values: HostArray, plan: DispatchPlan) -> HostArray:
    """Return numbers of rows (R,) as (T, K); 0 for routes without a row."""
    spread = np.zeros(plan.num_tokens * plan.top_k, values.dtype)
    spread[plan.pair_ids] = values
    return spread.reshape(plan.num_tokens, plan.top_k)


def _groups(engine: Engine, plan: DispatchPlan, params: MoEParams) -> list[Group]:
    """Cut the experts into groups; an expert with more rows than the limit is one alone."""
    offsets = flat(plan.expert_offsets)
    _, hidden, inner = params.down_proj.shape
    ends, count, _ = engine.groups(offsets, _LEAST_NUMBERS // (3 * inner + hidden))
    return [Group(offsets, *pair) for pair in pairwise([0, *ends[:count].tolist()])]
