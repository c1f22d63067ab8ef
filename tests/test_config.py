"""MoEConfig: every message, the JSON round trip, and every contradiction."""

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


@pytest.mark.parametrize(
    "fields", [{"renormalize": True}, {"router_order": "topk_score"}], ids=["renorm", "topk_score"]
)
def test_one_weight_divided_by_itself(fields: dict[str, Any]) -> None:
    for policy in ("probability", "batch_priority"):
        assert message(top_k=1, expert_capacity=1, drop_policy=policy, **fields) == (
            "MoEConfig: drop_policy must stay 'position' with top_k=1 and weights normalised "
            f"before the drop, got {policy!r}. All weights are equal, so it would do nothing."
        )
        config_of(top_k=2, expert_capacity=1, drop_policy=policy, **fields)
        if "renormalize" in fields:
            after = {**fields, "renormalize_drop": "after"}
            config_of(top_k=1, expert_capacity=1, drop_policy=policy, **after)
    assert message(top_k=1, weight_position="input", **fields) == (
        "MoEConfig: weight_position must stay 'output' with top_k=1 and weights that are "
        "normalised, got 'input'. All weights are 1, so it would do nothing."
    )
    config_of(top_k=1, weight_position="input", routed_scaling_factor=2.0, **fields)


MEANINGLESS = [
    # field, its value, the other fields, and why the message says it means nothing
    ("renorm_single", False, {"renormalize": True}, "without renormalize, top_k=1"),
    ("renorm_eps", 0.5, {}, "without renormalize=True (and renorm_single)"),
    ("renorm_p", 2, {}, "without renormalize=True (and renorm_single)"),
    ("renorm_p", 2, {"renormalize": True, "top_k": 1}, "with top_k=1"),
    ("renorm_eps_mode", "max", {"renormalize": True}, "without a positive renorm_eps"),
    (
        "renormalize_drop",
        "after",
        {"expert_capacity": 1},
        "without renormalize=True (and renorm_single)",
    ),
    ("selection_bias_on", "logits", {}, "without selection_bias=True"),
    ("topk_group", 2, {}, "with num_groups=1"),
    ("group_score", "max", {}, "with num_groups=1"),
    ("group_fill", "zero", {}, "with num_groups=1"),
    ("second_expert_policy", "random", {"top_k": 3}, "unless top_k=2"),
    ("shared_gated", True, {}, "without shared_intermediate_size"),
    ("shared_activation", "relu", {}, "without shared_intermediate_size"),
    ("shared_combine", "average", {}, "without shared_intermediate_size"),
    ("activation_alpha", 2.0, {}, "with an activation that has no alpha"),
    ("activation_limit", 2.0, {}, "with an activation that has no limit"),
    ("capacity_scope", "sequence", {}, "without capacity_factor or expert_capacity"),
    ("slot_order", "token", {"expert_capacity": 1}, "with drop_policy='position'"),
    ("score_fn", "sigmoid", {"routing": "soft"}, "with routing='soft'"),
    ("router_order", "topk_score", {"routing": "dense"}, "with routing='dense'"),
    ("selection_bias", True, {"routing": "hash"}, "with routing='hash'"),
    ("num_groups", 2, {"routing": "expert_choice"}, "with routing='expert_choice'"),
    ("num_identity_experts", 2, {"routing": "expert_choice"}, "with routing='expert_choice'"),
    ("expert_capacity", 2, {"routing": "dense"}, "with routing='dense'"),
    ("capacity_factor", Fraction(2), {"routing": "soft"}, "with routing='soft'"),
    ("weight_position", "input", {"routing": "soft"}, "with routing='soft'"),
    ("renormalize", True, {"routing": "soft"}, "with routing='soft'"),
]


@pytest.mark.parametrize(("name", "value", "others", "why"), MEANINGLESS)
def test_a_field_without_meaning_must_keep_its_default(
    name: str, value: object, others: dict[str, Any], why: str
) -> None:
    default = next(f.default for f in dataclasses.fields(MoEConfig) if f.name == name)
    assert message(**others, **{name: value}) == (
        f"MoEConfig: {name} must stay {default!r} {why}, got {value!r}. It would do nothing."
    )


CONTRADICTIONS = [
    (
        {"num_experts": 6, "num_groups": 4},
        "num_groups must divide num_experts = 6, got 4.",
    ),
    (
        {"num_experts": 6, "num_identity_experts": 1, "num_groups": 2},
        "num_groups must divide num_experts + num_identity_experts = 7, got 2.",
    ),
    (
        {"num_groups": 4, "topk_group": 5},
        "topk_group must be at most num_groups = 4, got 5.",
    ),
    (
        {"num_groups": 4, "topk_group": 1, "top_k": 3},
        "top_k must be at most the 2 experts of topk_group = 1 groups out of num_groups = 4, "
        "got 3.",
    ),
    (
        {"num_groups": 4, "topk_group": 3, "top_k": 2, "group_score": "topk_div"},
        "group_score must not be 'topk_div' with top_k = 2 below topk_group = 3. The sum of "
        "top_k // topk_group = 0 scores would make all groups equal.",
    ),
    (
        {"num_experts": 2, "num_identity_experts": 1, "top_k": 4},
        "top_k must be at most num_experts + num_identity_experts = 3, got 4. "
        "Every token chooses distinct experts.",
    ),
    (
        {"renormalize": True, "routing": "dense"},
        "renormalize must be False with routing='dense' and score_fn='softmax', got True. "
        "All probabilities already sum to 1.",
    ),
    (
        {"score_fn": "sqrtsoftplus", "router_order": "topk_score"},
        "router_order must stay 'score_topk' with score_fn='sqrtsoftplus' and "
        "routing='token_choice', got 'topk_score'. The same experts get the same scores.",
    ),
    (
        {"score_fn": "sigmoid", "router_order": "topk_score", "routing": "hash"},
        "router_order must stay 'score_topk' with score_fn='sigmoid' and routing='hash', got "
        "'topk_score'. The same experts get the same scores.",
    ),
    (
        {"selection_bias": True, "router_order": "topk_score"},
        "selection_bias_on must be 'logits' with router_order='topk_score', got 'scores'. "
        "That order chooses by the logits.",
    ),
    (
        {"second_expert_policy": "sampling", "selection_bias": True},
        "selection_bias must stay False with second_expert_policy='sampling', got True. "
        "The second expert is drawn by the logits alone.",
    ),
    (
        {"second_expert_policy": "sampling", "num_groups": 2},
        "num_groups must stay 1 with second_expert_policy='sampling', got 2. "
        "The second expert is drawn by the logits alone.",
    ),
    (
        {"routing": "soft", "expert_capacity": 1, "nan_policy": "clamp"},
        "nan_policy must be 'raise' or 'drop' with routing='soft', got 'clamp'. "
        "A token that stays would reach every slot.",
    ),
    (
        {"routing": "soft"},
        "expert_capacity must be at least 1 with routing='soft', got None. "
        "It is the number of slots of each expert.",
    ),
    (
        {"routing": "expert_choice"},
        "expert_capacity or capacity_factor must be given with routing='expert_choice', got "
        "neither. It is the number of tokens an expert takes.",
    ),
    (
        {"top_k": 1, "expert_capacity": 1, "drop_policy": "k_major"},
        "drop_policy must not be 'k_major' with top_k=1. It would be 'position'.",
    ),
]


@pytest.mark.parametrize(("fields", "text"), CONTRADICTIONS)
def test_contradictions_name_both_fields(fields: dict[str, Any], text: str) -> None:
    assert message(**fields) == f"MoEConfig: {text}"


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
