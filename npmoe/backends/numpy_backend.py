"""The NumPy backend: the reference verbs, and the expert core one block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from npmoe import ops
from npmoe._typing import HostArray
from npmoe.backends.protocol import ExpertGrads
from npmoe.backends.reference import ReferenceBackend
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan
from npmoe.params import MoEParams

# Rows of one expert that go through both products at once: their activations stay in cache.
_BLOCK_ROWS = 512


class NumpyBackend(ReferenceBackend):
    """The reference verbs with the expert core fused: the default backend.

    A block of at most 512 rows of one expert goes through gather, both products and the
    activation before the next one is touched, so intermediates stay in cache and nothing of size
    (R, H) or (R, I) is made but what the contract returns. Weight gradients of an expert with
    more rows are summed block by block in ascending order. Matrices in half precision become
    float32 one expert at a time.
    """

    name: ClassVar[str] = "numpy"
    accelerates: ClassVar[frozenset[str]] = frozenset({"experts_forward", "experts_backward"})

    def experts_forward(
        self,
        x: HostArray,
        params: MoEParams,
        plan: DispatchPlan,
        topk_weights: HostArray,
        cfg: MoEConfig,
        *,
        dropout: HostArray | None = None,
        save: bool = True,
    ) -> tuple[HostArray, HostArray | None]:
        """Return the output (T, H) and gate_up (R, 2I); eq. (3) to (5) of `npmoe.layer`."""
        forward = ops.activation_of(cfg).forward
        position = cfg.weight_position
        row_weights = _row_weights(topk_weights, plan)
        shape = (plan.num_rows, params.gate_up_proj.shape[1])
        gate_up = np.empty(shape, x.dtype) if save else None
        y_sorted = np.empty((plan.num_rows, x.shape[1]), x.dtype)
        for e, rows, w1, w2 in _blocks(plan, params):
            tokens = _gather(x, plan, rows)
            if position == "input":
                tokens *= row_weights[rows]
            pre = np.matmul(tokens, w1.T, out=None if gate_up is None else gate_up[rows])
            if params.gate_up_bias is not None:
                pre += params.gate_up_bias[e]
            act = forward(pre)
            if dropout is not None:
                act *= dropout[rows]
            if position == "mid":
                act *= row_weights[rows]
            y = np.matmul(act, w2.T, out=y_sorted[rows])
            if params.down_bias is not None:
                bias = params.down_bias[e]
                y += row_weights[rows] * bias if position == "mid" else bias
        weights = topk_weights if position == "output" else None
        return ops.combine_rows(y_sorted, plan, topk_weights=weights), gate_up

    def experts_backward(
        self,
        grad_output: HostArray,
        x: HostArray,
        gate_up: HostArray,
        params: MoEParams,
        plan: DispatchPlan,
        topk_weights: HostArray,
        cfg: MoEConfig,
        *,
        dropout: HostArray | None = None,
        out: MoEParams | None = None,
        accumulate: bool = False,
    ) -> ExpertGrads:
        """Return the gradients of the expert core; eq. (6) to (11) of `npmoe.layer`."""
        backward = ops.activation_of(cfg).recompute_and_backward
        on_input = cfg.weight_position == "input"
        sums = _WeightGrads(params, plan, x.dtype, out, accumulate)
        row_weights = _row_weights(topk_weights, plan)
        grad_rows = np.empty((plan.num_rows, x.shape[1]), x.dtype)
        grad_row_weights = np.empty(plan.num_rows, x.dtype)
        for e, rows, w1, w2 in _blocks(plan, params):
            g = _gather(grad_output, plan, rows)
            unweighted = g @ w2  # eq. (6)
            weights = row_weights[rows]
            grad_act = unweighted if on_input else unweighted * weights
            if dropout is not None:
                grad_act = grad_act * dropout[rows]
            act, grad_gate_up = backward(grad_act, gate_up[rows])  # eq. (4), (9)
            if dropout is not None:
                act *= dropout[rows]
            tokens = _gather(x, plan, rows)
            grad_tokens = np.matmul(grad_gate_up, w1, out=grad_rows[rows])
            if on_input:
                np.einsum("rh,rh->r", grad_tokens, tokens, out=grad_row_weights[rows])
                grad_tokens *= weights
                tokens *= weights
            else:
                np.einsum("ri,ri->r", unweighted, act, out=grad_row_weights[rows])  # eq. (7)
                if params.down_bias is not None:
                    grad_row_weights[rows] += g @ params.down_bias[e]
                g *= weights
            sums.add("down_proj", e, g, act)  # eq. (8)
            sums.add("gate_up_proj", e, grad_gate_up, tokens)  # eq. (10)
        grad_topk_weights = np.zeros(plan.num_tokens * plan.top_k, x.dtype)
        grad_topk_weights[plan.pair_ids] = grad_row_weights
        return ExpertGrads(
            hidden_states=ops.combine_rows(grad_rows, plan),  # eq. (11)
            topk_weights=grad_topk_weights.reshape(plan.num_tokens, plan.top_k),
            gate_up_proj=sums.grads["gate_up_proj"],
            down_proj=sums.grads["down_proj"],
            gate_up_bias=sums.grads.get("gate_up_bias"),
            down_bias=sums.grads.get("down_bias"),
        )


def _row_weights(topk_weights: HostArray, plan: DispatchPlan) -> HostArray:
    """Return the combine weight of every row as a column (R, 1)."""
    return topk_weights.reshape(-1)[plan.pair_ids][:, None]


class _WeightGrads:
    """The expert gradients being summed; an expert's first block overwrites, later ones add."""

    def __init__(
        self,
        params: MoEParams,
        plan: DispatchPlan,
        dtype: np.dtype[Any],
        out: MoEParams | None,
        accumulate: bool,
    ) -> None:
        self.grads: dict[str, HostArray] = {}
        empty = np.diff(plan.expert_offsets) == 0
        for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
            value = getattr(params, name)
            if value is None:
                continue
            given = None if out is None else getattr(out, name)
            self.grads[name] = np.empty_like(value, dtype) if given is None else given
            if given is None or not accumulate:
                self.grads[name][empty] = 0.0
        begun = np.zeros(plan.num_experts, bool)
        if accumulate:
            begun[:] = True
        self._begun = {name: begun.copy() for name in self.grads}

    def add(self, name: str, e: int, grad_y: HostArray, x: HostArray) -> None:
        """Add ``grad_y.T @ x`` to the matrix of expert e, and the column sums to its bias."""
        bias = self.grads.get(name.replace("proj", "bias"))
        if self._begun[name][e]:
            self.grads[name][e] += grad_y.T @ x
            if bias is not None:
                bias[e] += grad_y.sum(axis=0)
        else:
            np.matmul(grad_y.T, x, out=self.grads[name][e])
            if bias is not None:
                np.add.reduce(grad_y, axis=0, out=bias[e])
            self._begun[name][e] = True


def _blocks(
    plan: DispatchPlan, params: MoEParams
) -> Iterator[tuple[int, slice, HostArray, HostArray]]:
    """Yield (expert, rows, its matrices) with at most _BLOCK_ROWS rows, in ascending order."""
    for e, rows in ops.expert_rows(plan):
        w1 = ops.expert_matrix(params.gate_up_proj, e)
        w2 = ops.expert_matrix(params.down_proj, e)
        for start in range(rows.start, rows.stop, _BLOCK_ROWS):
            yield e, slice(start, min(start + _BLOCK_ROWS, rows.stop)), w1, w2


def _gather(x: HostArray, plan: DispatchPlan, rows: slice) -> HostArray:
    """Return the tokens of some rows; ids are in range by construction, so nothing is checked."""
    taken: HostArray = np.take(x, plan.token_ids[rows], axis=0, mode="clip")
    return taken
