"""MoEConfig: every message, the JSON round trip, and what it gives back."""

from __future__ import annotations

import dataclasses
import json
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from npmoe import MoEConfig, RangeError
from npmoe.activations import ACTIVATIONS

FACTOR = "capacity_factor"


def config_of(**fields: Any) -> MoEConfig:
    return MoEConfig(**fields)


def message(**fields: Any) -> str:
    with pytest.raises(RangeError) as caught:
        config_of(**fields)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("hidden_size", "intermediate_size", "num_experts", "top_k", "capacity_multiple"),
        *("num_groups", "topk_group"),
    ],
)
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "4", None, np.int64(4)])
def test_sizes_are_positive_integers(name: str, value: object) -> None:
    expected = f"MoEConfig: {name} must be an integer of at least 1, got {value!r}."
    assert message(**{FACTOR: 1, name: value}) == expected


@pytest.mark.parametrize("value", [-1, 1.0, False, "0"])
def test_bounds_of_the_capacity_are_not_negative(value: object) -> None:
    tail = f"must be an integer of at least 0, got {value!r}."
    assert message(capacity_factor=1, min_capacity=value) == f"MoEConfig: min_capacity {tail}"
    for name in ("expert_capacity", "num_identity_experts", "shared_intermediate_size"):
        assert message(**{name: value}) == f"MoEConfig: {name} {tail}"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("routing", "'token_choice', 'expert_choice', 'soft', 'dense', 'hash'"),
        ("score_fn", "'softmax', 'sigmoid', 'sqrtsoftplus'"),
        ("router_order", "'score_topk', 'topk_score'"),
        ("renorm_eps_mode", "'add', 'max'"),
        ("selection_bias_on", "'scores', 'logits'"),
        ("group_score", "'max', 'top2_sum', 'topk_div'"),
        ("group_fill", "'-inf', 'zero'"),
        ("second_expert_policy", "'all', 'sampling', 'random'"),
        ("nan_policy", "'raise', 'clamp', 'drop'"),
        ("weight_position", "'output', 'mid', 'input'"),
        ("activation", ", ".join(map(repr, ACTIVATIONS))),
        ("shared_combine", "'sum', 'average'"),
        ("capacity_scope", "'batch', 'sequence'"),
        (
            "capacity_rounding",
            "'ceil', 'floor', 'round', 'tutel', 'megatron_f64', 'deepspeed_f32'",
        ),
        (
            "drop_policy",
            "'position', 'k_major', 'batch_priority', 'probability', 'random'",
        ),
        ("slot_order", "'priority', 'token'"),
        ("renormalize_drop", "'before', 'after'"),
    ],
)
@pytest.mark.parametrize("value", ["none", None, ["ceil"], 1])
def test_words_come_from_a_list(name: str, allowed: str, value: object) -> None:
    expected = f"MoEConfig: {name} must be one of {allowed}, got {value!r}."
    assert message(**{name: value}) == expected


def test_words_and_numbers_that_may_be_missing() -> None:
    words = ", ".join(map(repr, ACTIVATIONS))
    for name, allowed in (
        ("router_dtype", "None, 'float32', 'float64'"),
        ("shared_activation", f"None, {words}"),
        ("renorm_p", "1, 2"),
    ):
        for value in ("none", 3, True):
            expected = f"MoEConfig: {name} must be one of {allowed}, got {value!r}."
            assert message(**{name: value}) == expected


SWITCHES = (
    *("renormalize", "renorm_single", "selection_bias", "router_bias", "expert_bias"),
    *("output_bias", "shared_gated", "capacity_count_top_k"),
)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [1, 0, None, "True"])
def test_switches_are_bools(name: str, value: object) -> None:
    assert message(**{name: value}) == f"MoEConfig: {name} must be True or False, got {value!r}."


def test_every_bool_field_is_among_the_switches() -> None:
    names = {f.name for f in dataclasses.fields(MoEConfig) if isinstance(f.default, bool)}
    assert names == set(SWITCHES)


@pytest.mark.parametrize("name", ["capacity_factor", "eval_capacity_factor"])
@pytest.mark.parametrize(
    "value",
    [
        *(0, -1.5, "0", "x", "1/0", "", float("nan"), float("inf"), True, [1]),
        *(Decimal("Infinity"), "1e999999999", "1E-999999999"),
    ],
)
def test_factors_are_positive_numbers(name: str, value: object) -> None:
    expected = (
        f"MoEConfig: {name} must be a positive number such as '1.25', got {value!r}. "
        "None means dropless."
    )
    assert message(**{FACTOR: 1, name: value}) == expected


@pytest.mark.parametrize("name", ["router_noise_std", "renorm_eps"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_noise_and_eps_are_finite_and_not_negative(name: str, value: object) -> None:
    expected = f"MoEConfig: {name} must be finite and not negative, got {value!r}."
    assert message(**{name: value}) == expected


@pytest.mark.parametrize("name", ["router_jitter", "expert_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1, float("nan"), "0.1", None, True])
def test_jitter_and_dropout_are_below_one(name: str, value: object) -> None:
    assert message(**{name: value}) == f"MoEConfig: {name} must lie in [0, 1), got {value!r}."


@pytest.mark.parametrize(
    "name", ["routed_scaling_factor", "logit_softcap", "activation_alpha", "activation_limit"]
)
@pytest.mark.parametrize("value", [0.0, -1, float("nan"), float("inf"), "1", None, True])
def test_coefficients_are_finite_and_positive(name: str, value: object) -> None:
    if value is None and name != "routed_scaling_factor":
        assert getattr(config_of(), name) is None
        return
    expected = f"MoEConfig: {name} must be finite and positive, got {value!r}."
    assert message(**{name: value}) == expected


def test_is_frozen_keyword_only_and_hashable() -> None:
    cfg = MoEConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.top_k = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        MoEConfig(64)  # type: ignore[misc]
    assert hash(cfg) == hash(MoEConfig())
    assert not hasattr(cfg, "__dict__")


@pytest.mark.parametrize(
    ("given", "exact"),
    [
        (1.1, Fraction(11, 10)),
        ("1.1", Fraction(11, 10)),
        ("5/3", Fraction(5, 3)),
        (Fraction(5, 3), Fraction(5, 3)),
        (2, Fraction(2)),
        (1e-3, Fraction(1, 1000)),
        (np.float64(1.1), Fraction(11, 10)),
        (Decimal("1.25"), Fraction(5, 4)),
    ],
)
def test_factor_is_exact_and_survives_json(given: Any, exact: Fraction) -> None:
    cfg = MoEConfig(capacity_factor=given, eval_capacity_factor=given)
    assert type(cfg.capacity_factor) is Fraction
    assert cfg.capacity_factor == exact == cfg.eval_capacity_factor
    back = MoEConfig.from_json(cfg.to_json())
    assert back == cfg
    assert back.capacity_factor == exact
    assert json.loads(cfg.to_json())["capacity_factor"] == str(exact)


def test_json_round_trip_of_every_field() -> None:
    several = [
        MoEConfig(
            hidden_size=3,
            intermediate_size=5,
            num_experts=7,
            top_k=4,
            score_fn="sigmoid",
            router_order="topk_score",
            renormalize=True,
            renorm_eps=1e-20,
            renorm_eps_mode="max",
            renorm_p=2,
            routed_scaling_factor=2.5,
            logit_softcap=30.0,
            selection_bias=True,
            selection_bias_on="logits",
            num_identity_experts=1,
            num_groups=4,
            topk_group=3,
            group_score="max",
            group_fill="zero",
            router_noise_std=0.1,
            router_jitter=0.1,
            router_bias=True,
            router_dtype="float64",
            nan_policy="drop",
            weight_position="mid",
            activation="swiglu_oai",
            activation_alpha=1.5,
            activation_limit=3.0,
            expert_bias=True,
            expert_dropout=0.1,
            output_bias=True,
            shared_intermediate_size=3,
            shared_gated=True,
            shared_activation="relu",
            shared_combine="average",
            capacity_factor="1.1",
            eval_capacity_factor="2",
            capacity_scope="sequence",
            capacity_rounding="round",
            capacity_count_top_k=False,
            min_capacity=2,
            capacity_multiple=4,
            drop_policy="probability",
            slot_order="token",
            renormalize_drop="after",
        ),
        MoEConfig(expert_capacity=3, routing="expert_choice"),
        MoEConfig(top_k=1, renormalize=True, renorm_single=False),
        MoEConfig(top_k=2, second_expert_policy="sampling"),
    ]
    for cfg in several:
        assert MoEConfig.from_json(cfg.to_json()) == cfg
        assert MoEConfig.from_dict(cfg.to_dict()) == cfg
    changed = {
        f.name
        for f in dataclasses.fields(MoEConfig)
        for c in several
        if getattr(c, f.name) != f.default
    }
    assert changed == {f.name for f in dataclasses.fields(MoEConfig)}


def test_unreadable_json() -> None:
    with pytest.raises(RangeError) as caught:
        MoEConfig.from_json("{")
    assert str(caught.value) == (
        "MoEConfig.from_json: text must be JSON, got Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1)."
    )
    with pytest.raises(RangeError) as caught:
        MoEConfig.from_json("[1]")
    assert str(caught.value) == "MoEConfig.from_dict: values must be an object, got [1]."
    with pytest.raises(RangeError) as caught:
        MoEConfig.from_json('{"top_k": 1, "zeta": 2, "alpha": 3}')
    assert str(caught.value) == (
        "MoEConfig.from_dict: values must hold known fields, got alpha, zeta. "
        "Was it written by another version?"
    )


def test_for_evaluation() -> None:
    cfg = MoEConfig(router_noise_std=0.3, capacity_factor="1.1", eval_capacity_factor=2)
    expected = MoEConfig(capacity_factor=2)
    assert cfg.for_evaluation() == expected
    assert expected.for_evaluation() == expected
    kept = MoEConfig(router_noise_std=0.3, capacity_factor="1.1", min_capacity=3)
    assert kept.for_evaluation() == MoEConfig(capacity_factor="1.1", min_capacity=3)
    random = MoEConfig(
        router_jitter=0.1,
        expert_dropout=0.2,
        second_expert_policy="random",
        expert_capacity=2,
        drop_policy="random",
        slot_order="token",
    )
    assert random.for_evaluation() == MoEConfig(expert_capacity=2)
    other = MoEConfig(expert_capacity=2, drop_policy="k_major", slot_order="token")
    assert other.for_evaluation() == other
    rows = MoEConfig(expert_capacity=0)
    assert rows.for_evaluation() == rows
    assert rows.has_capacity
    assert cfg.has_capacity
    assert not MoEConfig().has_capacity


@pytest.mark.parametrize(("activation", "rows"), [("swiglu", 10), ("gelu", 5), ("relu", 5)])
def test_gate_up_size(activation: str, rows: int) -> None:
    cfg = MoEConfig(intermediate_size=5, activation=activation)
    assert cfg.gate_up_size == rows
    assert cfg.gated is (rows == 10)
