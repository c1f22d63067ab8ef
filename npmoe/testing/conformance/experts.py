"""The expert core: ``check_experts`` and ``check_experts_backward``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Unpack

import numpy as np

from npmoe.testing.conformance.case import Call, Case, Check, Effort, Kind
from npmoe.testing.conformance.common import Cases, hygiene_checks, judge_values
from npmoe.testing.conformance.draw import Values
from npmoe.testing.conformance.expert_cases import (
    PER_TOKEN,
    Sizes,
    Weighting,
    describe,
    expected_experts,
    growing,
    make_experts,
    reduce_experts,
)
from npmoe.testing.conformance.report import Report
from npmoe.testing.conformance.runner import Settings, run_checks

_EMPTY = ("empty-first", "empty-last", "every-other", "one-expert")
_TINY = ((1, 1, 1, 1, 1), (1, 1, 1, 2, 2), (2, 2, 1, 3, 2), (3, 4, 2, 2, 3))
_SLOTS = ((1, 2, 2, 1, 1), (2, 2, 2, 2, 1), (2, 3, 3, 1, 2), (3, 5, 4, 3, 3), (4, 8, 8, 2, 3))
_TILES = (
    *((15, 2, 1, 17, 3), (16, 2, 1, 16, 16), (17, 2, 2, 3, 31)),
    *((33, 3, 1, 33, 2), (63, 4, 1, 1, 33), (65, 1, 1, 2, 17), (129, 2, 1, 3, 2)),
)


class _Draw:
    """Generators of cases for one of the two kinds."""

    def __init__(self, backward: bool) -> None:
        self.backward = backward

    def shaped(
        self,
        *wanted: tuple[int, int, int, int, int],
        values: Values = "normal",
        load: str = "spread",
        weighting: Weighting = "plain",
        change: Callable[[np.random.Generator, Case], Case] | None = None,
    ) -> Cases:
        """Draw given sizes (T, E, K, H, I), three times each."""

        def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
            for _ in range(1 if effort.quick else 3):
                for sizes in wanted:
                    case = make_experts(
                        rng,
                        Sizes(*sizes),
                        effort.dtype,
                        backward=self.backward,
                        values=values,
                        load=load,
                        weighting=weighting,
                    )
                    yield case if change is None else change(rng, case)

        return generate

    def drawn(
        self,
        *loads: str,
        values: Values = "normal",
        weighting: Weighting = "plain",
        widest: int = 17,
        change: Callable[[np.random.Generator, Case], Case] | None = None,
    ) -> Cases:
        """Draw growing sizes, with the loads in turn."""

        def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
            for i, sizes in enumerate(growing(rng, effort, widest=widest)):
                case = make_experts(
                    rng,
                    sizes,
                    effort.dtype,
                    backward=self.backward,
                    values=values,
                    load=loads[i % len(loads)],
                    weighting=weighting,
                )
                yield case if change is None else change(rng, case)

        return generate


def _poison_unused(rng: np.random.Generator, case: Case) -> Case:
    """Fill the matrices of experts without rows with NaN or infinity."""
    ids = case.arguments["topk_ids"]
    unused = np.setdiff1d(np.arange(len(case.arguments["down_proj"])), ids)
    filled = {n: case.arguments[n].copy() for n in ("gate_up_proj", "down_proj")}
    for w in filled.values():
        w[unused] = rng.choice([np.nan, np.inf])
    return case.replace(**filled)


def _poison_holes(rng: np.random.Generator, case: Case) -> Case:
    """Leave routes without an expert; the weights of half of the cases are NaN there."""
    if rng.random() < 0.5:
        return case
    given = case.arguments
    return case.replace(
        topk_weights=np.where(given["topk_ids"] < 0, np.nan, given["topk_weights"]).astype(
            given["topk_weights"].dtype
        )
    )


def _unroute(value: float | None) -> Callable[[np.random.Generator, Case], Case]:
    """Take all experts from some tokens, and put `value` into their rows."""

    def change(rng: np.random.Generator, case: Case) -> Case:
        given = case.arguments
        gone = rng.random(len(given["topk_ids"])) < 0.5
        gone[int(rng.integers(len(gone)))] = True
        rows = {"topk_ids": given["topk_ids"].copy()}
        rows["topk_ids"][gone] = -1
        for name in ("hidden_states", "grad_output"):
            if name in given and value is not None:
                rows[name] = given[name].copy()
                rows[name][gone] = value
        return case.replace(**rows)

    return change


def _poison_token(rng: np.random.Generator, case: Case) -> Case:
    """Put NaN into the hidden states of one token among several."""
    hidden = case.arguments["hidden_states"].copy()
    if len(hidden) > 1:
        hidden[int(rng.integers(len(hidden)))] = np.nan
    return case.replace(hidden_states=hidden)


def _large_gates(rng: np.random.Generator, case: Case) -> Case:
    """Make gates of both signs up to 1,000, where exp over- and underflows."""
    hidden = np.ones_like(case.arguments["hidden_states"])
    w1, w2 = case.arguments["gate_up_proj"].copy(), case.arguments["down_proj"].copy()
    sizes = np.array([1000.0, 200.0, 120.0, 88.8, 20.0])
    gates = rng.permutation(np.concatenate([sizes, -sizes]))
    half = w1.shape[1] // 2
    w1[:, :half] = 0.0
    w1[:, :half, 0] = np.resize(gates, (len(w1), half))
    w2[w2 == 0.0] = 1.0
    return case.replace(hidden_states=hidden, gate_up_proj=w1, down_proj=w2)


def _wide_range(rng: np.random.Generator, case: Case) -> Case:
    """Scale what goes in by 2^20 and what it meets by 2^-20, which changes no result much."""
    sign = int(rng.choice([-20, 20]))
    up, down = np.float32(2.0**sign), np.float32(2.0**-sign)
    given = case.arguments
    return case.replace(
        hidden_states=given["hidden_states"] * up, gate_up_proj=given["gate_up_proj"] * down
    )


def _cancelling(rng: np.random.Generator, case: Case) -> Case:
    """Make weights of +-128 beside 1, which cancel in any order but in few bits."""
    shape = case.arguments["topk_weights"].shape
    weights = np.resize([128.0, 1.0, -128.0, 1.0], shape[1])
    drawn = np.stack([rng.permutation(weights) for _ in range(shape[0])])
    return case.replace(topk_weights=drawn.astype(case.arguments["topk_weights"].dtype))


def _judge_shapes(call: Call, case: Case) -> None:
    """Raise what the call itself raises: shapes and dtypes."""
    call(case)


def _with_turned(cases: Cases) -> Cases:
    """Add every case with its tokens, and with its slots, in reverse order."""

    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        for case in cases(rng, effort):
            given = case.arguments
            tokens = {n: given[n][::-1].copy() for n in PER_TOKEN if n in given}
            slots = {n: given[n][:, ::-1].copy() for n in ("topk_weights", "topk_ids")}
            yield from (case, case.replace(**tokens), case.replace(**slots))

    return generate


def _with_halves(cases: Cases) -> Cases:
    """Add the two halves of the tokens of every case."""

    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        for case in cases(rng, effort):
            half = len(case.arguments["topk_ids"]) // 2
            yield case
            for rows in (slice(0, half), slice(half, None)):
                piece = {n: case.arguments[n][rows] for n in PER_TOKEN}
                yield describe(case.arguments | piece, dict(case.options))

    return generate


def _checks(backward: bool) -> tuple[Check, ...]:
    draw = _Draw(backward)
    values = judge_values(expected_experts)

    def check(name: str, about: str, cases: Cases, judge: Any = values) -> Check:
        return Check(name=name, about=about, cases=cases, judge=judge)

    checks = [
        check(
            "integers-are-exact",
            "where silu(g) = g and all numbers are small integers, there is one right answer",
            draw.drawn("spread", "every-other", values="integers", widest=3),
        ),
        check(
            "within-rounding",
            "normal values stay within the error bound: no reduced precision, no TF32",
            draw.drawn("spread", *_EMPTY),
        ),
        check(
            "shape-and-dtype-are-kept",
            "outputs have the shapes and the dtype of what they belong to",
            draw.shaped((1, 1, 1, 1, 1), (2, 3, 2, 3, 2)),
            _judge_shapes,
        ),
        check(
            "gate-is-the-first-half",
            "silu goes over the first I rows of gate_up_proj: halves not swapped, not interleaved",
            draw.shaped(*_TINY),
        ),
        check(
            "square-matrices-are-not-transposed",
            "with H = I or H = 2I a transposed matrix still fits: it must not be used",
            draw.shaped((1, 1, 1, 2, 2), (1, 1, 1, 2, 1), (3, 2, 1, 4, 2), (8, 3, 2, 16, 16)),
        ),
        check(
            "widths-may-be-anything",
            "H, I and 2I all different, one of them 1, none a power of two",
            draw.shaped((2, 2, 1, 1, 3), (2, 2, 2, 3, 1), (3, 2, 1, 5, 2), (4, 3, 2, 7, 3)),
        ),
        check(
            "weights-belong-to-their-route",
            "ids and weights stay together whatever the order of experts within a token",
            draw.shaped(*_SLOTS, load="falling", weighting="by-slot"),
        ),
        check(
            "each-route-reads-its-token",
            "route t*K + k reads row t, with several slots and tokens",
            draw.shaped((2, 2, 2, 1, 1), (3, 3, 3, 2, 1), (4, 5, 3, 3, 2)),
        ),
        check(
            "minus-one-is-no-expert",
            "ids of -1 contribute 0, whatever their weights, and are not the last expert",
            draw.drawn("holes", change=_poison_holes),
        ),
        check(
            "tokens-without-experts-are-zero",
            "tokens whose ids are all -1 give exactly 0, not their input and not stale memory",
            draw.drawn("spread", change=_unroute(None)),
        ),
        check(
            "unrouted-tokens-are-not-read",
            "NaN in tokens whose ids are all -1 reaches nothing (0 x NaN)",
            draw.drawn("spread", change=_unroute(np.nan)),
        ),
        check(
            "unused-experts-are-not-read",
            "NaN and infinity in matrices of experts without rows reach nothing (0 x NaN)",
            draw.drawn(*_EMPTY, change=_poison_unused),
        ),
        check(
            "tokens-are-independent",
            "NaN in one token reaches its own row and its experts' gradients alone; tokens and "
            "slots may change places",
            _with_turned(draw.drawn("spread", change=_poison_token)),
        ),
        check(
            "one-expert-takes-all",
            "all rows on one expert, beyond any tile: nothing is dropped, every token is summed",
            draw.shaped(
                *((n, 3, 1, 2, 2) for n in (2, 7, 16, 33, 70, 130)),
                load="one-expert",
            ),
        ),
        check(
            "every-expert-for-every-token",
            "K = E, up to 8",
            draw.shaped((1, 2, 2, 2, 1), (3, 3, 3, 1, 2), (2, 8, 8, 3, 2)),
        ),
        check(
            "slots-are-summed-in-full-precision",
            "sums over 8 slots keep small terms beside large ones that cancel",
            draw.shaped((1, 8, 8, 1, 1), (3, 9, 8, 2, 2), values="integers", change=_cancelling),
        ),
        check(
            "large-gates-stay-finite",
            "gates of +-1,000: silu neither overflows nor becomes NaN",
            draw.shaped((1, 1, 1, 1, 5), (2, 2, 1, 2, 10), (3, 2, 2, 3, 10), change=_large_gates),
        ),
        check(
            "wide-ranges-stay-finite",
            "hidden states of 2^20, and of 2^-20: nothing passes through 16 bits",
            draw.shaped((1, 1, 1, 1, 1), (2, 2, 1, 3, 2), (4, 3, 2, 5, 3), change=_wide_range),
        ),
        check(
            "more-experts-than-a-block",
            "257 and 1,025 experts: no limit at 256 or 1,024, no power of two assumed",
            draw.shaped((9, 257, 2, 2, 1), (12, 1025, 3, 1, 2)),
        ),
        check(
            "no-tokens",
            "zero tokens give empty rows, and gradients of exactly 0",
            draw.shaped((0, 3, 2, 4, 2), (0, 1, 1, 1, 1)),
        ),
        check(
            "edges-of-tiles",
            "rows and widths one below, at and above 16, 32, 64 and 128",
            draw.shaped(*_TILES),
        ),
    ]
    checks += _backward_checks(draw, check) if backward else _forward_checks(draw, check)
    return (*checks, *hygiene_checks(draw.drawn("spread", "holes"), expected_experts))


def _forward_checks(draw: _Draw, check: Callable[..., Check]) -> list[Check]:
    return [
        check(
            "activation-is-silu",
            "the gate goes through silu, not gelu, relu or a sigmoid; the up half through nothing",
            draw.shaped(*_TINY),
        ),
        check(
            "weights-multiply-the-output",
            "the weight multiplies what the expert returns; silu makes its input another function",
            draw.shaped(*_TINY, weighting="wide"),
        ),
        check(
            "empty-experts-shift-nothing",
            "experts without rows, at either end and between, shift nobody's rows",
            draw.drawn(*_EMPTY, values="integers", widest=3),
        ),
    ]


def _backward_checks(draw: _Draw, check: Callable[..., Check]) -> list[Check]:
    return [
        check(
            "slope-is-that-of-silu",
            "the gate's gradient has both terms of the product rule, the up half's is silu(g)",
            draw.shaped(*_TINY),
        ),
        check(
            "expert-gradients-are-plain-sums",
            "gradients of matrices are sums over rows: no mean, no factor for ranks or slots",
            draw.shaped(*((n, 1, 1, 1, 1) for n in (1, 2, 3)), (3, 3, 2, 2, 1)),
        ),
        check(
            "empty-experts-have-zero-gradient",
            "experts without rows get exactly 0, also in memory that was never zeroed",
            draw.drawn(*_EMPTY),
        ),
        check(
            "weight-gradient-is-not-weighted",
            "grad_topk_weights is <g, y> of the bare expert output, whatever the weight is",
            draw.shaped(*_TINY, weighting="wide"),
        ),
        check(
            "zero-weights-have-gradients",
            "a weight of 0 is still a route: its gradient is <g, y>, the others are 0",
            draw.shaped(*_TINY, *_SLOTS, weighting="zeros"),
        ),
        check(
            "weights-scale-the-gradients",
            "twice the weight is twice the gradients of hidden states and both matrices",
            draw.shaped(*_TINY, weighting="wide"),
        ),
        check(
            "slots-add-to-the-hidden-gradient",
            "the gradient of a token is the sum over its slots, not the last one's",
            draw.shaped(*_SLOTS),
        ),
        check(
            "batches-add-up",
            "the weight gradients of a batch and of its halves are sums over their own tokens",
            _with_halves(draw.drawn("spread", "one-expert")),
        ),
    ]


EXPERTS = Kind(
    name="experts",
    signature=(
        "fn(hidden_states (T,H), gate_up_proj (E,2I,H), down_proj (E,H,I), topk_weights (T,K), "
        "topk_ids (T,K)) -> (T,H)"
    ),
    expected=expected_experts,
    checks=_checks(backward=False),
    reductions=reduce_experts,
)
EXPERTS_BACKWARD = Kind(
    name="experts_backward",
    signature=(
        "fn(grad_output (T,H), hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids) -> "
        "(grad_hidden_states, grad_gate_up_proj, grad_down_proj, grad_topk_weights)"
    ),
    expected=expected_experts,
    checks=_checks(backward=True),
    reductions=reduce_experts,
)


def check_experts(fn: Callable[..., Any], **settings: Unpack[Settings]) -> Report:
    """Check ``fn(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids) -> output``.

    ``output[t] = sum over k of w[t,k] * down_proj[e] @ (silu(gate) * up)`` with e = ids[t,k] and
    gate, up the halves of ``gate_up_proj[e] @ hidden_states[t]``; -1 is no expert. Keywords are
    those of `run_checks`.
    """
    return run_checks(EXPERTS, fn, **settings)


def check_experts_backward(fn: Callable[..., Any], **settings: Unpack[Settings]) -> Report:
    """Check ``fn(grad_output, hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids)``.

    It returns the gradients of ``sum(output * grad_output)`` with respect to hidden_states,
    gate_up_proj, down_proj and topk_weights; routes without an expert get 0. Keywords are those
    of `run_checks`.
    """
    return run_checks(EXPERTS_BACKWARD, fn, **settings)
