"""The composed layer against the definition, on everything the strategies can draw."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npmoe
from npmoe import naive
from npmoe.backends import Backend
from npmoe.testing.bounds import assert_within
from npmoe.testing.layer_bounds import LayerBounds, layer_bounds
from npmoe.testing.problems import MoEProblem
from npmoe.testing.strategies import moe_configs, moe_problems
from npmoe.tree import map_arrays

BACKENDS = ("reference", "numpy", "loopback")
GRADS = [f.name for f in dataclasses.fields(npmoe.MoEGrads)]


class Results(NamedTuple):
    """Results of one forward and backward call, on the host."""

    output: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    row_ids: np.ndarray
    probs: np.ndarray
    logits: np.ndarray
    grads: dict[str, np.ndarray | None]

    @property
    def kept(self) -> np.ndarray:
        return self.row_ids >= 0


def run_layer(problem: MoEProblem, name: str) -> Results:
    backend = npmoe.get_backend(name)
    params = map_arrays(lambda _, a: backend.asarray(a), problem.params)
    output, saved = npmoe.moe_forward(
        backend.asarray(problem.hidden_states),
        params,
        problem.cfg,
        backend=backend,
        token_mask=_move(backend, problem.token_mask),
        topk_ids=_move(backend, problem.topk_ids),
    )
    grads = npmoe.moe_backward(
        backend.asarray(problem.grad_output),
        saved,
        params,
        grad_router_logits=_move(backend, problem.grad_router_logits),
    )
    host = backend.asnumpy
    found = {n: getattr(grads, n) for n in GRADS}
    return Results(
        output=host(output),
        topk_ids=host(saved.routing.topk_ids),
        topk_weights=host(saved.routing.topk_weights),
        row_ids=host(saved.plan.row_ids),
        probs=host(saved.routing.probs),
        logits=host(saved.routing.router_logits),
        grads={n: None if g is None else host(g) for n, g in found.items()},
    )


def run_naive(problem: MoEProblem, topk_ids: np.ndarray | None) -> Results:
    """Run the definition; `topk_ids` replaces the choice."""
    choice = {"token_mask": problem.token_mask, "topk_ids": topk_ids}
    forward = naive.moe_forward(problem.hidden_states, problem.params, problem.cfg, **choice)
    grads = naive.moe_backward(
        problem.grad_output,
        problem.hidden_states,
        problem.params,
        problem.cfg,
        grad_router_logits=problem.grad_router_logits,
        **choice,
    )
    # The canonical order: by expert, and by route within an expert.
    routes = np.flatnonzero(forward.kept)
    order = routes[np.argsort(forward.topk_ids.ravel()[routes], kind="stable")]
    row_ids = np.full(forward.kept.size, -1)
    row_ids[order] = np.arange(len(order))
    return Results(
        output=forward.output,
        topk_ids=forward.topk_ids,
        topk_weights=forward.topk_weights,
        row_ids=row_ids.reshape(forward.kept.shape),
        probs=forward.probs,
        logits=forward.logits,
        grads={n: getattr(grads, n) for n in GRADS},
    )


def _move(backend: Backend, array: np.ndarray | None) -> Any:
    return None if array is None else backend.asarray(array)


def arrays_of(problem: MoEProblem) -> list[np.ndarray]:
    trees = (problem.params, problem)
    found = [getattr(t, f.name) for t in trees for f in dataclasses.fields(t)]
    return [a for a in found if isinstance(a, np.ndarray)]


def assert_lawful_choice(
    problem: MoEProblem, actual: Results, forward: naive.NaiveForward, bounds: LayerBounds
) -> None:
    """Check that ids fall by key and no better expert was left out, as far as rounding can tell."""
    keys, slack = forward.probs, bounds.probs
    if problem.cfg.router_order == "topk_score":
        keys, slack = forward.logits, bounds.router_logits
    for t, ids in enumerate(actual.topk_ids):
        if problem.token_mask is not None and not problem.token_mask[t]:
            assert (ids == -1).all()
            continue
        assert len(set(ids)) == len(ids)
        assert (ids >= 0).all()
        rest = [e for e in range(problem.cfg.num_experts) if e not in ids]
        for k, e in enumerate(ids):
            for worse in [*ids[k + 1 :], *rest]:
                assert keys[t, e] + slack[t, e] >= keys[t, worse] - slack[t, worse]


def assert_lawful_drop(problem: MoEProblem, actual: Results, forward: naive.NaiveForward) -> None:
    """Check per expert how many routes are kept, and that no heavier one was dropped."""
    cfg = problem.cfg
    valid = problem.token_mask
    num_tokens = len(actual.topk_ids) if valid is None else int(valid.sum())
    capacity = naive.expert_capacity(num_tokens, cfg)
    _, weights, _ = naive.route(forward.logits, cfg, valid, actual.topk_ids)
    weight_bound = drop_bound(problem, forward)
    for e in range(cfg.num_experts):
        chosen = actual.topk_ids == e
        kept, dropped = chosen & actual.kept, chosen & ~actual.kept
        size = int(chosen.sum())
        assert kept.sum() == (size if capacity is None else min(size, capacity))
        if not dropped.any() or not kept.any():
            continue
        if cfg.drop_policy == "position":
            assert np.nonzero(kept)[0].max() < np.nonzero(dropped)[0].min()
        else:
            least = (weights + weight_bound)[kept].min()
            assert least >= (weights - weight_bound)[dropped].max()


def naive_forward(problem: MoEProblem, ids: np.ndarray) -> naive.NaiveForward:
    return naive.moe_forward(
        problem.hidden_states,
        problem.params,
        problem.cfg,
        token_mask=problem.token_mask,
        topk_ids=ids,
    )


def drop_bound(problem: MoEProblem, forward: naive.NaiveForward) -> np.ndarray:
    """Bound the weights as they stand at the drop, before a normalisation that follows it."""
    if problem.cfg.renormalize_drop != "after":
        return layer_bounds(problem, forward).topk_weights
    before = dataclasses.replace(problem.cfg, renormalize=False, renormalize_drop="before")
    everything = dataclasses.replace(forward, kept=forward.topk_ids >= 0)
    return layer_bounds(dataclasses.replace(problem, cfg=before), everything).topk_weights


def assert_close(problem: MoEProblem, actual: Results, expected: Results, b: LayerBounds) -> None:
    valid = np.ones(len(actual.output), bool) if problem.token_mask is None else problem.token_mask
    kept = expected.kept
    assert_within(actual.logits[valid], expected.logits[valid], b.router_logits[valid], "logits")
    assert_within(actual.probs, expected.probs, b.probs, "probs")
    assert_within(
        actual.topk_weights[kept], expected.topk_weights[kept], b.topk_weights[kept], "topk_weights"
    )
    assert_within(actual.output, expected.output, b.output, "output")
    for name in GRADS:
        if expected.grads[name] is None:
            assert actual.grads[name] is None
        else:
            assert_within(
                actual.grads[name], expected.grads[name], getattr(b.grads, name), f"grad {name}"
            )


def assert_same_bits(actual: Results, expected: Results) -> None:
    """Check an exact problem, whose results no order of summation can change."""
    kept = expected.kept
    assert (actual.topk_ids == expected.topk_ids).all()
    assert (actual.row_ids == expected.row_ids).all()
    assert (actual.topk_weights[kept] == expected.topk_weights[kept]).all()
    assert (actual.output == expected.output).all()
    for name, grad in expected.grads.items():
        assert grad is None or (actual.grads[name] == grad).all(), name


def assert_exact_zeros(problem: MoEProblem, actual: Results) -> None:
    """Check what must be 0 to the last bit: masked rows, dropped tokens, empty experts."""
    assert not actual.output[~actual.kept.any(axis=1)].any()
    assert not actual.topk_weights[actual.topk_ids < 0].any()
    if problem.token_mask is not None:
        masked = ~problem.token_mask
        assert (actual.topk_ids[masked] == -1).all()
        assert not actual.probs[masked].any()
        assert not actual.grads["hidden_states"][masked].any()
    empty = np.setdiff1d(np.arange(problem.cfg.num_experts), actual.topk_ids[actual.kept])
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        grad = actual.grads[name]
        assert grad is None or not grad[empty].any()


def check_against_naive(problem: MoEProblem, backend: str) -> None:
    before = [a.tobytes() for a in arrays_of(problem)]
    actual = run_layer(problem, backend)
    assert [a.tobytes() for a in arrays_of(problem)] == before, "an input changed"
    again = run_layer(problem, backend)
    for one, other in zip(actual[:-1], again[:-1], strict=True):
        assert one.tobytes() == other.tobytes()
    for name, grad in actual.grads.items():
        assert grad is None or grad.tobytes() == again.grads[name].tobytes()

    for array in (actual.output, actual.topk_weights, actual.probs):
        assert array.dtype == problem.dtype
    assert all(g is None or g.dtype == problem.dtype for g in actual.grads.values())
    assert_exact_zeros(problem, actual)

    forward = naive_forward(problem, actual.topk_ids)
    bounds = layer_bounds(problem, forward)
    replay = problem.topk_ids
    if replay is None and not problem.exact_logits:
        assert_lawful_choice(problem, actual, forward, bounds)
        replay = actual.topk_ids
    expected = run_naive(problem, replay)
    assert (actual.topk_ids == expected.topk_ids).all()
    if problem.exact:
        assert_same_bits(actual, expected)
        return
    assert_lawful_drop(problem, actual, forward)
    # Weights that agree up to rounding may rank either way.
    if (actual.kept == expected.kept).all():
        assert (actual.row_ids == expected.row_ids).all()
        assert_close(problem, actual, expected, bounds)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(problem=moe_problems())
def test_layer_is_the_definition(backend: str, problem: MoEProblem) -> None:
    check_against_naive(problem, backend)


# Structures that need several conditions at once, and are rare among all that is legal.
RARE = {
    "partial drops, normalised after": moe_problems(
        moe_configs(renormalize_drop="after", expert_capacity=2, num_experts=4, top_k=3),
        num_tokens=7,
    ),
    "partial drops, normalised before": moe_problems(
        moe_configs(
            renormalize=True, renormalize_drop="before", expert_capacity=3, num_experts=4, top_k=3
        ),
        num_tokens=7,
    ),
    "partial drops by weight": moe_problems(
        moe_configs(drop_policy="probability", expert_capacity=2, num_experts=4, top_k=2),
        num_tokens=7,
    ),
    "partial drops by weight, normalised after": moe_problems(
        moe_configs(
            drop_policy="probability",
            renormalize_drop="after",
            expert_capacity=2,
            num_experts=4,
            top_k=2,
        ),
        num_tokens=7,
    ),
    "partial drops of a softmax over the chosen": moe_problems(
        moe_configs(router_order="topk_score", expert_capacity=2, num_experts=3, top_k=2),
        num_tokens=7,
    ),
    "capacity for valid tokens": moe_problems(
        moe_configs(capacity_factor="1/2", min_capacity=0, capacity_multiple=1), mask="some"
    ),
    "probabilities that underflow": moe_problems(
        moe_configs(num_experts=8, top_k=3), num_tokens=5, values=("integer",), logit_exponent=10
    ),
    "many experts and choices": moe_problems(moe_configs(num_experts=20, top_k=9), num_tokens=2),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("structure", RARE)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_rare_structures_are_the_definition(
    structure: str, backend: str, data: st.DataObject
) -> None:
    check_against_naive(data.draw(RARE[structure]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(problem=moe_problems(moe_configs(nan_policy="drop"), values=("normal",), mask="some"))
def test_dropping_non_finite_rows_is_masking_them(backend: str, problem: MoEProblem) -> None:
    masked = run_layer(problem, backend)
    dropped = run_layer(
        dataclasses.replace(problem, token_mask=np.ones(len(masked.output), bool)), backend
    )
    none = run_layer(dataclasses.replace(problem, token_mask=None), backend)
    for other in (dropped, none):
        for name in ("output", "topk_ids", "topk_weights", "row_ids", "probs"):
            assert getattr(other, name).tobytes() == getattr(masked, name).tobytes()
        for name, grad in masked.grads.items():
            assert grad is None or other.grads[name].tobytes() == grad.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(
    problem=moe_problems(
        moe_configs(nan_policy="clamp", router_bias=False),
        values=("normal",),
        mask="none",
        auxiliary=False,
    )
)
def test_clamped_rows_go_to_the_first_experts_with_weight_zero(
    backend: str, problem: MoEProblem
) -> None:
    # Finite inputs whose logits overflow in either dtype.
    hidden = problem.hidden_states.copy()
    router = problem.params.router_weight.copy()
    big = float(np.finfo(problem.dtype).max) / 4.0
    broken = np.arange(len(hidden)) % 3 == 0
    hidden[broken, 0] = big
    hidden[~broken, 0] = 0.0
    router[:, 0] = 8.0
    w1 = problem.params.gate_up_proj.copy()
    w1[:, :, 0] = 0.0
    params = dataclasses.replace(problem.params, router_weight=router, gate_up_proj=w1)
    problem = dataclasses.replace(problem, params=params, hidden_states=hidden)
    with np.errstate(over="ignore"):
        actual = run_layer(problem, backend)
        expected = run_naive(problem, problem.topk_ids)
        if problem.dtype == np.float64:
            assert not expected.output[broken].any()
            assert (actual.kept == expected.kept).all()
    top_k = problem.cfg.top_k
    if problem.topk_ids is None:
        assert (actual.topk_ids[broken] == np.arange(top_k)).all()
    assert not actual.topk_weights[broken].any()
    assert not actual.probs[broken].any()
    assert not actual.output[broken].any()
    assert np.isfinite(actual.output).all()
    assert not actual.grads["hidden_states"][broken].any()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(problem=moe_problems(values=("exact",)))
def test_exact_problems_are_compared_bit_for_bit(backend: str, problem: MoEProblem) -> None:
    assert problem.exact
    assert_same_bits(run_layer(problem, backend), run_naive(problem, problem.topk_ids))


@settings(max_examples=30, deadline=None)
@given(problem=moe_problems(layout="contiguous"))
def test_a_device_changes_no_bit(problem: MoEProblem) -> None:
    one, other = run_layer(problem, "reference"), run_layer(problem, "loopback")
    assert one.output.tobytes() == other.output.tobytes()
    for name, grad in one.grads.items():
        assert grad is None or grad.tobytes() == other.grads[name].tobytes()


@settings(max_examples=30, deadline=None)
@given(problem=moe_problems(dtypes=("float64",)), block_rows=st.integers(1, 4))
def test_blocks_of_rows_change_nothing_but_rounding(problem: MoEProblem, block_rows: int) -> None:
    # The default of 512 rows is never reached here.
    with mock.patch("npmoe.backends.numpy_backend._BLOCK_ROWS", block_rows):
        actual = run_layer(problem, "numpy")
    expected = run_layer(problem, "reference")
    assert (actual.topk_ids == expected.topk_ids).all()
    assert (actual.kept == expected.kept).all()
    assert_exact_zeros(problem, actual)
    bounds = layer_bounds(problem, naive_forward(problem, expected.topk_ids))
    if problem.exact:
        assert_same_bits(actual, expected)
    elif (naive_forward(problem, expected.topk_ids).kept == expected.kept).all():
        assert_close(problem, actual, expected, bounds)


@settings(max_examples=15, deadline=None)
@given(problem=moe_problems(num_tokens=12), shape=st.sampled_from([(3, 4), (2, 3, 2), (1, 12)]))
def test_leading_axes_are_flattened_and_restored(
    problem: MoEProblem, shape: tuple[int, ...]
) -> None:
    def fold(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array.reshape(*shape, *array.shape[1:])

    flat = run_layer(problem, "numpy")
    folded = run_layer(
        dataclasses.replace(
            problem,
            hidden_states=fold(problem.hidden_states),
            grad_output=fold(problem.grad_output),
            token_mask=fold(problem.token_mask),
            topk_ids=fold(problem.topk_ids),
        ),
        "numpy",
    )
    assert folded.output.shape == (*shape, problem.cfg.hidden_size)
    assert folded.grads["hidden_states"].shape == folded.output.shape
    assert folded.output.tobytes() == flat.output.tobytes()
    for name, grad in flat.grads.items():
        assert grad is None or grad.tobytes() == folded.grads[name].tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(problem=moe_problems(moe_configs(router_bias=True), values=("normal",), load="spread"))
def test_experts_closed_by_a_bias_of_minus_infinity(backend: str, problem: MoEProblem) -> None:
    bias = problem.params.router_bias.copy()
    bias[1::2] = -np.inf
    params = dataclasses.replace(problem.params, router_bias=bias)
    problem = dataclasses.replace(problem, params=params)
    actual, expected = run_layer(problem, backend), run_naive(problem, problem.topk_ids)
    if (actual.topk_ids != expected.topk_ids).any() or (actual.kept != expected.kept).any():
        return
    assert not actual.probs[:, 1::2].any()
    assert not actual.topk_weights[(actual.topk_ids >= 0) & (actual.topk_ids % 2 == 1)].any()
    assert_close_but_logits(problem, actual, expected)


def assert_close_but_logits(problem: MoEProblem, actual: Results, expected: Results) -> None:
    """Compare with infinite logits, which have no difference, replaced by 0 on both sides."""
    valid = slice(None) if problem.token_mask is None else problem.token_mask
    infinite = np.isneginf(expected.logits)
    assert (np.isneginf(actual.logits)[valid] == infinite[valid]).all()
    actual, expected = (
        r._replace(logits=np.where(infinite, 0.0, r.logits)) for r in (actual, expected)
    )
    bounds = layer_bounds(problem, naive_forward(problem, actual.topk_ids))
    assert_close(problem, actual, expected, bounds)
