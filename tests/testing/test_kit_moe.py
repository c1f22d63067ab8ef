"""check_moe and check_moe_backward: our own pass, every planted mistake dies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kit_runs import assert_dies, loose_bounds, moe_subjects, uncaught

from npmoe import RangeError, preset
from npmoe.params import param_axes
from npmoe.testing.conformance.moe import (
    check_moe,
    check_moe_backward,
    moe_kind,
    moe_presets,
)
from npmoe.testing.faults.moe import FAULTS

FEW = ("within-rounding", "largest-logits-win", "more-experts-than-tokens")
CHECKS = {"moe": check_moe, "moe_backward": check_moe_backward}


@pytest.mark.parametrize(
    ("name", "dtype", "seed"),
    [("mixtral", "float32", 0), ("olmoe", "float64", 1), ("glam", "float32", 2)],
)
def test_our_own_pass(name: str, dtype: str, seed: int) -> None:
    forward, backward = moe_subjects(name)
    for check, fn in ((check_moe, forward), (check_moe_backward, backward)):
        report = check(fn, preset=name, dtype=dtype, seed=seed, quick=True)
        assert report.passed, str(report)
        assert all(r.cases for r in report.results)


@pytest.mark.parametrize("name", moe_presets())
def test_every_preset_that_fits_passes(name: str) -> None:
    assert tuple(param_axes(preset(name))) == ("router_weight", "gate_up_proj", "down_proj")
    report = check_moe(moe_subjects(name)[0], name, quick=True, only=FEW)
    assert report.passed, str(report)


def test_presets_with_other_parameters_are_refused() -> None:
    with pytest.raises(RangeError) as caught:
        check_moe(print, preset="llama4")
    known = ", ".join(moe_presets())
    assert str(caught.value) == (
        f"check_moe: preset must be one of {known}, got 'llama4'. "
        "Its layer has more parameters: shared_gate_up_proj, shared_down_proj."
    )
    with pytest.raises(RangeError) as caught:
        check_moe_backward(print, preset="mixtrall")
    assert str(caught.value) == (
        f"check_moe_backward: preset must be one of {known}, got 'mixtrall'."
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_every_fault_dies_by_name(fault: object, seed: int, tmp_path: Path) -> None:
    check, options = CHECKS[fault.kind], dict(fault.options)
    report = check(fault.subject, only=[fault.check], quick=True, seed=seed, **options)
    assert_dies(fault, report, tmp_path)


@pytest.mark.parametrize(("name", "dtype"), [("mixtral", "float32"), ("olmoe", "float64")])
def test_bounds_are_below_one_percent(name: str, dtype: str) -> None:
    for backward in (False, True):
        assert loose_bounds(moe_kind(name, backward=backward), dtype, seed=5) == []


@pytest.mark.parametrize("name", ["mixtral", "switch"])
def test_every_check_can_fail(name: str) -> None:
    forward, backward = moe_subjects(name)

    def run(fn: object, **settings: object) -> object:
        return check_moe(fn, name, **settings)

    def run_backward(fn: object, **settings: object) -> object:
        return check_moe_backward(fn, name, **settings)

    assert uncaught(moe_kind(name), run, forward) == []
    assert uncaught(moe_kind(name, backward=True), run_backward, backward) == []


def test_mistakes_in_no_list_die_too() -> None:
    forward, backward = moe_subjects("mixtral")

    def one_more(x: np.ndarray, r: np.ndarray, w1: np.ndarray, w2: np.ndarray, top_k: int):
        return forward(x, r, w1, w2, min(top_k + 1, len(r)))

    def scaled(x: np.ndarray, r: np.ndarray, w1: np.ndarray, w2: np.ndarray, top_k: int):
        return forward(x, r / np.sqrt(r.dtype.type(r.shape[1])), w1, w2, top_k)

    def residual(x: np.ndarray, r: np.ndarray, w1: np.ndarray, w2: np.ndarray, top_k: int):
        return x + forward(x, r, w1, w2, top_k)

    def without_shift(g: np.ndarray, x: np.ndarray, r: np.ndarray, *rest: object):
        grads = backward(g, x, r, *rest)
        return grads[0], grads[1] - grads[1].mean(axis=0) + grads[1].max(), *grads[2:]

    for wrong in (one_more, scaled, residual):
        assert not check_moe(wrong, quick=True, stop=True).passed, wrong.__name__
    assert not check_moe_backward(without_shift, quick=True, stop=True).passed
