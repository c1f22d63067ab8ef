"""What a backend is: a name, its availability, array transfer and the verbs of the layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from npmoe._typing import Array, HostArray
from npmoe.config import DropPolicy, MoEConfig, SlotOrder
from npmoe.dispatch import DispatchPlan
from npmoe.params import MoEParams
from npmoe.routing import Routing, SoftRouting


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend can run here, and if not, why and what to install."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertGrads:
    """What the expert core's backward returns; biases are None where the experts have none."""

    hidden_states: Array  # (T, H)
    topk_weights: Array  # (T, K)
    gate_up_proj: Array
    down_proj: Array
    gate_up_bias: Array | None
    down_bias: Array | None


@runtime_checkable
class FusedExperts(Protocol):
    """The expert core in two calls: eq. (3) to (5) and (6) to (11) of `npmoe.layer`."""

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
        """Return the output (T, H) and gate_up (R, 2I); dropout (R, I) multiplies activations.

        Without `save` there will be no backward pass, and gate_up may be None.
        """

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
        """Return the gradients of x, of the weights and of the expert parameters."""


@runtime_checkable
class Backend(Protocol):
    """The contract of a backend. Subclass `ReferenceBackend`; override what you make faster.

    Shapes and meanings of the verbs are those of `npmoe.ops` and `npmoe.routing`. A backend may
    also be a `FusedExperts`; the layer then calls that pair instead of the single verbs.

    Attributes
    ----------
    name : str
    accelerates : frozenset of str
        The verbs that it really overrides.
    host_arrays : bool
        Whether its arrays are NumPy's, as training needs.
    operands : {"tf32", "bfloat16", "float16"} or None
        What rows and matrices are rounded to where they enter a product of the experts; None:
        nothing is. Sums are never rounded so.

    A backend with host arrays may have a further attribute ``nn``, `npmoe.nn.ModelVerbs`: models
    then take attention and norms from there.
    """

    name: ClassVar[str]
    accelerates: ClassVar[frozenset[str]]
    host_arrays: ClassVar[bool]
    operands: str | None

    @classmethod
    def availability(cls) -> Availability:
        """Say whether the backend can run here; cheap, never raises."""

    def asarray(self, x: Any) -> Array:
        """Move an array to the backend."""

    def asnumpy(self, x: Array) -> HostArray:
        """Move an array to the host."""

    def synchronize(self) -> None:
        """Wait for all work that was submitted."""

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """(T, N), (M, N) -> (T, M)."""

    def linear_backward(
        self, grad_y: Array, x: Array, weight: Array, bias: Array | None = None
    ) -> tuple[Array, Array, Array | None]:
        """Return grad_x, grad_weight, grad_bias."""

    def mask_rows(self, x: Array, mask: Array) -> Array:
        """Zero the rows whose mask is False."""

    def add(self, x: Array, y: Array) -> Array:
        """Return the sum of two arrays of one shape."""

    def multiply(self, x: Array, y: Array) -> Array:
        """Return the product of two arrays, elementwise."""

    def scale(self, x: Array, factor: float) -> Array:
        """Multiply by a number."""

    def cast(self, x: Array, dtype: str) -> Array:
        """Convert to another float dtype."""

    def add_bias(self, x: Array, bias: Array, mask: Array | None = None) -> Array:
        """(T, H), (H,) -> (T, H), zero where masked."""

    def sum_rows(self, x: Array) -> Array:
        """(T, H) -> (H,)."""

    def gate_rows(self, rows: Array, logit: Array) -> Array:
        """Multiply rows (T, N) by the sigmoid of logits (T, 1)."""

    def gate_rows_backward(self, grad_act: Array, act: Array, logit: Array) -> Array:
        """Return the gradient of the logits (T, 1)."""

    def store(self, value: Array, out: Array | None, accumulate: bool) -> Array:
        """Put a result into a caller's array."""

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
        """Choose experts and weights."""

    def route_backward(
        self,
        grad_topk_weights: Array,
        routing: Routing,
        cfg: MoEConfig,
        plan: DispatchPlan | None = None,
    ) -> Array:
        """Return grad_router_logits."""

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
        """Sort routes by expert, drop what exceeds the capacity."""

    def renormalize_kept(self, routing: Routing, plan: DispatchPlan, cfg: MoEConfig) -> Array:
        """Normalise and scale weights over the kept routes."""

    def softcap(self, x: Array, limit: float) -> Array:
        """Return limit * tanh(x / limit)."""

    def softcap_backward(self, grad: Array, capped: Array, limit: float) -> Array:
        """Return the gradient of x."""

    def soft_route(
        self,
        x: Array,
        router_weight: Array,
        soft_scale: Array,
        *,
        token_mask: Array | None = None,
        nan_policy: str = "raise",
    ) -> SoftRouting:
        """Return logits and both soft assignments of x (B, L, H)."""

    def soft_dispatch(self, x: Array, dispatch: Array) -> Array:
        """(B, L, H), (B, L, E*C) -> (B*E*C, H)."""

    def soft_combine(self, y: Array, combine: Array) -> Array:
        """(B*E*C, H), (B, L, E*C) -> (B, L, H)."""

    def soft_combine_backward(self, grad: Array, y: Array, combine: Array) -> tuple[Array, Array]:
        """Return the gradients of y and of combine."""

    def soft_dispatch_backward(
        self, grad_slots: Array, x: Array, dispatch: Array
    ) -> tuple[Array, Array]:
        """Return the gradients of x and of dispatch."""

    def soft_weights_backward(
        self, grad_dispatch: Array, grad_combine: Array, soft: SoftRouting
    ) -> Array:
        """Return the gradient of the logits."""

    def soft_route_backward(
        self, grad_logits: Array, x: Array, router_weight: Array, soft_scale: Array
    ) -> tuple[Array, Array, Array]:
        """Return the gradients of x, router_weight and soft_scale."""

    def combine_identity(
        self, x: Array, topk_ids: Array, topk_weights: Array, num_experts: int
    ) -> Array:
        """Multiply x (T, H) by the summed weights of each token's identity experts."""

    def combine_identity_backward(
        self, grad: Array, x: Array, topk_ids: Array, topk_weights: Array, num_experts: int
    ) -> tuple[Array, Array]:
        """Return the gradients of x and of topk_weights."""

    def gather_rows(self, x: Array, plan: DispatchPlan) -> Array:
        """(T, H) -> (R, H)."""

    def combine_rows(
        self, rows: Array, plan: DispatchPlan, *, topk_weights: Array | None = None
    ) -> Array:
        """(R, H) -> (T, H)."""

    def scale_rows(self, rows: Array, plan: DispatchPlan, topk_weights: Array) -> Array:
        """Multiply rows by their routes' weights."""

    def row_dot(self, rows_a: Array, rows_b: Array, plan: DispatchPlan) -> Array:
        """(R, N), (R, N) -> (T, K)."""

    def grouped_gemm(
        self,
        x: Array,
        weight: Array,
        plan: DispatchPlan,
        *,
        bias: Array | None = None,
        transposed: bool = False,
    ) -> Array:
        """(R, N), (E, M, N) -> (R, M)."""

    def grouped_gemm_wgrad(
        self,
        x: Array,
        grad_y: Array,
        plan: DispatchPlan,
        *,
        out: Array | None = None,
        accumulate: bool = False,
    ) -> Array:
        """(R, N), (R, M) -> (E, M, N)."""

    def segment_sum(self, rows: Array, plan: DispatchPlan) -> Array:
        """(R, N) -> (E, N)."""

    def spread_experts(self, values: Array, plan: DispatchPlan) -> Array:
        """(E, N) -> (R, N)."""

    def draw_dropout(
        self, plan: DispatchPlan, cfg: MoEConfig, rng: np.random.Generator, dtype: str
    ) -> Array:
        """Return the dropout factors of the activations (R, I)."""

    def activation(self, gate_up: Array, cfg: MoEConfig, *, shared: bool = False) -> Array:
        """(R, 2I) -> (R, I)."""

    def activation_backward(
        self, grad_act: Array, gate_up: Array, cfg: MoEConfig, *, shared: bool = False
    ) -> Array:
        """Return grad_gate_up."""
