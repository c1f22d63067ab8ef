"""MoEConfig: fields that mean nothing in a combination, and contradictions, name both fields."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import pytest

from npmoe import MoEConfig, RangeError


def config_of(**fields: Any) -> MoEConfig:
    return MoEConfig(**fields)


def message(**fields: Any) -> str:
    with pytest.raises(RangeError) as caught:
        config_of(**fields)
    return str(caught.value)


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
