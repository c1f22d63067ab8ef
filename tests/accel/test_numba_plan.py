"""The plan by counting is that of the reference, array for array."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from needs import need_numba

need_numba()

import npmoe
from accel.numba_cpu import rows
from npmoe.dispatch import DispatchPlan, plan_dispatch


def same_plans(ids: Any, **options: Any) -> None:
    backend = npmoe.get_backend("numba")
    want = plan_dispatch(ids, **options)
    got = backend.plan_dispatch(ids, **options)
    for name in DispatchPlan.__dataclass_fields__:
        one, other = getattr(got, name), getattr(want, name)
        assert type(one) is type(other), name
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, name
            assert one.shape == other.shape, name
            np.testing.assert_array_equal(one, other, err_msg=name)
        else:
            assert one == other, name


@given(st.integers(0, 40), st.integers(0, 6), st.integers(1, 30), st.integers(0, 2**31), st.data())
def test_drawn_ids(tokens: int, top_k: int, experts: int, seed: int, data: Any) -> None:
    rng = np.random.default_rng(seed)
    lowest = data.draw(st.sampled_from([-1, 0]))
    ids = rng.integers(lowest, experts, (tokens, top_k)).astype(np.int32)
    same_plans(ids, num_experts=experts)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(0, 2, 3), (4, 0, 3), (0, 0, 1), (50, 3, 1), (1, 1, 1), (300, 8, 5000), (3, 2, 70_000)],
)
def test_sizes(tokens: int, top_k: int, experts: int) -> None:
    rng = np.random.default_rng(0)
    same_plans(rng.integers(-1, experts, (tokens, top_k)).astype(np.int32), num_experts=experts)


def test_all_on_one_expert() -> None:
    for chosen in (0, 3, 6, -1):
        same_plans(np.full((100, 2), chosen, np.int32), num_experts=7)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int64", "uint64", ">i4", ">i8"])
def test_other_integers(dtype: str) -> None:
    ids = np.random.default_rng(0).integers(0, 9, (20, 3)).astype(dtype)
    same_plans(ids, num_experts=9)


def test_layouts_of_ids() -> None:
    wide = np.random.default_rng(0).integers(-1, 9, (40, 6)).astype(np.int32)
    fixed = wide[:, :3].copy()
    fixed.flags.writeable = False
    for ids in (wide[::2, 1::2], wide[::-1, ::-1], np.asfortranarray(wide), fixed, wide.T):
        before = ids.copy()
        same_plans(ids, num_experts=9)
        np.testing.assert_array_equal(ids, before)


def test_capacities_and_identity_experts() -> None:
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(6, dtype=np.int32), (30, 1)), axis=1)[:, :3]
    weights = rng.random((30, 3))
    same_plans(ids, num_experts=4, num_identity_experts=2)
    for policy in ("position", "k_major", "batch_priority", "probability"):
        for order in ("priority", "token"):
            same_plans(
                ids, num_experts=6, capacity=7, drop_policy=policy, slot_order=order,
                topk_weights=weights,
            )  # fmt: skip
    same_plans(ids, num_experts=6, capacity=[3, 0, 2])


@pytest.mark.parametrize(
    "bad", [-2, 5, 2**31 - 1, -(2**31), 2**32, 2**32 + 1, -(2**32), 2**40 + 2, 2**63 - 1]
)
def test_ids_out_of_range_raise_the_same_error(bad: int) -> None:
    ids = np.array([[0, 1], [bad, 2], [4, 3]])
    ids = ids.astype(np.int32) if -(2**31) <= bad < 2**31 else ids
    with pytest.raises(npmoe.PlanError) as want:
        plan_dispatch(ids, num_experts=5)
    with pytest.raises(npmoe.PlanError) as got:
        npmoe.get_backend("numba").plan_dispatch(ids, num_experts=5)
    assert str(got.value) == str(want.value)


def test_no_id_is_written_beside_its_arrays() -> None:
    """Whatever the ids are; the kernels are called as the backend calls them."""
    rng = np.random.default_rng(0)
    experts, routes = 6, 60
    ids = rng.integers(-(2**31), 2**31, routes).astype(np.int32)
    ids[::3] = rng.integers(-3, experts + 3, len(ids[::3]))

    def guarded(size: int) -> np.ndarray:
        return np.full(size + 40, -777, np.int32)

    offsets, next_row = guarded(experts + 1), guarded(experts)
    assert not rows.count_routes(ids, experts, offsets[20 : 21 + experts])
    inside = (ids >= 0) & (ids < experts)
    counts = np.bincount(ids[inside], minlength=experts)
    np.testing.assert_array_equal(offsets[20 : 21 + experts], np.append(0, counts.cumsum()))
    num_rows = int(inside.sum())
    outs = [guarded(num_rows), guarded(num_rows), guarded(routes)]
    views = [o[20 : len(o) - 20] for o in outs]
    rows.place_routes(ids, 2, experts, offsets[20 : 21 + experts], next_row[20:-20], *views)
    for room in (offsets, next_row, *outs):
        assert (room[:20] == -777).all()
        assert (room[-20:] == -777).all()
    np.testing.assert_array_equal(views[2] >= 0, inside)
    np.testing.assert_array_equal(ids[views[0]], np.sort(ids[inside]))


def test_replayed_ids_out_of_range_are_refused_by_the_layer() -> None:
    cfg = npmoe.MoEConfig(hidden_size=4, num_experts=4, top_k=2)
    params, x = npmoe.init_params(cfg), np.ones((3, 4), np.float32)
    for bad in (4, -2, 2**31 - 1, 2**32):
        ids = np.array([[0, 1], [bad, 1], [0, 1]])
        texts = []
        for name in ("numpy", "numba"):
            with pytest.raises(npmoe.NpmoeError) as caught:
                npmoe.moe_forward(x, params, cfg, name, topk_ids=ids)
            texts.append(str(caught.value))
        assert texts[0] == texts[1]
