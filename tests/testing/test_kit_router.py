"""check_router: right routers pass, planted mistakes die by name, and no check is idle."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from kit_reproducers import reproduces

from npmoe import RangeError, naive
from npmoe.conventions import ROUTING_CONVENTIONS, routing_convention
from npmoe.routing import route
from npmoe.testing.conformance.case import Effort
from npmoe.testing.conformance.draw import draw_separated
from npmoe.testing.conformance.router import check_router, router_conventions, router_kind
from npmoe.testing.faults.router import FAULTS

CONVENTIONS = router_conventions()
KIND = router_kind("softmax_topk_renorm")
CHECKS = {check.name: check for name in CONVENTIONS for check in router_kind(name).checks}
# Mistakes that need more than four experts or choices to show.
LARGE = {"more-experts-than-a-block", "many-choices", "edges-of-tiles"}

config = functools.cache(routing_convention)


def ours(router_logits, top_k, convention="softmax_topk_renorm"):
    cfg = config(convention, router_logits.shape[1], top_k, nan_policy="clamp")
    routing = route(router_logits, cfg)
    return routing.topk_weights, routing.topk_ids


def iterative(router_logits, top_k, convention):
    """Find one expert after the other; softmax by logsumexp where that is accurate."""
    x = np.where(np.isfinite(router_logits.max(axis=1))[:, None], router_logits, 0)
    x = x.astype(router_logits.dtype)
    if "softmax" in convention:
        shifted = x - x.max(axis=1, keepdims=True)
        key = np.exp(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
    else:
        with np.errstate(over="ignore"):
            key = (1 / (1 + np.exp(-x))).astype(x.dtype)
    by = x if convention in ("topk_softmax", "llama4") else key
    ids, used = np.zeros((len(x), top_k), np.int64), np.zeros(x.shape, bool)
    for k in range(top_k):
        left = np.where(used, -np.inf, by)
        ids[:, k] = ((left == left.max(axis=1, keepdims=True)) & ~used).argmax(axis=1)
        np.put_along_axis(used, ids[:, k : k + 1], True, axis=1)
    weights = np.take_along_axis(key, ids, axis=1)
    if convention == "topk_softmax":
        chosen = np.take_along_axis(x, ids, axis=1)
        weights = np.exp(chosen - chosen[:, :1])
    eps = x.dtype.type(1e-20 if convention == "sigmoid_topk" else 0)
    if convention not in ("softmax_topk", "llama4") and (eps == 0 or top_k > 1):
        weights = weights / (weights.sum(axis=1, keepdims=True) + eps)
    return weights, ids


def in_float64(router_logits, top_k, convention):
    weights, ids = ours(router_logits.astype(np.float64), top_k, convention)
    return weights.astype(router_logits.dtype), ids


def unordered(router_logits, top_k):
    weights, ids = ours(router_logits, top_k)
    order = np.argsort(ids, axis=1)
    return np.take_along_axis(weights, order, axis=1), np.take_along_axis(ids, order, axis=1)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_right_routers_pass(convention: str) -> None:
    runs = [(ours, "float32", 0), (iterative, "float64", 1)]
    runs += [(in_float64, "float32", 2)] * (convention == "softmax_topk_renorm")
    for subject, dtype, seed in runs:
        function = functools.partial(subject, convention=convention)
        report = check_router(function, convention, dtype=dtype, seed=seed, quick=True)
        assert report.passed, f"{subject.__name__}: {report}"


@pytest.mark.parametrize(("dtype", "seed"), [("float32", 0), ("float64", 1), ("float32", 2)])
def test_a_right_router_passes_everything(dtype: str, seed: int) -> None:
    report = check_router(ours, dtype=dtype, seed=seed)
    assert report.passed, str(report)


def test_an_unordered_router_fails_one_check() -> None:
    report = check_router(unordered, quick=True)
    assert [f.check for f in report.failures] == ["ids-by-falling-weight"]
    ledger = {"ids-by-falling-weight": "unordered, as upstream"}
    assert check_router(unordered, quick=True, expected_failed_checks=ledger).passed


def test_near_ties_may_fall_either_way() -> None:
    def shaken(router_logits, top_k):
        """Choose after moving every logit by one bit, weigh without."""
        ends = np.where(np.arange(router_logits.shape[1]) % 2, 99, -99)
        ids = ours(np.nextafter(router_logits, ends.astype(router_logits.dtype)), top_k)[1]
        power = np.exp(router_logits - router_logits.max(axis=1, keepdims=True))
        chosen = np.take_along_axis(power, ids, axis=1)
        return chosen / chosen.sum(axis=1, keepdims=True), ids

    for dtype in ("float32", "float64"):
        report = check_router(shaken, dtype=dtype, only=["within-rounding"])
        assert report.passed, str(report)
    assert not check_router(shaken, "topk_softmax", only=["within-rounding"]).passed


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_mistakes_die_by_name_and_small(fault, tmp_path: Path) -> None:
    options = dict(fault.options)
    with np.errstate(all="ignore"):
        for seed in (0, 1, 2):
            report = check_router(
                fault.subject, **options, only=[fault.check], quick=True, seed=seed
            )
            assert [f.check for f in report.failures] == [fault.check]
        x, top_k = report.failures[0].case.arguments.values()
        assert len(x) <= 4
        assert fault.check in LARGE or (x.shape[1] <= 4 and top_k <= 4)
        assert reproduces(report, tmp_path)
    right = {"softmax_topk_renorm": "ours"}.get(options["convention"], options["convention"])
    assert not reproduces(report, tmp_path, target=f"{__name__}:{right}")


softmax_topk = functools.partial(ours, convention="softmax_topk")
topk_softmax = functools.partial(ours, convention="topk_softmax")
sigmoid_topk = functools.partial(ours, convention="sigmoid_topk")


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_narrow_routers_are_not_within_rounding(narrow: str) -> None:
    def subject(router_logits, top_k):
        if narrow == "float16":
            x = np.clip(router_logits, -6e4, 6e4).astype(np.float16).astype(router_logits.dtype)
        else:
            bits = router_logits.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
            x = bits.view(np.float32).astype(router_logits.dtype)
        return ours(x, top_k)

    names = ["within-rounding", "close-logits-are-told-apart"]
    for dtype in ("float32", "float64"):
        for seed in (0, 1, 2):
            report = check_router(subject, dtype=dtype, quick=True, seed=seed, only=names)
            assert [f.check for f in report.failures] == names


def spoiled(change):
    """Return what routes and spoils something."""

    def subject(router_logits, top_k):
        weights, ids = ours(router_logits, top_k)
        return change(weights, ids, router_logits)

    return subject


noise = np.random.default_rng(0)
IDLE_OTHERWISE = {
    "largest-logits-are-chosen": lambda x, k: ours(-x, k),
    "masked-experts-come-last": lambda x, k: ours(np.maximum(x, 0), k),
    "edges-of-tiles": spoiled(lambda w, i, x: (w, np.where(np.arange(len(w))[:, None] < 16, i, 0))),
    "no-tokens": lambda x, k: ours(x, k) if len(x) else (x, x),
    "same-bits-twice": spoiled(
        lambda w, i, x: (w + w.dtype.type(1e-7) * noise.standard_normal(w.shape, w.dtype), i)
    ),
    "read-only-inputs": spoiled(lambda w, i, x: (w if x.flags.writeable else w + 1, i)),
    "strided-inputs": spoiled(lambda w, i, x: (w if x.flags.c_contiguous else w + 1, i)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_can_fail(name: str) -> None:
    killing = [fault for fault in FAULTS if fault.check == name]
    assert (name in IDLE_OTHERWISE) != bool(killing)
    if name in IDLE_OTHERWISE:
        report = check_router(IDLE_OTHERWISE[name], only=[name], quick=True)
        assert [f.check for f in report.failures] == [name]


def test_mistakes_of_the_same_kinds_die_too() -> None:
    def second_best(x, k):
        """Leave the largest out."""
        ids = np.roll(np.argsort(-x, axis=1, kind="stable"), -1, axis=1)[:, :k]
        return np.full(ids.shape, 1 / k, x.dtype), ids

    def tail_rows_of_tiles(x, k):
        """Leave the last partial tile of 32 rows as it was."""
        weights, ids = ours(x, k)
        weights[len(x) // 32 * 32 :] *= len(x) < 32
        return weights, ids

    def padded_experts(x, k):
        """Pad experts to a power of two with logits of 0."""
        width = 1 << (x.shape[1] - 1).bit_length()
        return ours(np.pad(x, ((0, 0), (0, width - x.shape[1]))), k)

    def seven_bits(x, k):
        """Keep ids in seven bits."""
        weights, ids = ours(x, k)
        return weights, ids.astype(np.int8)

    def small_eps(x, k):
        """Add 1e-5 to the sum."""
        weights, ids = ours(x, k)
        return weights / weights.dtype.type(1 + 1e-5), ids

    def rising(x, k):
        """List the best last."""
        weights, ids = ours(x, k)
        return weights[:, ::-1], ids[:, ::-1]

    wrong = {
        second_best: "largest-logits-are-chosen",
        tail_rows_of_tiles: "edges-of-tiles",
        padded_experts: "largest-logits-are-chosen",
        seven_bits: "more-experts-than-a-block",
        small_eps: "within-rounding",
        rising: "ids-by-falling-weight",
    }
    with np.errstate(all="ignore"):
        for subject, name in wrong.items():
            assert not check_router(subject, quick=True, only=[name]).passed, subject.__name__


def test_conventions_that_need_more_are_refused() -> None:
    assert {"softmax_topk", "softmax_topk_renorm", "topk_softmax", "sigmoid_topk"} < set(
        CONVENTIONS
    )
    for name in set(ROUTING_CONVENTIONS) - set(CONVENTIONS):
        with pytest.raises(
            RangeError, match=r"check_router: convention must be one of .*more than"
        ):
            check_router(ours, name)
    with pytest.raises(RangeError, match=r"one of 'softmax_topk', .* got 'mixtral'\.$"):
        check_router(ours, "mixtral")


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_truth_is_the_definition(convention: str) -> None:
    for case in CHECKS["largest-logits-are-chosen"].cases(
        np.random.default_rng(1), Effort(cases=10, quick=True, dtype="float64")
    ):
        x, top_k = case.arguments.values()
        want = naive.route(x, routing_convention(convention, x.shape[1], top_k))
        weights, ids = router_kind(convention).expected(case)
        assert (ids.value == want.topk_ids).all()
        np.testing.assert_allclose(weights.value, want.topk_weights, rtol=1e-13)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_are_small(convention: str, dtype: str) -> None:
    """Weights within 1 % of the largest; no check is passed by being loose."""
    kind = router_kind(convention)
    effort = Effort(cases=6, quick=True, dtype=dtype)
    for check in kind.checks:
        for case in check.cases(np.random.default_rng(0), effort):
            weights = kind.expected(case)[0]
            bound = np.where(weights.free, 0, weights.bound)
            largest = np.where(weights.free, 0, weights.value).max(initial=0)
            underflow = largest < 1e-17  # where eps decides, or everything underflows
            assert underflow or (bound <= 0.01 * largest).all(), (check.name, case.note)


def test_separated_logits_keep_their_distance() -> None:
    x = np.sort(draw_separated(np.random.default_rng(0), (50, 64), "float32"), axis=1)
    assert np.diff(x, axis=1).min() > 0.99 / 64
    assert 1.5 < x.std() < 2.5
