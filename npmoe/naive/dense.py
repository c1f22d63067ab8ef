"""The experts on buffers of C rows each: the dense capacity form, by einsum.

D_tec = 1 where token t lies in slot c of expert e, built from the slots and not from the
weights, which may be 0:  rows_ech = D_tec x_th,  y_th = (w D)_tec expert_e(rows)_ech.
Lepikhin et al. 2020 (GShard), arXiv 2006.16668, algorithm 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive.activations import activate, activate_backward
from npmoe.naive.capacity import sequences
from npmoe.naive.draws import Draws
from npmoe.naive.results import ExpertGrads, NaiveForward, f64


class Buffers(NamedTuple):
    """Everything between gather and combine; the sequences' buffers lie side by side in C."""

    places: HostArray  # (T, K, E, C), 1 where the route lies
    enter: HostArray  # (T, E, C), what multiplies x on the way in
    leave: HostArray  # (T, E, C), what multiplies y on the way out
    x: HostArray  # (T, H), 0 for tokens without a route
    rows: HostArray  # (E, C, H)
    gate_up: HostArray  # (E, C, 2I)
    dropout: HostArray  # (E, C, I), factors
    act: HostArray  # (E, C, I), after dropout
    y: HostArray  # (E, C, H)


def route_places(forward: NaiveForward, cfg: MoEConfig, sequence_length: int | None) -> HostArray:
    """Return (T, K, E, C), 1 where the route lies; C is the most slots used, if nothing drops."""
    slot_ids = forward.slot_ids
    groups = sequences(len(forward.kept), sequence_length, cfg)
    if slot_ids is None:
        slot_ids, groups = np.full(forward.kept.shape, -1), [range(len(forward.kept))]
        taken = [0] * cfg.num_experts
        for t, k in np.argwhere(forward.kept & (forward.topk_ids < cfg.num_experts)):
            slot_ids[t, k] = taken[forward.topk_ids[t, k]]
            taken[forward.topk_ids[t, k]] += 1
    capacity = 1 + int(slot_ids.max(initial=-1))
    places = np.zeros((*slot_ids.shape, cfg.num_experts, len(groups) * capacity))
    for n, tokens in enumerate(groups):
        for t in tokens:
            for k in range(slot_ids.shape[1]):
                if slot_ids[t, k] >= 0:
                    places[t, k, forward.topk_ids[t, k], n * capacity + slot_ids[t, k]] = 1.0
    return places


def fill(
    x: HostArray,
    forward: NaiveForward,
    params: Any,
    cfg: MoEConfig,
    sequence_length: int | None,
    draws: Draws,
) -> Buffers:
    """Run the experts on all rows of their buffers; rows without a token are 0."""
    places = route_places(forward, cfg, sequence_length)
    ones = places.sum(axis=1)
    weighted = np.einsum("tk,tkec->tec", forward.topk_weights, places)
    enter, leave = (weighted, ones) if cfg.weight_position == "input" else (ones, weighted)
    has_route = np.asarray(forward.kept.any(axis=1))
    x = np.where(has_route[:, None], f64(x), 0.0)
    rows = np.einsum("tec,th->ech", enter, x)
    gate_up = np.einsum("ech,eih->eci", rows, f64(params.gate_up_proj))
    if params.gate_up_bias is not None:
        gate_up = gate_up + f64(params.gate_up_bias)[:, None, :]
    act = np.zeros((*rows.shape[:2], params.down_proj.shape[2]))
    for e, c in np.ndindex(act.shape[:2]):
        act[e, c] = activate(
            gate_up[e, c], cfg.activation, cfg.activation_alpha, cfg.activation_limit
        )
    dropout = np.ones(act.shape)
    if draws.dropout is not None:
        factors = draws.dropout[:, : places.shape[1]] / (1.0 - cfg.expert_dropout)
        dropout = np.einsum("tkec,tki->eci", places, factors)
    act = act * dropout
    y = np.einsum("eci,ehi->ech", act, f64(params.down_proj))
    if params.down_bias is not None:
        y = y + f64(params.down_bias)[:, None, :]
    return Buffers(places, enter, leave, x, rows, gate_up, dropout, act, y)


def run_routes(
    x: HostArray,
    forward: NaiveForward,
    params: Any,
    cfg: MoEConfig,
    sequence_length: int | None,
    draws: Draws,
) -> HostArray:
    """Return the sum over the kept routes of every token, (T, H)."""
    buffers = fill(x, forward, params, cfg, sequence_length, draws)
    identity = forward.topk_weights * (forward.topk_ids >= cfg.num_experts)
    output = np.einsum("tec,ech->th", buffers.leave, buffers.y)
    return f64(output + np.einsum("tk,th->th", identity, buffers.x))


def run_routes_backward(
    grad_output: HostArray,
    x: HostArray,
    forward: NaiveForward,
    params: Any,
    cfg: MoEConfig,
    sequence_length: int | None,
    draws: Draws,
) -> tuple[HostArray, HostArray, ExpertGrads]:
    """Return the gradients of x, of topk_weights (0 where dropped) and of the parameters."""
    b = fill(x, forward, params, cfg, sequence_length, draws)
    grad_y = np.einsum("tec,th->ech", b.leave, grad_output)
    grad_act = np.einsum("ech,ehi->eci", grad_y, f64(params.down_proj)) * b.dropout
    grad_gate_up = np.zeros(b.gate_up.shape)
    for e, c in np.ndindex(grad_act.shape[:2]):
        grad_gate_up[e, c] = activate_backward(
            grad_act[e, c],
            b.gate_up[e, c],
            cfg.activation,
            cfg.activation_alpha,
            cfg.activation_limit,
        )
    grad_rows = np.einsum("eci,eih->ech", grad_gate_up, f64(params.gate_up_proj))
    on_input = cfg.weight_position == "input"
    token_side, row_side = (b.x, grad_rows) if on_input else (grad_output, b.y)
    grad_weights = np.einsum("tkec,th,ech->tk", b.places, token_side, row_side)
    identity = forward.topk_ids >= cfg.num_experts
    grad_weights += np.einsum("tk,th,th->tk", identity * 1.0, grad_output, b.x)
    grad_x = np.einsum("tec,ech->th", b.enter, grad_rows)
    grad_x += np.einsum("tk,th->th", forward.topk_weights * identity, grad_output)
    grads = ExpertGrads(
        gate_up_proj=np.einsum("eci,ech->eih", grad_gate_up, b.rows),
        down_proj=np.einsum("ech,eci->ehi", grad_y, b.act),
        gate_up_bias=grad_gate_up.sum(axis=1),
        down_bias=grad_y.sum(axis=1),
    )
    return grad_x, grad_weights, grads
