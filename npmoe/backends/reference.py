"""The reference backend: the verbs of `npmoe.ops` behind the backend contract."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from npmoe import dispatch, ops, routing
from npmoe._typing import Array, HostArray
from npmoe.backends.protocol import Availability
from npmoe.routing import soft


class ReferenceBackend:
    """Every verb in vectorised NumPy, one at a time.

    The verbs use the array functions of their arguments, so that a subclass for another
    NumPy-like array type has only to override the transfer methods to be complete, and may then
    replace the verbs that it makes faster. Arrays beyond the verbs' own are not kept.
    """

    name: ClassVar[str] = "reference"
    accelerates: ClassVar[frozenset[str]] = frozenset()
    host_arrays: ClassVar[bool] = True
    operands: str | None = None

    @classmethod
    def availability(cls) -> Availability:
        """Say that NumPy is always there."""
        return Availability(True)

    def asarray(self, x: Any) -> Array:
        """Return x as an ndarray."""
        return np.asarray(x)

    def asnumpy(self, x: Array) -> HostArray:
        """Return x as an ndarray."""
        return np.asarray(x)

    def synchronize(self) -> None:
        """Return at once: NumPy works synchronously."""

    linear = staticmethod(ops.linear)
    linear_backward = staticmethod(ops.linear_backward)
    mask_rows = staticmethod(ops.mask_rows)
    add = staticmethod(ops.add)
    multiply = staticmethod(ops.multiply)
    scale = staticmethod(ops.scale)
    cast = staticmethod(ops.cast)
    add_bias = staticmethod(ops.add_bias)
    sum_rows = staticmethod(ops.sum_rows)
    gate_rows = staticmethod(ops.gate_rows)
    gate_rows_backward = staticmethod(ops.gate_rows_backward)
    store = staticmethod(ops.store)
    route = staticmethod(routing.route)
    route_backward = staticmethod(routing.route_backward)
    renormalize_kept = staticmethod(routing.renormalize_kept)
    softcap = staticmethod(routing.softcap)
    softcap_backward = staticmethod(routing.softcap_backward)
    soft_route = staticmethod(soft.soft_route)
    soft_dispatch = staticmethod(soft.soft_dispatch)
    soft_combine = staticmethod(soft.soft_combine)
    soft_combine_backward = staticmethod(soft.soft_combine_backward)
    soft_dispatch_backward = staticmethod(soft.soft_dispatch_backward)
    soft_weights_backward = staticmethod(soft.soft_weights_backward)
    soft_route_backward = staticmethod(soft.soft_route_backward)
    plan_dispatch = staticmethod(dispatch.plan_dispatch)
    gather_rows = staticmethod(ops.gather_rows)
    combine_rows = staticmethod(ops.combine_rows)
    combine_identity = staticmethod(ops.combine_identity)
    combine_identity_backward = staticmethod(ops.combine_identity_backward)
    scale_rows = staticmethod(ops.scale_rows)
    row_dot = staticmethod(ops.row_dot)
    grouped_gemm = staticmethod(ops.grouped_gemm)
    grouped_gemm_wgrad = staticmethod(ops.grouped_gemm_wgrad)
    segment_sum = staticmethod(ops.segment_sum)
    spread_experts = staticmethod(ops.spread_experts)
    draw_dropout = staticmethod(ops.draw_dropout)
    activation = staticmethod(ops.activation)
    activation_backward = staticmethod(ops.activation_backward)
