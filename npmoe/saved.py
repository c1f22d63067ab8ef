"""SavedTensors: what the backward pass needs from the forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from npmoe._typing import Array
from npmoe.backends import Backend
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan
from npmoe.routing import Routing, SoftRouting
from npmoe.stats import LoadStats, load_stats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SoftSaved:
    """What soft routing keeps besides: the assignments, and what went in and out of the slots."""

    assignments: SoftRouting
    slots: Array  # (B*E*C, H)
    slot_outputs: Array  # (B*E*C, H)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedTensors:
    """What `moe_backward` needs; `gate_up` (R, 2I) is the only activation kept per route.

    Attributes
    ----------
    routing : Routing
        Ids, weights, probabilities and logits.
    plan : DispatchPlan
        Which row went where.
    hidden_states : (T, H) float array
        The input itself, not a copy: it must not change before the backward pass.
    gate_up : (R, 2I) float array
    shape : tuple of int
        Of the layer's input.
    cfg : MoEConfig
    backend : Backend
    jitter : (T, H) float array or None
        What multiplied the router's input.
    dropout : (R, I) float array or None
        What multiplied the activations: 0 or 1 / (1 - expert_dropout).
    shared_gate_up : (T, 2S) float array or None
        The shared expert's pre-activation.
    soft : SoftSaved or None
    """

    hidden_states: Array
    routing: Routing
    plan: DispatchPlan
    gate_up: Array
    shape: tuple[int, ...]
    cfg: MoEConfig
    backend: Backend
    jitter: Array | None = None
    dropout: Array | None = None
    shared_gate_up: Array | None = None
    soft: SoftSaved | None = None

    def stats(self) -> LoadStats:
        """Return load and drops of this call, as host numbers."""
        return load_stats(self.routing, self.plan, self.cfg.num_experts, self.backend.asnumpy)
