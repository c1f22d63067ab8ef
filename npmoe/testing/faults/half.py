"""Backends that are each wrong about expert weights in half precision."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from npmoe import ops
from npmoe._half import is_half
from npmoe._typing import HostArray
from npmoe.backends import ExpertGrads, NumpyBackend, ReferenceBackend
from npmoe.dispatch import DispatchPlan
from npmoe.experts import compose_forward
from npmoe.testing.faults.fault import Fault


class RoundedActivations(ReferenceBackend):
    """Rows are cast to the dtype of the weights before the product."""

    name: ClassVar[str] = "rounded-activations"

    @staticmethod
    def grouped_gemm(
        x: HostArray, weight: HostArray, plan: DispatchPlan, **options: Any
    ) -> HostArray:
        """Round the rows."""
        rounded = x.astype(weight.dtype).astype(x.dtype)
        right: HostArray = ops.grouped_gemm(rounded, weight, plan, **options)
        return right


class HalfSums(ReferenceBackend):
    """Products are summed in the dtype of the weights."""

    name: ClassVar[str] = "half-sums"

    @staticmethod
    def grouped_gemm(
        x: HostArray,
        weight: HostArray,
        plan: DispatchPlan,
        *,
        bias: HostArray | None = None,
        transposed: bool = False,
    ) -> HostArray:
        """Add term by term, rounding each sum."""
        if not is_half(weight.dtype):
            found: HostArray = ops.grouped_gemm(x, weight, plan, bias=bias, transposed=transposed)
            return found
        y = np.zeros((plan.num_rows, weight.shape[2 if transposed else 1]), x.dtype)
        for e, rows in ops.expert_rows(plan):
            matrix = ops.expert_matrix(weight, e)
            for column, terms in zip(x[rows].T, matrix if transposed else matrix.T, strict=True):
                with np.errstate(all="ignore"):
                    y[rows] = (y[rows] + np.outer(column, terms)).astype(weight.dtype)
            if bias is not None:
                y[rows] += bias[e]
        return y


class BrainAsFloat16(ReferenceBackend):
    """The bits of bfloat16 are read as float16."""

    name: ClassVar[str] = "bfloat16-as-float16"

    @staticmethod
    def grouped_gemm(
        x: HostArray, weight: HostArray, plan: DispatchPlan, **options: Any
    ) -> HostArray:
        """Take two bytes for two bytes."""
        if weight.dtype.itemsize == 2:
            weight = weight.view(np.float16)
        with np.errstate(all="ignore"):
            right: HostArray = ops.grouped_gemm(x, weight, plan, **options)
        return right


class FlushedSubnormals(ReferenceBackend):
    """Numbers of float16 whose exponent is 0 are read as 0."""

    name: ClassVar[str] = "flushed-subnormals"

    @staticmethod
    def grouped_gemm(
        x: HostArray, weight: HostArray, plan: DispatchPlan, **options: Any
    ) -> HostArray:
        """Drop what has no leading 1."""
        if weight.dtype == np.float16:
            weight = np.where(np.abs(weight) < 2.0**-14, np.float16(0), weight)
        right: HostArray = ops.grouped_gemm(x, weight, plan, **options)
        return right


class HalfGradients(NumpyBackend):
    """Gradients have the dtype of the parameter."""

    name: ClassVar[str] = "half-gradients"

    def experts_backward(self, *arguments: Any, **options: Any) -> ExpertGrads:
        """Round the gradients of both matrices."""
        right, dtype = super().experts_backward(*arguments, **options), arguments[3].down_proj.dtype
        return dataclasses.replace(
            right,
            gate_up_proj=right.gate_up_proj.astype(dtype),
            down_proj=right.down_proj.astype(dtype),
        )


class FusedRounding(NumpyBackend):
    """The fused pair alone rounds what enters its products."""

    name: ClassVar[str] = "fused-rounding"

    def experts_forward(
        self, *arguments: Any, **options: Any
    ) -> tuple[HostArray, HostArray | None]:
        """Run the core on wrong products."""
        return compose_forward(RoundedActivations(), *arguments, **options)


def _fault(check: str, seen: str, subject: type[ReferenceBackend], dtype: str) -> Fault:
    return Fault(
        name=f"backend-{subject.name}",
        kind="backend",
        check=check,
        seen=seen,
        subject=subject,
        options=(("dtype", dtype),),
    )


_ROUNDED = "activations-are-not-rounded"
_READ = "half-weights-are-read-exactly"
FAULTS = (
    _fault(
        _ROUNDED,
        "torch.autocast: both operands of a product are cast down",
        RoundedActivations,
        "bfloat16",
    ),
    _fault(
        "sums-are-float32",
        "torch: allow_fp16_reduced_precision_reduction is on by default",
        HalfSums,
        "float16",
    ),
    _fault(
        _READ,
        "NumPy has no bfloat16: arrays of two bytes change hands without their dtype",
        BrainAsFloat16,
        "bfloat16",
    ),
    _fault(
        _READ, "conversion by shifting the exponent, which is 0 here", FlushedSubnormals, "float16"
    ),
    _fault(
        "gradients-are-float32",
        "torch: .grad has the dtype of the parameter",
        HalfGradients,
        "float16",
    ),
    _fault(
        _ROUNDED,
        "kernels that keep the activation between the two products in 16 bits",
        FusedRounding,
        "float16",
    ),
)
