"""Every option of the layer, in drawn combinations, against finite differences in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from npmoe import GradientError, MoEConfig
from npmoe._config_rules import LITERALS
from npmoe.layer_gradcheck import gradcheck_layer, gradcheck_layers
from npmoe.testing.strategies import moe_configs

TOLERANCE = 1e-7
LAYERS = gradcheck_layers()


@pytest.mark.parametrize("backend", ["numpy", "reference"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("title", LAYERS)
def test_the_table(title: str, masked: bool, backend: str) -> None:
    errors = gradcheck_layer(LAYERS[title], seed=1, directions=1, backend=backend, masked=masked)
    assert max(errors.values()) <= TOLERANCE, errors


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    moe_configs(nan_policy="raise"),
    st.integers(0, 10**6),
    st.booleans(),
    st.sampled_from(["numpy", "reference"]),
)
def test_drawn_configs(cfg: MoEConfig, seed: int, masked: bool, backend: str) -> None:
    # In one dimension the unit vectors of soft routing do not move: differences see rounding.
    assume(cfg.router_dtype != "float32" and not (cfg.routing == "soft" and cfg.hidden_size == 1))
    try:
        errors = gradcheck_layer(cfg, seed=seed, directions=1, backend=backend, masked=masked)
    except GradientError as error:
        assume("boundary" not in str(error))  # tied choices stay tied at every step
        raise
    assert all(e <= TOLERANCE for e in errors.values()), errors


def test_the_table_holds_every_kind_of_path() -> None:
    """Each routing, score function, weight position and normalisation is in the table."""
    for name in ("routing", "score_fn", "router_order", "weight_position", "renorm_p"):
        found = {getattr(cfg, name) for cfg in LAYERS.values()}
        assert found | {"hash"} >= set(LITERALS[name]) | {"hash"}, name
    changed = {
        f.name
        for f in dataclasses.fields(MoEConfig)
        for cfg in LAYERS.values()
        if getattr(cfg, f.name) != f.default
    }
    # What has no gradient of its own: choices, roundings, what happens to broken rows.
    without = {
        *("renorm_single", "selection_bias_on", "group_score", "group_fill", "router_dtype"),
        *("nan_policy", "activation_alpha", "eval_capacity_factor", "capacity_scope"),
        *("capacity_rounding", "capacity_count_top_k", "min_capacity", "capacity_multiple"),
        "slot_order",
    }
    assert changed | without == {f.name for f in dataclasses.fields(MoEConfig)}


def test_hash_routing() -> None:
    cfg = MoEConfig(
        hidden_size=5, intermediate_size=4, num_experts=6, routing="hash", renormalize=True
    )
    assert max(gradcheck_layer(cfg).values()) <= TOLERANCE


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = LAYERS["expert choice"]
    from npmoe.backends import NumpyBackend

    right = NumpyBackend.route_backward
    monkeypatch.setattr(
        NumpyBackend, "route_backward", staticmethod(lambda *a: 1.0001 * np.asarray(right(*a)))
    )
    assert gradcheck_layer(cfg)["router_weight"] > TOLERANCE
