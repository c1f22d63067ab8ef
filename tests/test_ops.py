"""The verbs on integers, where every order of summation gives the same bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmoe import MoEConfig, ops
from npmoe.activations import ACTIVATIONS, bind_activation
from npmoe.dispatch import DispatchPlan, plan_dispatch

DTYPES = [np.float32, np.float64]


def integers(rng: np.random.Generator, *shape: int, dtype: Any = np.float64) -> np.ndarray:
    return rng.integers(-4, 5, shape).astype(dtype)


def padded(plan: DispatchPlan) -> DispatchPlan:
    """Return the plan as a device makes it: T*K entries, the tail -1."""
    tail = plan.num_tokens * plan.top_k - plan.num_rows
    minus = np.full(tail, -1, np.int32)
    return dataclasses.replace(
        plan,
        pair_ids=np.concatenate([plan.pair_ids, minus]),
        token_ids=np.concatenate([plan.token_ids, minus]),
    )


@st.composite
def plans(draw: st.DrawFn) -> tuple[DispatchPlan, np.random.Generator]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_tokens, num_experts = draw(st.integers(0, 9)), draw(st.integers(1, 6))
    top_k = draw(st.integers(1, num_experts))
    order = rng.permuted(np.tile(np.arange(num_experts), (num_tokens, 1)), axis=1)
    holes = draw(st.sampled_from([0.0, 0.3, 1.0]))
    ids = np.where(rng.random((num_tokens, top_k)) < holes, -1, order[:, :top_k])
    capacity = draw(st.none() | st.integers(0, 3))
    plan = plan_dispatch(ids.astype(np.int32), num_experts=num_experts, capacity=capacity)
    return (padded(plan) if draw(st.booleans()) else plan), rng


def experts_of(plan: DispatchPlan) -> np.ndarray:
    return np.repeat(np.arange(plan.num_experts), plan.tokens_per_expert)


@given(plans())
def test_gather_and_combine_are_adjoint(drawn: tuple[DispatchPlan, np.random.Generator]) -> None:
    plan, rng = drawn
    x, y = integers(rng, plan.num_tokens, 3), integers(rng, plan.num_rows, 3)
    rows = ops.gather_rows(x, plan)
    assert rows.shape == y.shape
    assert (rows * y).sum() == (x * ops.combine_rows(y, plan)).sum()
    for r in range(plan.num_rows):
        np.testing.assert_array_equal(rows[r], x[plan.pair_ids[r] // plan.top_k])


@given(plans())
def test_weighted_combine(drawn: tuple[DispatchPlan, np.random.Generator]) -> None:
    plan, rng = drawn
    rows = integers(rng, plan.num_rows, 3)
    weights = integers(rng, plan.num_tokens, plan.top_k)
    before = rows.copy()
    got = ops.combine_rows(rows, plan, topk_weights=weights)
    np.testing.assert_array_equal(rows, before)
    expected = np.zeros((plan.num_tokens, 3))
    for t, k in np.ndindex(plan.row_ids.shape):
        if plan.row_ids[t, k] >= 0:
            expected[t] += weights[t, k] * rows[plan.row_ids[t, k]]
    np.testing.assert_array_equal(got, expected)
    # The same through scale_rows.
    scaled = ops.scale_rows(rows, plan, weights)
    np.testing.assert_array_equal(rows, before)
    np.testing.assert_array_equal(ops.combine_rows(scaled, plan), expected)


@given(plans())
def test_combine_reads_no_weight_of_a_dropped_route(
    drawn: tuple[DispatchPlan, np.random.Generator],
) -> None:
    plan, rng = drawn
    rows = integers(rng, plan.num_rows, 2)
    weights = integers(rng, plan.num_tokens, plan.top_k)
    clean = ops.combine_rows(rows, plan, topk_weights=weights)
    for poison in (np.nan, np.inf):
        broken = np.where(plan.row_ids < 0, poison, weights)
        np.testing.assert_array_equal(ops.combine_rows(rows, plan, topk_weights=broken), clean)


def test_combine_reads_no_row_of_a_dropped_route() -> None:
    # Row -1 of NumPy is the last one, so a -1 that is followed shows here.
    plan = plan_dispatch(np.array([[0], [1], [1]]), num_experts=2, capacity=1)
    rows = np.array([[2.0], [np.nan]])
    assert plan.row_ids.tolist() == [[0], [1], [-1]]
    got = ops.combine_rows(rows, plan, topk_weights=np.ones((3, 1)))
    np.testing.assert_array_equal(got, [[2.0], [np.nan], [0.0]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_adds_slots_in_ascending_order(dtype: Any) -> None:
    big = 1.0 / np.finfo(dtype).eps
    plan = plan_dispatch(np.array([[2, 0, 1]]), num_experts=3)
    rows = np.array([[1.0], [-2 * big], [2 * big]], dtype)  # slots 1, 2, 0
    # (2 big + 1) - 2 big: the 1 is lost; any other order keeps it.
    assert ops.combine_rows(rows, plan).tolist() == [[0.0]]


@given(plans(), st.sampled_from(DTYPES))
def test_grouped_gemm(drawn: tuple[DispatchPlan, np.random.Generator], dtype: Any) -> None:
    plan, rng = drawn
    weight = integers(rng, plan.num_experts, 5, 3, dtype=dtype)
    bias = integers(rng, plan.num_experts, 5, dtype=dtype)
    x, y = (
        integers(rng, plan.num_rows, 3, dtype=dtype),
        integers(rng, plan.num_rows, 5, dtype=dtype),
    )
    experts = experts_of(plan)
    plain = ops.grouped_gemm(x, weight, plan)
    biased = ops.grouped_gemm(x, weight, plan, bias=bias)
    back = ops.grouped_gemm(y, weight, plan, transposed=True)
    assert plain.dtype == biased.dtype == back.dtype == dtype
    assert plain.shape == biased.shape == (plan.num_rows, 5)
    assert back.shape == (plan.num_rows, 3)
    for r, e in enumerate(experts):
        product = [
            sum(int(w) * int(v) for w, v in zip(row, x[r], strict=True)) for row in weight[e]
        ]
        assert plain[r].tolist() == product
        np.testing.assert_array_equal(biased[r], plain[r] + bias[e])
        np.testing.assert_array_equal(back[r], (weight[e] * y[r][:, None]).sum(axis=0))
    assert (plain * y).sum() == (x * back).sum()


@given(plans(), st.sampled_from(DTYPES))
def test_weight_gradient(drawn: tuple[DispatchPlan, np.random.Generator], dtype: Any) -> None:
    plan, rng = drawn
    x, y = (
        integers(rng, plan.num_rows, 3, dtype=dtype),
        integers(rng, plan.num_rows, 5, dtype=dtype),
    )
    expected = np.zeros((plan.num_experts, 5, 3))
    for r, e in enumerate(experts_of(plan)):
        expected[e] += np.outer(y[r], x[r])
    got = ops.grouped_gemm_wgrad(x, y, plan)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected)
    out = np.full(got.shape, np.nan, dtype)
    assert ops.grouped_gemm_wgrad(x, y, plan, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert not np.signbit(out[np.asarray(plan.tokens_per_expert) == 0]).any()
    start = integers(rng, *got.shape, dtype=dtype)
    out = start.copy()
    assert ops.grouped_gemm_wgrad(x, y, plan, out=out, accumulate=True) is out
    np.testing.assert_array_equal(out, start + expected)
    # It is the adjoint of the product in its weight.
    weight = integers(rng, *got.shape, dtype=dtype)
    assert (ops.grouped_gemm(x, weight, plan) * y).sum() == (weight * got).sum()


def test_weight_gradient_ignores_accumulate_without_out() -> None:
    plan = plan_dispatch(np.array([[0]]), num_experts=2)
    got = ops.grouped_gemm_wgrad(np.ones((1, 2)), np.ones((1, 1)), plan, accumulate=True)
    assert got.tolist() == [[[1.0, 1.0]], [[0.0, 0.0]]]


@given(plans())
def test_segment_sum_and_spread_are_adjoint(
    drawn: tuple[DispatchPlan, np.random.Generator],
) -> None:
    plan, rng = drawn
    rows, values = integers(rng, plan.num_rows, 3), integers(rng, plan.num_experts, 3)
    sums, spread = ops.segment_sum(rows, plan), ops.spread_experts(values, plan)
    experts = experts_of(plan)
    np.testing.assert_array_equal(spread, values[experts])
    np.testing.assert_array_equal(sums, np.eye(plan.num_experts)[:, experts] @ rows)
    assert (sums * values).sum() == (rows * spread).sum()


@given(plans())
def test_row_dot(drawn: tuple[DispatchPlan, np.random.Generator]) -> None:
    plan, rng = drawn
    a, b = integers(rng, plan.num_rows, 3), integers(rng, plan.num_rows, 3)
    got = ops.row_dot(a, b, plan)
    expected = np.zeros(plan.row_ids.shape)
    for t, k in np.ndindex(plan.row_ids.shape):
        if plan.row_ids[t, k] >= 0:
            expected[t, k] = (a[plan.row_ids[t, k]] * b[plan.row_ids[t, k]]).sum()
    np.testing.assert_array_equal(got, expected)
    # <scale_rows(a, w), b> = <w, row_dot(a, b)>
    weights = integers(rng, plan.num_tokens, plan.top_k)
    assert (ops.scale_rows(a, plan, weights) * b).sum() == (weights * got).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_linear(dtype: Any, biased: bool) -> None:
    rng = np.random.default_rng(0)
    x, w, g = (integers(rng, *s, dtype=dtype) for s in ((4, 3), (5, 3), (4, 5)))
    bias = integers(rng, 5, dtype=dtype) if biased else None
    y = ops.linear(x, w, bias)
    expected = [[sum(x[t] * w[m]) + (bias[m] if biased else 0) for m in range(5)] for t in range(4)]
    assert y.tolist() == np.array(expected).tolist()
    grad_x, grad_w, grad_bias = ops.linear_backward(g, x, w, bias)
    assert y.dtype == grad_x.dtype == grad_w.dtype == dtype
    plain = ops.linear(x, w)
    assert (grad_x * x).sum() == (grad_w * w).sum() == (plain * g).sum()
    np.testing.assert_array_equal(grad_x, sum(g[:, [m]] * w[m] for m in range(5)))
    np.testing.assert_array_equal(grad_w, sum(np.outer(g[t], x[t]) for t in range(4)))
    if biased:
        np.testing.assert_array_equal(grad_bias, [g[:, m].sum() for m in range(5)])
    else:
        assert grad_bias is None


def test_mask_rows_is_new_and_reads_no_masked_value() -> None:
    x = np.array([[1.0, np.nan], [2.0, 3.0]], np.float32)
    before = x.copy()
    got = ops.mask_rows(x, np.array([False, True]))
    assert got.tolist() == [[0.0, 0.0], [2.0, 3.0]]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(x, before)
    assert not np.shares_memory(ops.mask_rows(x, np.array([True, True])), x)


def test_add_is_new() -> None:
    x, y = np.array([1.0, 2.0]), np.array([3.0, 5.0])
    got = ops.add(x, y)
    assert got.tolist() == [4.0, 7.0]
    assert (x.tolist(), y.tolist()) == ([1.0, 2.0], [3.0, 5.0])


def test_store() -> None:
    value, out = np.array([1.0, 2.0]), np.array([np.nan, 10.0])
    assert ops.store(value, None, False) is value
    assert ops.store(value, out, False) is out
    assert out.tolist() == [1.0, 2.0]
    assert ops.store(value, out, True) is out
    assert out.tolist() == [2.0, 4.0]
    assert value.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_verbs_are_those_of_the_table(name: str) -> None:
    cfg = MoEConfig(activation=name)
    rng = np.random.default_rng(0)
    pre = rng.standard_normal((3, 4))
    grad = rng.standard_normal((3, 2 if cfg.gated else 4))
    table = bind_activation(name)
    assert ops.activation(pre, cfg).tobytes() == table.forward(pre).tobytes()
    got = ops.activation_backward(grad, pre, cfg)
    assert got.tobytes() == table.backward(grad, pre).tobytes()


def test_expert_rows_skips_empty_experts() -> None:
    plan = plan_dispatch(np.array([[3], [1], [3]]), num_experts=5)
    assert list(ops.expert_rows(plan)) == [(1, slice(0, 1)), (3, slice(1, 3))]
