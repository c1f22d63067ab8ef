"""The language model: incremental equals whole, causality, ties, messages, parameter counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from npmoe import nn
from npmoe.activations import ACTIVATIONS
from npmoe.config import MoEConfig
from npmoe.errors import RangeError, ShapeError, UnsupportedError
from npmoe.models import (
    LanguageConfig,
    VisionConfig,
    host_backend,
    init_language_params,
    language_forward,
    language_loss,
)
from npmoe.models.block import block_backward
from npmoe.models.gradcheck import gradcheck_model, gradcheck_models
from npmoe.models.language import language_loss_value
from npmoe.testing.bounds import assert_within, gamma
from npmoe.tree import map_arrays, named_arrays, num_elements

SIZES = {
    "vocab_size": 13,
    "context_length": 12,
    "hidden_size": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "dense_intermediate_size": 20,
}
MOE = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=5, top_k=2, renormalize=True)
CONFIGS = {
    "pre": LanguageConfig(**SIZES, moe=MOE),
    "post": LanguageConfig(
        **SIZES, norm="layer", norm_position="post", moe=MOE, moe_every=2, tie_embeddings=False
    ),
    "dense": LanguageConfig(**SIZES, activation="gelu"),
}
# Roundings on the longest way through the three blocks of 16 columns: about 100 in a block, each
# passed on with slopes of a few units by norms and products.
BOUND = gamma(3 * 100 * 64, "float64")


def drawn(cfg, seed=0):
    rng = np.random.default_rng(seed)
    params = map_arrays(
        lambda _, a: a + 0.1 * rng.standard_normal(a.shape),
        init_language_params(cfg, seed, "float64"),
    )
    return params, rng.integers(0, cfg.vocab_size, (2, cfg.context_length))


def new_caches(cfg, batch_size):
    return tuple(
        nn.KeyValueCache(
            batch_size=batch_size,
            num_kv_heads=cfg.num_kv_heads,
            capacity=cfg.context_length,
            head_dim=cfg.hidden_size // cfg.num_heads,
            dtype="float64",
        )
        for _ in range(cfg.num_layers)
    )


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 4, 2], [12]])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_pieces_with_a_cache_equal_the_whole(name, pieces):
    cfg = CONFIGS[name]
    params, ids = drawn(cfg)
    whole, _ = language_forward(ids, params, cfg)
    caches = new_caches(cfg, len(ids))
    parts = []
    for piece in np.split(ids, np.cumsum(pieces)[:-1], axis=1):
        parts.append(language_forward(piece, params, cfg, caches=caches)[0])
    found = np.concatenate(parts, axis=1)
    assert_within(found, whole, BOUND * np.abs(whole).max(), "pieces")
    # The bound tells something: without the cache's earlier positions the logits are others.
    alone, _ = language_forward(ids[:, 6:], params, cfg)
    assert np.abs(alone - whole[:, 6:]).max() > 1e6 * BOUND * np.abs(whole).max()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_no_position_sees_a_later_one(name):
    cfg = CONFIGS[name]
    params, ids = drawn(cfg)
    before, _ = language_forward(ids, params, cfg)
    for t in (1, 6, 11):
        changed = ids.copy()
        changed[:, t] = (changed[:, t] + 1) % cfg.vocab_size
        after, _ = language_forward(changed, params, cfg)
        scale = BOUND * np.abs(before).max()
        assert_within(after[:, :t], before[:, :t], scale, "earlier positions")
        assert (np.abs(after[:, t:] - before[:, t:]).max(axis=(0, 2)) > 1e6 * scale).all()


def test_sequences_of_a_batch_do_not_mix():
    cfg = CONFIGS["pre"]
    params, ids = drawn(cfg)
    both, _ = language_forward(ids, params, cfg)
    for row in range(2):
        one, _ = language_forward(ids[row : row + 1], params, cfg)
        assert_within(one[0], both[row], BOUND * np.abs(both).max(), "one sequence")


def test_a_tied_head_is_the_embedding_and_its_gradient_the_sum_of_both():
    tied = CONFIGS["pre"]
    free = dataclasses.replace(tied, tie_embeddings=False)
    params, ids = drawn(tied)
    assert params.head is None
    assert init_language_params(free).head.shape == (13, 16)
    assert not np.array_equal(init_language_params(free).head, init_language_params(free).embedding)
    loose = dataclasses.replace(params, head=params.embedding.copy())
    inputs, targets = ids[:, :-1], ids[:, 1:]
    one = language_loss(inputs, targets, params, tied)
    two = language_loss(inputs, targets, loose, free)
    assert one.total == two.total
    assert two.grads.head is not None
    together = two.grads.embedding + two.grads.head
    assert np.array_equal(one.grads.embedding, together)
    assert np.abs(two.grads.head).max() > 0
    assert num_elements(loose) == num_elements(params) + 13 * 16


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_loss_is_what_its_formula_says(name):
    cfg = CONFIGS[name]
    params, ids = drawn(cfg)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    result = language_loss(inputs, targets, params, cfg)
    logits, saved = language_forward(inputs, params, cfg)
    losses = []
    for row, wanted in zip(logits.reshape(-1, 13), targets.ravel(), strict=True):
        losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[wanted])
    want = float(np.mean(losses))
    assert abs(result.cross_entropy - want) <= gamma(100, "float64") * max(losses)
    auxiliary = 0.0
    for layer in (b.moe for b in saved.blocks if b.moe is not None):
        probs, chosen = layer.routing.probs, layer.routing.topk_ids
        share = np.bincount(chosen.ravel(), minlength=5) / chosen.size
        log_sum_exp = np.log(np.exp(layer.routing.router_logits).sum(axis=1))
        auxiliary += 0.01 * 5 * float(share @ probs.mean(axis=0))
        auxiliary += 0.001 * float((log_sum_exp**2).mean())
    assert abs(result.auxiliary - auxiliary) <= gamma(300, "float64") * max(auxiliary, 1.0)
    assert (auxiliary > 0) == (cfg.moe is not None)
    value, _ = language_loss_value(inputs, targets, params, cfg)
    assert value == result.total


@pytest.mark.parametrize("name", list(CONFIGS))
def test_gradients_in_given_arrays_and_scaled_are_the_same(name):
    cfg = CONFIGS[name]
    params, ids = drawn(cfg)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    plain = dict(named_arrays(language_loss(inputs, targets, params, cfg).grads))
    out = map_arrays(lambda _, a: np.full_like(a, np.nan), params)
    given = language_loss(inputs, targets, params, cfg, out=out, scale=0.5).grads
    for path, value in named_arrays(given):
        # A power of two scales without rounding, all the way through.
        assert np.array_equal(value, 0.5 * plain[path]), path
    moe = [n for n, _ in named_arrays(out) if "router" in n]
    assert len(moe) == cfg.num_moe_layers
    assert all(
        np.shares_memory(dict(named_arrays(out))[n], dict(named_arrays(given))[n]) for n in moe
    )


def test_dropout_and_noise_need_a_generator_and_repeat_with_its_seed():
    cfg = dataclasses.replace(
        CONFIGS["pre"], dropout=0.2, moe=dataclasses.replace(MOE, router_noise_std=0.5)
    )
    params, ids = drawn(cfg)

    def logits(rng):
        return language_forward(ids, params, cfg, rng=rng)[0]

    assert np.array_equal(logits(np.random.default_rng(3)), logits(np.random.default_rng(3)))
    assert not np.array_equal(logits(np.random.default_rng(3)), logits(np.random.default_rng(4)))
    assert np.array_equal(logits(None), language_forward(ids, params, CONFIGS["pre"])[0])


def test_initial_values_depend_on_the_seed_only_and_blocks_have_their_own():
    one, two = (dict(named_arrays(init_language_params(CONFIGS["pre"], 5))) for _ in range(2))
    other = dict(named_arrays(init_language_params(CONFIGS["pre"], 6)))
    assert all(np.array_equal(one[n], two[n]) for n in one)
    assert not np.array_equal(one["embedding"], other["embedding"])
    longer = dataclasses.replace(CONFIGS["pre"], num_layers=4)
    more = dict(named_arrays(init_language_params(longer, 5)))
    assert np.array_equal(more["blocks.1.attention.qkv_proj"], one["blocks.1.attention.qkv_proj"])
    assert not np.array_equal(
        one["blocks.0.attention.qkv_proj"], one["blocks.1.attention.qkv_proj"]
    )


def test_every_nth_block_has_the_experts():
    cfg = dataclasses.replace(CONFIGS["post"], num_layers=5, moe_every=2)
    kinds = [type(b.feed_forward).__name__ for b in init_language_params(cfg).blocks]
    assert kinds == ["MLPParams", "MoEParams", "MLPParams", "MoEParams", "MLPParams"]
    assert cfg.num_moe_layers == 2


def test_a_dense_variant_has_no_limit_of_its_own() -> None:
    moe = dataclasses.replace(MOE, activation="swiglu_clamp_pre", activation_limit=3.0)
    with pytest.raises(UnsupportedError) as caught:
        LanguageConfig(**SIZES, moe=moe).dense_variant()
    assert str(caught.value) == (
        "dense_variant: moe.activation_alpha and moe.activation_limit must be None, got None and "
        "3.0. The dense sublayer has the published values."
    )


def test_a_dense_variant_has_no_mixture_of_widths() -> None:
    with pytest.raises(UnsupportedError) as caught:
        LanguageConfig(**SIZES, moe=MOE, moe_last=1).dense_variant()
    assert str(caught.value) == (
        "dense_variant: every block must have experts, got moe_every = 1 and moe_last = 1. "
        "All dense blocks have one width."
    )


@pytest.mark.parametrize(
    ("every", "last", "places"),
    [(1, 0, [0, 1, 2, 3, 4]), (2, 0, [1, 3]), (2, 1, [3]), (1, 2, [3, 4]), (3, 1, [2])],
)
def test_the_experts_may_be_in_the_last_blocks_only(every, last, places):
    sizes = {**SIZES, "num_layers": 5}
    cfg = LanguageConfig(**sizes, moe=MOE, moe_every=every, moe_last=last)
    assert [layer for layer in range(5) if cfg.is_moe_layer(layer)] == places
    kinds = [type(b.feed_forward).__name__ for b in init_language_params(cfg).blocks]
    assert [n for n, kind in enumerate(kinds) if kind == "MoEParams"] == places
    assert cfg.num_moe_layers == len(places)


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize(
    ("activation", "expert_bias", "router_bias"),
    [("swiglu", False, False), ("gelu", False, True), ("relu", True, True), ("swiglu", True, True)],
)
def test_the_dense_variant_has_the_same_active_parameters(
    num_experts, activation, expert_bias, router_bias, shared
):
    """Counted in the real arrays: K experts, the shared one, the router; at most a column more."""
    moe = MoEConfig(
        hidden_size=16,
        intermediate_size=8,
        num_experts=num_experts,
        top_k=min(2, num_experts),
        activation=activation,
        expert_bias=expert_bias,
        router_bias=router_bias,
        shared_intermediate_size=shared,
        shared_gated=shared > 0,
        output_bias=shared > 0,
    )
    cfg = LanguageConfig(**SIZES, moe=moe)
    dense = cfg.dense_variant()
    assert dense.moe is None
    assert dense.dense_variant() is dense
    sparse_block = init_language_params(cfg).blocks[0].feed_forward
    dense_block = init_language_params(dense).blocks[0].feed_forward
    active = 0
    for name, array in named_arrays(sparse_block):
        every_token = name.startswith(("router", "shared", "output"))
        active += array.size if every_token else moe.top_k * array[0].size
    full = num_elements(dense_block)
    matrices = 3 if activation == "swiglu" else 2
    column = matrices * cfg.hidden_size
    assert 0 <= full - active < column
    assert dense_block.down_proj.shape[1] * column == full
    same = {f.name for f in dataclasses.fields(cfg)} - {"moe", "moe_every"}
    same -= {"dense_intermediate_size", "activation"}
    assert all(getattr(cfg, name) == getattr(dense, name) for name in same)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ({"num_layers": True}, "num_layers must be an integer of at least 1, got True"),
        ({"hidden_size": 16.0}, "hidden_size must be an integer of at least 1, got 16.0"),
        ({"norm": "batch"}, "norm must be 'rms' or 'layer', got 'batch'"),
        ({"norm_position": "mid"}, "norm_position must be 'pre' or 'post', got 'mid'"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": float("nan")}, "dropout must lie"),
        ({"rope_base": 1.0}, "rope_base must be above 1, got 1.0"),
        ({"z_loss_coefficient": -1.0}, "z_loss_coefficient must be finite and >= 0, got -1.0"),
        ({"load_balancing_coefficient": float("inf")}, "must be finite and >= 0, got inf"),
        (
            {"num_heads": 5, "num_kv_heads": 5},
            "hidden_size must be a multiple of 2 .* = 10, got 16",
        ),
        ({"num_heads": 16, "num_kv_heads": 1}, "multiple of 2 .* = 32, got 16"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads = 3, got 4"),
        (
            {"activation": "swish"},
            f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got 'swish'",
        ),
        (
            {"moe": dataclasses.replace(MOE, routing="expert_choice", expert_capacity=1)},
            "moe.routing must be 'token_choice' or 'dense', got 'expert_choice'. A language model "
            "must not see later tokens, and has no table of ids.",
        ),
        ({"moe_every": 2}, "moe_every must stay 1 without moe, got 2"),
        ({"moe": MOE, "moe_every": 4}, "moe_every must be at most num_layers = 3, got 4"),
        ({"moe_last": 1}, "moe_last must stay 0 without moe, got 1"),
        ({"moe": MOE, "moe_last": -1}, "moe_last must be an integer of at least 0, got -1"),
        (
            {"moe": MOE, "moe_every": 2, "moe_last": 2},
            "moe_last must be at most num_layers // moe_every = 1, got 2",
        ),
        ({"moe": MOE, "hidden_size": 32}, "moe.hidden_size must equal hidden_size = 32, got 16"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(change, words):
    with pytest.raises(RangeError, match=f"^LanguageConfig: .*{words}"):
        LanguageConfig(**{**SIZES, **change})


@pytest.mark.parametrize("name", list(CONFIGS))
def test_configs_survive_a_dictionary(name):
    cfg = dataclasses.replace(CONFIGS[name], dropout=0.25)
    assert LanguageConfig.from_dict(cfg.to_dict()) == cfg


def test_an_unknown_field_is_named():
    values = {**CONFIGS["pre"].to_dict(), "depth": 3}
    with pytest.raises(RangeError, match=r"got depth\. Was it written by another version\?"):
        LanguageConfig.from_dict(values)


def test_wrong_inputs_of_the_forward_pass():
    cfg = CONFIGS["pre"]
    params, ids = drawn(cfg)
    with pytest.raises(ShapeError, match=r"ids must have shape \(B, L\), got \(12,\)"):
        language_forward(ids[0], params, cfg)
    with pytest.raises(RangeError, match="at most context_length = 12 columns, got 24"):
        language_forward(np.tile(ids, 2), params, cfg)
    with pytest.raises(RangeError, match="13"):
        language_forward(np.full((1, 2), 13), params, cfg)
    with pytest.raises(RangeError, match="moe must be a config for a block with MoE parameters"):
        language_forward(ids, params, cfg.dense_variant())


def test_only_host_backends_run_the_model():
    assert host_backend("f", "reference").name == "reference"
    with pytest.raises(UnsupportedError, match=r"^f: backend must work on host arrays, got 'loop"):
        host_backend("f", "loopback")


@pytest.mark.parametrize(("name", "value"), [("directions", 0), ("seed", -1)])
def test_a_gradcheck_of_nothing_is_refused(name, value):
    cfg = next(iter(gradcheck_models().values()))
    with pytest.raises(RangeError, match=f"^gradcheck: {name} must be at least {value + 1}, got"):
        gradcheck_model(cfg, **{name: value})


def test_the_gradcheck_models_cover_every_choice():
    models = list(gradcheck_models().values())
    configs = [c for c in models if isinstance(c, LanguageConfig)]
    moes = [c.moe for c in configs]
    assert {c.norm for c in configs} == {"rms", "layer"}
    assert {c.norm_position for c in configs} == {"pre", "post"}
    assert {c.tie_embeddings for c in configs} == {True, False}
    assert {m.activation for m in moes} == {"swiglu", "gelu", "relu"}
    assert {m.router_order for m in moes} == {"score_topk", "topk_score"}
    assert {m.renormalize_drop for m in moes} == {"before", "after"}
    assert {m.drop_policy for m in moes} == {"position", "probability"}
    assert {m.expert_bias for m in moes} == {m.router_bias for m in moes} == {True, False}
    vision = [c for c in models if isinstance(c, VisionConfig)]
    assert {c.positions for c in vision} == {"learned", "sinusoidal"}
    assert {c.norm_position for c in vision} == {"pre", "post"}
    assert {c.moe.routing for c in vision} == {"token_choice", "expert_choice", "soft"}
    assert {c.moe_last for c in vision} == {0, 1}


def test_a_backward_refuses_what_another_kind_of_block_saved():
    ids = np.zeros((1, 4), np.int32)
    moe, dense = CONFIGS["pre"], CONFIGS["dense"]
    params = init_language_params(dense)
    _, saved = language_forward(ids, params, dense)
    other = init_language_params(moe).blocks[0]
    with pytest.raises(RangeError, match="block_backward: saved must come from a block with these"):
        block_backward(np.ones((1, 4, 16), "float32"), saved.blocks[0], other, moe)
