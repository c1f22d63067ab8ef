"""What load_balancing_loss says when it is asked for something that cannot be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from npmoe import MoEConfig, PlanError, RangeError, ShapeError
from npmoe.balancing import LoadCounter
from npmoe.dispatch import plan_dispatch
from npmoe.losses import load_balancing_loss
from npmoe.routing import Routing, route


def routing_of(logits: np.ndarray, **arguments: Any) -> Routing:
    num_experts = logits.shape[1]
    cfg = MoEConfig(hidden_size=1, intermediate_size=1, num_experts=num_experts, top_k=2)
    return route(logits, cfg, **arguments)


def message(error: type[Exception], **arguments: Any) -> str:
    routing = arguments.pop("routing", None) or routing_of(np.zeros((4, 3)), sequence_length=2)
    with pytest.raises(error) as caught:
        load_balancing_loss(routing, **arguments)
    return str(caught.value)


def test_messages_about_names() -> None:
    assert message(RangeError, convention="gpt") == (
        "load_balancing_loss: convention must be one of 'switch', 'gshard', 'hf', 'flaxformer', "
        "'megatron', 'megablocks', 'deepspeed_topk', 'deepseek_v3', 'sonic', 'unscaled', "
        "'prob_entropy', got 'gpt'."
    )
    assert message(RangeError, counts="all") == (
        "load_balancing_loss: counts must be one of 'executed', 'pre_drop', 'post_drop', "
        "'unbiased_topk', 'top1', got 'all'."
    )
    assert message(RangeError, scope="rank") == (
        "load_balancing_loss: scope must be one of 'batch', 'sequence', 'global', got 'rank'."
    )


@pytest.mark.parametrize("coefficient", [math.nan, math.inf])
def test_message_about_the_coefficient(coefficient: float) -> None:
    assert message(RangeError, coefficient=coefficient) == (
        f"load_balancing_loss: coefficient must be finite, got {coefficient}."
    )


def test_messages_about_plan_and_routing() -> None:
    assert message(RangeError, counts="post_drop") == (
        "load_balancing_loss: plan must be given with counts='post_drop', got None. "
        "Pass saved.plan, or choose counts='pre_drop'."
    )
    foreign = plan_dispatch(routing_of(np.zeros((2, 3))).topk_ids, num_experts=3)
    assert message(ShapeError, counts="executed", plan=foreign) == (
        "load_balancing_loss: plan.row_ids must have shape (T, K) = (4, 2), got (2, 2). "
        "T, K are bound by routing.topk_ids. Pass the plan of the same call."
    )
    fields = {"topk_weights": np.ones((6, 1)), "sequence_length": 4}
    soft = Routing(
        topk_ids=np.zeros((6, 1), np.int32),
        probs=np.ones((4, 6)),
        router_logits=np.ones((4, 6)),
        **fields,
    )
    assert message(ShapeError, routing=soft) == (
        "load_balancing_loss: routing.topk_ids must have shape (T, K) with T = 4, got (6, 1). "
        "T is bound by routing.probs. Soft routing sends every token everywhere and needs no "
        "such loss."
    )
    beyond = Routing(
        topk_ids=np.array([[3]], np.int32),
        probs=np.ones((1, 3)),
        router_logits=np.ones((1, 3)),
        topk_weights=np.ones((1, 1)),
        sequence_length=1,
    )
    assert message(PlanError, routing=beyond) == (
        "load_balancing_loss: routing.topk_ids must lie in -1..2, got 3. E is bound by "
        "routing.probs."
    )
    uneven = routing_of(np.zeros((4, 3)), sequence_length=3)
    assert message(ShapeError, routing=uneven, scope="sequence") == (
        "load_balancing_loss: routing.sequence_length must divide T = 4, got 3. "
        "T is bound by routing.probs."
    )


def test_messages_about_the_window() -> None:
    window = LoadCounter(3, counts="top1")
    assert message(RangeError, scope="global") == (
        "load_balancing_loss: window must be a LoadCounter with scope='global' and None "
        "otherwise, got NoneType with scope='global'."
    )
    assert message(RangeError, window=window) == (
        "load_balancing_loss: window must be a LoadCounter with scope='global' and None "
        "otherwise, got LoadCounter with scope='batch'."
    )
    assert message(RangeError, window=window, scope="global") == (
        "load_balancing_loss: window must count 'pre_drop', got 'top1'. Pass counts='top1', or "
        "make the counter with counts='pre_drop'."
    )
    assert message(RangeError, window=LoadCounter(3), scope="global") == (
        "load_balancing_loss: window must hold counts, got none. Add this micro-batch before its "
        "loss."
    )
    assert message(ShapeError, window=LoadCounter(4), scope="global") == (
        "load_balancing_loss: window must count E = 3 experts, got 4. E is bound by routing.probs."
    )


@pytest.mark.parametrize("arguments", [{"counts": "top1"}, {"scope": "global"}])
def test_the_entropy_of_probabilities_counts_nothing(arguments: dict[str, str]) -> None:
    counts, scope = arguments.get("counts"), arguments.get("scope", "batch")
    assert message(RangeError, convention="prob_entropy", **arguments) == (
        "load_balancing_loss: counts and scope='global' must not be given with "
        f"convention='prob_entropy', got counts={counts!r}, scope={scope!r}. It counts nothing."
    )
