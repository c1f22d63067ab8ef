"""Backends that are each wrong in one way."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from npmoe import ops, routing
from npmoe._typing import HostArray
from npmoe.backends import ExpertGrads, NumpyBackend, ReferenceBackend
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan, plan_dispatch
from npmoe.params import MoEParams
from npmoe.routing import Routing
from npmoe.testing.faults.fault import Fault


class UnwrittenEmptyExperts(ReferenceBackend):
    """Weight gradients of experts without rows are whatever was there."""

    name: ClassVar[str] = "unwritten-empty-experts"

    @staticmethod
    def grouped_gemm_wgrad(
        x: HostArray,
        grad_y: HostArray,
        plan: DispatchPlan,
        *,
        out: HostArray | None = None,
        accumulate: bool = False,
    ) -> HostArray:
        """Write experts with rows alone."""
        right: HostArray = ops.grouped_gemm_wgrad(x, grad_y, plan)
        if out is None:
            out, accumulate = np.full_like(right, 7.0), False
        filled = np.asarray(plan.tokens_per_expert) > 0
        out[filled] = out[filled] + right[filled] if accumulate else right[filled]
        return out


class TransposedSquares(ReferenceBackend):
    """Square matrices are transposed once too often."""

    name: ClassVar[str] = "transposed-squares"

    @staticmethod
    def grouped_gemm(
        x: HostArray,
        weight: HostArray,
        plan: DispatchPlan,
        *,
        bias: HostArray | None = None,
        transposed: bool = False,
    ) -> HostArray:
        """Ignore `transposed` where both fit."""
        square = weight.shape[1] == weight.shape[2]
        if square:
            weight = weight.transpose(0, 2, 1)
        right: HostArray = ops.grouped_gemm(x, weight, plan, bias=bias, transposed=transposed)
        return right


class WrappingCombine(ReferenceBackend):
    """Dropped routes add the last row: row_ids of -1 are used as indices."""

    name: ClassVar[str] = "wrapping-combine"

    @staticmethod
    def combine_rows(
        rows: HostArray, plan: DispatchPlan, *, topk_weights: HostArray | None = None
    ) -> HostArray:
        """Take rows[row_ids] for all routes."""
        if not len(rows):
            return np.zeros((plan.num_tokens, rows.shape[1]), rows.dtype)
        taken = rows[plan.row_ids]
        if topk_weights is not None:
            taken = taken * topk_weights[:, :, None]
        return np.asarray(taken.sum(axis=1, dtype=rows.dtype))


class LastOfTies(ReferenceBackend):
    """Of equal logits the highest id is chosen."""

    name: ClassVar[str] = "last-of-ties"

    @staticmethod
    def route(router_logits: HostArray, cfg: MoEConfig, **options: Any) -> Routing:
        """Choose by an unstable order, here the reverse one."""
        plain = cfg.routing == "token_choice" and cfg.num_groups == 1
        sampled = cfg.second_expert_policy != "all" or cfg.selection_bias
        if not plain or sampled or options.get("topk_ids") is not None:
            return routing.route(router_logits, cfg, **options)
        order = np.argsort(-router_logits[:, ::-1], axis=1, kind="stable")[:, : cfg.top_k]
        ids = (router_logits.shape[1] - 1 - order).astype(np.int32)
        return routing.route(router_logits, cfg, **(options | {"topk_ids": ids}))


class ApproximateGelu(ReferenceBackend):
    """GELU is its tanh approximation."""

    name: ClassVar[str] = "approximate-gelu"

    @staticmethod
    def activation(gate_up: HostArray, cfg: MoEConfig, *, shared: bool = False) -> HostArray:
        """Put gelu_tanh for gelu."""
        if cfg.activation == "gelu":
            cfg = dataclasses.replace(cfg, activation="gelu_tanh")
        right: HostArray = ops.activation(gate_up, cfg, shared=shared)
        return right


class ForgottenAccumulate(ReferenceBackend):
    """`accumulate` overwrites what stands in `out`."""

    name: ClassVar[str] = "forgotten-accumulate"

    @staticmethod
    def store(value: HostArray, out: HostArray | None, accumulate: bool) -> HostArray:
        """Ignore `accumulate`."""
        del accumulate
        right: HostArray = ops.store(value, out, False)
        return right


class DetachedNorm(ReferenceBackend):
    """The router's gradient leaves the sum of the weights out."""

    name: ClassVar[str] = "detached-norm"

    @staticmethod
    def route_backward(
        grad_topk_weights: HostArray,
        routing_result: Routing,
        cfg: MoEConfig,
        plan: DispatchPlan | None = None,
    ) -> HostArray:
        """Differentiate weights as if they were not normalised."""
        if cfg.renormalize and cfg.router_order == "score_topk" and plan is None:
            cfg = MoEConfig.from_dict(
                cfg.to_dict()
                | {"renormalize": False, "renorm_eps": 0.0, "renorm_eps_mode": "add", "renorm_p": 1}
            )
        right: HostArray = routing.route_backward(grad_topk_weights, routing_result, cfg, plan)
        return right


class Racing(ReferenceBackend):
    """Slots are summed in another order at every call, as atomics do."""

    name: ClassVar[str] = "racing"

    def __init__(self) -> None:
        self._calls = 0

    def combine_rows(
        self, rows: HostArray, plan: DispatchPlan, *, topk_weights: HostArray | None = None
    ) -> HostArray:
        """Return other last bits at every call."""
        self._calls += 1
        right: HostArray = ops.combine_rows(rows, plan, topk_weights=topk_weights)
        return np.asarray(right * (1 + self._calls % 3 * np.finfo(right.dtype).eps))


class HiddenHostCopies(NumpyBackend):
    """Claims arrays of a device, and returns NumPy's."""

    name: ClassVar[str] = "hidden-host-copies"
    host_arrays: ClassVar[bool] = False


class FusedWeightGradient(NumpyBackend):
    """The fused core takes the weighted output for the gradient of the weights."""

    name: ClassVar[str] = "fused-weight-gradient"

    def experts_backward(
        self,
        grad_output: HostArray,
        x: HostArray,
        gate_up: HostArray,
        params: MoEParams,
        plan: DispatchPlan,
        topk_weights: HostArray,
        cfg: MoEConfig,
        **options: Any,
    ) -> ExpertGrads:
        """Multiply grad_topk_weights by the weights once more."""
        right = super().experts_backward(
            grad_output, x, gate_up, params, plan, topk_weights, cfg, **options
        )
        wrong = np.where(plan.row_ids >= 0, right.topk_weights * topk_weights, 0)
        return dataclasses.replace(right, topk_weights=wrong.astype(x.dtype))


class OneSlotTooMany(ReferenceBackend):
    """Experts with a capacity keep one row more."""

    name: ClassVar[str] = "one-slot-too-many"

    @staticmethod
    def plan_dispatch(topk_ids: HostArray, **options: Any) -> DispatchPlan:
        """Compare ranks with <= instead of <."""
        capacity = options.get("capacity")
        if capacity is not None:
            more = capacity + 1 if isinstance(capacity, int) else [c + 1 for c in capacity]
            options["capacity"] = more
        return plan_dispatch(topk_ids, **options)


def _fault(check: str, seen: str, subject: type[ReferenceBackend]) -> Fault:
    return Fault(
        name=f"backend-{subject.name}", kind="backend", check=check, seen=seen, subject=subject
    )


FAULTS = (
    _fault(
        "empty-experts-have-zero-gradient",
        "pytorch#172439, MSLK#158, tokamax#887",
        UnwrittenEmptyExperts,
    ),
    _fault("square-matrices-are-not-transposed", "transformers#33463", TransposedSquares),
    _fault("verb-combine-rows", "vllm#46408", WrappingCombine),
    _fault(
        "ties-go-to-the-lowest-expert", "np.argsort's default, torch.topk: unstable", LastOfTies
    ),
    _fault("verb-activation", "tanh-GELU for erf-GELU", ApproximateGelu),
    _fault("accumulate-adds", "stale gradients under accumulation", ForgottenAccumulate),
    _fault("verb-route", "gradient stopped at the sum of the chosen", DetachedNorm),
    _fault("same-bits-twice", "sglang#33511, vllm#56887, flashinfer#3976", Racing),
    _fault(
        "results-stay-on-the-device", "silent copies to the host between kernels", HiddenHostCopies
    ),
    _fault("experts-fused", "weights' gradient from the scaled output", FusedWeightGradient),
    _fault("verb-plan-dispatch", "transformers#48293: capacity", OneSlotTooMany),
)
