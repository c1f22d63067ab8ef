"""One problem through a backend's layer and through the definition, for comparison."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

import npmoe
from npmoe import naive
from npmoe.backends import Backend
from npmoe.testing.bounds import assert_within
from npmoe.testing.decisions import Decisions, assert_lawful
from npmoe.testing.draws import draw_numbers, rows_of
from npmoe.testing.layer_bounds import LayerBounds, layer_bounds
from npmoe.testing.problems import MoEProblem
from npmoe.tree import map_arrays

BACKENDS = ("reference", "numpy", "loopback")
GRADS = [f.name for f in dataclasses.fields(npmoe.MoEGrads)]


class Results(NamedTuple):
    """Results of one forward and backward call, on the host."""

    output: np.ndarray  # (T, H)
    topk_ids: np.ndarray
    summed_ids: np.ndarray
    topk_weights: np.ndarray
    row_ids: np.ndarray
    slot_ids: np.ndarray | None
    kept: np.ndarray
    probs: np.ndarray
    logits: np.ndarray
    clean_logits: np.ndarray
    grads: dict[str, np.ndarray | None]

    @property
    def decisions(self) -> Decisions:
        names = [f.name for f in dataclasses.fields(Decisions)]
        return Decisions(**{n: getattr(self, n) for n in names})

    def arrays(self) -> dict[str, np.ndarray | None]:
        """Return everything by name."""
        return {n: getattr(self, n) for n in self._fields if n != "grads"} | self.grads


def run_layer(problem: MoEProblem, name: str) -> Results:
    backend = npmoe.get_backend(name)

    def move(array: np.ndarray | None) -> Any:
        return None if array is None else backend.asarray(array)

    params = map_arrays(lambda _, a: backend.asarray(a), problem.params)
    output, saved = npmoe.moe_forward(
        move(problem.fold(problem.hidden_states)),
        params,
        problem.cfg,
        backend=backend,
        rng=problem.generator(),
        token_mask=move(problem.fold(problem.token_mask)),
        topk_ids=move(problem.fold(problem.topk_ids)),
    )
    grads = npmoe.moe_backward(
        move(problem.fold(problem.grad_output)),
        saved,
        params,
        grad_router_logits=move(problem.grad_router_logits),
    )
    return _collect(problem, backend, output, saved, grads)


def _collect(
    problem: MoEProblem,
    backend: Backend,
    output: Any,
    saved: npmoe.SavedTensors,
    grads: npmoe.MoEGrads,
) -> Results:
    def host(array: Any) -> np.ndarray | None:
        return None if array is None else backend.asnumpy(array)

    shape = problem.hidden_states.shape
    folded = problem.fold(problem.hidden_states).shape
    assert output.shape == folded
    assert grads.hidden_states.shape == folded
    found = {n: host(getattr(grads, n)) for n in GRADS}
    found["hidden_states"] = found["hidden_states"].reshape(shape)
    routing, row_ids = saved.routing, host(saved.plan.row_ids)
    ids = host(routing.topk_ids)
    summed = host(routing.summed_ids)
    clean = host(routing.clean_logits)
    logits = host(routing.router_logits)
    return Results(
        output=host(output).reshape(shape),
        topk_ids=ids,
        summed_ids=ids if summed is None else summed,
        topk_weights=host(routing.topk_weights),
        row_ids=row_ids,
        slot_ids=host(saved.plan.slot_ids),
        kept=(row_ids >= 0) | (ids >= problem.cfg.num_experts),
        probs=host(routing.probs),
        logits=logits,
        clean_logits=logits if clean is None else clean,
        grads=found,
    )


@contextlib.contextmanager
def told(decisions: Decisions) -> Iterator[None]:
    """Make the definition decide like this wherever it would decide itself."""

    def choose_ids(*_: object) -> np.ndarray:
        return decisions.summed_ids.astype(int)

    drop = (decisions.kept, decisions.slot_ids)
    with (
        mock.patch("npmoe.naive.routing.choose_ids", choose_ids),
        mock.patch("npmoe.naive.layer.keep_routes", return_value=drop),
    ):
        yield


def numbers_for(problem: MoEProblem, decisions: Decisions | None) -> naive.Draws:
    """Return the random numbers; with decisions, those that lead to them."""
    if decisions is None or problem.cfg.routing == "soft":
        return draw_numbers(problem)
    ids, kept = decisions.topk_ids, decisions.kept
    draws = draw_numbers(problem, rows_of(ids, kept, problem.cfg.num_experts))
    if draws.second is None:
        return draws
    refused = (decisions.summed_ids != ids).any(axis=1)
    return dataclasses.replace(draws, second=np.where(refused, np.inf, -1.0))


def naive_forward(problem: MoEProblem, draws: naive.Draws) -> naive.NaiveForward:
    return naive.moe_forward(
        problem.hidden_states,
        problem.params,
        problem.cfg,
        token_mask=problem.token_mask,
        topk_ids=problem.topk_ids,
        sequence_length=problem.sequence_length,
        draws=draws,
    )


def decisions_of(forward: naive.NaiveForward) -> Decisions:
    return Decisions(
        topk_ids=forward.topk_ids,
        summed_ids=forward.summed_ids,
        kept=forward.kept,
        slot_ids=forward.slot_ids,
    )


def run_naive(
    problem: MoEProblem, decisions: Decisions | None = None
) -> tuple[Results, LayerBounds]:
    """Run the definition, with its own decisions or those of a layer; return its bounds too."""
    if decisions is None:
        decisions = decisions_of(naive_forward(problem, numbers_for(problem, None)))
    draws = numbers_for(problem, decisions)
    with contextlib.nullcontext() if problem.cfg.routing == "soft" else told(decisions):
        forward = naive_forward(problem, draws)
        grads = naive.moe_backward(
            problem.grad_output,
            problem.hidden_states,
            problem.params,
            problem.cfg,
            token_mask=problem.token_mask,
            topk_ids=problem.topk_ids,
            sequence_length=problem.sequence_length,
            draws=draws,
            grad_router_logits=problem.grad_router_logits,
        )
    results = Results(
        output=forward.output,
        topk_ids=forward.topk_ids,
        summed_ids=forward.summed_ids,
        topk_weights=forward.topk_weights,
        row_ids=rows_of(forward.topk_ids, forward.kept, problem.cfg.num_experts),
        slot_ids=forward.slot_ids,
        kept=forward.kept,
        probs=forward.probs,
        logits=forward.logits,
        clean_logits=forward.clean_logits,
        grads={n: getattr(grads, n) for n in GRADS},
    )
    return results, layer_bounds(problem, forward, draws)


def check_decisions(problem: MoEProblem, actual: Results, bounds: LayerBounds) -> None:
    """Check that all decisions are lawful, and those that rounding cannot touch the same."""
    assert bounds.router is not None
    assert_lawful(problem, actual.decisions, bounds.router, draw_numbers(problem))
    if problem.exact or (problem.exact_choice and problem.topk_ids is None):
        free = naive_forward(problem, numbers_for(problem, None))
        assert (actual.summed_ids == free.summed_ids).all(), "another choice than the definition's"


def assert_close(problem: MoEProblem, actual: Results, expected: Results, b: LayerBounds) -> None:
    """Check every number against its bound."""
    v, kept = problem.valid, expected.kept
    assert_within(actual.logits[v], expected.logits[v], b.router_logits[v], "logits")
    assert_within(actual.clean_logits[v], expected.clean_logits[v], b.clean_logits[v], "clean")
    assert_within(actual.probs, expected.probs, b.probs, "probs")
    if problem.cfg.routing != "soft":
        assert_within(
            actual.topk_weights[kept],
            expected.topk_weights[kept],
            b.topk_weights[kept],
            "topk_weights",
        )
        assert (actual.row_ids == expected.row_ids).all()
    assert_within(actual.output, expected.output, b.output, "output")
    for name in GRADS:
        if expected.grads[name] is None:
            assert actual.grads[name] is None, name
        else:
            assert_within(
                actual.grads[name], expected.grads[name], getattr(b.grads, name), f"grad {name}"
            )


def assert_same_numbers(actual: Results, expected: Results) -> None:
    """Check an exact problem, whose results no order of summation can change."""
    kept = expected.kept
    assert (actual.topk_weights[kept] == expected.topk_weights[kept]).all()
    for name in ("topk_ids", "summed_ids", "kept", "row_ids", "slot_ids", "output"):
        one, other = getattr(actual, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        assert one is None or (one == other).all(), name
    for name, grad in expected.grads.items():
        assert (grad is None) == (actual.grads[name] is None), name
        assert grad is None or (actual.grads[name] == grad).all(), name


def assert_same_bits(actual: Results, expected: Results) -> None:
    """Check two runs of layers that must not differ at all."""
    for name, array in expected.arrays().items():
        other = actual.arrays()[name]
        assert (array is None) == (other is None), name
        assert array is None or array.tobytes() == other.tobytes(), name


def assert_exact_zeros(problem: MoEProblem, actual: Results) -> None:
    """Check what must be 0 to the last bit: masked rows, dropped tokens, empty experts."""
    cfg, masked = problem.cfg, ~problem.valid
    for array in (actual.output, actual.probs, actual.grads["hidden_states"]):
        assert not array[masked].any()
    if cfg.routing == "soft":
        return
    assert (actual.topk_ids[masked] == -1).all()
    assert not actual.topk_weights[actual.topk_ids < 0].any()
    if not cfg.shared_intermediate_size and not cfg.output_bias:
        assert not actual.output[~actual.kept.any(axis=1)].any()
    empty = np.setdiff1d(np.arange(cfg.num_experts), actual.topk_ids[actual.kept])
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        grad = actual.grads[name]
        assert grad is None or not grad[empty].any(), name
