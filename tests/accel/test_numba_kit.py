"""The conformance kit, in every dtype, without an expected failure."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

from typing import Any

import pytest
from needs import need_numba

need_numba()

import npmoe
from npmoe.backends import FusedExperts
from npmoe.testing import check_backend
from npmoe.testing.conformance.case import WITH_HALVES


@pytest.mark.parametrize("dtype", WITH_HALVES)
def test_the_kit(dtype: str) -> None:
    report = check_backend("numba", quick=True, dtype=dtype)
    assert report.passed, str(report)
    ran = [r for r in report.results if r.status != "not run"]  # some say nothing on halves
    assert {r.status for r in ran} == {"passed"}, str(report)
    assert len(ran) > 10


@pytest.mark.parametrize("options", [{"batch_invariant": True}, {"num_threads": 1}], ids=str)
def test_the_kit_with_options(options: dict[str, Any]) -> None:
    report = check_backend(npmoe.get_backend("numba", **options), quick=True, seed=1)
    assert report.passed, str(report)


def test_the_fused_pair_is_offered() -> None:
    assert isinstance(npmoe.get_backend("numba"), FusedExperts)
