"""LoadCounter and update_selection_bias."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmoe import DTypeError, MoEConfig, RangeError, ShapeError
from npmoe.balancing import LoadCounter, update_selection_bias
from npmoe.dispatch import plan_dispatch
from npmoe.routing import Routing, route


def routing_of(ids: Any, num_experts: int = 4, mask: Any = None, seed: int = 0) -> Routing:
    ids = np.array(ids)
    cfg = MoEConfig(hidden_size=1, intermediate_size=1, num_experts=num_experts, top_k=ids.shape[1])
    logits = np.random.default_rng(seed).standard_normal((len(ids), num_experts))
    return route(logits, cfg, topk_ids=ids, token_mask=None if mask is None else np.array(mask))


FIRST = [[0, 1], [0, 2], [1, -1]]
SECOND = [[3, 0], [3, 2]]


def test_counts_add_up() -> None:
    counter = LoadCounter(4)
    assert counter.add(routing_of(FIRST), key=(0, 0))
    counter.tokens_per_expert[:] = 99  # a copy
    assert counter.add(routing_of(SECOND), key=(0, 1))
    assert counter.tokens_per_expert.tolist() == [3, 2, 2, 2]
    assert counter.tokens_per_expert.dtype == np.int64
    assert (counter.num_tokens, counter.num_choices) == (5, 10)
    assert counter.flush().tolist() == [3, 2, 2, 2]
    assert counter.tokens_per_expert.tolist() == [0, 0, 0, 0]
    assert (counter.num_tokens, counter.num_choices) == (0, 0)
    assert counter.add(routing_of(SECOND), key=(0, 1))


def test_a_recomputed_forward_counts_once_and_evaluation_never() -> None:
    counter = LoadCounter(4)
    assert counter.add(routing_of(FIRST), key=0)
    assert not counter.add(routing_of(FIRST), key=0)
    routing_of(SECOND)
    assert counter.tokens_per_expert.tolist() == [2, 2, 1, 0]
    assert counter.num_tokens == 3
    # Two micro-batches that happen to be equal are two.
    assert counter.add(routing_of(FIRST), key=1)
    assert counter.tokens_per_expert.tolist() == [4, 4, 2, 0]


def test_padding_does_not_count() -> None:
    counter = LoadCounter(4)
    counter.add(routing_of(FIRST, mask=[True, False, True]), key=0)
    assert counter.tokens_per_expert.tolist() == [1, 2, 0, 0]
    assert (counter.num_tokens, counter.num_choices) == (2, 4)


def test_what_is_counted() -> None:
    routing = routing_of(FIRST)
    plan = plan_dispatch(routing.topk_ids, num_experts=4, capacity=1)
    fresh = np.argsort(-routing.probs, axis=1, kind="stable")[:, :2]
    expected = {
        "pre_drop": [2, 2, 1, 0],
        "top1": [2, 1, 0, 0],
        "post_drop": [1, 1, 1, 0],
        "executed": [1, 1, 1, 0],
        "unbiased_topk": np.bincount(fresh.reshape(-1), minlength=4).tolist(),
    }
    for counts, numbers in expected.items():
        counter = LoadCounter(4, counts=counts)  # type: ignore[arg-type]
        counter.add(routing, key=0, plan=plan)
        assert counter.tokens_per_expert.tolist() == numbers, counts
        assert counter.num_choices == (3 if counts == "top1" else 6)


def test_merge_of_ranks() -> None:
    one, two = LoadCounter(4), LoadCounter(4)
    one.add(routing_of(FIRST), key=(0, "rank 0"))
    two.add(routing_of(SECOND), key=(0, "rank 1"))
    one.merge(two)
    assert one.tokens_per_expert.tolist() == [3, 2, 2, 2]
    assert one.num_tokens == 5
    assert two.tokens_per_expert.tolist() == [1, 0, 1, 2]
    one.flush()
    assert two.num_tokens == 2


def test_failing_calls_leave_the_counter_alone() -> None:
    counter = LoadCounter(4)
    counter.add(routing_of(FIRST), key=0)
    other, wrong, foreign = LoadCounter(4), LoadCounter(4, counts="top1"), LoadCounter(3)
    other.add(routing_of(SECOND), key=0)
    other.add(routing_of(SECOND), key=1)
    cases: list[tuple[type[Exception], Any, str]] = [
        (
            RangeError,
            lambda: counter.add(routing_of(SECOND), key=0),
            "LoadCounter.add: key must name one micro-batch, got 0 with other counts than before. "
            "Flush after each step, or put the step into the key.",
        ),
        (
            ShapeError,
            lambda: counter.add(routing_of([[0]], 3), key=1),
            "LoadCounter.add: routing.probs must have E = 4 columns, got 3. "
            "E is bound by the counter.",
        ),
        (
            RangeError,
            lambda: counter.merge(other),
            "LoadCounter.merge: other must hold no key of this counter, got 0 in both. "
            "Put the rank into the key.",
        ),
        (
            RangeError,
            lambda: counter.merge(wrong),
            "LoadCounter.merge: other must count 'pre_drop', got 'top1'.",
        ),
        (
            ShapeError,
            lambda: counter.merge(foreign),
            "LoadCounter.merge: other must count E = 4 experts, got 3. E is bound by this counter.",
        ),
    ]
    for error, call, message in cases:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message
        assert counter.tokens_per_expert.tolist() == [2, 2, 1, 0]
        assert counter.num_tokens == 3


def test_the_same_counts_of_other_tokens_are_another_micro_batch() -> None:
    counter = LoadCounter(4)
    counter.add(routing_of([[0, -1]]), key=0)
    with pytest.raises(RangeError, match="key must name one micro-batch"):
        counter.add(routing_of([[0, -1], [-1, -1]]), key=0)


def test_messages_of_the_constructor() -> None:
    with pytest.raises(RangeError) as caught:
        LoadCounter(0)
    assert str(caught.value) == "LoadCounter: num_experts must be at least 1, got 0."
    with pytest.raises(RangeError, match="LoadCounter: counts must be one of 'executed', "):
        LoadCounter(1, counts="all")  # type: ignore[arg-type]
    with pytest.raises(RangeError, match=r"LoadCounter\.add: plan must be given with counts="):
        LoadCounter(4, counts="post_drop").add(routing_of(FIRST), key=0)


# The bias.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_step_by_hand(dtype: type) -> None:
    bias = np.array([0.5, 0.25, 0.0, -0.5], dtype)
    before = bias.copy()
    counts = np.array([9, 2, 5, 0])  # mean 4
    moved = update_selection_bias(bias, counts, rate=0.125)
    assert moved.dtype == dtype
    assert moved.tolist() == [0.375, 0.375, -0.125, -0.375]
    centered = update_selection_bias(bias, np.array([9, 1, 1, 1]), rate=0.125, center=True)
    # Signs -1, 1, 1, 1 have the mean 1/2.
    assert centered.tolist() == [0.3125, 0.3125, 0.0625, -0.4375]
    np.testing.assert_array_equal(bias, before)


@given(
    st.lists(st.integers(0, 2**40), min_size=1, max_size=9),
    st.booleans(),
)
def test_the_bias_moves_against_the_load(counts: list[int], center: bool) -> None:
    n = np.array(counts)
    change = update_selection_bias(np.zeros(len(n)), n, rate=1.0, center=center)
    signs = [(sum(counts) > len(counts) * c) - (sum(counts) < len(counts) * c) for c in counts]
    mean = sum(signs) / len(signs) if center else 0.0
    np.testing.assert_allclose(change, [s - mean for s in signs], rtol=0, atol=4 * 2.0**-53)


def test_the_mean_itself_does_not_move() -> None:
    # 1/3 of 3 in floating point is no matter: the comparison is in integers.
    for e in (3, 7, 11):
        moved = update_selection_bias(np.ones(e), np.full(e, 10**15 + 1), rate=0.5)
        np.testing.assert_array_equal(moved, np.ones(e))
    assert update_selection_bias(np.zeros(3), np.zeros(3, int), rate=1.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64])
def test_narrow_counts_do_not_overflow(dtype: type) -> None:
    large = 250 if dtype is np.uint8 else 2**30
    counts = np.array([large, 3, 0, large], dtype)
    assert update_selection_bias(np.zeros(4), counts, rate=1.0).tolist() == [-1, 1, 1, -1]


def test_repeated_steps_balance_a_biased_router() -> None:
    logits = np.random.default_rng(0).standard_normal((512, 8)) + np.linspace(0.0, 2.0, 8)
    cfg = MoEConfig(
        hidden_size=1,
        intermediate_size=1,
        num_experts=8,
        top_k=2,
        score_fn="sigmoid",
        selection_bias=True,
    )
    bias, worst = np.zeros(8), []
    for step in range(200):
        counter = LoadCounter(8)
        counter.add(route(logits, cfg, selection_bias=bias), key=step)
        worst.append(counter.tokens_per_expert.max() / 128)
        bias = update_selection_bias(bias, counter.flush(), rate=0.004)
    assert worst[0] > 2.0
    assert max(worst[-10:]) < 1.1


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (
            DTypeError,
            {"selection_bias": np.zeros(3, int)},
            "selection_bias must have dtype float32 or float64, got int64. "
            "Convert it with selection_bias.astype('float32').",
        ),
        (
            ShapeError,
            {"tokens_per_expert": np.zeros(4, int)},
            "tokens_per_expert must have shape (E,) = (3,), got (4,). "
            "E is bound by selection_bias.",
        ),
        (RangeError, {"rate": -1.0}, "rate must be finite and >= 0, got -1.0."),
        (RangeError, {"rate": math.nan}, "rate must be finite and >= 0, got nan."),
    ],
)
def test_messages_of_the_update(
    error: type[Exception], changes: dict[str, Any], message: str
) -> None:
    arguments = {
        "selection_bias": np.zeros(3),
        "tokens_per_expert": np.zeros(3, int),
        "rate": 0.1,
        **changes,
    }
    with pytest.raises(error) as caught:
        update_selection_bias(**arguments)
    assert str(caught.value) == "update_selection_bias: " + message
