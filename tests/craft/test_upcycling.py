from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import npmoe
from npmoe import MoEConfig
from npmoe.activations import ACTIVATIONS, bind_activation
from npmoe.craft import upcycle_mlp, upcycle_model
from npmoe.errors import RangeError, ShapeError, UnsupportedError
from npmoe.models import (
    LanguageConfig,
    VisionConfig,
    init_language_params,
    init_vision_params,
    language_forward,
    language_loss,
    vision_forward,
)
from npmoe.nn import MLPParams, init_mlp_params, mlp
from npmoe.params import MoEParams
from npmoe.testing.bounds import assert_within, gamma
from npmoe.tree import named_arrays

H, I = 6, 8


def dense(activation, dtype="float64", *, bias=False, integers=False):
    rng = np.random.default_rng(0)
    params = init_mlp_params(H, I, activation, rng, dtype, bias=bias)
    for _, array in named_arrays(params):
        if integers:
            array[...] = rng.integers(-3, 4, array.shape)
        elif array.ndim == 1:
            array[...] = rng.standard_normal(array.shape)
    x = rng.integers(-3, 4, (9, H)) if integers else rng.standard_normal((9, H))
    return x.astype(dtype), params


def config(shards, **options):
    return MoEConfig(
        **{
            "hidden_size": H,
            "intermediate_size": I // shards,
            "num_experts": 8,
            "top_k": shards,
            "renormalize": True,
            **options,
        }
    )


def size_of_terms(x, params, activation):
    """Return the output of absolute values: what the rounding errors are relative to."""
    _, pre = mlp(x, params, activation)
    act = np.abs(bind_activation(activation).forward(pre))
    terms = np.abs(x) @ np.abs(params.gate_up_proj).T
    terms = terms.reshape(len(x), -1, I).sum(axis=1) * (1 + np.abs(pre).max())
    return (act + terms) @ np.abs(params.down_proj).T + 1


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("shards", "top_k"), [(1, 1), (1, 3), (2, 2), (2, 4), (4, 8), (8, 8)])
def test_the_function_is_preserved_for_every_activation(activation, bias, shards, top_k):
    x, params = dense(activation, bias=bias)
    cfg = config(shards, top_k=top_k, activation=activation, expert_bias=bias)
    want, _ = mlp(x, params, activation)
    got, saved = npmoe.moe_forward(x, upcycle_mlp(params, cfg, 3), cfg)
    bound = gamma(8 * (H + I + top_k + 20), "f8") * size_of_terms(x, params, activation)
    assert_within(got, want, bound, "upcycle_mlp")
    assert bound.max() < 1e-9 * np.abs(want).max()
    # Whole groups are chosen: every shard equally often.
    ids = saved.routing.topk_ids
    shard_counts = [np.bincount(row % shards, minlength=shards).tolist() for row in ids]
    assert shard_counts == [[top_k // shards] * shards] * len(ids)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("scaling", [1.0, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_function_is_preserved_exactly_on_integers(shards, scaling, bias, dtype):
    x, params = dense("relu", dtype, bias=bias, integers=True)
    cfg = config(shards, routed_scaling_factor=scaling, activation="relu", expert_bias=bias)
    if bias:
        params.down_bias[...] *= 2  # halved exactly by the scaling
    want, _ = mlp(x, params, "relu")
    got, _ = npmoe.moe_forward(x, upcycle_mlp(params, cfg, 3), cfg)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == dtype


@pytest.mark.parametrize(
    "options",
    [
        {"renormalize": False, "router_order": "topk_score"},
        {"renormalize": False, "routing": "dense", "num_experts": 4},
        {"score_fn": "sigmoid", "routed_scaling_factor": 2.5},
        {"selection_bias": True, "score_fn": "sigmoid"},
        {"num_groups": 4, "topk_group": 2, "top_k": 4, "group_score": "max"},
        {"weight_position": "mid", "output_bias": True, "router_bias": True},
        {"capacity_factor": "4", "renormalize_drop": "after"},
    ],
)
def test_other_routers_with_weights_of_constant_sum(options):
    x, params = dense("swiglu")
    cfg = config(2, **options)
    want, _ = mlp(x, params, "swiglu")
    got, _ = npmoe.moe_forward(x, upcycle_mlp(params, cfg), cfg)
    bound = gamma(8 * (H + I + 28), "f8") * size_of_terms(x, params, "swiglu")
    assert_within(got, want, bound, "upcycle_mlp")


def test_experts_are_copies_of_shards_and_own_their_memory():
    _, params = dense("swiglu", "float32")
    moe = upcycle_mlp(params, config(2))
    for e in range(8):
        rows = slice(4 * (e % 2), 4 * (e % 2) + 4)
        np.testing.assert_array_equal(moe.gate_up_proj[e, :4], params.gate_up_proj[:I][rows])
        np.testing.assert_array_equal(moe.gate_up_proj[e, 4:], params.gate_up_proj[I:][rows])
        np.testing.assert_array_equal(moe.down_proj[e], 2 * params.down_proj[:, rows])
    assert len(np.unique(moe.router_weight, axis=0)) == 4
    np.testing.assert_array_equal(moe.router_weight[0::2], moe.router_weight[1::2])
    assert all(not np.shares_memory(a, params.down_proj) for _, a in named_arrays(moe))
    again = upcycle_mlp(params, config(2))
    assert all(
        a.tobytes() == b.tobytes()
        for (_, a), (_, b) in zip(named_arrays(moe), named_arrays(again), strict=True)
    )


def language(**options):
    cfg = LanguageConfig(
        **{
            "vocab_size": 11,
            "context_length": 6,
            "hidden_size": 8,
            "num_layers": 3,
            "num_heads": 2,
            "num_kv_heads": 2,
            "dense_intermediate_size": 12,
            **options,
        }
    )
    return init_language_params(cfg, 0, "float64"), cfg


MOE = MoEConfig(hidden_size=8, intermediate_size=6, num_experts=6, top_k=2, renormalize=True)


@pytest.mark.parametrize(
    ("which", "layers"), [({}, [0, 1, 2]), ({"moe_every": 2}, [1]), ({"moe_last": 2}, [1, 2])]
)
def test_a_language_model_is_preserved(which, layers):
    params, cfg = language()
    ids = np.random.default_rng(0).integers(0, 11, (2, 6))
    want, _ = language_forward(ids, params, cfg)
    sparse, sparse_cfg = upcycle_model(params, cfg, MOE, **which)
    kinds = [isinstance(b.feed_forward, MoEParams) for b in sparse.blocks]
    assert [i for i, moe in enumerate(kinds) if moe] == layers
    got, saved = language_forward(ids, sparse, sparse_cfg)
    assert len(saved.load_stats()) == len(layers)
    # A hundred roundings per layer, amplified by norms of hidden states near 1.
    np.testing.assert_allclose(got, want, rtol=0, atol=gamma(1000, "f8") * np.abs(want).max())
    assert sparse.embedding is params.embedding


def test_routers_of_two_layers_differ_and_training_can_go_on():
    params, cfg = language()
    sparse, sparse_cfg = upcycle_model(params, cfg, MOE, rng=5)
    routers = [b.feed_forward.router_weight for b in sparse.blocks]
    assert (routers[0] != routers[1]).all()
    ids = np.random.default_rng(0).integers(0, 11, (2, 7))
    result = language_loss(ids[:, :-1], ids[:, 1:], sparse, sparse_cfg)
    for block in result.grads.blocks:
        assert np.abs(block.feed_forward.down_proj).max() > 0


def test_a_vision_model_is_preserved():
    cfg = VisionConfig(
        image_size=4,
        patch_size=2,
        channels=1,
        num_classes=3,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        dense_intermediate_size=12,
    )
    params = init_vision_params(cfg, 0, "float64")
    images = np.random.default_rng(0).standard_normal((3, 4, 4, 1))
    want, _ = vision_forward(images, params, cfg)
    got, _ = vision_forward(images, *upcycle_model(params, cfg, MOE))
    np.testing.assert_allclose(got, want, rtol=0, atol=gamma(1000, "f8") * np.abs(want).max())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"renormalize": False}, UnsupportedError, "sum to a constant, got renormalize=False"),
        ({"renorm_eps": 1e-6}, UnsupportedError, "renorm_eps=1e-06"),
        ({"renorm_p": 2}, UnsupportedError, "renorm_p=2"),
        (
            {"top_k": 1, "intermediate_size": 8, "renorm_single": False},
            UnsupportedError,
            "sum to a constant",
        ),
        ({"second_expert_policy": "sampling"}, UnsupportedError, "cfg.second_expert_policy must"),
        ({"num_identity_experts": 2}, UnsupportedError, "cfg.num_identity_experts must leave"),
        ({"shared_intermediate_size": 2}, UnsupportedError, "cfg.shared_intermediate_size must"),
        (
            {"weight_position": "input"},
            UnsupportedError,
            "cfg.weight_position must leave the dense function as it is, got 'input'",
        ),
        (
            {"activation": "swiglu_oai", "activation_limit": 3.0},
            UnsupportedError,
            "cfg.activation_limit must",
        ),
        (
            {"hidden_size": 4},
            ShapeError,
            r"params.down_proj must have shape .* H = 4, got \(6, 8\)",
        ),
        ({"activation": "relu"}, ShapeError, "must have 8 rows for cfg.activation 'relu'"),
        ({"intermediate_size": 3}, RangeError, "cfg.intermediate_size must divide I = 8"),
        (
            {"num_experts": 7},
            RangeError,
            "cfg.num_experts must be a multiple of the 2 shards .*, got 7",
        ),
        ({"top_k": 3}, RangeError, "cfg.top_k must be a multiple of the 2 shards .*, got 3"),
    ],
)
def test_messages(options, error, words):
    _, params = dense("swiglu")
    with pytest.raises(error, match=words) as raised:
        upcycle_mlp(params, config(2, **options))
    assert str(raised.value).startswith("upcycle_mlp: ")


def test_other_messages():
    _, params = dense("swiglu", bias=True)
    with pytest.raises(RangeError, match=r"cfg.expert_bias must be True for a dense sublayer with"):
        upcycle_mlp(params, config(2))
    only_up = MLPParams(gate_up_proj=params.gate_up_proj, down_proj=params.down_proj)
    assert not upcycle_mlp(only_up, config(2, expert_bias=True)).down_bias.any()
    model, cfg = language()
    sparse, sparse_cfg = upcycle_model(model, cfg, MOE)
    with pytest.raises(RangeError, match=r"^upcycle_model: cfg\.moe must be None, got a config"):
        upcycle_model(sparse, sparse_cfg, MOE)
    with pytest.raises(
        RangeError, match=r"moe.activation must be that of the dense model, 'swiglu', got 'relu'"
    ):
        upcycle_model(model, cfg, replace(MOE, activation="relu"))
