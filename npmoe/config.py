"""MoEConfig: one frozen table of options that say which function the layer computes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from npmoe.activations import ACTIVATIONS
from npmoe.errors import RangeError

if TYPE_CHECKING:
    from fractions import Fraction

RouterOrder = Literal["score_topk", "topk_score"]
CapacityRounding = Literal["ceil", "floor", "round"]
DropPolicy = Literal["position", "probability"]
RenormalizeDrop = Literal["before", "after"]
NanPolicy = Literal["raise", "clamp", "drop"]

_LITERALS: dict[str, tuple[str, ...]] = {
    "router_order": get_args(RouterOrder),
    "activation": tuple(ACTIVATIONS),
    "capacity_rounding": get_args(CapacityRounding),
    "drop_policy": get_args(DropPolicy),
    "renormalize_drop": get_args(RenormalizeDrop),
    "nan_policy": get_args(NanPolicy),
}
_NEEDS_CAPACITY = ("drop_policy", "renormalize_drop")
_NEEDS_FACTOR = (
    "eval_capacity_factor",
    "capacity_rounding",
    "capacity_count_top_k",
    "min_capacity",
    "capacity_multiple",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Say which function a Mixture-of-Experts layer computes.

    Parameters
    ----------
    hidden_size, intermediate_size, num_experts, top_k : int
        H, I, E and K of every shape in this package.
    router_order : {"score_topk", "topk_score"}
        Softmax over all experts and then top-k (Switch, Mixtral, OLMoE), or top-k of the logits
        and softmax over the chosen (gpt-oss).
    renormalize : bool
        Divide the chosen weights by their sum. Without meaning for "topk_score", whose weights
        sum to 1 already.
    routed_scaling_factor : float
        Multiplies the combine weights, after any normalisation.
    router_noise_std : float
        Standard deviation of Gaussian noise added to the router logits when a generator is given.
    router_bias : bool
        Whether the router has a bias (E,).
    activation : {"swiglu", "gelu", "relu"}
        SwiGLU experts store gate and up halves in gate_up_proj; the others are not gated.
    expert_bias : bool
        Whether both expert projections have biases.
    capacity_factor : str, Fraction, float or None
        None is dropless. Rows per expert are tokens * top_k / num_experts * factor, in exact
        rational arithmetic; a string ("1.1") or Fraction is exact, a float means its shortest
        decimal spelling.
    eval_capacity_factor : str, Fraction, float or None
        The factor of `for_evaluation()`; None keeps `capacity_factor`.
    expert_capacity : int or None
        Explicit rows per expert, instead of a factor.
    capacity_rounding : {"ceil", "floor", "round"}
        How the exact quotient becomes an integer ("round" takes halves to even).
    capacity_count_top_k : bool
        Whether top_k multiplies the factor.
    min_capacity, capacity_multiple : int
        Lower bound of the capacity, and the number of which it is rounded up to a multiple.
    drop_policy : {"position", "probability"}
        Which routes an expert keeps: the first tokens, or the largest combine weights.
    renormalize_drop : {"before", "after"}
        Where the one normalisation sits relative to the drop.
    nan_policy : {"raise", "clamp", "drop"}
        What happens to a token whose largest logit is NaN or infinite.

    Raises
    ------
    RangeError
        If a value is out of range, or a field leaves its default where it has no meaning.

    Examples
    --------
    >>> cfg = MoEConfig(hidden_size=4, intermediate_size=8, num_experts=8, top_k=2)
    >>> MoEConfig.from_json(cfg.to_json()) == cfg
    True
    """

    hidden_size: int = 64
    intermediate_size: int = 128
    num_experts: int = 8
    top_k: int = 2
    # routing
    router_order: RouterOrder = "score_topk"
    renormalize: bool = False
    routed_scaling_factor: float = 1.0
    router_noise_std: float = 0.0
    router_bias: bool = False
    nan_policy: NanPolicy = "raise"
    # experts
    activation: str = "swiglu"
    expert_bias: bool = False
    # capacity
    capacity_factor: str | float | Fraction | None = None
    eval_capacity_factor: str | float | Fraction | None = None
    expert_capacity: int | None = None
    capacity_rounding: CapacityRounding = "ceil"
    capacity_count_top_k: bool = True
    min_capacity: int = 0
    capacity_multiple: int = 1
    drop_policy: DropPolicy = "position"
    renormalize_drop: RenormalizeDrop = "before"

    def __post_init__(self) -> None:
        """Check every field and every contradiction between two fields."""
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            _check_int(name, getattr(self, name), 1)
        _check_int("min_capacity", self.min_capacity, 0)
        _check_int("capacity_multiple", self.capacity_multiple, 1)
        if self.expert_capacity is not None:
            _check_int("expert_capacity", self.expert_capacity, 0)
        for name, allowed in _LITERALS.items():
            if getattr(self, name) not in allowed:
                raise RangeError(
                    f"MoEConfig: {name} must be one of {', '.join(map(repr, allowed))}, "
                    f"got {getattr(self, name)!r}."
                )
        for field in dataclasses.fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise RangeError(
                    f"MoEConfig: {field.name} must be True or False, "
                    f"got {getattr(self, field.name)!r}."
                )
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _exact(name, value))
        noise = self.router_noise_std
        if not (_is_finite(noise) and noise >= 0):
            raise RangeError(
                f"MoEConfig: router_noise_std must be finite and not negative, got {noise!r}."
            )
        scale = self.routed_scaling_factor
        if not (_is_finite(scale) and scale > 0):
            raise RangeError(
                f"MoEConfig: routed_scaling_factor must be finite and positive, got {scale!r}."
            )
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        if self.top_k > self.num_experts:
            raise RangeError(
                f"MoEConfig: top_k must be at most num_experts = {self.num_experts}, "
                f"got {self.top_k}. Every token chooses distinct experts."
            )
        if self.renormalize and self.router_order == "topk_score":
            raise RangeError(
                "MoEConfig: renormalize must be False with router_order='topk_score', got True. "
                "Its softmax over the chosen experts already sums to 1."
            )
        if self.capacity_factor is not None and self.expert_capacity is not None:
            raise RangeError(
                "MoEConfig: expert_capacity must be None with capacity_factor, got "
                f"{self.expert_capacity} and {self.capacity_factor}. Give one of them."
            )
        has_capacity = self.has_capacity
        for names, present, need in (
            (_NEEDS_CAPACITY, has_capacity, "capacity_factor or expert_capacity"),
            (_NEEDS_FACTOR, self.capacity_factor is not None, "capacity_factor"),
        ):
            for name in names:
                if not present and getattr(self, name) != _default(name):
                    raise RangeError(
                        f"MoEConfig: {name} must stay {_default(name)!r} without {need}, "
                        f"got {getattr(self, name)!r}. It would do nothing."
                    )
        if self.renormalize_drop == "after" and not self.renormalize:
            raise RangeError(
                "MoEConfig: renormalize_drop must stay 'before' without renormalize=True, "
                "got 'after'. There is no normalisation to move."
            )
        if self.top_k == 1 and not self.capacity_count_top_k:
            raise RangeError(
                "MoEConfig: capacity_count_top_k must stay True with top_k=1, got False. "
                "It would do nothing."
            )
        normalised = self.router_order == "topk_score" or (
            self.renormalize and self.renormalize_drop == "before"
        )
        if self.drop_policy == "probability" and self.top_k == 1 and normalised:
            raise RangeError(
                "MoEConfig: drop_policy must stay 'position' with top_k=1 and weights normalised "
                "before the drop, got 'probability'. All weights are 1, so it would do nothing."
            )

    @property
    def has_capacity(self) -> bool:
        """Whether an expert may refuse routes."""
        return self.capacity_factor is not None or self.expert_capacity is not None

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate half."""
        return ACTIVATIONS[self.activation].gated

    @property
    def gate_up_size(self) -> int:
        """Rows of gate_up_proj per expert: 2*I for gated experts, else I."""
        return self.intermediate_size * (2 if self.gated else 1)

    def for_evaluation(self) -> MoEConfig:
        """Return the config to evaluate with: no router noise, the evaluation's capacity."""
        factor = self.eval_capacity_factor
        return dataclasses.replace(
            self,
            router_noise_std=0.0,
            capacity_factor=self.capacity_factor if factor is None else factor,
            eval_capacity_factor=None,
        )

    def to_json(self) -> str:
        """Return the config as JSON text; fractions become strings."""
        import json  # noqa: PLC0415  # here and below: slow to import, seldom needed

        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        exact = ("capacity_factor", "eval_capacity_factor")
        return {k: str(v) if k in exact and v is not None else v for k, v in values.items()}

    @classmethod
    def from_json(cls, text: str) -> MoEConfig:
        """Return the config that `to_json` wrote.

        Raises
        ------
        RangeError
            If the text is not a JSON object, or names a field that does not exist.
        """
        import json  # noqa: PLC0415

        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise RangeError(f"MoEConfig.from_json: text must be JSON, got {error}.") from error
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: object) -> MoEConfig:
        """Return the config with these fields; unknown names raise RangeError."""
        if not isinstance(values, dict):
            raise RangeError(f"MoEConfig.from_dict: values must be an object, got {values!r}.")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise RangeError(
                f"MoEConfig.from_dict: values must hold known fields, got {', '.join(unknown)}. "
                "Was it written by another version?"
            )
        return cls(**values)


def _default(name: str) -> Any:
    return next(f.default for f in dataclasses.fields(MoEConfig) if f.name == name)


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RangeError(
            f"MoEConfig: {name} must be an integer of at least {least}, got {value!r}."
        )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _exact(name: str, value: Any) -> Fraction:
    """Return a capacity factor as a positive Fraction; a float means its shortest decimal."""
    from fractions import Fraction  # noqa: PLC0415

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
