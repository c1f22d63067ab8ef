"""Prove or break anybody's MoE functions; see README.md.

Importing this package or any module of it but `strategies` does not import hypothesis.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npmoe.testing import strategies
    from npmoe.testing.conformance.activation import check_activation, check_activation_backward
    from npmoe.testing.conformance.align import check_align
    from npmoe.testing.conformance.backend import check_backend
    from npmoe.testing.conformance.block_gemm import check_block_gemm
    from npmoe.testing.conformance.combine import check_combine
    from npmoe.testing.conformance.experts import check_experts, check_experts_backward
    from npmoe.testing.conformance.gemm import check_grouped_gemm, check_grouped_gemm_wgrad
    from npmoe.testing.conformance.loss import check_loss
    from npmoe.testing.conformance.moe import check_moe, check_moe_backward
    from npmoe.testing.conformance.pytest_form import parametrize_with_checks
    from npmoe.testing.conformance.report import Report
    from npmoe.testing.conformance.router import check_router

__all__ = [
    "Report",
    "check_activation",
    "check_activation_backward",
    "check_align",
    "check_backend",
    "check_block_gemm",
    "check_combine",
    "check_experts",
    "check_experts_backward",
    "check_grouped_gemm",
    "check_grouped_gemm_wgrad",
    "check_loss",
    "check_moe",
    "check_moe_backward",
    "check_router",
    "parametrize_with_checks",
    "strategies",
]

_ROOM = "npmoe.testing.conformance"


def __getattr__(name: str) -> Any:
    """Load a public name at its first use."""
    if name == "strategies":
        return import_module("npmoe.testing.strategies")
    if name == "Report":
        return import_module(f"{_ROOM}.report").Report
    if name == "parametrize_with_checks":
        return import_module(f"{_ROOM}.pytest_form").parametrize_with_checks
    if name in __all__:
        from npmoe.testing.conformance.registry import check_function  # noqa: PLC0415

        return check_function(name.removeprefix("check_"))
    raise AttributeError(f"module 'npmoe.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
