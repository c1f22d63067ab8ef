"""The kit as pytest tests, and as a page."""

from __future__ import annotations

import numpy as np
import pytest

from npmoe import testing
from npmoe.testing import check_align, parametrize_with_checks
from npmoe.testing.conformance.page import html_page
from npmoe.testing.conformance.registry import KINDS
from npmoe.testing.faults.gemm import FAULTS
from npmoe.testing.faults.matrix import run_fault


def product(x_sorted, w, expert_offsets):
    y = np.zeros((len(x_sorted), w.shape[1]), x_sorted.dtype)
    for e in range(len(w)):
        rows = slice(expert_offsets[e], expert_offsets[e + 1])
        y[rows] = x_sorted[rows] @ w[e].T
    return y


@parametrize_with_checks([("grouped_gemm", product)], quick=True)
def test_every_check_is_a_test(check) -> None:
    check()


@parametrize_with_checks(
    [("grouped_gemm", FAULTS[0].subject)],
    quick=True,
    expected_failed_checks=dict.fromkeys(
        (
            *("integers-are-exact", "within-rounding", "empty-experts-shift-nothing"),
            *("square-is-not-transposed", "edges-of-tiles", "unused-weights-are-not-read"),
            *("read-only-inputs", "strided-inputs"),
        ),
        "planted",
    ),
)
def test_known_failures_are_strict(check) -> None:
    check()


def test_a_failing_test_shows_the_report() -> None:
    mark = parametrize_with_checks([("grouped_gemm", FAULTS[0].subject)], quick=True)
    first = mark.args[1][0].values[0]
    assert str(first) == "grouped_gemm-integers-are-exact"
    with pytest.raises(AssertionError, match="integers-are-exact  FAILED"):
        first()


def test_subjects_may_come_without_their_kind() -> None:
    mark = parametrize_with_checks([product, "reference"], quick=True)
    names = [param.id for param in mark.args[1]]
    assert "grouped_gemm-no-rows" in names
    assert "backend-no-tokens" in names
    report = testing.check_grouped_gemm(FAULTS[0].subject, quick=True)
    assert len(report.failures[0].case["x_sorted"]) <= 4


def test_public_names() -> None:
    assert {f"check_{kind}" for kind in (*KINDS, "backend")} < set(testing.__all__)
    for name in testing.__all__:
        assert getattr(testing, name) is not None
    assert set(testing.__all__) <= set(dir(testing))
    with pytest.raises(AttributeError, match="has no attribute 'check_everything'"):
        _ = testing.check_everything


def test_the_page_shows_checks_failures_the_plan_and_the_kill_table() -> None:
    pytest.importorskip("matplotlib")

    def empty(topk_ids, block_size, num_experts, expert_map=None):
        return np.zeros(0, np.int32), np.zeros(0, np.int32), 0

    report = check_align(empty, quick=True, only=["each-route-exactly-once"])
    page = html_page([report], [run_fault(FAULTS[0])])
    assert page.count('src="data:image/png;base64,') == 1
    for words in ("each-route-exactly-once", "gemm-skips-last-expert", "1 of 1 planted mistakes"):
        assert words in page
    assert "<script" not in page
    assert "http" not in page
