"""Router logits to choices and weights: ties, broken rows, masks, replay, noise, gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmoe import MoEConfig, RangeError, gradcheck
from npmoe.dispatch import DispatchPlan, plan_dispatch
from npmoe.routing import Routing, renormalize_kept, route, route_backward, stable_topk

ORDERS = ("score_topk", "topk_score")
INF, NAN = np.inf, np.nan


def config(num_experts: int = 4, top_k: int = 2, **fields: Any) -> MoEConfig:
    return MoEConfig(
        hidden_size=1, intermediate_size=1, num_experts=num_experts, top_k=top_k, **fields
    )


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 6),
    st.integers(1, 20),
    st.sampled_from([0, 1, 3]),
    st.booleans(),
    st.data(),
)
def test_topk_is_a_stable_sort(
    seed: int, rows: int, columns: int, size: int, never: bool, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    key = rng.integers(-size, size + 1, (rows, columns)).astype(float)
    if never:
        key[rng.random(key.shape) < 0.4] = -INF
    top_k = data.draw(st.integers(1, columns))
    before = key.copy()
    ids = stable_topk(key, top_k)
    np.testing.assert_array_equal(ids, np.argsort(-key, axis=1, kind="stable")[:, :top_k])
    np.testing.assert_array_equal(key, before)


@pytest.mark.parametrize("top_k", [1, 7, 8, 9, 12])
@pytest.mark.parametrize("value", [0.0, -3.5, -INF])
def test_topk_of_equal_keys_counts_up(top_k: int, value: float) -> None:
    ids = stable_topk(np.full((3, 12), value, np.float32), top_k)
    np.testing.assert_array_equal(ids, np.tile(np.arange(top_k), (3, 1)))


def test_topk_does_not_tell_zeros_apart() -> None:
    assert stable_topk(np.array([[-0.0, 0.0, -0.0]]), 3).tolist() == [[0, 1, 2]]
    assert stable_topk(np.array([[-INF, -0.0, 0.0]]), 3).tolist() == [[1, 2, 0]]


LOG = np.log([[1.0, 2.0, 4.0, 1.0]])  # probabilities 1/8, 2/8, 4/8, 1/8


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({}, [4 / 8, 2 / 8, 1 / 8]),
        ({"renormalize": True}, [4 / 7, 2 / 7, 1 / 7]),
        ({"router_order": "topk_score"}, [4 / 7, 2 / 7, 1 / 7]),
        (
            {"renormalize": True, "expert_capacity": 1, "renormalize_drop": "after"},
            [4 / 8, 2 / 8, 1 / 8],
        ),
        ({"routed_scaling_factor": 2.5}, [10 / 8, 5 / 8, 2.5 / 8]),
        ({"routed_scaling_factor": 2.5, "renormalize": True}, [10 / 7, 5 / 7, 2.5 / 7]),
        (
            {"routed_scaling_factor": 2.5, "router_order": "topk_score"},
            [10 / 7, 5 / 7, 2.5 / 7],
        ),
    ],
)
def test_worked_numbers(fields: dict[str, Any], weights: list[float]) -> None:
    routing = route(LOG, config(4, 3, **fields))
    assert routing.topk_ids.tolist() == [[2, 1, 0]]
    assert routing.topk_ids.dtype == np.int32
    np.testing.assert_allclose(routing.topk_weights, [weights], rtol=8 * 2.0**-53)
    np.testing.assert_allclose(routing.probs, [[1 / 8, 2 / 8, 4 / 8, 1 / 8]], rtol=8 * 2.0**-53)
    assert routing.router_logits is LOG
    assert routing.token_mask is None
    assert routing.sequence_length == 1


def test_selection_goes_by_probability_after_underflow() -> None:
    logits = np.array([[-2000.0, 0.0, -1000.0]])  # both underflow to probability 0
    with np.errstate(under="ignore"):
        assert route(logits, config(3, 2)).topk_ids.tolist() == [[1, 0]]
        late = route(logits, config(3, 2, router_order="topk_score"))
    assert late.topk_ids.tolist() == [[1, 2]]


@pytest.mark.parametrize("order", ORDERS)
def test_large_logits_do_not_overflow(order: str) -> None:
    logits = np.array([[3e38, 3e38, -3e38, 0.0]], np.float32)
    with np.errstate(over="raise"):
        assert route(logits / 2, config(router_order=order)).topk_weights.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("order", ORDERS)
def test_one_expert_every_expert_no_token(order: str) -> None:
    one = route(np.array([[7.0], [-3.0]]), config(1, 1, router_order=order))
    assert one.topk_ids.tolist() == [[0], [0]]
    assert one.topk_weights.tolist() == [[1.0], [1.0]]
    every = route(LOG, config(4, 4, router_order=order))
    assert every.topk_ids.tolist() == [[2, 1, 0, 3]]
    np.testing.assert_allclose(every.topk_weights.sum(axis=1), 1.0, rtol=2.0**-50)
    none = route(np.empty((0, 4)), config(4, 3, router_order=order))
    assert none.topk_ids.shape == none.topk_weights.shape == (0, 3)
    grad = route_backward(none.topk_weights, none, config(4, 3, router_order=order))
    assert grad.shape == (0, 4)


BROKEN = [
    pytest.param([1.0, NAN, 2.0, 0.0], "nan", id="nan"),
    pytest.param([NAN, NAN, NAN, NAN], "nan", id="all nan"),
    pytest.param([1.0, INF, 2.0, 0.0], "inf", id="inf"),
    pytest.param([INF, INF, -INF, 0.0], "inf", id="two inf"),
    pytest.param([-INF, -INF, -INF, -INF], "-inf", id="all -inf"),
    pytest.param([NAN, INF, 2.0, 0.0], "nan", id="nan and inf"),
]


def with_broken_row(row: list[float], dtype: type = np.float64) -> np.ndarray:
    logits = np.random.default_rng(1).standard_normal((5, 4)).astype(dtype)
    logits[3] = row
    return logits


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("row", "value"), BROKEN)
def test_raise_names_the_token(row: list[float], value: str, order: str) -> None:
    cfg = config(router_order=order)
    logits = with_broken_row(row)
    expected = (
        "moe_forward: router_logits must have a finite largest value in every row, "
        f"got {value} in token 3. Look for NaN or overflow in hidden_states and router_weight, "
        "or choose nan_policy='drop'."
    )
    for mask in (None, np.array([False, True, True, True, True])):
        with pytest.raises(RangeError) as caught:
            route(logits, cfg, token_mask=mask)
        assert str(caught.value) == expected
    masked = route(logits, cfg, token_mask=np.array([True, True, True, False, True]))
    assert masked.topk_ids[3].tolist() == [-1, -1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", ["clamp", "drop"])
@pytest.mark.parametrize(("row", "value"), BROKEN)
def test_broken_row_is_alone(
    row: list[float], value: str, policy: str, order: str, renormalize: bool, dtype: type
) -> None:
    cfg = config(
        router_order=order, nan_policy=policy, renormalize=renormalize and order == ORDERS[0]
    )
    logits = with_broken_row(row, dtype)
    clean = with_broken_row([0.0, 1.0, 2.0, 3.0], dtype)
    before = logits.copy()
    got, whole = route(logits, cfg), route(clean, cfg)
    np.testing.assert_array_equal(logits, before)
    assert got.router_logits is logits
    others = [0, 1, 2, 4]
    for name in ("topk_ids", "topk_weights", "probs"):
        found, reference = getattr(got, name), getattr(whole, name)
        assert found.dtype == reference.dtype
        assert found[others].tobytes() == reference[others].tobytes()
    assert got.topk_weights[3].tolist() == [0.0, 0.0]
    assert got.probs[3].tolist() == [0.0] * 4
    grad = route_backward(np.ones((5, 2), dtype), got, cfg)
    reference = route_backward(np.ones((5, 2), dtype), whole, cfg)
    assert grad.dtype == dtype
    assert grad[3].tolist() == [0.0] * 4
    assert grad[others].tobytes() == reference[others].tobytes()
    if policy == "clamp":
        assert got.topk_ids[3].tolist() == [0, 1]
        assert got.token_mask is None
    else:
        assert got.topk_ids[3].tolist() == [-1, -1]
        assert got.token_mask.tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", ["clamp", "drop"])
def test_broken_row_meets_a_mask(policy: str, order: str) -> None:
    cfg = config(router_order=order, nan_policy=policy)
    logits = with_broken_row([NAN] * 4)
    logits[1] = NAN
    mask = np.array([True, False, True, True, True])
    got = route(logits, cfg, token_mask=mask)
    assert got.topk_ids[1].tolist() == [-1, -1]
    assert got.topk_ids[3].tolist() == ([0, 1] if policy == "clamp" else [-1, -1])
    assert got.token_mask.tolist() == [True, False, True, policy == "clamp", True]
    assert got.topk_weights[[1, 3]].tolist() == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", ["raise", "clamp", "drop"])
def test_one_minus_infinity_means_never(policy: str, order: str) -> None:
    cfg = config(router_order=order, nan_policy=policy)
    got = route(np.array([[-INF, 0.0, 0.0, -INF]]), cfg)
    assert got.topk_ids.tolist() == [[1, 2]]
    assert got.topk_weights.tolist() == [[0.5, 0.5]]
    assert got.probs.tolist() == [[0.0, 0.5, 0.5, 0.0]]
    more = route(np.array([[-INF, 5.0, -INF, -INF]]), cfg)
    assert more.topk_ids.tolist() == [[1, 0]]
    assert more.topk_weights.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("order", ORDERS)
def test_mask_excludes_and_leaves_others_alone(order: str) -> None:
    cfg = config(router_order=order)
    logits = np.random.default_rng(2).standard_normal((6, 4))
    mask = np.array([True, False, True, True, False, True])
    whole, got = route(logits, cfg), route(logits, cfg, token_mask=mask)
    assert got.topk_ids[~mask].tolist() == [[-1, -1]] * 2
    assert not got.topk_weights[~mask].any()
    assert not got.probs[~mask].any()
    for name in ("topk_ids", "topk_weights", "probs"):
        assert getattr(got, name)[mask].tobytes() == getattr(whole, name)[mask].tobytes()
    assert got.token_mask is not None
    nobody = route(logits, cfg, token_mask=np.zeros(6, bool))
    assert (nobody.topk_ids == -1).all()
    assert not nobody.topk_weights.any()


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int8])
@pytest.mark.parametrize("order", ORDERS)
def test_replay_keeps_ids_and_takes_current_weights(order: str, dtype: type) -> None:
    cfg = config(4, 2, router_order=order)
    ids = np.array([[0, 3], [-1, 1], [-1, -1]], dtype)
    got = route(np.repeat(LOG, 3, axis=0), cfg, topk_ids=ids)
    assert got.topk_ids.tolist() == ids.tolist()
    assert got.topk_ids.dtype == np.int32
    weights = {
        "score_topk": [[1 / 8, 1 / 8], [0.0, 2 / 8], [0.0, 0.0]],
        "topk_score": [[1 / 2, 1 / 2], [0.0, 1.0], [0.0, 0.0]],
    }
    np.testing.assert_allclose(got.topk_weights, weights[order], rtol=8 * 2.0**-53)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, np.int8, np.int64])
def test_replay_of_masked_rows_becomes_minus_one(dtype: type) -> None:
    ids = np.array([[0, 3], [2, 1]], dtype)
    mask = np.array([False, True])
    got = route(np.repeat(LOG, 2, axis=0), config(), token_mask=mask, topk_ids=ids)
    assert got.topk_ids.tolist() == [[-1, -1], [2, 1]]
    assert not got.topk_weights[0].any()


def test_replay_takes_its_own_number_of_choices() -> None:
    ids = np.array([[0, 3, 1]], np.int32)
    assert route(LOG, config(4, 2), topk_ids=ids).topk_weights.shape == (1, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noise(dtype: type) -> None:
    cfg = config(8, 2, router_noise_std=0.5)
    logits = np.random.default_rng(0).standard_normal((50, 8)).astype(dtype)
    before = logits.copy()
    silent = route(logits, cfg)
    assert silent.router_logits is logits
    assert route(logits, config(8, 2), rng=np.random.default_rng(3)).router_logits is logits
    first = route(logits, cfg, rng=np.random.default_rng(3))
    again = route(logits, cfg, rng=np.random.default_rng(3))
    other = route(logits, cfg, rng=np.random.default_rng(4))
    np.testing.assert_array_equal(logits, before)
    noise = np.random.default_rng(3).standard_normal((50, 8)) * 0.5
    np.testing.assert_array_equal(first.router_logits, logits + noise.astype(dtype))
    assert first.router_logits.dtype == first.topk_weights.dtype == first.probs.dtype == dtype
    assert first.router_logits.tobytes() == again.router_logits.tobytes()
    assert first.router_logits.tobytes() != other.router_logits.tobytes()
    # The choice follows the noisy logits.
    noisy = route(first.router_logits, config(8, 2))
    assert noisy.topk_ids.tobytes() == first.topk_ids.tobytes()
    assert noisy.topk_weights.tobytes() == first.topk_weights.tobytes()


def test_backward_after_the_drop_needs_the_plan() -> None:
    cfg = config(renormalize=True, expert_capacity=1, renormalize_drop="after")
    routing = route(LOG, cfg)
    with pytest.raises(RangeError) as caught:
        route_backward(np.ones((1, 2)), routing, cfg)
    assert str(caught.value) == (
        "route_backward: plan must be given with renormalize_drop='after', got None. "
        "Only the kept routes were normalised."
    )
    plan = plan_dispatch(routing.topk_ids, num_experts=4, capacity=1)
    assert route_backward(np.ones((1, 2)), routing, cfg, plan).shape == (1, 4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # p = (1/4, 1/4, 1/2): grad_x = p * (grad_p - <grad_p, p>), grad_p = (0, 0, 1)
        ({}, [-1 / 8, -1 / 8, 1 / 4]),
        # One weight that is 1 whatever happens.
        ({"renormalize": True}, [0.0, 0.0, 0.0]),
        ({"router_order": "topk_score"}, [0.0, 0.0, 0.0]),
    ],
)
def test_backward_worked_numbers(fields: dict[str, Any], expected: list[float]) -> None:
    cfg = config(3, 1, **fields)
    routing = route(np.log([[1.0, 1.0, 2.0]]), cfg)
    grad = route_backward(np.ones((1, 1)), routing, cfg)
    np.testing.assert_allclose(grad, [expected], atol=8 * 2.0**-53, rtol=0)


def test_backward_of_minus_one_beside_expert_zero() -> None:
    cfg = config(3, 2)
    logits = np.log([[1.0, 1.0, 2.0]])
    routing = route(logits, cfg, topk_ids=np.array([[-1, 0]]))
    alone = route(logits, cfg, topk_ids=np.array([[0]]))
    grad = route_backward(np.array([[np.float64(5.0), 1.0]]), routing, cfg)
    assert grad.tobytes() == route_backward(np.array([[1.0]]), alone, cfg).tobytes()


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(
    "fields", [{}, {"renormalize": True}, {"router_order": "topk_score"}], ids=str
)
@pytest.mark.parametrize("top_k", [1, 3, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("replayed", [False, True])
def test_gradient(
    fields: dict[str, Any], scale: float, top_k: int, masked: bool, replayed: bool
) -> None:
    cfg = config(5, top_k, routed_scaling_factor=scale, **fields)
    logits = np.random.default_rng(8).standard_normal((6, 5))
    mask = np.array([True, True, False, True, False, True]) if masked else None
    ids = np.random.default_rng(9).permuted(np.tile(np.arange(5), (6, 1)), axis=1)[:, :top_k]
    ids[1, 0] = -1
    replay = ids if replayed else None

    def forward(x: np.ndarray) -> np.ndarray:
        return route(x, cfg, token_mask=mask, topk_ids=replay).topk_weights

    def backward(grad: np.ndarray, x: np.ndarray) -> np.ndarray:
        return route_backward(grad, route(x, cfg, token_mask=mask, topk_ids=replay), cfg)

    gradcheck(forward, backward, [logits], decisions=lambda x: stable_topk(x, top_k))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_gradient_after_the_drop(scale: float) -> None:
    cfg = config(
        5,
        3,
        renormalize=True,
        renormalize_drop="after",
        expert_capacity=2,
        routed_scaling_factor=scale,
    )
    logits = np.random.default_rng(8).standard_normal((6, 5))

    def planned(x: np.ndarray) -> tuple[Routing, DispatchPlan]:
        routing = route(x, cfg)
        plan = plan_dispatch(routing.topk_ids, num_experts=5, capacity=2)
        weights = renormalize_kept(routing, plan, cfg)
        return dataclasses.replace(routing, topk_weights=weights), plan

    routing, plan = planned(logits)
    kept = (plan.row_ids >= 0).sum(axis=1)
    assert {0, 1, 2} <= set(kept.tolist())
    sums = routing.topk_weights.sum(axis=1)
    np.testing.assert_allclose(sums, scale * (kept > 0), rtol=8 * 2.0**-53)
    gradcheck(
        lambda x: planned(x)[0].topk_weights,
        lambda grad, x: route_backward(grad, planned(x)[0], cfg, planned(x)[1]),
        [logits],
        decisions=lambda x: planned(x)[1].row_ids,
    )
