"""check_loss: right losses pass, planted mistakes die by name, and no check is idle."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from kit_reproducers import reproduces

from npmoe import RangeError, naive
from npmoe.conventions import routing_convention
from npmoe.losses import (
    BALANCE_CONVENTIONS,
    entropy_loss,
    importance_loss,
    load_balancing_loss,
    z_loss,
)
from npmoe.routing import route
from npmoe.testing.conformance.case import Effort
from npmoe.testing.conformance.loss import check_loss, loss_kind
from npmoe.testing.conformance.loss_rule import LOSSES, OTHERS, LossRule
from npmoe.testing.faults.loss import FAULTS

OWN = {"z_loss": z_loss, "entropy": entropy_loss, "importance": importance_loss}
NAIVE = {
    "z_loss": naive.z_loss,
    "entropy": naive.entropy_loss,
    "importance": naive.importance_loss,
}
CHECKS = {check.name: (name, check) for name in LOSSES for check in loss_kind(name).checks}
config = functools.cache(routing_convention)


def ours(router_logits, topk_ids, loss="switch"):
    cfg = config("softmax_topk", router_logits.shape[1], topk_ids.shape[1])
    routing = route(router_logits, cfg, topk_ids=topk_ids)
    if loss in OWN:
        return OWN[loss](routing)
    return load_balancing_loss(routing, convention=loss, scope="batch")


def plain(router_logits, topk_ids, loss):
    """Compute everything in the dtype of the logits, with sums in the textbook's order."""
    x, number = router_logits, router_logits.dtype.type
    (tokens, experts), top_k = x.shape, topk_ids.shape[1]
    if tokens == 0:
        return 0.0, x.copy()
    probs = np.exp(x - x.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    mean, tiny = probs.mean(axis=0), np.finfo(x.dtype).tiny
    if loss == "z_loss":
        top = x.max(axis=1, keepdims=True)
        lse = np.log(np.exp(x - top).sum(axis=1, keepdims=True)) + top
        return (lse**2).mean(), 2 * lse * probs / number(tokens)
    if loss == "entropy":
        log = np.log(np.maximum(probs, tiny))
        value, slope = -(probs * log).sum(axis=1).mean(), -(log + 1) / number(tokens)
    elif loss == "importance":
        amount = probs.sum(axis=0)
        value = (amount * amount).mean() / amount.mean() ** 2 - 1
        slope = 2 * amount[None] / (amount.mean() ** 2 * number(experts))
    elif loss == "prob_entropy":
        log = np.log(np.maximum(mean, tiny))
        value = number(experts) * (mean * log).sum()
        slope = number(experts) * (log[None] + 1) / number(tokens)
    else:
        fresh = np.argsort(-probs, axis=1, kind="stable")[:, :top_k]
        entry = BALANCE_CONVENTIONS[loss]
        ids = {"top1": topk_ids[:, :1], "unbiased_topk": fresh}.get(entry.counts, topk_ids)
        hot = sum(
            (ids[:, k, None] == np.arange(experts)).astype(x.dtype) for k in range(ids.shape[1])
        )
        share = hot.mean(axis=0)
        share = share if entry.counts_over == "tokens" else share / number(ids.shape[1])
        factor = number(experts if entry.times_experts else 1)
        value, slope = factor * (share * mean).sum(), factor * share[None] / number(tokens)
    return value, probs * slope - probs * (probs * slope).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_right_losses_pass(loss: str) -> None:
    seed = LOSSES.index(loss) % 3
    runs = [(ours, "float32", seed), (plain, "float64", (seed + 1) % 3)]
    if loss == "switch":
        runs += [(ours, "float32", 1), (ours, "float64", 2), (plain, "float32", 2)]
    for subject, dtype, seed in runs:
        function = functools.partial(subject, loss=loss)
        report = check_loss(function, loss, dtype=dtype, seed=seed, quick=loss != "switch")
        assert report.passed, f"{subject.__name__}: {report}"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_mistakes_die_by_name_and_small(fault, tmp_path: Path) -> None:
    loss = dict(fault.options)["loss"]
    with np.errstate(all="ignore"):
        for seed in (0, 1, 2):
            report = check_loss(fault.subject, loss, only=[fault.check], quick=True, seed=seed)
            assert [f.check for f in report.failures] == [fault.check]
        (tokens, experts), top_k = (
            report.failures[0].case.arguments["router_logits"].shape,
            report.failures[0].case.arguments["topk_ids"].shape[1],
        )
        assert max(tokens, experts, top_k) <= 4
        assert reproduces(report, tmp_path)
    assert not reproduces(report, tmp_path, target=f"{__name__}:{loss}")


switch, megatron, gshard, z, entropy, importance = (
    functools.partial(ours, loss=name)
    for name in ("switch", "megatron", "gshard", "z_loss", "entropy", "importance")
)
globals()["z_loss"] = z


def scaled(factor: float, only_gradient: bool = False):
    def subject(router_logits, topk_ids, loss):
        value, grad = ours(router_logits, topk_ids, loss)
        return value * (1 if only_gradient else factor), grad * grad.dtype.type(factor)

    return subject


noise = np.random.default_rng(0)


def changed(change):
    def subject(router_logits, topk_ids, loss):
        value, grad = ours(router_logits, topk_ids, loss)
        return change(value, grad, router_logits)

    return subject


IDLE_OTHERWISE = {
    "within-rounding": changed(lambda v, g, x: (v, g.astype("f2").astype(x.dtype))),
    "tokens-are-averaged": changed(lambda v, g, x: (v * len(x), g)),
    "huge-logits-do-not-overflow": changed(lambda v, g, x: (v / (np.abs(x).max() < 80), g)),
    "masked-experts-cost-nothing": changed(lambda v, g, x: (v, g + 0 * np.nan_to_num(x).max() + 1)),
    "one-expert": changed(lambda v, g, x: (v + 1, g)),
    "no-tokens-cost-nothing": changed(lambda v, g, x: (v + np.nan, g)),
    "many-experts-and-tokens": changed(
        lambda v, g, x: (v, np.where(np.arange(len(g))[:, None] < 32, g, 0))
    ),
    "gradient-has-the-dtype-of-the-logits": changed(lambda v, g, x: (v, g.astype("f8"))),
    "inputs-are-not-written": changed(lambda v, g, x: (x.fill(0), (v, g))[1]),
    "same-bits-twice": changed(lambda v, g, x: (v + noise.random(), g)),
    "read-only-inputs": changed(lambda v, g, x: (v + (not x.flags.writeable), g)),
    "strided-inputs": changed(lambda v, g, x: (v + (not x.flags.c_contiguous), g)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_can_fail(name: str) -> None:
    if name in IDLE_OTHERWISE:
        subject, loss = functools.partial(IDLE_OTHERWISE[name], loss="switch"), "switch"
    else:
        fault = next(f for f in FAULTS if f.check == name)
        subject, loss = fault.subject, dict(fault.options)["loss"]
    with np.errstate(all="ignore"):
        report = check_loss(subject, loss, only=[name], quick=True)
    assert [f.check for f in report.failures] == [name]


@pytest.mark.parametrize("loss", ["switch", "hf", "prob_entropy", *OTHERS])
def test_mistakes_of_the_same_kinds_die_too(loss: str) -> None:
    wrong = {
        "gradient of the next token": changed(lambda v, g, x: (v, np.roll(g, 1, axis=0))),
        "half of both": scaled(0.5),
        "a gradient 1 % off": scaled(1.01, only_gradient=True),
        "a last expert without gradient": changed(
            lambda v, g, x: (v, g * (np.arange(g.shape[1]) < g.shape[1] - 1))
        ),
        "a value in half precision": changed(lambda v, g, x: (np.float16(v), g)),
        "another sign": scaled(-1.0),
    }
    names = ["uniform-value-of-the-convention", "within-rounding"]
    names += ["gradient-is-the-slope-of-the-value"]
    with np.errstate(all="ignore"):
        for what, change in wrong.items():
            subject = functools.partial(change, loss=loss)
            assert not check_loss(subject, loss, quick=True, only=names, stop=True).passed, what


def test_conventions_are_told_apart() -> None:
    """Of any two that differ, one is not the other: only these compute the same."""
    same = {
        *(("switch", n) for n in ("megablocks", "deepspeed_topk", "sonic")),
        ("megatron", "deepseek_v3"),
    }
    names = ["uniform-value-of-the-convention", "counts-follow-the-ids", "within-rounding"]
    for wanted in ("switch", "megatron", "unscaled"):
        for name in LOSSES:
            if name == wanted:
                continue
            subject = functools.partial(ours, loss=name)
            known = [n for n in names if n in {c.name for c in loss_kind(wanted).checks}]
            report = check_loss(subject, wanted, quick=True, only=known, stop=True)
            assert report.passed == ((wanted, name) in same), (wanted, name)


def test_unknown_losses_are_refused() -> None:
    with pytest.raises(RangeError, match=r"^check_loss: loss must be one of .*'z_loss'.*got 'aux'"):
        check_loss(ours, "aux")


@pytest.mark.parametrize("loss", LOSSES)
def test_the_truth_is_the_definition(loss: str) -> None:
    effort = Effort(cases=4, quick=True, dtype="float64")
    for name in ("within-rounding", "softmax-is-taken-once", "masked-experts-cost-nothing"):
        for case in CHECKS[name][1].cases(np.random.default_rng(1), effort):
            x, ids = case.arguments.values()
            if loss in OTHERS and np.isinf(x).any():
                continue  # the definition takes ln 0
            if loss in NAIVE:
                value, grad = NAIVE[loss](x)
            else:
                source = BALANCE_CONVENTIONS[loss].counts or "pre_drop"
                source = "pre_drop" if source == "executed" else source
                value, grad = naive.load_balancing_loss(x, ids, convention=loss, counts=source)
            want_value, want_grad = LossRule(loss).expected(case)
            np.testing.assert_allclose(want_value.value, value, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(want_grad.value, grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_are_small(loss: str, dtype: str) -> None:
    """Within 1 % of the value, or of the largest gradient there could be."""
    kind, effort = loss_kind(loss), Effort(cases=2, quick=True, dtype=dtype)
    for check in kind.checks:
        for case in check.cases(np.random.default_rng(0), effort):
            value, grad = kind.expected(case)
            if not len(grad.value):
                continue
            largest = max(abs(float(value.value)), 0.1)  # where the value is 0 on purpose
            assert value.bound <= 0.01 * largest, (check.name, case.note)
            largest = max(np.abs(grad.value).max(), 0.1 / len(grad.value))
            assert grad.bound.max() <= 0.01 * largest, (check.name, case.note)
