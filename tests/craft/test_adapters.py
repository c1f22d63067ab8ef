from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import npmoe
from npmoe import MoEConfig
from npmoe.craft import (
    AdapterBackend,
    ExpertAdapters,
    attach_adapters,
    init_adapters,
    merge_adapters,
    merge_adapters_backward,
    unmerge_adapters,
)
from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.finite_differences import gradcheck
from npmoe.params import init_params
from npmoe.tree import flatten, named_arrays, unflatten

SIZES = {"hidden_size": 5, "intermediate_size": 4, "num_experts": 3, "top_k": 2}
CASES = {
    "swiglu": MoEConfig(**SIZES, renormalize=True),
    "relu2, on the input, biased": MoEConfig(
        **SIZES,
        activation="relu2",
        weight_position="input",
        expert_bias=True,
        router_order="topk_score",
        score_fn="sigmoid",
    ),
    "capacity, shared": MoEConfig(
        **SIZES, capacity_factor="0.7", shared_intermediate_size=3, weight_position="mid"
    ),
}


def layer(cfg, dtype="float64", rank=2, *, integers=False):
    rng = np.random.default_rng(0)
    params = init_params(cfg, 0, dtype)
    adapters = init_adapters(cfg, rank, 1, dtype)
    for _, array in [*named_arrays(adapters), *named_arrays(params)]:
        drawn = rng.integers(-3, 4, array.shape) if integers else rng.standard_normal(array.shape)
        array[...] = drawn
    x = rng.integers(-3, 4, (7, 5)) if integers else rng.standard_normal((7, 5))
    return x.astype(dtype), params, adapters


def test_fresh_adapters_leave_every_bit():
    cfg = CASES["swiglu"]
    params = init_params(cfg, 0)
    adapters = init_adapters(cfg, 3, 0)
    assert [a.shape for _, a in named_arrays(adapters)] == [
        (3, 3, 5),
        (3, 8, 3),
        (3, 3, 4),
        (3, 5, 3),
    ]
    merged = merge_adapters(params, adapters, scale=2.0)
    assert merged.gate_up_proj is not params.gate_up_proj
    np.testing.assert_array_equal(merged.gate_up_proj, params.gate_up_proj)
    np.testing.assert_array_equal(merged.down_proj, params.down_proj)
    x = np.random.default_rng(0).standard_normal((7, 5)).astype("float32")
    plain, _ = npmoe.moe_forward(x, params, cfg, "reference")
    attached, _ = npmoe.moe_forward(
        x, attach_adapters(params, adapters, scale=2.0), cfg, AdapterBackend()
    )
    np.testing.assert_array_equal(plain, attached)


def test_the_spread_of_a_does_not_depend_on_the_fan_in():
    cfg = MoEConfig(hidden_size=400, intermediate_size=100, num_experts=8)
    adapters = init_adapters(cfg, 16, 0)
    assert not adapters.gate_up_b.any()
    assert not adapters.down_b.any()
    for array, size in ((adapters.gate_up_a, 400), (adapters.down_a, 100)):
        deviation = array.std() * np.sqrt(size)
        assert abs(deviation - 1) < 5 / np.sqrt(2 * array.size)


def test_merging_is_the_formula_exactly_on_integers():
    _, params, adapters = layer(CASES["swiglu"], "float32", integers=True)
    merged = merge_adapters(params, adapters, scale=0.5)
    for e in range(3):
        change = adapters.gate_up_b[e] @ adapters.gate_up_a[e] / 2
        np.testing.assert_array_equal(merged.gate_up_proj[e], params.gate_up_proj[e] + change)
        change = adapters.down_b[e] @ adapters.down_a[e] / 2
        np.testing.assert_array_equal(merged.down_proj[e], params.down_proj[e] + change)
    assert merged.router_weight is params.router_weight


@pytest.mark.parametrize("name", CASES)
def test_merged_and_attached_agree(name):
    cfg = CASES[name]
    x, params, adapters = layer(cfg)
    merged = merge_adapters(params, adapters, scale=0.25)
    attached = attach_adapters(params, adapters, scale=0.25)
    one, saved_one = npmoe.moe_forward(x, merged, cfg, "reference")
    other, saved_other = npmoe.moe_forward(x, attached, cfg, AdapterBackend())
    # Rounded differently, so equal up to float64's roundoff times what the layer amplifies.
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-12 * np.abs(one).max())
    assert np.abs(one - npmoe.moe_forward(x, params, cfg)[0]).max() > 0.1
    grad = np.random.default_rng(3).standard_normal(x.shape)
    grads_one = npmoe.moe_backward(grad, saved_one, merged)
    grads_other = npmoe.moe_backward(grad, saved_other, attached)
    for (path, a), (_, b) in zip(named_arrays(grads_one), named_arrays(grads_other), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-11 * np.abs(a).max(), err_msg=path)


def test_merged_and_attached_are_equal_on_integers():
    cfg = MoEConfig(**(SIZES | {"top_k": 1}), activation="relu", renormalize=True)
    x, params, adapters = layer(cfg, "float32", integers=True)
    merged = merge_adapters(params, adapters, scale=2.0)
    attached = attach_adapters(params, adapters, scale=2.0)
    one, saved_one = npmoe.moe_forward(x, merged, cfg, "reference")
    other, saved_other = npmoe.moe_forward(x, attached, cfg, AdapterBackend())
    np.testing.assert_array_equal(one, other)
    assert np.abs(one).max() < 2**24
    grad = np.ones_like(x)
    grads_one = npmoe.moe_backward(grad, saved_one, merged)
    grads_other = npmoe.moe_backward(grad, saved_other, attached)
    np.testing.assert_array_equal(grads_one.hidden_states, grads_other.hidden_states)
    np.testing.assert_array_equal(grads_one.gate_up_proj, grads_other.gate_up_proj)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, attached):
    cfg = CASES[name]
    x, params, adapters = layer(cfg)
    flat, like = flatten(adapters)
    scale = 0.3

    def forward(flat):
        tree = unflatten(flat, like)
        if attached:
            used = attach_adapters(params, tree, scale=scale)
            return used, npmoe.moe_forward(x, used, cfg, AdapterBackend())
        used = merge_adapters(params, tree, scale=scale)
        return used, npmoe.moe_forward(x, used, cfg)

    def f_backward(grad, flat):
        used, (_, saved) = forward(flat)
        grads = npmoe.moe_backward(grad, saved, used)
        return flatten(merge_adapters_backward(grads, unflatten(flat, like), scale=scale))[0]

    report = gradcheck(
        lambda flat: forward(flat)[1][0],
        f_backward,
        (flat,),
        step=1e-4,
        decisions=lambda flat: forward(flat)[1][1].gate_up > 0,  # relu2's second derivative jumps
    )
    assert max(report.elementwise.values()) < 1e-7


def test_the_round_trip_returns_the_base_bitwise():
    _, params, adapters = layer(CASES["swiglu"], "float32")
    before = [a.tobytes() for _, a in named_arrays(params)]
    merged = merge_adapters(params, adapters, scale=0.7)
    back = unmerge_adapters(merged, params, adapters, scale=0.7)
    assert back is params
    assert [a.tobytes() for _, a in named_arrays(back)] == before
    # Subtracting the change would not have given it.
    subtracted = merged.down_proj - (np.float32(0.7) * adapters.down_b) @ adapters.down_a
    assert (subtracted != params.down_proj).any()


def test_unmerging_refuses_what_would_lose_something():
    _, params, adapters = layer(CASES["swiglu"])
    merged = merge_adapters(params, adapters, scale=0.7)
    with pytest.raises(RangeError) as error:
        unmerge_adapters(merged, params, adapters, scale=0.6)
    assert str(error.value) == (
        "unmerge_adapters: merged.gate_up_proj must be what merge_adapters gives for params, "
        "adapters and scale, got other bits. Was it changed after merging? Going back would lose "
        "that."
    )
    merged.down_proj[1, 2, 3] = np.nextafter(merged.down_proj[1, 2, 3], 9)
    with pytest.raises(RangeError, match=r"merged\.down_proj must be"):
        unmerge_adapters(merged, params, adapters, scale=0.7)


def test_half_precision_base():
    cfg = CASES["swiglu"]
    x, params, adapters = layer(cfg, "float32")
    half = replace(
        params,
        gate_up_proj=params.gate_up_proj.astype("float16"),
        down_proj=params.down_proj.astype("float16"),
    )
    merged = merge_adapters(half, adapters, scale=0.5)
    assert merged.gate_up_proj.dtype == np.float32
    widened = replace(
        half,
        gate_up_proj=half.gate_up_proj.astype("float32"),
        down_proj=half.down_proj.astype("float32"),
    )
    again = merge_adapters(widened, adapters, scale=0.5)
    np.testing.assert_array_equal(merged.down_proj, again.down_proj)
    assert unmerge_adapters(merged, half, adapters, scale=0.5) is half
    one, _ = npmoe.moe_forward(x, attach_adapters(half, adapters, scale=0.5), cfg, AdapterBackend())
    other, _ = npmoe.moe_forward(
        x, attach_adapters(widened, adapters, scale=0.5), cfg, AdapterBackend()
    )
    np.testing.assert_array_equal(one, other)


def test_other_backends_refuse_attached_adapters():
    cfg = CASES["swiglu"]
    x, params, adapters = layer(cfg)
    with pytest.raises(TypeError):
        npmoe.moe_forward(x, attach_adapters(params, adapters, scale=1.0), cfg, "reference")
    with pytest.raises(TypeError):
        npmoe.moe_forward(x, attach_adapters(params, adapters, scale=1.0), cfg, "numpy")


def test_messages():
    cfg = CASES["swiglu"]
    _, params, adapters = layer(cfg)
    with pytest.raises(RangeError, match=r"^init_adapters: rank must be at least 1, got 0"):
        init_adapters(cfg, 0)
    with pytest.raises(DTypeError, match=r"dtype must be 'float32' or 'float64', got 'float16'"):
        init_adapters(cfg, 1, dtype="float16")
    with pytest.raises(RangeError, match=r"^merge_adapters: scale must be finite, got inf"):
        merge_adapters(params, adapters, scale=np.inf)
    with pytest.raises(ShapeError) as error:
        merge_adapters(params, replace(adapters, down_b=adapters.down_b[:, :, :1]), scale=1.0)
    assert str(error.value).startswith(
        "merge_adapters: adapters.down_b must have shape (E, H, Rank) = (3, 5, 2), got (3, 5, 1)."
    )
    with pytest.raises(ShapeError, match=r"attach_adapters: adapters\.gate_up_a must have shape"):
        attach_adapters(params, init_adapters(replace(cfg, num_experts=4), 2), scale=1.0)
    single = ExpertAdapters(**{n: a.astype("float32") for n, a in named_arrays(adapters)})
    with pytest.raises(DTypeError) as error:
        merge_adapters(params, single, scale=1.0)
    assert str(error.value).startswith(
        "merge_adapters: adapters.gate_up_a must have dtype float64, got float32. The dtype is "
        "bound by params.gate_up_proj."
    )
    with pytest.raises(DTypeError, match=r"bound by grads\.gate_up_proj"):
        merge_adapters_backward(params, single, scale=1.0)
