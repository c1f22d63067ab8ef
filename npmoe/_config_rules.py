"""Which values a field of MoEConfig may take, and in which combinations it means anything.

A field that would do nothing must stay at its default: each row of the tables below says when a
field has an effect, and the message names the other field that decides it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from npmoe.activations import ACTIVATIONS
from npmoe.errors import RangeError

if TYPE_CHECKING:
    from fractions import Fraction

    from npmoe.config import MoEConfig

LITERALS: dict[str, tuple[Any, ...]] = {
    "routing": ("token_choice", "expert_choice", "soft", "dense", "hash"),
    "score_fn": ("softmax", "sigmoid", "sqrtsoftplus"),
    "router_order": ("score_topk", "topk_score"),
    "renorm_eps_mode": ("add", "max"),
    "renorm_p": (1, 2),
    "selection_bias_on": ("scores", "logits"),
    "group_score": ("max", "top2_sum", "topk_div"),
    "group_fill": ("-inf", "zero"),
    "second_expert_policy": ("all", "sampling", "random"),
    "router_dtype": (None, "float32", "float64"),
    "nan_policy": ("raise", "clamp", "drop"),
    "weight_position": ("output", "mid", "input"),
    "activation": tuple(ACTIVATIONS),
    "shared_activation": (None, *ACTIVATIONS),
    "shared_combine": ("sum", "average"),
    "capacity_scope": ("batch", "sequence"),
    "capacity_rounding": ("ceil", "floor", "round", "tutel", "megatron_f64", "deepspeed_f32"),
    "drop_policy": ("position", "k_major", "batch_priority", "probability", "random"),
    "slot_order": ("priority", "token"),
    "renormalize_drop": ("before", "after"),
}
_LEAST = {
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_experts": 1,
    "top_k": 1,
    "num_groups": 1,
    "topk_group": 1,
    "capacity_multiple": 1,
    "min_capacity": 0,
    "num_identity_experts": 0,
    "shared_intermediate_size": 0,
}
FACTORS = ("capacity_factor", "eval_capacity_factor")

_CHOOSES = ("token_choice",)
_GIVES_WEIGHTS = ("token_choice", "hash")
_NOT_SOFT = ("token_choice", "expert_choice", "dense", "hash")
# The kinds of routing in which a field has an effect; fields not named here have one in all.
_ROUTINGS: dict[str, tuple[str, ...]] = {
    "score_fn": _NOT_SOFT,
    "router_order": _GIVES_WEIGHTS,
    "renormalize": _NOT_SOFT,
    "renorm_single": _GIVES_WEIGHTS,
    "routed_scaling_factor": _NOT_SOFT,
    "logit_softcap": _NOT_SOFT,
    "selection_bias": _CHOOSES,
    "num_groups": _CHOOSES,
    "second_expert_policy": _CHOOSES,
    "router_noise_std": _NOT_SOFT,
    "router_jitter": _NOT_SOFT,
    "router_bias": _NOT_SOFT,
    "router_dtype": _NOT_SOFT,
    "num_identity_experts": ("token_choice", "hash", "dense"),
    "weight_position": _NOT_SOFT,
    "capacity_factor": ("token_choice", "expert_choice", "hash"),
    "expert_capacity": ("token_choice", "expert_choice", "hash", "soft"),
    "capacity_scope": ("token_choice", "expert_choice", "hash"),
    "drop_policy": _GIVES_WEIGHTS,
    "renormalize_drop": _GIVES_WEIGHTS,
}


class _Need(NamedTuple):
    """A field, when it has an effect, and the words that say what it lacks."""

    field: str
    has_effect: Callable[[MoEConfig], bool]
    lacking: str


_NEEDS = (
    _Need(
        "renorm_single", lambda c: c.renormalize and c.top_k == 1, "without renormalize, top_k=1"
    ),
    *(
        _Need(name, lambda c: c.normalizes, "without renormalize=True (and renorm_single)")
        for name in ("renorm_eps", "renorm_p", "renormalize_drop")
    ),
    _Need("renorm_eps_mode", lambda c: c.renorm_eps > 0, "without a positive renorm_eps"),
    _Need("renorm_p", lambda c: c.top_k > 1 or not c.chooses_top_k, "with top_k=1"),
    _Need("selection_bias_on", lambda c: c.selection_bias, "without selection_bias=True"),
    _Need("topk_group", lambda c: c.num_groups > 1, "with num_groups=1"),
    _Need("group_score", lambda c: c.num_groups > 1, "with num_groups=1"),
    _Need("group_fill", lambda c: c.num_groups > 1, "with num_groups=1"),
    _Need("second_expert_policy", lambda c: c.top_k == 2, "unless top_k=2"),
    _Need(
        "shared_gated", lambda c: c.shared_intermediate_size > 0, "without shared_intermediate_size"
    ),
    _Need(
        "shared_activation",
        lambda c: c.shared_intermediate_size > 0,
        "without shared_intermediate_size",
    ),
    _Need(
        "shared_combine",
        lambda c: c.shared_intermediate_size > 0,
        "without shared_intermediate_size",
    ),
    _Need(
        "activation_alpha",
        lambda c: any(ACTIVATIONS[n].default_alpha is not None for n in c.activations),
        "with an activation that has no alpha",
    ),
    _Need(
        "activation_limit",
        lambda c: any(ACTIVATIONS[n].default_limit is not None for n in c.activations),
        "with an activation that has no limit",
    ),
    *(
        _Need(name, lambda c: c.has_capacity, "without capacity_factor or expert_capacity")
        for name in ("drop_policy", "renormalize_drop", "capacity_scope")
    ),
    *(
        _Need(name, lambda c: c.capacity_factor is not None, "without capacity_factor")
        for name in (
            *("eval_capacity_factor", "capacity_rounding", "capacity_count_top_k"),
            *("min_capacity", "capacity_multiple"),
        )
    ),
    _Need("capacity_count_top_k", lambda c: c.top_k > 1, "with top_k=1"),
    _Need("slot_order", lambda c: c.drop_policy != "position", "with drop_policy='position'"),
)


def check_config(cfg: MoEConfig) -> None:
    """Raise RangeError unless every field is in range and has an effect or its default."""
    _check_values(cfg)
    routing = cfg.routing
    for name, kinds in _ROUTINGS.items():
        if routing not in kinds:
            _stay(cfg, name, f"with routing={routing!r}")
    _check_sizes(cfg)
    for name, has_effect, lacking in _NEEDS:
        if not has_effect(cfg):
            _stay(cfg, name, lacking)
    _check_contradictions(cfg)
    _check_capacity(cfg)


def _check_values(cfg: MoEConfig) -> None:
    for name, least in _LEAST.items():
        _check_int(name, getattr(cfg, name), least)
    if cfg.expert_capacity is not None:
        _check_int("expert_capacity", cfg.expert_capacity, 0)
    for name, allowed in LITERALS.items():
        value = getattr(cfg, name)
        if value not in allowed or isinstance(value, bool):
            raise RangeError(
                f"MoEConfig: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}."
            )
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.type == "bool" and not isinstance(value, bool):
            raise RangeError(f"MoEConfig: {field.name} must be True or False, got {value!r}.")
    for name in ("router_noise_std", "renorm_eps"):
        value = getattr(cfg, name)
        if not (is_finite(value) and value >= 0):
            raise RangeError(f"MoEConfig: {name} must be finite and not negative, got {value!r}.")
    for name in ("router_jitter", "expert_dropout"):
        value = getattr(cfg, name)
        if not (is_finite(value) and 0 <= value < 1):
            raise RangeError(f"MoEConfig: {name} must lie in [0, 1), got {value!r}.")
    for name in ("routed_scaling_factor", "logit_softcap", "activation_alpha", "activation_limit"):
        value = getattr(cfg, name)
        if value is None and name != "routed_scaling_factor":
            continue
        if not (is_finite(value) and value > 0):
            raise RangeError(f"MoEConfig: {name} must be finite and positive, got {value!r}.")


def _check_sizes(cfg: MoEConfig) -> None:
    size = cfg.router_size
    if cfg.chooses_top_k and cfg.top_k > size:
        what = "num_experts" + (" + num_identity_experts" if cfg.num_identity_experts else "")
        raise RangeError(
            f"MoEConfig: top_k must be at most {what} = {size}, "
            f"got {cfg.top_k}. Every token chooses distinct experts."
        )
    if cfg.num_groups == 1:
        return
    if size % cfg.num_groups:
        what = "num_experts" + (" + num_identity_experts" if cfg.num_identity_experts else "")
        raise RangeError(
            f"MoEConfig: num_groups must divide {what} = {size}, got {cfg.num_groups}."
        )
    if cfg.topk_group > cfg.num_groups:
        raise RangeError(
            f"MoEConfig: topk_group must be at most num_groups = {cfg.num_groups}, "
            f"got {cfg.topk_group}."
        )
    selectable = cfg.topk_group * (size // cfg.num_groups)
    if cfg.top_k > selectable:
        raise RangeError(
            f"MoEConfig: top_k must be at most the {selectable} experts of topk_group = "
            f"{cfg.topk_group} groups out of num_groups = {cfg.num_groups}, got {cfg.top_k}."
        )
    if cfg.group_score == "topk_div" and cfg.top_k < cfg.topk_group:
        raise RangeError(
            f"MoEConfig: group_score must not be 'topk_div' with top_k = {cfg.top_k} below "
            f"topk_group = {cfg.topk_group}. The sum of top_k // topk_group = 0 scores would "
            "make all groups equal."
        )


def _check_contradictions(cfg: MoEConfig) -> None:
    if cfg.renormalize and cfg.score_fn == "softmax":
        if cfg.router_order == "topk_score":
            raise RangeError(
                "MoEConfig: renormalize must be False with router_order='topk_score', got True. "
                "Its softmax over the chosen experts already sums to 1."
            )
        if cfg.routing == "dense":
            raise RangeError(
                "MoEConfig: renormalize must be False with routing='dense' and "
                "score_fn='softmax', got True. All probabilities already sum to 1."
            )
    # A sigmoid saturates, so that its order still differs from that of the logits.
    elementwise = cfg.score_fn == "sqrtsoftplus" or (
        cfg.routing == "hash" and cfg.score_fn == "sigmoid"
    )
    if cfg.router_order == "topk_score" and elementwise and cfg.num_groups == 1:
        raise RangeError(
            f"MoEConfig: router_order must stay 'score_topk' with score_fn={cfg.score_fn!r} and "
            f"routing={cfg.routing!r}, got 'topk_score'. The same experts get the same scores."
        )
    if (
        cfg.selection_bias
        and cfg.router_order == "topk_score"
        and cfg.selection_bias_on == "scores"
    ):
        raise RangeError(
            "MoEConfig: selection_bias_on must be 'logits' with router_order='topk_score', got "
            "'scores'. That order chooses by the logits."
        )
    if cfg.second_expert_policy == "sampling":
        for name in ("selection_bias", "num_groups"):
            if getattr(cfg, name) != default_of(name):
                raise RangeError(
                    f"MoEConfig: {name} must stay {default_of(name)!r} with "
                    f"second_expert_policy='sampling', got {getattr(cfg, name)!r}. The second "
                    "expert is drawn by the logits alone."
                )
    if cfg.routing == "soft" and cfg.nan_policy == "clamp":
        raise RangeError(
            "MoEConfig: nan_policy must be 'raise' or 'drop' with routing='soft', got 'clamp'. "
            "A token that stays would reach every slot."
        )


def _check_capacity(cfg: MoEConfig) -> None:
    if cfg.capacity_factor is not None and cfg.expert_capacity is not None:
        raise RangeError(
            "MoEConfig: expert_capacity must be None with capacity_factor, got "
            f"{cfg.expert_capacity} and {cfg.capacity_factor}. Give one of them."
        )
    if cfg.routing == "soft" and not cfg.expert_capacity:
        raise RangeError(
            "MoEConfig: expert_capacity must be at least 1 with routing='soft', got "
            f"{cfg.expert_capacity}. It is the number of slots of each expert."
        )
    if cfg.routing == "expert_choice" and not cfg.has_capacity:
        raise RangeError(
            "MoEConfig: expert_capacity or capacity_factor must be given with "
            "routing='expert_choice', got neither. It is the number of tokens an expert takes."
        )
    if cfg.top_k == 1 and cfg.drop_policy == "k_major":
        raise RangeError(
            "MoEConfig: drop_policy must not be 'k_major' with top_k=1. It would be 'position'."
        )
    if cfg.drop_policy in ("probability", "batch_priority") and cfg.constant_weights:
        raise RangeError(
            "MoEConfig: drop_policy must stay 'position' with top_k=1 and weights normalised "
            f"before the drop, got {cfg.drop_policy!r}. All weights are equal, so it would do "
            "nothing."
        )
    ones = cfg.constant_weights and cfg.routed_scaling_factor == 1
    if cfg.weight_position != "output" and ones:
        raise RangeError(
            "MoEConfig: weight_position must stay 'output' with top_k=1 and weights that are "
            f"normalised, got {cfg.weight_position!r}. All weights are 1, so it would do nothing."
        )


def _stay(cfg: MoEConfig, name: str, why: str) -> None:
    """Raise unless the field is at its default."""
    value, default = getattr(cfg, name), default_of(name)
    if value != default:
        raise RangeError(
            f"MoEConfig: {name} must stay {default!r} {why}, got {value!r}. It would do nothing."
        )


def default_of(name: str) -> Any:
    """Return a field's default."""
    return _defaults()[name]


@functools.cache
def _defaults() -> dict[str, Any]:
    from npmoe.config import MoEConfig  # noqa: PLC0415  # the class imports these checks

    return {f.name: f.default for f in dataclasses.fields(MoEConfig)}


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RangeError(
            f"MoEConfig: {name} must be an integer of at least {least}, got {value!r}."
        )


def is_finite(value: object) -> bool:
    """Return whether a value is a finite Python number."""
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def exact_factor(name: str, value: Any) -> Fraction:
    """Return a capacity factor as a positive Fraction; a float means its shortest decimal."""
    from fractions import Fraction  # noqa: PLC0415  # slow to import, seldom needed

    try:
        # A huge exponent would fill the memory with digits before it could be compared.
        if isinstance(value, str) and "e" in value.lower() and not 0 < float(value) < math.inf:
            raise ValueError
        exact = Fraction(repr(float(value)) if isinstance(value, float) else value)
    except (ValueError, TypeError, ArithmeticError):
        exact = None
    if exact is None or exact <= 0 or isinstance(value, bool):
        raise RangeError(
            f"MoEConfig: {name} must be a positive number such as '1.25', got {value!r}. "
            "None means dropless."
        )
    return exact
