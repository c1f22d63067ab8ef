"""check_activation and its backward: right ones pass, mistakes die by name, no check is idle."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from kit_reproducers import reproduces

from npmoe import RangeError
from npmoe.activations import ACTIVATIONS, bind_activation
from npmoe.naive.activations import activate, activate_backward
from npmoe.testing.conformance.activation import (
    activation_kind,
    check_activation,
    check_activation_backward,
)
from npmoe.testing.conformance.case import Effort
from npmoe.testing.faults.activation import FAULTS

CHECK = {"activation": check_activation, "activation_backward": check_activation_backward}
# One activation per group of checks that only some have.
NAMES = ("swiglu_oai", "swiglu_clamp_pre", "swiglu_clamp_post", "geglu", "gelu_tanh", "reglu")
NAMES += ("swiglu", "relu2")
KINDS = {(n, b): activation_kind(n, backward=b) for n in NAMES for b in (False, True)}


def run(kind: str, subject, activation: str, **settings):
    return CHECK[kind](subject, activation, **settings)


def subjects(name: str, alpha: float | None = None, limit: float | None = None):
    """Return our functions, of which scripts can also find the gated ones by name."""
    bound = bind_activation(name, alpha, limit)
    return bound.forward, bound.backward


def by_tanh(z, alpha=1.0):
    """Return x sigmoid(alpha x) and its slope, by tanh."""
    s = 0.5 * (1 + np.tanh(0.5 * alpha * z))
    return z * s, s * (1 + alpha * z * (1 - s))


def oai_by_tanh(gate_up):
    g, u = np.split(gate_up, 2, axis=1)
    return by_tanh(np.minimum(g, 7), 1.702)[0] * (np.clip(u, -7, 7) + 1)


def oai_by_tanh_backward(grad_act, gate_up):
    g, u = np.split(gate_up, 2, axis=1)
    value, slope = by_tanh(np.minimum(g, 7), 1.702)
    grad_g = grad_act * slope * (np.clip(u, -7, 7) + 1) * (g <= 7)
    return np.concatenate([grad_g, grad_act * value * (np.abs(u) <= 7)], axis=1)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_right_functions_pass(name: str) -> None:
    runs = [("float32", 0), ("float64", 1), ("float32", 2), ("float64", 2)]
    for dtype, seed in runs if name == "swiglu_oai" else runs[:2]:
        for check, subject in zip(CHECK.values(), subjects(name), strict=True):
            report = check(subject, name, dtype=dtype, seed=seed, quick=name != "swiglu_oai")
            assert report.passed, str(report)


def test_other_ways_to_compute_pass() -> None:
    for dtype in ("float32", "float64"):
        report = check_activation(oai_by_tanh, "swiglu_oai", dtype=dtype, quick=True)
        assert report.passed, str(report)
        report = check_activation_backward(
            oai_by_tanh_backward, "swiglu_oai", dtype=dtype, quick=True
        )
        assert report.passed, str(report)


@pytest.mark.parametrize(
    ("name", "alpha", "limit"),
    [("swiglu_oai", 2.5, 0.1), ("swiglu_clamp_pre", None, 0.5), ("swiglu_clamp_post", None, 0.1)],
)
def test_parameters_reach_the_truth(name: str, alpha: float | None, limit: float) -> None:
    own, published = subjects(name, alpha, limit), subjects(name)
    for check, right, wrong in zip(CHECK.values(), own, published, strict=True):
        for dtype in ("float32", "float64"):
            report = check(right, name, alpha=alpha, limit=limit, dtype=dtype, quick=True)
            assert report.passed, str(report)
        report = check(wrong, name, alpha=alpha, limit=limit, quick=True, only=["within-rounding"])
        assert not report.passed


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_mistakes_die_by_name_and_small(fault, tmp_path: Path) -> None:
    name = dict(fault.options)["activation"]
    with np.errstate(all="ignore"):
        for seed in (0, 1, 2):
            report = run(fault.kind, fault.subject, name, only=[fault.check], quick=True, seed=seed)
            assert [f.check for f in report.failures] == [fault.check]
        shape = report.failures[0].case.arguments["gate_up"].shape
        assert shape[0] == 1
        assert shape[1] <= 4
        assert reproduces(report, tmp_path)
    assert not reproduces(report, tmp_path, target=f"{__name__}:{fault.kind}_{name}")


for _name in NAMES:
    globals()[f"activation_{_name}"], globals()[f"activation_backward_{_name}"] = subjects(_name)

noise = np.random.default_rng(0)


def changed(kind: str, name: str, change):
    """Return our function with its output changed; `change` also sees the last argument."""
    right = subjects(name)[kind == "activation_backward"]
    return lambda *given: change(right(*given), given[-1])


IDLE_OTHERWISE = {
    "within-rounding": lambda out, z: out.astype("f2").astype(z.dtype),
    "integers-are-exact": lambda out, z: out * out.dtype.type(1 + 1e-6),
    "edges-of-tiles": lambda out, z: np.where(np.arange(len(z))[:, None] < 64, out, 0),
    "no-rows": lambda out, z: out if len(z) else out[:, :0],
    "output-has-the-dtype-of-the-input": lambda out, z: out.astype(np.float64),
    "input-is-not-written": lambda out, z: (out, z.fill(1) if z.flags.writeable else 0)[0],
    "same-bits-twice": lambda out, z: out + noise.standard_normal(out.shape, out.dtype),
    "read-only-inputs": lambda out, z: out if z.flags.writeable else out + 1,
    "strided-inputs": lambda out, z: out if z.flags.c_contiguous else out + 1,
    "nan-stays-in-its-place": lambda out, z: out * (z.sum() * 0 + 1),
    "large-inputs-stay-finite": lambda out, z: out / (np.abs(z).max(initial=0) < 80),
    "zero-gradient-gives-zero": lambda out, z: out + out.dtype.type(1e-30),
    "zero-is-flat": lambda out, z: np.where(z[:, : out.shape[1]] == 0, 1, out).astype(z.dtype),
}
# These see any other factor.
for _curve in ("curve-is-relu", "curve-is-relu-squared", "tanh-not-erf", "erf-not-tanh"):
    IDLE_OTHERWISE[_curve] = lambda out, z: out * out.dtype.type(1.001)
for _half in ("gate-is-the-first-half", "halves-are-contiguous"):
    IDLE_OTHERWISE[_half] = IDLE_OTHERWISE["erf-not-tanh"]
for _limit in ("limit-comes-before-the-curve", "limit-comes-after-the-curve"):
    IDLE_OTHERWISE[_limit] = IDLE_OTHERWISE["erf-not-tanh"]
for _more in ("curve-is-x-sigmoid-x", "sigmoid-is-scaled-by-alpha", "both-halves-are-limited"):
    IDLE_OTHERWISE[_more] = IDLE_OTHERWISE["erf-not-tanh"]
for _last in ("gate-is-limited-from-above-only", "up-is-shifted-by-one"):
    IDLE_OTHERWISE[_last] = lambda out, z: out * out.dtype.type(1.5)
for _back in ("no-gradient-beyond-the-limit", "limit-itself-has-a-gradient"):
    IDLE_OTHERWISE[_back] = lambda out, z: out + out.dtype.type(1e-2)


@pytest.mark.parametrize("kind", CHECK)
def test_every_check_can_fail(kind: str) -> None:
    for name in NAMES:
        checks = KINDS[name, kind == "activation_backward"].checks
        for check in checks:
            subject = changed(kind, name, IDLE_OTHERWISE[check.name])
            with np.errstate(all="ignore"):
                report = run(kind, subject, name, only=[check.name], quick=True)
            assert [f.check for f in report.failures] == [check.name], name


def halves(z):
    return np.split(z, 2, axis=1)


def test_mistakes_of_the_same_kinds_die_too() -> None:
    def hard_swish(z):
        g, u = halves(z)
        return g * np.clip(g / 6 + 0.5, 0, 1) * u

    def quick_gelu(z):
        g, u = halves(z)
        return by_tanh(g, 1.702)[0] * u

    def shift_before_the_limit(z):
        g, u = halves(z)
        return by_tanh(np.minimum(g, 7), 1.702)[0] * np.clip(u + 1, -7, 7)

    def limits_the_product(z):
        g, u = halves(z)
        return np.clip(by_tanh(g)[0] * u, -10, 10)

    def polynomial_without_its_cube(z):
        return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * z))

    wrong = [
        (hard_swish, "swiglu", "curve-is-x-sigmoid-x"),
        (quick_gelu, "geglu", "erf-not-tanh"),
        (shift_before_the_limit, "swiglu_oai", "both-halves-are-limited"),
        (limits_the_product, "swiglu_clamp_pre", "both-halves-are-limited"),
        (polynomial_without_its_cube, "gelu_tanh", "tanh-not-erf"),
    ]
    for subject, name, check in wrong:
        report = check_activation(subject, name, quick=True, only=[check])
        assert not report.passed, subject.__name__


def test_names_and_parameters_are_checked() -> None:
    for check in CHECK.values():
        with pytest.raises(
            RangeError, match=rf"^{check.__name__}: activation must be one of .*'x'"
        ):
            check(abs, "x")
        with pytest.raises(RangeError, match="limit must be None for 'swiglu'"):
            check(abs, "swiglu", limit=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_truth_is_the_definition(name: str) -> None:
    rng, effort = np.random.default_rng(1), Effort(cases=6, quick=True, dtype="float64")
    for backward in (False, True):
        kind = KINDS[name, backward]
        for case in kind.checks[0].cases(rng, effort):
            (want,) = kind.expected(case)
            define = activate_backward if backward else activate
            for row, given in zip(
                want.value, zip(*case.arguments.values(), strict=True), strict=True
            ):
                np.testing.assert_allclose(row, define(*given, name), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_are_small(name: str, dtype: str) -> None:
    """In every check within 1 % of its largest value, so that none passes by being loose."""
    effort = Effort(cases=3, quick=True, dtype=dtype)
    for backward in (False, True):
        kind = KINDS[name, backward]
        for check in kind.checks:
            if check.name == "gate-is-limited-from-above-only":
                continue  # where all values are nearly 0; see the next test
            cases = check.cases(np.random.default_rng(0), effort)
            wants = [kind.expected(case)[0] for case in cases]
            bound = max(0 if w.bound is None else w.bound.max(initial=0) for w in wants)
            assert bound <= 0.01 * max(np.abs(w.value).max(initial=0) for w in wants), check.name


@pytest.mark.parametrize("name", ["swiglu_oai", "swiglu_clamp_pre"])
def test_the_slope_below_minus_the_limit_is_seen(name: str) -> None:
    """In float32 what a second limit would change is well above the bound."""
    effort = Effort(cases=6, quick=True, dtype="float32")
    limit = ACTIVATIONS[name].default_limit
    for backward in (False, True):
        kind = KINDS[name, backward]
        check = next(c for c in kind.checks if c.name == "gate-is-limited-from-above-only")
        visible = 0.0
        for case in check.cases(np.random.default_rng(0), effort):
            (want,) = kind.expected(case)
            mistake = 0.0 * want.value
            if not backward:
                z = np.maximum(case.arguments["gate_up"], np.float32(-limit))
                mistake = kind.expected(case.replace(gate_up=z))[0].value
            visible = max(visible, float((np.abs(want.value - mistake) / want.bound)[0, 0]))
        assert visible > 3.0
