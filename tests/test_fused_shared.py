"""A shared expert as routed experts: the same output, exactly back, and what is refused."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npmoe.activations import ACTIVATIONS
from npmoe.errors import DTypeError, PlanError, RangeError, ShapeError
from npmoe.fused_shared import RoutedExperts, fuse_shared_experts, unfuse_shared_experts
from npmoe.naive.activations import activate
from npmoe.params import MoEParams


def draw(
    E: int = 3,
    H: int = 5,
    I: int = 2,
    n: int = 2,
    *,
    gated: bool = True,
    bias: bool = False,
    T: int = 4,
    K: int = 2,
    dtype: str = "f8",
    seed: int = 0,
) -> RoutedExperts:
    rng = np.random.default_rng(seed)
    halves = 2 if gated else 1

    def numbers(*shape: int) -> np.ndarray:
        return (rng.integers(-99, 100, shape) / 64.0).astype(dtype)

    ids = np.array([rng.permutation(E)[:K] for _ in range(T)], np.int32).reshape(T, K)
    return RoutedExperts(
        params=MoEParams(
            router_weight=numbers(E, H),
            gate_up_proj=numbers(E, halves * I, H),
            down_proj=numbers(E, H, I),
            gate_up_bias=numbers(E, halves * I) if bias else None,
            down_bias=numbers(E, H) if bias else None,
            shared_gate_up_proj=numbers(halves * n * I, H),
            shared_down_proj=numbers(H, n * I),
        ),
        topk_ids=ids,
        topk_weights=rng.random((T, K)).astype(dtype),
    )


def fuse(drawn: RoutedExperts, **options: Any) -> RoutedExperts:
    return fuse_shared_experts(drawn.params, drawn.topk_ids, drawn.topk_weights, **options)


def routed(x: np.ndarray, experts: RoutedExperts, name: str) -> np.ndarray:
    """Return what the routed experts give each token, one route at a time."""
    p, y = experts.params, np.zeros(x.shape)
    for t, k in np.ndindex(experts.topk_ids.shape):
        e = experts.topk_ids[t, k]
        if e >= 0:
            z = p.gate_up_proj[e] @ x[t] + (0.0 if p.gate_up_bias is None else p.gate_up_bias[e])
            out = p.down_proj[e] @ activate(z, name)
            out = out + (0.0 if p.down_bias is None else p.down_bias[e])
            y[t] += experts.topk_weights[t, k] * out
    return y


def shared(x: np.ndarray, params: MoEParams, name: str) -> np.ndarray:
    rows = [params.shared_down_proj @ activate(params.shared_gate_up_proj @ h, name) for h in x]
    return np.array(rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", ["swiglu", "swiglu_oai", "geglu", "relu", "relu2"])
def test_the_output_is_that_of_both(name: str, n: int, bias: bool) -> None:
    drawn = draw(n=n, gated=ACTIVATIONS[name].gated, bias=bias)
    x = np.random.default_rng(1).integers(-16, 17, (4, 5)) / 8.0
    fused = fuse(drawn)
    assert fused.topk_ids.tolist() == [[*row, *range(3, 3 + n)] for row in drawn.topk_ids.tolist()]
    assert fused.topk_weights[:, 2:].tolist() == [[1.0] * n] * 4
    want = routed(x, drawn, name) + shared(x, drawn.params, name)
    # At most 5 experts of 5 and 2 products; terms below 2**13 in size.
    assert np.abs(routed(x, fused, name) - want).max() <= 64 * 2.0**-53 * 2.0**13
    assert np.abs(shared(x, drawn.params, name)).max() > 0.1
    # Applied later, the scale leaves the shared part alone.
    scaled = fuse(drawn, later_scale=2.5)
    assert scaled.topk_weights[:, 2:].tolist() == [[1.0 / 2.5] * n] * 4
    later = 2.5 * routed(x, drawn, name) + shared(x, drawn.params, name)
    assert np.abs(2.5 * routed(x, scaled, name) - later).max() <= 200 * 2.0**-53 * 2.0**13


@settings(max_examples=60, deadline=None)
@given(
    E=st.integers(1, 4),
    H=st.integers(1, 4),
    I=st.integers(1, 4),
    n=st.integers(1, 3),
    gated=st.booleans(),
    bias=st.booleans(),
    T=st.integers(0, 3),
    dtype=st.sampled_from(["f4", "f8"]),
    masked=st.booleans(),
)
def test_round_trip(
    E: int, H: int, I: int, n: int, gated: bool, bias: bool, T: int, dtype: str, masked: bool
) -> None:
    drawn = draw(E, H, I, n, gated=gated, bias=bias, T=T, K=1, dtype=dtype)
    mask = np.arange(T) % 2 == 0 if masked else None
    fused = fuse(drawn, token_mask=mask)
    assert fused.topk_ids.dtype == np.int32
    assert fused.topk_weights.dtype == dtype
    assert fused.params.gate_up_proj.dtype == fused.params.down_proj.dtype == dtype
    assert fused.params.router_weight is drawn.params.router_weight
    back = unfuse_shared_experts(fused, n)
    np.testing.assert_array_equal(back.topk_ids, drawn.topk_ids)
    np.testing.assert_array_equal(back.topk_weights, drawn.topk_weights)
    for field in fields(MoEParams):
        one, other = getattr(back.params, field.name), getattr(drawn.params, field.name)
        assert (one is None) == (other is None), field.name
        if one is not None:
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
    for name in ("gate_up_proj", "down_proj"):
        assert not np.shares_memory(getattr(back.params, name), getattr(fused.params, name))


def test_rows_by_hand() -> None:
    drawn = draw(1, 1, 2, 2, T=1, K=1)
    gate, up, down = [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 12.0]
    params = replace(
        drawn.params,
        shared_gate_up_proj=np.array(gate + up)[:, None],
        shared_down_proj=np.array([down]),
    )
    fused = fuse_shared_experts(params, drawn.topk_ids, drawn.topk_weights).params
    assert fused.gate_up_proj[1:, :, 0].tolist() == [[1, 2, 5, 6], [3, 4, 7, 8]]
    assert fused.down_proj[1:, 0].tolist() == [[9, 10], [11, 12]]
    assert fused.shared_gate_up_proj is fused.shared_down_proj is None


def test_masked_tokens_get_nothing() -> None:
    drawn = draw()
    fused = fuse(drawn, token_mask=np.array([True, False, True, False]), later_scale=0.5)
    assert fused.topk_ids[:, 2:].tolist() == [[3, 4], [-1, -1]] * 2
    assert fused.topk_weights[:, 2:].tolist() == [[2.0, 2.0], [0.0, 0.0]] * 2


def raises(error: type[Exception], call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_what_cannot_be_fused() -> None:
    drawn = draw(bias=True)
    ids, weights = drawn.topk_ids, drawn.topk_weights

    def refused(error: type[Exception], **changes: Any) -> str:
        params = replace(drawn.params, **changes)
        return raises(error, fuse_shared_experts, params, ids, weights)

    assert refused(RangeError, shared_down_proj=None) == (
        "fuse_shared_experts: params must have a shared expert, got None for "
        "shared_gate_up_proj or shared_down_proj."
    )
    assert refused(RangeError, shared_gate_weight=np.ones((1, 5))) == (
        "fuse_shared_experts: params.shared_gate_weight must be None, got an array. A gated "
        "shared expert has a weight of its own for every token, which no route carries."
    )
    odd = {"shared_gate_up_proj": np.ones((6, 5)), "shared_down_proj": np.ones((5, 3))}
    assert refused(RangeError, **odd) == (
        "fuse_shared_experts: the shared expert's size must be a multiple of I = 2, got 3."
    )
    assert refused(ShapeError, shared_gate_up_proj=np.ones((4, 5))) == (
        "fuse_shared_experts: params.shared_gate_up_proj must have shape (2*S, H) = (8, 5), "
        "got (4, 5). S is bound by params.shared_down_proj (5, 4). "
        "H is bound by params.down_proj (3, 5, 2)."
    )
    assert "params.gate_up_proj must have shape (E, 2*I, H)" in refused(
        ShapeError, gate_up_proj=np.ones((3, 5, 4))
    )


def test_bad_routes() -> None:
    drawn = draw()
    ids = drawn.topk_ids.copy()
    ids[1, 1] = 3
    assert raises(PlanError, fuse, replace(drawn, topk_ids=ids)) == (
        "fuse_shared_experts: topk_ids must lie in [-1, 3), got 0 to 3. "
        "Identity experts cannot be fused."
    )
    ids[1, 1] = -2
    assert "must lie in [-1, 3), got -2 to 2" in raises(
        PlanError, fuse, replace(drawn, topk_ids=ids)
    )
    assert "topk_ids must be an integer array" in raises(
        DTypeError, fuse, replace(drawn, topk_ids=ids * 1.0)
    )
    assert "topk_weights must have shape (T, K) = (4, 2), got (4, 1)" in raises(
        ShapeError, fuse, replace(drawn, topk_weights=drawn.topk_weights[:, :1])
    )
    assert "token_mask must have shape (T,) = (4,), got (3,)" in raises(
        ShapeError, fuse, drawn, token_mask=np.ones(3, bool)
    )
    for scale in (0.0, float("inf"), float("nan")):
        assert raises(RangeError, fuse, drawn, later_scale=scale) == (
            f"fuse_shared_experts: later_scale must be finite and not 0, got {scale!r}."
        )


def test_what_cannot_be_taken_apart() -> None:
    fused = fuse(draw(bias=True))
    for n in (0, -1, 5):
        assert raises(RangeError, unfuse_shared_experts, fused, n) == (
            "unfuse_shared_experts: num_shared must be at least 1 and below the 5 experts, "
            f"got {n}."
        )
    text = (
        "unfuse_shared_experts: topk_ids must hold the ids 3 to 4 in the last 2 columns "
        "and nowhere else, or -1."
    )
    swapped, inside = fused.topk_ids[:, [0, 1, 3, 2]], fused.topk_ids.copy()
    inside[0, 0] = 4
    for ids in (swapped, inside, fused.topk_ids[:, 3:]):
        assert raises(PlanError, unfuse_shared_experts, replace(fused, topk_ids=ids), 2) == text
    for name in ("gate_up_bias", "down_bias"):
        bias = getattr(fused.params, name).copy()
        bias[4, 1] = -0.5
        wrong = replace(fused, params=replace(fused.params, **{name: bias}))
        assert raises(RangeError, unfuse_shared_experts, wrong, 2) == (
            f"unfuse_shared_experts: params.{name} must be 0 for the last 2 experts, got 0.5. "
            "A shared expert has no bias."
        )
