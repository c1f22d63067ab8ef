"""A backend whose verbs are launches: what CuPy's and Numba's GPU backends share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from npmoe import dispatch, ops, routing
from npmoe._typing import Array, HostArray
from npmoe.backends import ExpertGrads, ReferenceBackend
from npmoe.config import DropPolicy, MoEConfig, SlotOrder
from npmoe.dispatch import DispatchPlan
from npmoe.errors import DTypeError, PlanError, RangeError, UnsupportedError
from npmoe.experts import compose_backward, compose_forward
from npmoe.params import MoEParams
from npmoe.routing import Routing

from ..curve import curve_of
from . import core, rows
from .kernel import Device
from .plans import count_plan
from .products import NO_GATHER, STORE, Products
from .router import has_fast_route, route_rows
from .tilings import SIMT, Tiling


class DeviceBackend(ReferenceBackend):
    """The verbs as kernels on a device; the unusual ones run the reference's lines there.

    Nothing here waits for the device. What is wrong with the *contents* of arrays (a router logit
    that is not finite under nan_policy "raise", an id out of range) is noted on the device and
    raised by the next `asnumpy` or `synchronize`.

    Waiting cannot be avoided where the host must know what the device holds: capacities and drop
    policies, expert choice, groups of experts, expert dropout, sampled second experts.
    """

    host_arrays: ClassVar[bool] = False
    accelerates: ClassVar[frozenset[str]] = frozenset(
        {
            "route", "plan_dispatch", "gather_rows", "combine_rows", "scale_rows", "row_dot",
            "grouped_gemm", "grouped_gemm_wgrad", "segment_sum", "spread_experts",
            "activation", "activation_backward", "draw_dropout", "experts_forward",
            "experts_backward",
        }
    )  # fmt: skip

    def __init__(self, device: Device, tiling: Tiling = SIMT) -> None:
        self.device, self.tiling, self.operands = device, tiling, tiling.operand
        self._noted = device.zeros(2, np.int32)

    def asarray(self, x: Any) -> Array:
        """Copy x to the device."""
        return self.device.asarray(x)

    def asnumpy(self, x: Array) -> HostArray:
        """Copy x to the host; raises what was noted about the contents of earlier arguments."""
        self._raise_noted()
        return self.device.asnumpy(x)

    def synchronize(self) -> None:
        """Wait for all work; raises what was noted about the contents of earlier arguments."""
        self.device.synchronize()
        self._raise_noted()

    def _raise_noted(self) -> None:
        illegal, broken = self.device.asnumpy(self._noted).tolist()
        if not (illegal or broken):
            return
        self._noted = self.device.zeros(2, np.int32)
        later = "It was noted on the device, by a call before this one"
        if illegal:
            raise PlanError(
                "plan_dispatch: topk_ids must lie in -1..num_experts-1, got others. "
                f"{later}; -1 means no expert."
            )
        raise RangeError(
            "moe_forward: router_logits must have a finite largest value in every row, and "
            f"selection_bias no NaN, got others. {later}. Look for NaN or overflow in "
            "hidden_states and router_weight, or choose nan_policy='drop'."
        )

    def check_own(self, *arrays: Any) -> None:
        """Raise unless arrays are the device's."""
        for x in arrays:
            if hasattr(x, "shape") and not self.device.is_own(x):
                raise DTypeError(
                    f"{self.name}: arrays must be on the device, got "
                    f"{type(x).__module__}.{type(x).__name__} of shape {tuple(x.shape)}. "
                    "Nothing is copied silently: move it with backend.asarray(x)."
                )

    def _check_float(self, name: str, x: Array) -> None:
        self.check_own(x)
        if np.dtype(x.dtype) not in (np.float32, np.float64):
            raise UnsupportedError(
                f"{self.name}: {name} must have dtype float32 or float64, got {x.dtype}. Convert "
                "it with astype; weights alone may be float16 or bfloat16."
            )

    def _products(self, x: Array, plan: DispatchPlan) -> Products:
        self._check_float("x", x)
        return Products.of(self.device, self.tiling, plan, x.dtype)

    def route(
        self,
        router_logits: Array,
        cfg: MoEConfig,
        *,
        selection_bias: Array | None = None,
        token_mask: Array | None = None,
        topk_ids: Array | None = None,
        rng: np.random.Generator | None = None,
        sequence_length: int | None = None,
    ) -> Routing:
        """Choose experts and weights; see `npmoe.routing.route`, which does all unusual cases."""
        self._check_float("router_logits", router_logits)
        self.check_own(selection_bias, token_mask, topk_ids)
        usual = topk_ids is None and (selection_bias is not None) == cfg.selection_bias
        if not (usual and has_fast_route(cfg) and router_logits.size):
            return routing.route(
                router_logits,
                cfg,
                selection_bias=selection_bias,
                token_mask=token_mask,
                topk_ids=topk_ids,
                rng=rng,
                sequence_length=sequence_length,
            )
        clean = None
        if cfg.router_noise_std and rng is not None:
            clean = router_logits
            noise = rng.standard_normal(tuple(clean.shape)) * cfg.router_noise_std
            router_logits = clean + self.asarray(noise.astype(clean.dtype))
        found = route_rows(
            self.device, router_logits, cfg, selection_bias, token_mask, self._noted[1:]
        )
        length = router_logits.shape[0] if sequence_length is None else sequence_length
        return Routing(
            **found,
            router_logits=router_logits,
            sequence_length=length,
            score_fn=cfg.score_fn,
            clean_logits=clean,
        )

    def plan_dispatch(
        self,
        topk_ids: Array,
        *,
        num_experts: int,
        num_identity_experts: int = 0,
        capacity: int | Sequence[int] | None = None,
        drop_policy: DropPolicy = "position",
        slot_order: SlotOrder = "priority",
        topk_weights: Array | None = None,
        rng: np.random.Generator | None = None,
    ) -> DispatchPlan:
        """Sort routes by expert by counting; see `npmoe.plan_dispatch`, which does capacities."""
        self.check_own(topk_ids, topk_weights)
        if capacity is None and np.dtype(topk_ids.dtype) == np.int32:
            return count_plan(
                self.device,
                topk_ids,
                num_ids=num_experts,
                num_experts=num_experts,
                num_legal=num_experts + num_identity_experts,
                illegal=self._noted[:1],
            )
        return dispatch.plan_dispatch(
            topk_ids,
            num_experts=num_experts,
            num_identity_experts=num_identity_experts,
            capacity=capacity,
            drop_policy=drop_policy,
            slot_order=slot_order,
            topk_weights=topk_weights,
            rng=rng,
        )

    def gather_rows(self, x: Array, plan: DispatchPlan) -> Array:
        """(T, H) -> (T*K, H)."""
        self._check_float("x", x)
        return rows.gather(self.device, x, plan)

    def combine_rows(
        self, rows_: Array, plan: DispatchPlan, *, topk_weights: Array | None = None
    ) -> Array:
        """(R, H) -> (T, H)."""
        self._check_float("rows", rows_)
        return rows.combine(self.device, rows_, plan, topk_weights)

    def scale_rows(self, rows_: Array, plan: DispatchPlan, topk_weights: Array) -> Array:
        """Multiply rows by their routes' weights."""
        self._check_float("rows", rows_)
        return rows.scale(self.device, rows_, plan, topk_weights)

    def row_dot(self, rows_a: Array, rows_b: Array, plan: DispatchPlan) -> Array:
        """(R, N), (R, N) -> (T, K)."""
        self._check_float("rows_a", rows_a)
        return rows.dot(self.device, rows_a, rows_b, plan)

    def spread_experts(self, values: Array, plan: DispatchPlan) -> Array:
        """(E, N) -> (T*K, N)."""
        self._check_float("values", values)
        return rows.spread(self.device, values, plan)

    def segment_sum(self, rows_: Array, plan: DispatchPlan) -> Array:
        """(R, N) -> (E, N)."""
        self._check_float("rows", rows_)
        out = self.device.empty((plan.num_experts, rows_.shape[1]), rows_.dtype)
        rows.segment_sum(self.device, rows_, plan, out)
        return out

    def activation(self, gate_up: Array, cfg: MoEConfig, *, shared: bool = False) -> Array:
        """(R, 2I) -> (R, I)."""
        self._check_float("gate_up", gate_up)
        return rows.activate(self.device, gate_up, curve_of(cfg, gate_up.dtype, shared=shared))

    def activation_backward(
        self, grad_act: Array, gate_up: Array, cfg: MoEConfig, *, shared: bool = False
    ) -> Array:
        """Return grad_gate_up."""
        self._check_float("gate_up", gate_up)
        curve = curve_of(cfg, gate_up.dtype, shared=shared)
        return rows.activate_backward(self.device, grad_act, gate_up, curve)

    def draw_dropout(
        self, plan: DispatchPlan, cfg: MoEConfig, rng: np.random.Generator, dtype: str
    ) -> Array:
        """Return the factors (T*K, I); waits for the number of rows, which the draws depend on."""
        drawn = ops.draw_dropout(plan, cfg, rng, dtype)
        factors = self.device.zeros((plan.pair_ids.shape[0], drawn.shape[1]), drawn.dtype)
        factors[: drawn.shape[0]] = drawn
        return factors

    def grouped_gemm(
        self,
        x: Array,
        weight: Array,
        plan: DispatchPlan,
        *,
        bias: Array | None = None,
        transposed: bool = False,
    ) -> Array:
        """(R, N), (E, M, N) -> (R, M); see `npmoe.ops.grouped_gemm`."""
        products = self._products(x, plan)
        y = self.device.empty((x.shape[0], weight.shape[2 if transposed else 1]), x.dtype)
        products.multiply(
            products.operand(x), weight, STORE, transposed=transposed,
            bias=rows.optional(self.device, bias), y=y,
        )  # fmt: skip
        return y

    def grouped_gemm_wgrad(
        self,
        x: Array,
        grad_y: Array,
        plan: DispatchPlan,
        *,
        out: Array | None = None,
        accumulate: bool = False,
    ) -> Array:
        """(R, N), (R, M) -> (E, M, N); see `npmoe.ops.grouped_gemm_wgrad`."""
        products = self._products(x, plan)
        adds = accumulate and out is not None
        if out is None:
            out = self.device.empty((plan.num_experts, grad_y.shape[1], x.shape[1]), x.dtype)
        with rows.writable(self.device, out, out, x, adds) as goal:
            grad, rows_ = products.operand(grad_y), products.operand(x)
            products.weight_gradient(grad, rows_, NO_GATHER, goal.array, adds)
        return out

    def experts_forward(
        self,
        x: Array,
        params: MoEParams,
        plan: DispatchPlan,
        topk_weights: Array,
        cfg: MoEConfig,
        *,
        dropout: Array | None = None,
        save: bool = True,
    ) -> tuple[Array, Array | None]:
        """Return the output (T, H) and gate_up (T*K, 2I); eq. (3) to (5) of `npmoe.layer`."""
        self._check_float("x", x)
        self.check_own(params.gate_up_proj, params.down_proj, topk_weights)
        if not _fuses(cfg, dropout):
            return compose_forward(
                self, x, params, plan, topk_weights, cfg, dropout=dropout, save=save
            )
        return core.experts_forward(
            self.device, self.tiling, x, params, plan, topk_weights, cfg, save
        )

    def experts_backward(
        self,
        grad_output: Array,
        x: Array,
        gate_up: Array,
        params: MoEParams,
        plan: DispatchPlan,
        topk_weights: Array,
        cfg: MoEConfig,
        *,
        dropout: Array | None = None,
        out: MoEParams | None = None,
        accumulate: bool = False,
    ) -> ExpertGrads:
        """Return the gradients of the expert core; eq. (6) to (11) of `npmoe.layer`."""
        self._check_float("x", x)
        self.check_own(grad_output, params.gate_up_proj, params.down_proj)
        if not _fuses(cfg, dropout):
            return compose_backward(
                self, grad_output, x, gate_up, params, plan, topk_weights, cfg, dropout=dropout,
                out=out, accumulate=accumulate,
            )  # fmt: skip
        return core.experts_backward(
            self.device, self.tiling, grad_output, x, gate_up, params, plan, topk_weights, cfg,
            out, accumulate,
        )  # fmt: skip


def _fuses(cfg: MoEConfig, dropout: Array | None) -> bool:
    """Return whether the fused pair knows the config; the others take single verbs."""
    return cfg.weight_position != "input" and dropout is None


def _checked(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Return an inherited verb that refuses arrays of others."""

    @functools.wraps(verb)
    def run(self: DeviceBackend, *args: Any, **kwargs: Any) -> Any:
        self.check_own(*args, *kwargs.values())
        return verb(*args, **kwargs)

    return run


for _name, _value in vars(ReferenceBackend).items():
    if isinstance(_value, staticmethod) and _name not in vars(DeviceBackend):
        setattr(DeviceBackend, _name, _checked(_value.__func__))
