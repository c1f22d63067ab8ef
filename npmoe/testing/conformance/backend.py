"""A backend: every verb, the expert core and the whole layer: ``check_backend``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Unpack

import numpy as np

from npmoe._half import HALF_DTYPES
from npmoe.activations import ACTIVATIONS
from npmoe.config import MoEConfig
from npmoe.testing.bounds import gamma
from npmoe.testing.conformance.backend_cases import (
    drawn_case,
    draws,
    experts_cases,
    experts_truth,
    half_case,
    reduce_backend,
    route_cases,
    soft_cases,
    square_cases,
    verb_truth,
)
from npmoe.testing.conformance.backend_probe import (
    LAYER_RUNS,
    BackendProbe,
    is_fused,
    previous_gradient,
    resolve,
)
from npmoe.testing.conformance.case import (
    WITH_HALVES,
    Call,
    Case,
    Check,
    Effort,
    Expected,
    Finding,
    Kind,
)
from npmoe.testing.conformance.common import Cases, hygiene_checks, judge_values
from npmoe.testing.conformance.half_cases import exact_reads, long_sums, selections
from npmoe.testing.conformance.operand_cases import OPERANDS_NOTE, operand_checks
from npmoe.testing.conformance.recipes import (
    GRADS,
    exact_recipes,
    layer_case,
    layer_expected,
    layer_recipes,
    make_recipe,
    problem_of,
    truth_of,
)
from npmoe.testing.conformance.report import Report
from npmoe.testing.conformance.runner import Settings, run_checks
from npmoe.testing.conformance.verbs import ALSO, VERBS

_LAYOUTS = ("strided", "read_only", "reversed", "fortran")
_UNSAVED = """\
saved = target("forward", *arguments[1:])[0]
assert saved.tobytes() == got[0].tobytes(), f"saved:\\n{saved}\\nunsaved:\\n{got[0]}"
"""
# With expert weights in half precision they say something more; the others would repeat float32.
_MEETS_WEIGHTS = frozenset(
    {
        *("verb-grouped-gemm", "experts-composed", "experts-fused"),
        *("square-matrices-are-not-transposed", "layer-forward", "layer-backward"),
        *("layer-is-exact", "empty-experts-have-zero-gradient", "out-is-overwritten"),
        *("accumulate-adds", "no-tokens", "any-memory-layout", "same-bits-twice"),
        *("results-stay-on-the-device", "layer-composed-forward", "layer-composed-backward"),
    }
)
_EMPTY = MoEConfig(hidden_size=3, intermediate_size=2, num_experts=8, top_k=2, expert_bias=True)


@functools.lru_cache(maxsize=64)
def expected_backend(case: Case) -> tuple[Expected, ...]:
    """Return the truth of a verb, of the expert core, or of the layer."""
    verb = str(case.arguments["verb"])
    if verb in ("residence", "accelerates"):
        return (Expected(value=np.zeros(())),)
    if verb.startswith("experts-"):
        return experts_truth(case)
    if verb not in LAYER_RUNS:
        return verb_truth(case)
    found = layer_expected(case, grads=verb.startswith("backward"))
    if verb == "forward-unsaved":
        return found[:1]
    return _accumulated(case, found) if verb == "backward-accumulate" else found


def _accumulated(case: Case, grads: tuple[Expected, ...]) -> tuple[Expected, ...]:
    """Return gradients added to previous ones; that of the input is always new."""
    recipe = str(case.arguments["recipe"])
    problem = problem_of(recipe)
    names = [n for n in GRADS if getattr(truth_of(recipe).grads, n) is not None]
    found = []
    for name, want in zip(names, grads, strict=True):
        if name == "hidden_states":
            found.append(want)
            continue
        start = previous_gradient(name, getattr(problem.params, name).shape, problem.dtype)
        given = np.asarray(want.bound)
        size = np.abs(start) + np.abs(want.value) + given
        # Its rows may be added one by one.
        n = 4 + problem.hidden_states.shape[0] * problem.cfg.router_size
        bound = given + gamma(n, problem.dtype) * size
        found.append(Expected(value=start + want.value, bound=bound, dtype=want.dtype))
    return tuple(found)


def _judge_unsaved(call: Call, case: Case) -> None:
    """Raise unless save=False gives the output bits of save=True."""
    saved = call(layer_case("forward", str(case.arguments["recipe"])))[0]
    unsaved = call(case)[0]
    if saved.tobytes() != unsaved.tobytes():
        raise Finding("the output with save=False must have the bits of that with save=True.")


def _verb_cases(name: str) -> Cases:
    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        if name == "route":
            yield from route_cases(rng, effort, after=False)
        elif name == "renormalize_kept":
            yield from route_cases(rng, effort, after=True)
        elif name == "soft_route":
            yield from soft_cases(rng, effort)
        else:
            least = len(ACTIVATIONS) if name == "activation" else 0
            for d in draws(rng, replace(effort, cases=max(effort.cases, least))):
                yield drawn_case(name, d)

    return generate


def _ties(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    yield from route_cases(rng, effort, after=False, ties=True)


def _squares(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    for verb in ("grouped_gemm", "grouped_gemm_wgrad", "linear", "experts-composed"):
        if effort.half is None or verb not in ("grouped_gemm_wgrad", "linear"):
            yield from square_cases(rng, effort, verb)


def _core_cases(verb: str) -> Cases:
    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        yield from experts_cases(rng, effort, verb)

    return generate


def _layer_cases(verb: str, **fixed: Any) -> Cases:
    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        for recipe in layer_recipes(rng, effort, **fixed):
            yield layer_case(verb, recipe)

    return generate


def _exact_cases(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    for recipe in exact_recipes(rng, effort):
        yield layer_case("forward", recipe)
        yield layer_case("backward", recipe)


def _empty_cases(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """Yield eight experts of which most have no token."""
    for replay in ("same", "full", "none"):
        recipe = make_recipe(
            _EMPTY,
            num_tokens=2,
            seed=int(rng.integers(2**31)),
            dtype=effort.dtype,
            expert_dtype=effort.half,
            operands=effort.operands,
            values="integer",
            replay=replay,
        )
        yield layer_case("backward", recipe)
        yield layer_case("backward-composed", recipe)
        yield layer_case("backward-out", recipe)


def _no_tokens(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    for case in _layer_cases("backward", num_tokens=0, num_sequences=1, mask="none")(rng, effort):
        yield case
        yield layer_case("forward", str(case.arguments["recipe"]))


def _layouts(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    for layout in _LAYOUTS:
        cases = _layer_cases("backward", layout=layout)(rng, effort)
        yield from itertools.islice(cases, 2 if effort.quick else 14)


def _resident_cases(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """Yield layers without a capacity, whose number of rows would have to be counted."""
    for case in _layer_cases("residence", mask="none")(rng, effort):
        if not problem_of(str(case.arguments["recipe"])).cfg.has_capacity:
            yield case


def _wide_gradients(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """Yield small layers, every way to their gradients."""
    for tokens in (1, 0, 3):
        recipe = make_recipe(
            _EMPTY,
            num_tokens=tokens,
            seed=int(rng.integers(2**31)),
            dtype=effort.dtype,
            expert_dtype=effort.half,
            replay="full",
        )
        for verb in ("backward", "backward-composed", "backward-out", "backward-accumulate"):
            yield layer_case(verb, recipe)


def _half_checks(fused: bool) -> list[Check]:
    """Return the checks of half precision alone."""
    verbs = ("grouped_gemm", "experts-composed", *(("experts-fused",) if fused else ()))
    values = judge_values(expected_backend)

    def check(name: str, about: str, cases: Any) -> Check:
        def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
            yield from cases(rng, effort, verbs, half_case)

        return Check(name=name, about=about, cases=generate, judge=values, dtypes=HALF_DTYPES)

    return [
        check(
            "half-weights-are-read-exactly",
            "every number of half precision, subnormal or 1e38, comes out of a product as it is",
            exact_reads,
        ),
        check(
            "activations-are-not-rounded",
            "rows that meet weights of 1 and -1 keep their float32 bits: not cast to half",
            selections,
        ),
        check(
            "sums-are-float32",
            "integer sums beyond 2^11, exact in float32, are exact: no sum in half precision",
            long_sums,
        ),
        Check(
            name="gradients-are-float32",
            about="gradients of half weights are float32 arrays, new ones and those of out=",
            cases=_wide_gradients,
            judge=values,
            dtypes=HALF_DTYPES,
        ),
    ]


def _one_case(verb: str) -> Cases:
    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        del rng
        yield layer_case(verb, make_recipe(_EMPTY, num_tokens=1, dtype=effort.dtype))

    return generate


@functools.cache
def backend_kind(*, fused: bool, operands: str | None = None) -> Kind:
    """Return the kind of ``check_backend``.

    `fused` says whether the expert core is one call, `operands` what its products round to.
    """
    values = judge_values(expected_backend)

    def check(name: str, about: str, cases: Cases) -> Check:
        return Check(name=name, about=about, cases=cases, judge=values)

    checks = []
    for name in (*VERBS, "route", "renormalize_kept", "soft_route"):
        both = f" and {ALSO[name]}" if name in ALSO else ""
        both = " and route_backward" if name in ("route", "renormalize_kept") else both
        about = f"the verb {name}{both} does what the definition says"
        checks.append(check(f"verb-{name.replace('_', '-')}", about, _verb_cases(name)))
    checks += [
        check(
            "ties-go-to-the-lowest-expert",
            "of equal logits the lowest id is chosen first",
            _ties,
        ),
        check(
            "experts-composed",
            "the expert core from single verbs: holes, empty experts, NaN where nobody reads",
            _core_cases("experts-composed"),
        ),
        check(
            "square-matrices-are-not-transposed",
            "with equal widths a transposed matrix still fits: it must not be used",
            _squares,
        ),
        check("layer-forward", "output and ids of every option", _layer_cases("forward")),
        check("layer-backward", "all gradients of every option", _layer_cases("backward")),
        check("layer-is-exact", "layers without rounding have one right answer", _exact_cases),
        check(
            "empty-experts-have-zero-gradient",
            "experts without tokens get exactly 0, also in memory that was never zeroed",
            _empty_cases,
        ),
        check(
            "out-is-overwritten",
            "out= takes the gradients, whatever stood there",
            _layer_cases("backward-out"),
        ),
        check(
            "accumulate-adds",
            "accumulate= adds the gradients to what stands there",
            _layer_cases("backward-accumulate"),
        ),
        check("no-tokens", "zero tokens give empty rows and zero gradients", _no_tokens),
        check("any-memory-layout", "strided, reversed, Fortran and read-only arrays", _layouts),
        hygiene_checks(_layer_cases("backward"), expected_backend, arrays=False)[0],
        Check(
            name="save-changes-nothing",
            about="save=False gives the bits of save=True, and nothing saved",
            cases=_layer_cases("forward-unsaved"),
            judge=_judge_unsaved,
            script=lambda _: _UNSAVED,
        ),
        check(
            "results-stay-on-the-device",
            "everything returned is the backend's array; nothing goes to the host by itself",
            _resident_cases,
        ),
        check(
            "accelerates-is-true",
            "the verbs in `accelerates` are the backend's own, and are called",
            _one_case("accelerates"),
        ),
    ]
    if fused:
        checks += [
            check(
                "experts-fused",
                "the fused pair: holes, empty experts, NaN where nobody reads",
                _core_cases("experts-fused"),
            ),
            check(
                "layer-composed-forward",
                "the layer without the fused pair: output and ids",
                _layer_cases("forward-composed"),
            ),
            check(
                "layer-composed-backward",
                "the layer without the fused pair: all gradients",
                _layer_cases("backward-composed"),
            ),
        ]
    halves = [replace(c, dtypes=WITH_HALVES) if c.name in _MEETS_WEIGHTS else c for c in checks]
    halves += _half_checks(fused)
    if operands is not None:
        halves = operand_checks(halves, operands, expected_backend)
    return Kind(
        name="backend",
        signature="npmoe.backends.Backend: a name, class or instance",
        expected=expected_backend,
        checks=tuple(halves),
        reductions=reduce_backend,
    )


def check_backend(backend: Any, **settings: Unpack[Settings]) -> Report:
    """Check a backend: every verb, the expert core fused and composed, and the whole layer.

    Parameters
    ----------
    backend : str, Backend or class
        A name for `npmoe.get_backend`, an instance, or a class that is called without arguments.
    **settings
        Keywords of `run_checks`; `array` has no meaning here. With dtype "float16" or "bfloat16"
        expert weights have that dtype, and everything else is float32.

    Returns
    -------
    Report

    Raises
    ------
    BackendUnavailableError
        If it cannot run here, or lacks verbs.
    """
    instance, target = resolve(backend)
    shown = settings.get("name")
    # What a reproducer can call.
    again = ", ".join(map(repr, target))
    settings["name"] = f"npmoe.testing.conformance.backend_probe:probe({again})"
    kind = backend_kind(fused=is_fused(instance), operands=instance.operands)
    report = run_checks(kind, BackendProbe(instance), **settings)
    if instance.operands is not None:
        report.notes.append(OPERANDS_NOTE.format(instance.operands))
    return replace(report, target=shown or ":".join(target))
