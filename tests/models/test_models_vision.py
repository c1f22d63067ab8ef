"""The vision model: its formula, what an image depends on, messages, parameter counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from npmoe import nn
from npmoe.config import MoEConfig
from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.layer import moe_forward
from npmoe.models import (
    VisionConfig,
    init_vision_params,
    vision_forward,
    vision_loss,
)
from npmoe.models.vision import vision_loss_value
from npmoe.params import MoEParams
from npmoe.testing.bounds import assert_within, gamma
from npmoe.tree import map_arrays, named_arrays, num_elements

SIZES = {
    "image_size": 6,
    "channels": 2,
    "num_classes": 5,
    "patch_size": 2,
    "hidden_size": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "dense_intermediate_size": 20,
}
MOE = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=5, top_k=2, renormalize=True)
PER_IMAGE = {"capacity_factor": "0.8", "capacity_scope": "sequence"}
PRIORITY = dataclasses.replace(MOE, **PER_IMAGE, drop_policy="batch_priority")
CHOICE = MoEConfig(
    hidden_size=16,
    intermediate_size=8,
    num_experts=5,
    routing="expert_choice",
    capacity_factor="1",
    capacity_scope="sequence",
)
SOFT = MoEConfig(
    hidden_size=16, intermediate_size=8, num_experts=5, routing="soft", expert_capacity=2
)
NO_BALANCE = {"load_balancing_coefficient": 0.0}
CONFIGS = {
    "pre": VisionConfig(**SIZES, moe=MOE),
    "post": VisionConfig(
        **SIZES, norm="layer", norm_position="post", moe=MOE, moe_last=1, positions="sinusoidal"
    ),
    "priority": VisionConfig(**SIZES, moe=PRIORITY),
    "choice": VisionConfig(**SIZES, **NO_BALANCE, moe=CHOICE),
    "soft": VisionConfig(**SIZES, **NO_BALANCE, z_loss_coefficient=0.0, moe=SOFT),
    "all": VisionConfig(**SIZES, moe=dataclasses.replace(MOE, routing="dense", renormalize=False)),
    "dense": VisionConfig(**SIZES, activation="gelu"),
}
# Roundings on the longest way through the three blocks, as for the language model.
BOUND = gamma(3 * 100 * 64, "float64")


def drawn(cfg, seed=0, batch=3):
    rng = np.random.default_rng(seed)
    params = map_arrays(
        lambda _, a: a + 0.1 * rng.standard_normal(a.shape),
        init_vision_params(cfg, seed, "float64"),
    )
    images = rng.standard_normal((batch, cfg.image_size, cfg.image_size, cfg.channels))
    return params, images, rng.integers(0, cfg.num_classes, batch)


def by_hand(image, params, cfg):
    """Retype the model for one image from its parts, pre- and post-norm."""
    side, size = cfg.image_size, cfg.patch_size
    rows = []
    for y in range(0, side, size):
        for x in range(0, side, size):
            rows.append(params.patch_proj @ image[y : y + size, x : x + size].ravel())
    h = np.array(rows) + params.patch_bias
    grid = side // size
    positions = params.position_embedding
    h = h + (nn.grid_positions(grid, grid, 16, "float64") if positions is None else positions)

    def norm(x, p):
        if p.bias is None:
            return nn.rms_norm(x, p.weight)
        return nn.layer_norm(x, p.weight, p.bias)

    def sublayer(h, p, function):
        if cfg.norm_position == "pre":
            return h + function(norm(h, p))
        return norm(h + function(h), p)

    for b in params.blocks:
        h = sublayer(
            h,
            b.attention_norm,
            lambda x, b=b: nn.multihead_attention(
                x[None], b.attention, 4, 2, causal=False, rope_base=None
            )[0][0],
        )
        if isinstance(b.feed_forward, MoEParams):
            h = sublayer(
                h,
                b.feed_forward_norm,
                lambda x, b=b: moe_forward(x, b.feed_forward, cfg.moe)[0],
            )
        else:
            h = sublayer(
                h,
                b.feed_forward_norm,
                lambda x, b=b: nn.mlp(x, b.feed_forward, cfg.activation)[0],
            )
    if params.final_norm is not None:
        h = norm(h, params.final_norm)
    return params.head @ (h.sum(axis=0) / len(h)) + params.head_bias


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_image_by_itself_equals_the_formula(name):
    """Also: groups are images, so that nothing depends on the others of the batch."""
    cfg = CONFIGS[name]
    params, images, _ = drawn(cfg)
    logits, _ = vision_forward(images, params, cfg)
    want = np.array([by_hand(image, params, cfg) for image in images])
    assert_within(logits, want, BOUND * np.abs(want).max(), "logits")


def test_images_compete_for_rows_where_the_scope_is_the_batch():
    moe = dataclasses.replace(PRIORITY, capacity_scope="batch")
    cfg = dataclasses.replace(CONFIGS["priority"], moe=moe)
    params, images, _ = drawn(cfg)
    together, _ = vision_forward(images, params, cfg)
    alone, _ = vision_forward(images[:1], params, cfg)
    assert np.abs(together[0] - alone[0]).max() > 1e6 * BOUND * np.abs(together).max()


def test_positions_tell_patches_apart():
    for name in ("pre", "post"):
        cfg = CONFIGS[name]
        params, images, _ = drawn(cfg)
        turned = np.ascontiguousarray(images[:, ::-1])
        one, two = (vision_forward(x, params, cfg)[0] for x in (images, turned))
        assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_loss_is_what_its_formula_says(name):
    cfg = CONFIGS[name]
    params, images, labels = drawn(cfg)
    result = vision_loss(images, labels, params, cfg)
    logits, saved = vision_forward(images, params, cfg)
    losses = [
        np.log(np.exp(row - row.max()).sum()) + row.max() - row[label]
        for row, label in zip(logits, labels, strict=True)
    ]
    assert abs(result.cross_entropy - np.mean(losses)) <= gamma(100, "float64") * max(losses)
    auxiliary = 0.0
    for layer in (b.moe for b in saved.blocks if b.moe is not None and b.moe.soft is None):
        probs, chosen = layer.routing.probs, layer.routing.topk_ids
        share = np.bincount(chosen[chosen >= 0], minlength=5) / chosen.size
        log_sum_exp = np.log(np.exp(layer.routing.router_logits).sum(axis=1))
        auxiliary += cfg.load_balancing_coefficient * 5 * float(share @ probs.mean(axis=0))
        auxiliary += cfg.z_loss_coefficient * float((log_sum_exp**2).mean())
    assert abs(result.auxiliary - auxiliary) <= gamma(300, "float64") * max(auxiliary, 1.0)
    assert (auxiliary > 0) == (name not in ("dense", "soft"))
    value, _ = vision_loss_value(images, labels, params, cfg)
    assert value == result.total


@pytest.mark.parametrize("name", list(CONFIGS))
def test_gradients_in_given_arrays_and_scaled_are_the_same(name):
    cfg = CONFIGS[name]
    params, images, labels = drawn(cfg)
    plain = dict(named_arrays(vision_loss(images, labels, params, cfg).grads))
    assert plain.keys() == dict(named_arrays(params)).keys()
    out = map_arrays(lambda _, a: np.full_like(a, np.nan), params)
    given = vision_loss(images, labels, params, cfg, out=out, scale=0.5).grads
    for path, value in named_arrays(given):
        assert np.array_equal(value, 0.5 * plain[path]), path
    routers = [n for n, _ in named_arrays(out) if "router" in n]
    assert len(routers) == cfg.num_moe_layers
    both = dict(named_arrays(out)), dict(named_arrays(given))
    assert all(np.shares_memory(both[0][n], both[1][n]) for n in routers)


def test_dropout_and_noise_need_a_generator_and_repeat_with_its_seed():
    moe = dataclasses.replace(MOE, router_noise_std=0.5)
    cfg = dataclasses.replace(CONFIGS["pre"], dropout=0.2, moe=moe)
    params, images, _ = drawn(cfg)

    def logits(rng):
        return vision_forward(images, params, cfg, rng=rng)[0]

    assert np.array_equal(logits(np.random.default_rng(3)), logits(np.random.default_rng(3)))
    assert not np.array_equal(logits(np.random.default_rng(3)), logits(np.random.default_rng(4)))
    assert np.array_equal(logits(None), vision_forward(images, params, CONFIGS["pre"])[0])


def test_initial_values_depend_on_the_seed_only_and_blocks_have_their_own():
    one, two, other = (
        dict(named_arrays(init_vision_params(CONFIGS["pre"], seed))) for seed in (5, 5, 6)
    )
    assert all(np.array_equal(one[n], two[n]) for n in one)
    for name in ("patch_proj", "position_embedding", "head"):
        assert not np.array_equal(one[name], other[name])
    longer = dataclasses.replace(CONFIGS["pre"], num_layers=4)
    more = dict(named_arrays(init_vision_params(longer, 5)))
    assert np.array_equal(more["blocks.1.attention.qkv_proj"], one["blocks.1.attention.qkv_proj"])


def test_sinusoidal_positions_and_post_norm_have_no_parameters():
    params = init_vision_params(CONFIGS["post"])
    assert params.position_embedding is params.final_norm is None
    kinds = [type(b.feed_forward).__name__ for b in params.blocks]
    assert kinds == ["MLPParams", "MLPParams", "MoEParams"]


def test_the_dense_variant_has_the_same_active_parameters():
    cfg = CONFIGS["pre"]
    dense = cfg.dense_variant()
    sizes = [init_vision_params(c) for c in (cfg, dense)]
    idle = sum(3 * 8 * 16 * 3 for _ in range(3))  # three of five experts in each of three blocks
    extra = num_elements(sizes[1]) - (num_elements(sizes[0]) - idle)
    assert 0 <= extra < 3 * 3 * 16  # less than a column of three matrices in three blocks
    assert dense.moe is None


@pytest.mark.parametrize("name", list(CONFIGS))
def test_configs_survive_a_dictionary(name):
    assert VisionConfig.from_dict(CONFIGS[name].to_dict()) == CONFIGS[name]


def test_an_unknown_field_is_named():
    with pytest.raises(RangeError, match=r"^VisionConfig\.from_dict: values must hold known"):
        VisionConfig.from_dict({**CONFIGS["pre"].to_dict(), "vocab_size": 3})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 0}, "image_size must be an integer of at least 1, got 0"),
        ({"patch_size": 4}, "patch_size must divide image_size = 6, got 4"),
        ({"channels": True}, "channels must be an integer of at least 1, got True"),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
        ({"positions": "rotary"}, "positions must be 'learned' or 'sinusoidal', got 'rotary'"),
        (
            {"positions": "sinusoidal", "hidden_size": 18, "num_heads": 3, "num_kv_heads": 3},
            "hidden_size must be a multiple of 4 with positions='sinusoidal', got 18",
        ),
        ({"moe": dataclasses.replace(MOE, routing="hash")}, "moe.routing must not be 'hash', got"),
        (
            {"moe": CHOICE},
            "load_balancing_coefficient must be 0 with moe.routing='expert_choice', whose experts "
            "are equally full, got 0.01",
        ),
        (
            {"moe": SOFT, **NO_BALANCE},
            "z_loss_coefficient must be 0 with moe.routing='soft', whose logits are bounded, got",
        ),
    ],
)
def test_a_wrong_config_says_what_is_wrong(change, words):
    with pytest.raises(RangeError, match=f"^VisionConfig: {words}"):
        VisionConfig(**{**SIZES, **change})


def test_wrong_images():
    cfg = CONFIGS["pre"]
    params, images, _ = drawn(cfg)
    with pytest.raises(ShapeError) as caught:
        vision_forward(images[:, :4], params, cfg)
    assert str(caught.value) == (
        "vision_forward: images must have shape (B, S, S, C) = (B, 6, 6, 2), got (3, 4, 6, 2). "
        "S and C are bound by cfg. Crop or resize the images, or train a model of their size."
    )
    for wrong in (images[0], images[..., :1]):
        with pytest.raises(ShapeError, match=r"^vision_forward: images must have shape"):
            vision_forward(wrong, params, cfg)
    with pytest.raises(DTypeError, match=r"^vision_forward: images must have dtype float32"):
        vision_forward(images.astype(np.uint8), params, cfg)
    with pytest.raises(DTypeError, match="float64"):
        vision_forward(images.astype("f4"), params, cfg)
    with pytest.raises(RangeError, match=r"cross_entropy: targets must lie in \[0, 5\), got 5"):
        vision_loss(images, np.full(3, 5), params, cfg)
