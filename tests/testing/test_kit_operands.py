"""Backends that round the operands of the experts' products: allowed if they say so, once."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from npmoe._typing import Array
from npmoe.backends import ReferenceBackend
from npmoe.dispatch import DispatchPlan
from npmoe.testing import check_backend

pytest.importorskip("ml_dtypes", reason="needs the extra npmoe[test]: ml_dtypes")


def to_half(x: Array, name: str = "bfloat16") -> Array:
    return x.astype(name).astype(x.dtype if x.dtype.kind == "f" else np.float32)


class Rounding(ReferenceBackend):
    """Rounds rows and matrices to bfloat16 before every product of the experts."""

    name: ClassVar[str] = "rounding"
    operands: str | None = "bfloat16"

    def round(self, x: Array) -> Array:
        return to_half(x)

    def grouped_gemm(self, x: Array, weight: Array, plan: DispatchPlan, **keywords: Any) -> Array:
        rounded = self.round(np.asarray(weight, x.dtype))
        return super().grouped_gemm(self.round(x), rounded, plan, **keywords)

    def grouped_gemm_wgrad(
        self, x: Array, grad_y: Array, plan: DispatchPlan, **keywords: Any
    ) -> Array:
        return super().grouped_gemm_wgrad(self.round(x), self.round(grad_y), plan, **keywords)


class Silent(Rounding):
    """Does not say so."""

    operands: str | None = None


class Twice(Rounding):
    """Rounds products to bfloat16 as well."""

    def grouped_gemm(self, x: Array, weight: Array, plan: DispatchPlan, **keywords: Any) -> Array:
        return to_half(super().grouped_gemm(x, weight, plan, **keywords))


class Coarse(Rounding):
    """Keeps five bits where it says that it keeps eight."""

    def round(self, x: Array) -> Array:
        mantissa, exponent = np.frexp(x)
        return np.ldexp(np.rint(mantissa * 32) / 32, exponent).astype(x.dtype)


def failures(backend: Any, dtype: str = "float32") -> set[str]:
    return {f.check for f in check_backend(backend, quick=True, dtype=dtype).failures}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_operands_pass_and_are_said(dtype: str) -> None:
    report = check_backend(Rounding(), quick=True, dtype=dtype)
    assert report.passed, str(report)
    assert any("rounded to bfloat16" in note for note in report.notes)
    names = {r.name for r in report.results}
    assert "layer-backward" in names
    assert "verb-grouped-gemm" not in names


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (Silent, "layer-backward"),
        (Twice, "products-of-small-integers-are-exact"),
        (Coarse, "operands-keep-their-bits"),
    ],
)
def test_what_is_not_said_is_found(wrong: type[Rounding], check: str) -> None:
    assert check in failures(wrong())
