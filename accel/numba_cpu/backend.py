"""The backend "numba": kernels for the CPU, for many rows per expert and for few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from npmoe import dispatch, routing
from npmoe._cores import usable_cores
from npmoe._typing import HostArray
from npmoe.backends import ExpertGrads, ReferenceBackend
from npmoe.config import DropPolicy, MoEConfig, SlotOrder
from npmoe.dispatch import DispatchPlan
from npmoe.errors import RangeError, UnsupportedError
from npmoe.params import MoEParams
from npmoe.routing import Routing

from ..curve import curve_of
from . import core, router
from . import rows as kernels
from .launch import NO_IDS, SKINNY_ROWS, Engine, Group, flat
from .model_verbs import ModelVerbs
from .team import Team


class NumbaBackend(ReferenceBackend):
    """Kernels on the CPU.

    Parameters
    ----------
    num_threads : int, optional
        Threads that share the work; the usable cores by default. Results do not depend on it.
    batch_invariant : bool
        Give every token the bits it would get alone: one form of product for any number of rows.
    """

    name: ClassVar[str] = "numba"
    accelerates: ClassVar[frozenset[str]] = frozenset(
        {
            "linear", "linear_backward", "route", "plan_dispatch", "gather_rows", "combine_rows",
            "scale_rows", "row_dot", "grouped_gemm", "grouped_gemm_wgrad", "segment_sum",
            "activation", "activation_backward", "experts_forward", "experts_backward",
        }
    )  # fmt: skip

    def __init__(self, num_threads: int | None = None, batch_invariant: bool = False) -> None:
        if num_threads is None:
            num_threads = usable_cores()
        if isinstance(num_threads, bool) or not 1 <= num_threads <= 256:
            raise RangeError(
                f"get_backend: num_threads must be in 1..256, got {num_threads!r}. "
                "None takes the usable cores."
            )
        self.num_threads = num_threads
        self.batch_invariant = batch_invariant
        team = Team(num_threads)
        skinny_rows = 0 if batch_invariant else SKINNY_ROWS
        self._engines = {
            np.dtype(name): Engine(team, name, skinny_rows) for name in ("float32", "float64")
        }
        self.nn = ModelVerbs(self._engine)

    def release(self) -> None:
        """Free the memory that is kept from one call to the next."""
        for engine in self._engines.values():
            engine.release()

    def _engine(self, name: str, array: HostArray) -> Engine:
        """Return the engine of an array's dtype, which decides a verb's."""
        engine = self._engines.get(array.dtype)
        if engine is None:
            raise UnsupportedError(
                f"numba: {name} must have dtype float32 or float64 in native byte order, got "
                f"{array.dtype.str}. Convert it with astype; weights alone may be float16 or "
                "bfloat16."
            )
        return engine

    def linear(self, x: HostArray, weight: HostArray, bias: HostArray | None = None) -> HostArray:
        """Return ``x @ weight.T + bias``; see `npmoe.ops.linear`."""
        engine = self._engine("x", x)
        y = np.empty((len(x), len(weight)), x.dtype)
        if y.size:
            engine.project(flat(x), x.shape[1], weight[None], _whole(x), y.reshape(-1),
                           bias=None if bias is None else bias[None])  # fmt: skip
        return y

    def linear_backward(
        self, grad_y: HostArray, x: HostArray, weight: HostArray, bias: HostArray | None = None
    ) -> tuple[HostArray, HostArray, HostArray | None]:
        """Return (grad_x, grad_weight, grad_bias); see `npmoe.ops.linear_backward`."""
        engine, one = self._engine("x", x), _whole(x)
        grad_x, grad_weight = np.empty(x.shape, x.dtype), engine.empty(1, *weight.shape)
        grad_flat = flat(grad_y)
        engine.project_back(grad_flat, 0, weight[None], one, grad_x.reshape(-1))
        engine.weight_gradient(grad_flat, flat(x), one, grad_weight, accumulate=False)
        grad_bias = None
        if bias is not None:
            grad_bias = np.empty((1, len(bias)), x.dtype)
            core.sum_segments(engine, grad_flat, len(bias), one, grad_bias, False)
            grad_bias = grad_bias[0]
        return grad_x, grad_weight[0], grad_bias

    def route(
        self,
        router_logits: HostArray,
        cfg: MoEConfig,
        *,
        selection_bias: HostArray | None = None,
        token_mask: HostArray | None = None,
        topk_ids: HostArray | None = None,
        rng: np.random.Generator | None = None,
        sequence_length: int | None = None,
    ) -> Routing:
        """Choose experts and weights; see `npmoe.routing.route`, which does all unusual cases."""
        usual = (
            token_mask is None
            and topk_ids is None
            and router_logits.size > 0
            and not (cfg.router_noise_std and rng is not None)
            and (selection_bias is not None) == cfg.selection_bias
            and has_fast_route(cfg)
        )
        found = self._route_rows(router_logits, cfg, selection_bias) if usual else None
        if found is None:
            return routing.route(
                router_logits,
                cfg,
                selection_bias=selection_bias,
                token_mask=token_mask,
                topk_ids=topk_ids,
                rng=rng,
                sequence_length=sequence_length,
            )
        probs, ids, weights = found
        return Routing(
            topk_ids=ids,
            topk_weights=weights,
            probs=probs,
            router_logits=router_logits,
            sequence_length=len(ids) if sequence_length is None else sequence_length,
            score_fn=cfg.score_fn,
        )

    def _route_rows(
        self, logits: HostArray, cfg: MoEConfig, selection_bias: HostArray | None
    ) -> tuple[HostArray, HostArray, HostArray] | None:
        """Return scores, ids and weights, or None if a row needs a closer look."""
        num_tokens, size = logits.shape
        dtype, none = logits.dtype, np.zeros(0, logits.dtype)
        probs, weights = (
            np.empty((num_tokens, size), dtype),
            np.empty((num_tokens, cfg.top_k), dtype),
        )
        ids, broken = np.empty((num_tokens, cfg.top_k), np.int32), np.zeros(1, np.int8)
        softmax, after = cfg.score_fn == "softmax", cfg.router_order == "topk_score"
        bias = none if selection_bias is None else flat(selection_bias.astype(dtype, copy=False))
        self._engine("router_logits", logits).over_rows(
            router.route_rows, flat(logits), size, softmax,
            after or cfg.selection_bias_on == "logits", softmax and after, bias,
            cfg.renormalize and (cfg.renorm_single or cfg.top_k > 1), cfg.renorm_eps,
            cfg.renorm_eps_mode == "max", cfg.routed_scaling_factor, probs, ids, weights, broken,
            numbers=8 * logits.size,
        )  # fmt: skip
        return None if broken[0] else (probs, ids, weights)

    def plan_dispatch(
        self,
        topk_ids: HostArray,
        *,
        num_experts: int,
        num_identity_experts: int = 0,
        capacity: int | Sequence[int] | None = None,
        drop_policy: DropPolicy = "position",
        slot_order: SlotOrder = "priority",
        topk_weights: HostArray | None = None,
        rng: np.random.Generator | None = None,
    ) -> DispatchPlan:
        """Sort routes by expert by counting; see `npmoe.plan_dispatch`, which does capacities."""
        plan = None
        if capacity is None and not num_identity_experts and topk_ids.dtype == np.int32:
            plan = self._count_plan(topk_ids, num_experts)
        if plan is not None:
            return plan
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

    def _count_plan(self, topk_ids: HostArray, num_experts: int) -> DispatchPlan | None:
        """Return the plan without drops, or None if an id is out of range or there are too many."""
        if topk_ids.size >= 2**31:
            return None
        num_tokens, top_k = topk_ids.shape
        ids = flat(topk_ids)
        offsets = np.empty(num_experts + 1, np.int32)
        if not kernels.count_routes(ids, num_experts, offsets):
            return None
        pair_ids, token_ids = np.empty((2, offsets[-1]), np.int32)
        row_ids = np.empty(ids.size, np.int32)
        kernels.place_routes(ids, top_k, num_experts, offsets, np.empty(num_experts, np.int32),
                          pair_ids, token_ids, row_ids)  # fmt: skip
        return DispatchPlan(
            pair_ids=pair_ids,
            token_ids=token_ids,
            row_ids=row_ids.reshape(num_tokens, top_k),
            expert_offsets=offsets,
            num_tokens=num_tokens,
            top_k=top_k,
        )

    def gather_rows(self, x: HostArray, plan: DispatchPlan) -> HostArray:
        """(T, H) -> (R, H)."""
        out = np.empty((plan.num_rows, x.shape[1]), x.dtype)
        self._engine("x", x).over_rows(
            kernels.gather, flat(x), x.shape[1], flat(plan.token_ids), out.reshape(-1),
            numbers=out.size,
        )  # fmt: skip
        return out

    def combine_rows(
        self, rows: HostArray, plan: DispatchPlan, *, topk_weights: HostArray | None = None
    ) -> HostArray:
        """(R, H) -> (T, H)."""
        engine = self._engine("rows", rows)
        return core.combine(engine, flat(rows), plan, topk_weights, rows.shape[1])

    def scale_rows(self, rows: HostArray, plan: DispatchPlan, topk_weights: HostArray) -> HostArray:
        """Multiply rows by their routes' weights."""
        out = np.empty(rows.shape, rows.dtype)
        weights = core.row_weights(topk_weights, plan)
        self._engine("rows", rows).over_rows(
            kernels.scale, flat(rows), rows.shape[1], weights, out.reshape(-1), numbers=out.size
        )
        return out

    def row_dot(self, rows_a: HostArray, rows_b: HostArray, plan: DispatchPlan) -> HostArray:
        """(R, N), (R, N) -> (T, K)."""
        out = np.empty(plan.num_rows, rows_a.dtype)
        self._engine("rows_a", rows_a).over_rows(
            kernels.dot_rows, flat(rows_a), NO_IDS, flat(rows_b), NO_IDS, rows_a.shape[1], False,
            out,
            numbers=rows_a.size,
        )  # fmt: skip
        return core.scatter_routes(out, plan)

    def grouped_gemm(
        self,
        x: HostArray,
        weight: HostArray,
        plan: DispatchPlan,
        *,
        bias: HostArray | None = None,
        transposed: bool = False,
    ) -> HostArray:
        """(R, N), (E, M, N) -> (R, M); see `npmoe.ops.grouped_gemm`."""
        engine, group = self._engine("x", x), _all(plan)
        y = np.empty((plan.num_rows, weight.shape[2 if transposed else 1]), x.dtype)
        if transposed:
            engine.project_back(flat(x), 0, weight, group, y.reshape(-1))
        else:
            engine.project(flat(x), x.shape[1], weight, group, y.reshape(-1), bias=bias)
        return y

    def grouped_gemm_wgrad(
        self,
        x: HostArray,
        grad_y: HostArray,
        plan: DispatchPlan,
        *,
        out: HostArray | None = None,
        accumulate: bool = False,
    ) -> HostArray:
        """(R, N), (R, M) -> (E, M, N); see `npmoe.ops.grouped_gemm_wgrad`."""
        engine = self._engine("x", x)
        shape = (plan.num_experts, grad_y.shape[1], x.shape[1])
        goal = out
        if goal is None or not (goal.flags.c_contiguous and goal.flags.aligned):
            goal = engine.empty(*shape)
            if out is not None and accumulate:
                goal[...] = out
        engine.weight_gradient(
            flat(grad_y), flat(x), _all(plan), goal, accumulate=accumulate and out is not None
        )
        if out is None or goal is out:
            return goal
        out[...] = goal
        return out

    def segment_sum(self, rows: HostArray, plan: DispatchPlan) -> HostArray:
        """(R, N) -> (E, N)."""
        out = np.empty((plan.num_experts, rows.shape[1]), rows.dtype)
        engine = self._engine("rows", rows)
        core.sum_segments(engine, flat(rows), rows.shape[1], _all(plan), out, False)
        return out

    def activation(self, gate_up: HostArray, cfg: MoEConfig, *, shared: bool = False) -> HostArray:
        """(R, 2I) -> (R, I)."""
        engine = self._engine("gate_up", gate_up)
        curve = curve_of(cfg, engine.dtype, shared=shared)
        inner = gate_up.shape[1] // 2 if curve.gated else gate_up.shape[1]
        out = np.empty((len(gate_up), inner), engine.dtype)
        engine.over_rows(
            kernels.activate_rows, curve.kind, curve.gated, curve.settings, flat(gate_up), inner,
            out.reshape(-1), numbers=8 * gate_up.size,
        )  # fmt: skip
        return out

    def activation_backward(
        self, grad_act: HostArray, gate_up: HostArray, cfg: MoEConfig, *, shared: bool = False
    ) -> HostArray:
        """Return grad_gate_up."""
        engine = self._engine("gate_up", gate_up)
        curve = curve_of(cfg, engine.dtype, shared=shared)
        grad_gate_up = np.empty(gate_up.shape, engine.dtype)
        engine.over_rows(
            kernels.activate_rows_backward, curve.kind, curve.gated, curve.settings,
            flat(grad_act), flat(gate_up), grad_act.shape[1], grad_gate_up.reshape(-1),
            numbers=8 * gate_up.size, room=grad_act.shape[1],
        )  # fmt: skip
        return grad_gate_up

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
        return core.experts_forward(
            self._engine("x", x), x, params, plan, topk_weights, cfg, dropout, save
        )

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
        return core.experts_backward(
            self._engine("x", x), grad_output, x, gate_up, params, plan, topk_weights, cfg,
            dropout, out, accumulate,
        )  # fmt: skip


def has_fast_route(cfg: MoEConfig) -> bool:
    """Return whether the kernel knows the config's rules; the others are the reference's."""
    return (
        cfg.routing == "token_choice"
        and cfg.score_fn in ("softmax", "sigmoid")
        and cfg.num_groups == 1
        and cfg.renorm_p == 1
        and cfg.second_expert_policy == "all"
        and cfg.renormalize_drop == "before"
    )


def _whole(x: HostArray) -> Group:
    """Return all rows as those of one matrix."""
    return Group(np.array([0, len(x)], np.int32), 0, 1)


def _all(plan: DispatchPlan) -> Group:
    return Group(flat(plan.expert_offsets), 0, plan.num_experts)
