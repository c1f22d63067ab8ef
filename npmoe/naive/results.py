"""What the definition returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._typing import HostArray


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveForward:
    """What the forward pass computed; topk_weights are those it combined with, 0 if dropped.

    Soft routing has no choices (K = 0) and E * S columns of logits; probs are its `combine`.
    """

    output: HostArray  # (T, H)
    topk_ids: HostArray  # (T, K)
    topk_weights: HostArray  # (T, K)
    kept: HostArray  # (T, K) bool
    probs: HostArray  # (T, E)
    logits: HostArray  # (T, E), 0 where masked
    clean_logits: HostArray  # (T, E), without the noise
    summed_ids: HostArray  # (T, K), topk_ids with second experts that were dropped at random
    slot_ids: HostArray | None = None  # (T, K) in each expert's buffer; None if nothing can drop
    dispatch: HostArray | None = None  # (T, E * S) of soft routing


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveGrads:
    """Gradients, None where there is no parameter; selection_bias never has one."""

    hidden_states: HostArray
    router_weight: HostArray
    gate_up_proj: HostArray
    down_proj: HostArray
    router_bias: HostArray | None = None
    selection_bias: None = None
    gate_up_bias: HostArray | None = None
    down_bias: HostArray | None = None
    shared_gate_up_proj: HostArray | None = None
    shared_down_proj: HostArray | None = None
    shared_gate_weight: HostArray | None = None
    output_bias: HostArray | None = None
    soft_scale: HostArray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGrads:
    """Running sums of the gradients of the experts' parameters, zeros to begin with."""

    gate_up_proj: HostArray
    down_proj: HostArray
    gate_up_bias: HostArray
    down_bias: HostArray

    @classmethod
    def zeros(cls, params: Any) -> ExpertGrads:
        """Return zeros of the shapes of the parameters."""
        w1, w2 = params.gate_up_proj.shape, params.down_proj.shape
        return cls(
            gate_up_proj=np.zeros(w1),
            down_proj=np.zeros(w2),
            gate_up_bias=np.zeros(w1[:2]),
            down_bias=np.zeros(w2[:2]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedGrads:
    """Gradients of the shared parameters, None where there is no parameter."""

    shared_gate_up_proj: HostArray | None
    shared_down_proj: HostArray | None
    shared_gate_weight: HostArray | None
    output_bias: HostArray | None


def collect_grads(
    params: Any,
    experts: ExpertGrads,
    shared: SharedGrads,
    *,
    hidden_states: HostArray,
    router_weight: HostArray,
    router_bias: HostArray | None = None,
    soft_scale: HostArray | None = None,
) -> NaiveGrads:
    """Return one object of all gradients, None where there is no parameter."""
    return NaiveGrads(
        hidden_states=hidden_states,
        router_weight=router_weight,
        router_bias=None if params.router_bias is None else router_bias,
        gate_up_proj=experts.gate_up_proj,
        down_proj=experts.down_proj,
        gate_up_bias=None if params.gate_up_bias is None else experts.gate_up_bias,
        down_bias=None if params.down_bias is None else experts.down_bias,
        shared_gate_up_proj=shared.shared_gate_up_proj,
        shared_down_proj=shared.shared_down_proj,
        shared_gate_weight=shared.shared_gate_weight,
        output_bias=shared.output_bias,
        soft_scale=soft_scale,
    )


def f64(array: HostArray) -> HostArray:
    """Return an array in float64."""
    return np.asarray(array, dtype=np.float64)


def zeros_of(array: HostArray | None) -> HostArray | None:
    """Return float64 zeros of the shape of a parameter, None if there is none."""
    return None if array is None else np.zeros(np.shape(array))
