"""The composed layer: messages, shapes, ownership, and the ways to run it against each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import npmoe
from accel import loopback
from npmoe import MoEConfig, MoEGrads, MoEParams, RangeError
from npmoe.backends import numpy_backend
from npmoe.testing.bounds import gamma
from npmoe.tree import map_arrays, named_arrays

CFG = MoEConfig(
    hidden_size=4,
    intermediate_size=6,
    num_experts=3,
    top_k=2,
    router_bias=True,
    expert_bias=True,
)


def normal(*shape: int, seed: int = 0, dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def params_of(cfg: MoEConfig, dtype: str = "float64") -> MoEParams:
    """Draw parameters whose biases are not zero."""
    params = npmoe.init_params(cfg, rng=1, dtype=dtype)
    rng = np.random.default_rng(2)
    return map_arrays(
        lambda n, a: rng.standard_normal(a.shape).astype(dtype) if n.endswith("bias") else a, params
    )


PARAMS = params_of(CFG)


def arrays(grads: MoEGrads) -> dict[str, np.ndarray]:
    return dict(named_arrays(grads))


def run(
    x: np.ndarray, params: MoEParams, cfg: MoEConfig, backend: Any = "numpy", **arguments: Any
) -> tuple[np.ndarray, MoEGrads, npmoe.SavedTensors]:
    output, saved = npmoe.moe_forward(x, params, cfg, backend, **arguments)
    assert saved is not None
    grad_output = normal(*x.shape, seed=9, dtype=x.dtype)
    return output, npmoe.moe_backward(grad_output, saved, params), saved


# Shapes and ownership.


@pytest.mark.parametrize("lead", [(6,), (2, 3), (1, 2, 3), (6, 1), (0,), (2, 0)])
@pytest.mark.parametrize("backend", ["numpy", "reference"])
def test_leading_axes(lead: tuple[int, ...], backend: str) -> None:
    x = normal(6, 4)[: 6 if np.prod(lead) else 0].reshape(*lead, 4)
    output, grads, saved = run(x, PARAMS, CFG, backend)
    assert output.shape == grads.hidden_states.shape == x.shape
    assert saved.shape == x.shape
    assert saved.routing.sequence_length == (lead[-1])
    assert saved.routing.topk_ids.shape == (x.size // 4, 2)
    flat, flat_grads, _ = run(x.reshape(-1, 4), PARAMS, CFG, backend)
    assert output.tobytes() == flat.tobytes()
    for name, grad in arrays(grads).items():
        assert grad.tobytes() == getattr(flat_grads, name).tobytes()
    if not x.size:
        assert not any(g.any() for g in arrays(grads).values())
        assert grads.gate_up_proj.shape == (3, 12, 4)


def test_mask_and_ids_take_leading_axes() -> None:
    x = normal(2, 3, 4)
    mask = np.array([[True, False, True], [True, True, False]])
    ids = np.array([[[0, 1], [1, 2], [2, 0]], [[1, 0], [0, -1], [2, 1]]])
    output, _, saved = run(x, PARAMS, CFG, token_mask=mask, topk_ids=ids)
    assert (output[~mask] == 0).all()
    assert (output[mask] != 0).all()
    np.testing.assert_array_equal(saved.routing.topk_ids[mask.ravel()], ids[mask])
    assert saved.stats().num_tokens == 4
    assert saved.stats().chosen_per_expert.sum() == 7


def test_capacity_counts_valid_tokens_only() -> None:
    cfg = MoEConfig(hidden_size=4, num_experts=2, top_k=1, capacity_factor=1)
    params = npmoe.init_params(cfg, dtype="float64")
    mask = np.arange(10) < 4
    for backend in ("numpy", "reference"):
        _, saved = npmoe.moe_forward(normal(10, 4), params, cfg, backend, token_mask=mask)
        assert saved is not None
        assert saved.plan.capacity == 2


def test_save_false_gives_the_same_output() -> None:
    x = normal(5, 4)
    output, nothing = npmoe.moe_forward(x, PARAMS, CFG, save=False)
    assert nothing is None
    assert output.tobytes() == npmoe.moe_forward(x, PARAMS, CFG)[0].tobytes()


@pytest.mark.parametrize("backend", ["numpy", "reference", "loopback"])
def test_out_is_written_and_added_to(backend: str) -> None:
    run_on = npmoe.get_backend(backend)
    params = map_arrays(lambda _, a: run_on.asarray(a), PARAMS)
    x, grad_output = run_on.asarray(normal(5, 4)), run_on.asarray(normal(5, 4, seed=3))
    ids = run_on.asarray(np.array([[0, 2], [2, 0], [0, -1], [2, -1], [0, 2]]))  # expert 1 is empty
    _, saved = npmoe.moe_forward(x, params, CFG, run_on, topk_ids=ids)
    assert saved is not None
    fresh = npmoe.moe_backward(grad_output, saved, params)
    start = map_arrays(lambda _, a: normal(*a.shape, seed=11), PARAMS)
    for accumulate, begin in (
        (False, map_arrays(lambda _, a: np.full(a.shape, np.nan), PARAMS)),
        (True, start),
    ):
        out = map_arrays(lambda _, a: run_on.asarray(a.copy()), begin)
        got = npmoe.moe_backward(grad_output, saved, params, out=out, accumulate=accumulate)
        for name, _ in named_arrays(PARAMS):
            value = getattr(got, name)
            assert value is getattr(out, name), name
            plain = run_on.asnumpy(getattr(fresh, name))
            expected = getattr(start, name) + plain if accumulate else plain
            np.testing.assert_array_equal(run_on.asnumpy(value), expected, err_msg=name)
        hidden = run_on.asnumpy(got.hidden_states)
        np.testing.assert_array_equal(hidden, run_on.asnumpy(fresh.hidden_states))
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        assert not run_on.asnumpy(getattr(fresh, name))[1].any()


def test_gradients_may_go_into_gradients() -> None:
    x = normal(5, 4)
    _, first, saved = run(x, PARAMS, CFG)
    hidden = first.hidden_states
    second = npmoe.moe_backward(normal(5, 4, seed=9), saved, PARAMS, out=first, accumulate=True)
    assert second.gate_up_proj is first.gate_up_proj
    assert second.hidden_states is not hidden
    assert isinstance(first.params(), MoEParams)
    assert not isinstance(first.params(), MoEGrads)
    assert first.params().down_proj is first.down_proj


def test_a_none_stays_none() -> None:
    cfg = dataclasses.replace(CFG, router_bias=False, expert_bias=False)
    _, grads, _ = run(normal(5, 4), npmoe.init_params(cfg, dtype="float64"), cfg)
    assert set(arrays(grads)) == {"router_weight", "gate_up_proj", "down_proj", "hidden_states"}


@pytest.mark.parametrize("backend", ["numpy", "reference"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"expert_capacity": 2, "renormalize": True, "renormalize_drop": "after"},
        {"router_order": "topk_score", "expert_capacity": 2, "drop_policy": "probability"},
        {"activation": "gelu", "router_noise_std": 0.5},
        {"activation": "relu", "nan_policy": "drop"},
    ],
    ids=str,
)
def test_inputs_stay_as_they_are(backend: str, fields: dict[str, Any]) -> None:
    cfg = dataclasses.replace(CFG, **fields)
    params = params_of(cfg)
    inputs = {
        **dict(named_arrays(params)),
        "x": normal(7, 4),
        "grad_output": normal(7, 4, seed=1),
        "grad_logits": normal(7, 3, seed=2),
        "mask": np.arange(7) != 2,
        "ids": np.array([[0, 1], [2, 1], [0, 2], [1, -1], [0, 1], [1, 0], [2, 0]]),
    }
    before = {n: a.tobytes() for n, a in inputs.items()}
    for a in inputs.values():
        a.flags.writeable = False
    for ids in (None, inputs["ids"]):
        output, kept = npmoe.moe_forward(
            inputs["x"],
            params,
            cfg,
            backend,
            np.random.default_rng(0),
            token_mask=inputs["mask"],
            topk_ids=ids,
        )
        assert kept is not None
        gate_up = kept.gate_up.tobytes()
        results = [
            npmoe.moe_backward(inputs["grad_output"], kept, params, inputs["grad_logits"])
            for _ in range(2)
        ]
        assert kept.gate_up.tobytes() == gate_up
        for name, grad in arrays(results[0]).items():
            assert grad.tobytes() == getattr(results[1], name).tobytes()
            assert not any(np.shares_memory(grad, a) for a in inputs.values())
        assert not np.shares_memory(output, inputs["x"])
    assert before == {n: a.tobytes() for n, a in inputs.items()}


# One way of running against another.


def test_blocks_of_rows_are_used() -> None:
    assert numpy_backend._BLOCK_ROWS == 512


@pytest.mark.parametrize("activation", ["relu"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("num_tokens", [5, 512, 513, 1300])
@pytest.mark.parametrize("accumulate", [False, True])
def test_fused_equals_composed_on_integers(
    activation: str, dtype: str, num_tokens: int, accumulate: bool
) -> None:
    # The weights are exactly 1: all values are small integers, so no sum is ever rounded.
    cfg = dataclasses.replace(CFG, activation=activation, top_k=1, router_order="topk_score")
    rng = np.random.default_rng(num_tokens)
    params = map_arrays(
        lambda _, a: rng.integers(-1, 2, a.shape).astype(dtype), npmoe.init_params(cfg, dtype=dtype)
    )
    x, grad_output = (rng.integers(-2, 3, (num_tokens, 4)).astype(dtype) for _ in range(2))
    ids = np.where(rng.random((num_tokens, 1)) < 0.95, 2, 0)  # expert 1 is empty
    grads = {}
    for backend in ("numpy", "reference"):
        output, kept = npmoe.moe_forward(x, params, cfg, backend, topk_ids=ids)
        assert kept is not None
        out = map_arrays(lambda _, a: np.full_like(a, 3.0 if accumulate else np.nan), params)
        found = npmoe.moe_backward(grad_output, kept, params, out=out, accumulate=accumulate)
        grads[backend] = {"output": output, "gate_up": kept.gate_up, **arrays(found)}
        if num_tokens > 5:
            assert kept.plan.tokens_per_expert.max() > num_tokens * 0.9
    assert set(grads["numpy"]) == set(grads["reference"])
    for name, value in grads["numpy"].items():
        np.testing.assert_array_equal(value, grads["reference"][name], err_msg=name)
        assert value.dtype == dtype


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fused_agrees_with_composed(activation: str, dtype: str) -> None:
    cfg = dataclasses.replace(CFG, activation=activation)
    params = params_of(cfg, dtype)
    x = normal(1300, 4, dtype=dtype)
    out_a, fused, kept_a = run(x, params, cfg, "numpy")
    out_b, plain, kept_b = run(x, params, cfg, "reference")
    assert kept_a.routing.topk_weights.tobytes() == kept_b.routing.topk_weights.tobytes()
    fused_all = {"output": out_a, "gate_up": kept_a.gate_up, **arrays(fused)}
    plain_all = {"output": out_b, "gate_up": kept_b.gate_up, **arrays(plain)}
    # Every result is a sum of at most n products of values below 2**7, each with < 64 roundings.
    counts = dict.fromkeys(fused_all, 1300) | dict.fromkeys(
        ("output", "gate_up", "hidden_states"), 24
    )
    for name, value in fused_all.items():
        error = np.abs(value - plain_all[name]).max()
        scale = np.abs(plain_all[name]).max()
        assert error <= 2 * gamma(64, dtype) * 2.0**3 * np.sqrt(counts[name]) * max(scale, 1.0), (
            name
        )


LOOPBACK_CONFIGS = [
    {},
    {"renormalize": True},
    {"router_order": "topk_score", "activation": "gelu"},
    {"activation": "relu", "router_noise_std": 0.5},
    {"expert_capacity": 3, "drop_policy": "probability"},
    {"capacity_factor": "0.7", "renormalize": True, "renormalize_drop": "after"},
    {"routed_scaling_factor": 2.5},
    {"nan_policy": "clamp"},
    {"nan_policy": "drop", "capacity_factor": "1"},
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fields", LOOPBACK_CONFIGS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("replayed", [False, True])
def test_loopback_is_the_reference(
    fields: dict[str, Any], dtype: str, masked: bool, replayed: bool
) -> None:
    cfg = dataclasses.replace(CFG, **fields)
    params = params_of(cfg, dtype)
    host = {
        "x": normal(7, 4, dtype=dtype),
        "grad": normal(7, 4, seed=1, dtype=dtype),
        "logits": normal(7, 3, seed=2, dtype=dtype),
        "mask": np.arange(7) % 3 != 1 if masked else None,
        "ids": np.array([[0, 1], [2, 1], [0, 2], [1, -1], [0, 1], [1, 0], [2, 0]])
        if replayed
        else None,
    }
    if cfg.nan_policy != "raise":
        host["x"][3] = np.nan
        if cfg.nan_policy == "clamp":
            host["x"][3] = 0.0
    found = {}
    for name in ("reference", "loopback"):
        backend = npmoe.get_backend(name)
        moved = {n: None if a is None else backend.asarray(a) for n, a in host.items()}
        there = map_arrays(lambda _, a, move=backend.asarray: move(a), params)
        with loopback.verbs_only():
            output, kept = npmoe.moe_forward(
                moved["x"],
                there,
                cfg,
                backend,
                np.random.default_rng(5),
                token_mask=moved["mask"],
                topk_ids=moved["ids"],
            )
            assert kept is not None
            zeros = map_arrays(lambda _, a, move=backend.asarray: move(0 * a), params)
            grads = npmoe.moe_backward(
                moved["grad"], kept, there, moved["logits"], out=zeros, accumulate=True
            )
            stats = kept.stats()
            fields_of = {f.name: getattr(grads, f.name) for f in dataclasses.fields(grads)}
            found[name] = {
                "output": backend.asnumpy(output).tobytes(),
                "ids": backend.asnumpy(kept.routing.topk_ids).tobytes(),
                "stats": str(stats),
                **{n: backend.asnumpy(g).tobytes() for n, g in fields_of.items() if g is not None},
            }
    assert found["loopback"] == found["reference"]


def test_the_backward_uses_the_backend_of_the_forward() -> None:
    backend = npmoe.get_backend("reference")
    _, kept = npmoe.moe_forward(normal(5, 4), PARAMS, CFG, backend)
    assert kept is not None
    assert kept.backend is backend
    with npmoe.use_backend("loopback"):
        grads = npmoe.moe_backward(normal(5, 4), kept, PARAMS)
    assert type(grads.hidden_states) is np.ndarray


@pytest.mark.parametrize("backend", ["numpy", "reference"])
def test_many_experts_few_tokens(backend: str) -> None:
    cfg = MoEConfig(hidden_size=4, intermediate_size=3, num_experts=2048, top_k=1)
    params = npmoe.init_params(cfg, dtype="float64")
    output, grads, kept = run(normal(6, 4), params, cfg, backend)
    used = np.unique(kept.routing.topk_ids)
    empty = np.setdiff1d(np.arange(2048), used)
    assert not grads.gate_up_proj[empty].any()
    assert grads.gate_up_proj[used].any(axis=(1, 2)).all()
    assert output.shape == (6, 4)
    assert (grads.router_weight != 0).all()  # through the softmax


@pytest.mark.parametrize("backend", ["numpy", "reference"])
def test_dropped_routes_contribute_nothing(backend: str) -> None:
    cfg = dataclasses.replace(CFG, expert_capacity=0)
    x = normal(5, 4)
    output, grads, kept = run(x, PARAMS, cfg, backend)
    assert not output.any()
    assert not any(g.any() for g in arrays(grads).values())
    auxiliary = npmoe.moe_backward(x, kept, PARAMS, normal(5, 3))
    assert auxiliary.router_weight.any()
    assert auxiliary.hidden_states.any()
    assert not auxiliary.down_proj.any()


@pytest.mark.parametrize("backend", ["numpy", "reference"])
def test_masked_rows_may_hold_anything(backend: str) -> None:
    x, mask = normal(6, 4), np.array([True, False, True, True, False, True])
    broken = x.copy()
    broken[1], broken[4] = np.nan, np.inf
    grad_output = normal(6, 4, seed=1)
    grad_logits = normal(6, 3, seed=2)
    results = []
    for values in (x, broken):
        output, kept = npmoe.moe_forward(values, PARAMS, CFG, backend, token_mask=mask)
        assert kept is not None
        grads = npmoe.moe_backward(grad_output, kept, PARAMS, grad_logits)
        results.append([a.tobytes() for a in (output, *arrays(grads).values())])
        assert not output[~mask].any()
        assert not grads.hidden_states[~mask].any()
    assert results[0] == results[1]


# The object.


def test_layer_object() -> None:
    layer = npmoe.MoELayer(CFG, rng=4, dtype="float64", backend="reference")
    x = normal(2, 5, 4)
    with pytest.raises(RangeError) as caught:
        layer.backward(x)
    assert str(caught.value) == "MoELayer.backward: a forward pass must come first, got none."
    mask = np.ones((2, 5), bool)
    mask[0, 1] = False
    output = layer(x, token_mask=mask)
    expected, kept = npmoe.moe_forward(x, layer.params, CFG, "reference", token_mask=mask)
    assert kept is not None
    assert output.tobytes() == expected.tobytes()
    logits = normal(10, 3)
    grads = layer.backward(x, logits)
    wanted = npmoe.moe_backward(x, kept, layer.params, logits)
    for name, grad in arrays(grads).items():
        assert grad.tobytes() == getattr(wanted, name).tobytes()
    drawn = npmoe.init_params(CFG, 4, "float64")
    assert layer.params.down_proj.tobytes() == drawn.down_proj.tobytes()
    given = npmoe.MoELayer(CFG, PARAMS)
    assert given.params is PARAMS


def test_layer_object_passes_its_generator_on() -> None:
    cfg = dataclasses.replace(CFG, router_noise_std=1.0)
    layer = npmoe.MoELayer(cfg, PARAMS)
    x = normal(5, 4)
    silent = layer(x)
    noisy = layer(x, rng=np.random.default_rng(0))
    assert silent.tobytes() == npmoe.moe_forward(x, PARAMS, cfg)[0].tobytes()
    again = npmoe.moe_forward(x, PARAMS, cfg, rng=np.random.default_rng(0))[0]
    assert noisy.tobytes() == again.tobytes() != silent.tobytes()
