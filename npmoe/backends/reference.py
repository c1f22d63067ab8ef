"""The reference backend: the verbs of `npmoe.ops` behind the backend contract."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from npmoe import capacity, dispatch, ops, routing
from npmoe._typing import Array, HostArray
from npmoe.backends.protocol import Availability


class ReferenceBackend:
    """Every verb in vectorised NumPy, one at a time.

    The verbs use the array functions of their arguments, so that a subclass for another
    NumPy-like array type has only to override the transfer methods to be complete, and may then
    replace the verbs that it makes faster. Arrays beyond the verbs' own are not kept.
    """

    name: ClassVar[str] = "reference"
    accelerates: ClassVar[frozenset[str]] = frozenset()
    host_arrays: ClassVar[bool] = True

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
    store = staticmethod(ops.store)
    route = staticmethod(routing.route)
    route_backward = staticmethod(routing.route_backward)
    plan_dispatch = staticmethod(dispatch.plan_dispatch)
    renormalize_kept = staticmethod(capacity.renormalize_kept)
    gather_rows = staticmethod(ops.gather_rows)
    combine_rows = staticmethod(ops.combine_rows)
    scale_rows = staticmethod(ops.scale_rows)
    row_dot = staticmethod(ops.row_dot)
    grouped_gemm = staticmethod(ops.grouped_gemm)
    grouped_gemm_wgrad = staticmethod(ops.grouped_gemm_wgrad)
    segment_sum = staticmethod(ops.segment_sum)
    spread_experts = staticmethod(ops.spread_experts)
    activation = staticmethod(ops.activation)
    activation_backward = staticmethod(ops.activation_backward)
