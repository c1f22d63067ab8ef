"""MoEConfig: every message, the JSON round trip, and that no option silently does nothing."""

from __future__ import annotations

import dataclasses
import json
from decimal import Decimal
from fractions import Fraction
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest

import npmoe
from npmoe import MoEConfig, RangeError

FACTOR = "capacity_factor"


def config_of(**fields: Any) -> MoEConfig:
    return MoEConfig(**fields)


def message(**fields: Any) -> str:
    with pytest.raises(RangeError) as caught:
        config_of(**fields)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["hidden_size", "intermediate_size", "num_experts", "top_k", "capacity_multiple"]
)
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "4", None, np.int64(4)])
def test_sizes_are_positive_integers(name: str, value: object) -> None:
    expected = f"MoEConfig: {name} must be an integer of at least 1, got {value!r}."
    assert message(**{FACTOR: 1, name: value}) == expected


@pytest.mark.parametrize("value", [-1, 1.0, False, "0"])
def test_bounds_of_the_capacity_are_not_negative(value: object) -> None:
    tail = f"must be an integer of at least 0, got {value!r}."
    assert message(capacity_factor=1, min_capacity=value) == f"MoEConfig: min_capacity {tail}"
    assert message(expert_capacity=value) == f"MoEConfig: expert_capacity {tail}"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("router_order", "'score_topk', 'topk_score'"),
        ("activation", "'swiglu', 'gelu', 'relu'"),
        ("capacity_rounding", "'ceil', 'floor', 'round'"),
        ("drop_policy", "'position', 'probability'"),
        ("renormalize_drop", "'before', 'after'"),
        ("nan_policy", "'raise', 'clamp', 'drop'"),
    ],
)
@pytest.mark.parametrize("value", ["none", None, ["ceil"], 1])
def test_words_come_from_a_list(name: str, allowed: str, value: object) -> None:
    expected = f"MoEConfig: {name} must be one of {allowed}, got {value!r}."
    assert message(**{name: value}) == expected


@pytest.mark.parametrize(
    "name", ["renormalize", "router_bias", "expert_bias", "capacity_count_top_k"]
)
@pytest.mark.parametrize("value", [1, 0, None, "True"])
def test_switches_are_bools(name: str, value: object) -> None:
    assert message(**{name: value}) == f"MoEConfig: {name} must be True or False, got {value!r}."


def test_every_bool_field_is_among_the_switches() -> None:
    names = {f.name for f in dataclasses.fields(MoEConfig) if isinstance(f.default, bool)}
    assert names == {"renormalize", "router_bias", "expert_bias", "capacity_count_top_k"}


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


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_noise_is_finite_and_not_negative(value: object) -> None:
    expected = f"MoEConfig: router_noise_std must be finite and not negative, got {value!r}."
    assert message(router_noise_std=value) == expected


@pytest.mark.parametrize("value", [0.0, -1, float("nan"), float("inf"), "1", None, True])
def test_scale_is_finite_and_positive(value: object) -> None:
    expected = f"MoEConfig: routed_scaling_factor must be finite and positive, got {value!r}."
    assert message(routed_scaling_factor=value) == expected


def test_top_k_beyond_num_experts() -> None:
    assert message(num_experts=3, top_k=4) == (
        "MoEConfig: top_k must be at most num_experts = 3, got 4. "
        "Every token chooses distinct experts."
    )
    assert MoEConfig(num_experts=4, top_k=4).top_k == 4


def test_renormalize_with_topk_score() -> None:
    assert message(renormalize=True, router_order="topk_score") == (
        "MoEConfig: renormalize must be False with router_order='topk_score', got True. "
        "Its softmax over the chosen experts already sums to 1."
    )


def test_two_capacities() -> None:
    assert message(expert_capacity=3, capacity_factor="1.1") == (
        "MoEConfig: expert_capacity must be None with capacity_factor, got 3 and 11/10. "
        "Give one of them."
    )


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [("drop_policy", "probability", "position"), ("renormalize_drop", "after", "before")],
)
def test_drop_options_need_a_capacity(name: str, value: str, default: str) -> None:
    assert message(renormalize=True, **{name: value}) == (
        f"MoEConfig: {name} must stay {default!r} without capacity_factor or expert_capacity, "
        f"got {value!r}. It would do nothing."
    )
    for capacity in ({"capacity_factor": 1}, {"expert_capacity": 1}):
        assert getattr(config_of(renormalize=True, **capacity, **{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("eval_capacity_factor", "2", None),
        ("capacity_rounding", "floor", "ceil"),
        ("capacity_count_top_k", False, True),
        ("min_capacity", 1, 0),
        ("capacity_multiple", 2, 1),
    ],
)
@pytest.mark.parametrize("capacity", [{}, {"expert_capacity": 4}])
def test_factor_options_need_a_factor(
    name: str, value: object, default: object, capacity: dict[str, int]
) -> None:
    got = Fraction(2) if name == "eval_capacity_factor" else value
    assert message(**capacity, **{name: value}) == (
        f"MoEConfig: {name} must stay {default!r} without capacity_factor, got {got!r}. "
        "It would do nothing."
    )


def test_renormalize_drop_without_renormalize() -> None:
    assert message(expert_capacity=1, renormalize_drop="after") == (
        "MoEConfig: renormalize_drop must stay 'before' without renormalize=True, got 'after'. "
        "There is no normalisation to move."
    )


@pytest.mark.parametrize(
    "fields", [{"renormalize": True}, {"router_order": "topk_score"}], ids=["renorm", "topk_score"]
)
def test_probability_needs_weights_that_differ(fields: dict[str, Any]) -> None:
    assert message(top_k=1, expert_capacity=1, drop_policy="probability", **fields) == (
        "MoEConfig: drop_policy must stay 'position' with top_k=1 and weights normalised before "
        "the drop, got 'probability'. All weights are 1, so it would do nothing."
    )
    config_of(top_k=2, expert_capacity=1, drop_policy="probability", **fields)
    if "renormalize" in fields:
        fields = {**fields, "renormalize_drop": "after"}
        config_of(top_k=1, expert_capacity=1, drop_policy="probability", **fields)


def test_count_of_one_choice() -> None:
    assert message(top_k=1, capacity_factor=1, capacity_count_top_k=False) == (
        "MoEConfig: capacity_count_top_k must stay True with top_k=1, got False. "
        "It would do nothing."
    )


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
    cfg = MoEConfig(
        hidden_size=3,
        intermediate_size=5,
        num_experts=7,
        top_k=4,
        renormalize=True,
        routed_scaling_factor=2.5,
        router_noise_std=0.1,
        router_bias=True,
        nan_policy="drop",
        activation="relu",
        expert_bias=True,
        capacity_factor="1.1",
        eval_capacity_factor="2",
        capacity_rounding="round",
        capacity_count_top_k=False,
        min_capacity=2,
        capacity_multiple=4,
        drop_policy="probability",
        renormalize_drop="after",
    )
    assert MoEConfig.from_json(cfg.to_json()) == cfg
    assert MoEConfig.from_dict(cfg.to_dict()) == cfg
    others = MoEConfig(expert_capacity=3, router_order="topk_score")
    assert MoEConfig.from_json(others.to_json()) == others
    changed = {
        f.name
        for f in dataclasses.fields(MoEConfig)
        for c in (cfg, others)
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


# One value away from its default for every field, chosen so that each can show an effect.
OTHER: dict[str, Any] = {
    "hidden_size": 5,
    "intermediate_size": 7,
    "num_experts": 5,
    "top_k": 3,
    "router_order": "topk_score",
    "renormalize": True,
    "routed_scaling_factor": 2.5,
    "router_noise_std": 0.5,
    "router_bias": True,
    "nan_policy": "drop",
    "activation": "gelu",
    "expert_bias": True,
    "capacity_factor": "1.1",
    "eval_capacity_factor": "0.4",
    "expert_capacity": 4,
    "capacity_rounding": "floor",
    "capacity_count_top_k": False,
    "min_capacity": 4,
    "capacity_multiple": 3,
    "drop_policy": "probability",
    "renormalize_drop": "after",
}
SECOND: dict[str, Any] = {
    "top_k": 1,
    "nan_policy": "clamp",
    "activation": "relu",
    "capacity_rounding": "round",
}
BASES: list[dict[str, Any]] = [
    {},
    {"capacity_factor": "0.75"},
    {"capacity_factor": "0.75", "renormalize": True},
    {"expert_capacity": 3},
    {"expert_capacity": 3, "renormalize": True},
]
SMALL = {"hidden_size": 4, "intermediate_size": 3}


@cache
def function_of(cfg: MoEConfig) -> tuple[Any, ...]:
    """Return what the layer computes, in training and evaluation, with and without NaN."""
    params = npmoe.init_params(cfg, rng=3, dtype="float64")
    results: list[Any] = []
    for used in (cfg, cfg.for_evaluation()):
        results += [npmoe.expert_capacity(t, used) for t in range(1, 200, 7)]
    for num_tokens, broken in ((14, False), (16, True)):
        x = np.random.default_rng(5).standard_normal((num_tokens, cfg.hidden_size))
        if broken:
            x[2, 1] = np.nan
        for used in {cfg: None, cfg.for_evaluation(): None}:
            try:
                output, saved = npmoe.moe_forward(
                    x, params, used, "reference", np.random.default_rng(7)
                )
            except RangeError as error:
                results.append(str(error))
                continue
            assert saved is not None
            routing = saved.routing
            results += [a.tobytes() for a in (output, routing.topk_ids, routing.topk_weights)]
            if not broken:
                grads = npmoe.moe_backward(np.ones_like(output), saved, params)
                results.append(grads.router_weight.tobytes())
    shapes = tuple(name for name in ("router_bias", "down_bias") if getattr(params, name) is None)
    return (*results, shapes)


def test_every_field_has_another_value() -> None:
    assert list(OTHER) == [f.name for f in dataclasses.fields(MoEConfig)]


@pytest.mark.parametrize("base", BASES, ids=lambda b: "+".join(b) or "plain")
def test_no_option_silently_does_nothing(base: dict[str, Any]) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(MoEConfig)} | SMALL | base
    free = [name for name in OTHER if name not in base]
    values = [(n, OTHER[n]) for n in free] + [(n, SECOND[n]) for n in free if n in SECOND]
    legal = 0
    for (name, value), (other, second) in combinations(values, 2):
        if name == other:
            continue
        fields = defaults | {name: value, other: second}
        try:
            cfg = MoEConfig(**fields)
        except RangeError as error:
            named = name in str(error) or other in str(error)
            if not named:
                raise
            continue
        legal += 1
        for undone in (name, other):
            try:
                without = MoEConfig(**fields | {undone: defaults[undone]})
            except RangeError:
                continue  # the other option needs this one
            assert function_of(cfg) != function_of(without), (
                f"{undone}={fields[undone]!r} does nothing in {fields}"
            )
    assert legal > 50
