"""MoEConfig: one frozen table of options that say which function the layer computes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from npmoe._config_rules import FACTORS, check_config, exact_factor
from npmoe.activations import ACTIVATIONS
from npmoe.errors import RangeError

if TYPE_CHECKING:
    from fractions import Fraction

DropPolicy = Literal["position", "k_major", "batch_priority", "probability", "random"]
SlotOrder = Literal["priority", "token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Say which function a Mixture-of-Experts layer computes.

    Every field has a default, and a field that would do nothing in a combination must stay at
    it. `npmoe.preset` makes the config of a published model.

    Parameters
    ----------
    hidden_size, intermediate_size, num_experts, top_k : int
        H, I, E and K of every shape in this package. "expert_choice" reads top_k as the mean
        number of experts per token, behind `capacity_factor`; "dense" and "soft" do not read it.
    routing : {"token_choice", "expert_choice", "soft", "dense", "hash"}
        Every token chooses K experts; every expert chooses its C best tokens (not causal); soft
        mixtures of tokens in `expert_capacity` slots per expert (not causal); all experts for
        every token; or ids given by the caller, with weights from the router.
    score_fn : {"softmax", "sigmoid", "sqrtsoftplus"}
        From router logits to `probs`; the last two do not sum to 1.
    router_order : {"score_topk", "topk_score"}
        Score all experts and choose by score (Switch, Mixtral, DeepSeek-V3), or choose by logit
        and score the chosen alone (gpt-oss, Llama 4).
    renormalize : bool
        Divide the chosen weights by D = (sum of w**renorm_p)**(1/renorm_p).
    renorm_eps, renorm_eps_mode : float, {"add", "max"}
        Divide by D + eps, or by max(D, eps).
    renorm_p : {1, 2}
        The norm.
    renorm_single : bool
        Whether a single weight (top_k=1) is divided by itself too; Megatron does not.
    routed_scaling_factor : float
        Multiplies the combine weights, after any normalisation.
    logit_softcap : float or None
        c in ``c * tanh(x / c)``, applied to the router logits.
    selection_bias : bool
        Whether params.selection_bias is added for the choice; weights never see it.
    selection_bias_on : {"scores", "logits"}
        To what it is added.
    num_groups, topk_group : int
        Groups of consecutive experts, and how many of them each token may choose from.
    group_score : {"max", "top2_sum", "topk_div"}
        A group's score: its best selection key, the sum of its best two, or of its best
        top_k // topk_group.
    group_fill : {"-inf", "zero"}
        The key of experts in other groups; with "zero" they win over negative keys.
    second_expert_policy : {"all", "sampling", "random"}
        With top_k=2: the second best; a draw by softmax (Gumbel noise on the logits); or the
        second best, kept with probability min(1, 2 * its weight).
    router_noise_std : float
        Standard deviation of Gaussian noise added to the router logits, given a generator.
    router_jitter : float
        The router alone sees hidden_states times U(1 - jitter, 1 + jitter), given a generator.
    router_bias : bool
        Whether the router has a bias.
    router_dtype : {None, "float32", "float64"}
        In which the router computes; None is that of the input.
    num_identity_experts : int
        Further choices of the router, with ids from num_experts on, that return their input.
    nan_policy : {"raise", "clamp", "drop"}
        What happens to a token whose largest logit is NaN or infinite.
    weight_position : {"output", "mid", "input"}
        Where the combine weight multiplies: the expert's output; its activation (the same
        function, rounded elsewhere); or its input (another function: Llama 4).
    activation : str
        "swiglu", "swiglu_clamp_pre", "swiglu_clamp_post", "swiglu_oai", "geglu", "geglu_tanh"
        and "reglu" store gate and up halves in gate_up_proj; "silu", "gelu", "gelu_tanh", "relu"
        and "relu2" are not gated.
    activation_alpha, activation_limit : float or None
        Parameters of the activations that have them; None is the published value.
    expert_bias : bool
        Whether both expert projections have biases.
    expert_dropout : float
        Probability of dropping an activation, given a generator.
    output_bias : bool
        Whether a bias (H,) is added to the output of every valid token, unweighted.
    shared_intermediate_size : int
        Size of an expert that every token passes through; 0 is none.
    shared_gated : bool
        Multiply its output by sigmoid(shared_gate_weight . h).
    shared_activation : str or None
        None is the experts' own.
    shared_combine : {"sum", "average"}
        How routed and shared output are combined.
    capacity_factor : str, Fraction, float or None
        None is dropless. Rows per expert are tokens * top_k / num_experts * factor; a string
        ("1.1") or Fraction is exact, a float means its shortest decimal spelling.
    eval_capacity_factor : str, Fraction, float or None
        The factor of `for_evaluation()`; None keeps `capacity_factor`.
    expert_capacity : int or None
        Explicit rows per expert, instead of a factor.
    capacity_scope : {"batch", "sequence"}
        Whether tokens compete for rows within the batch or within their sequence.
    capacity_rounding : {"ceil", "floor", "round", "tutel", "megatron_f64", "deepspeed_f32"}
        The first three are exact ("round" takes halves to even); see `expert_capacity`.
    capacity_count_top_k : bool
        Whether top_k multiplies the factor.
    min_capacity, capacity_multiple : int
        Lower bound of the capacity, and the number of which it is rounded up to a multiple.
    drop_policy : {"position", "k_major", "batch_priority", "probability", "random"}
        Which routes an expert keeps: the first tokens; all first choices before any second; the
        same with tokens in order of their first weight; the largest weights; or a random draw.
    slot_order : {"priority", "token"}
        Whether an expert's slots are numbered in that order, or by token.
    renormalize_drop : {"before", "after"}
        Where the one normalisation sits relative to the drop.

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
    routing: Literal["token_choice", "expert_choice", "soft", "dense", "hash"] = "token_choice"
    score_fn: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    router_order: Literal["score_topk", "topk_score"] = "score_topk"
    renormalize: bool = False
    renorm_eps: float = 0.0
    renorm_eps_mode: Literal["add", "max"] = "add"
    renorm_p: int = 1
    renorm_single: bool = True
    routed_scaling_factor: float = 1.0
    logit_softcap: float | None = None
    selection_bias: bool = False
    selection_bias_on: Literal["scores", "logits"] = "scores"
    num_groups: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2_sum", "topk_div"] = "top2_sum"
    group_fill: Literal["-inf", "zero"] = "-inf"
    second_expert_policy: Literal["all", "sampling", "random"] = "all"
    router_noise_std: float = 0.0
    router_jitter: float = 0.0
    router_bias: bool = False
    router_dtype: Literal["float32", "float64"] | None = None
    num_identity_experts: int = 0
    nan_policy: Literal["raise", "clamp", "drop"] = "raise"
    # experts
    weight_position: Literal["output", "mid", "input"] = "output"
    activation: str = "swiglu"
    activation_alpha: float | None = None
    activation_limit: float | None = None
    expert_bias: bool = False
    expert_dropout: float = 0.0
    output_bias: bool = False
    shared_intermediate_size: int = 0
    shared_gated: bool = False
    shared_activation: str | None = None
    shared_combine: Literal["sum", "average"] = "sum"
    # capacity
    capacity_factor: str | float | Fraction | None = None
    eval_capacity_factor: str | float | Fraction | None = None
    expert_capacity: int | None = None
    capacity_scope: Literal["batch", "sequence"] = "batch"
    capacity_rounding: Literal[
        "ceil", "floor", "round", "tutel", "megatron_f64", "deepspeed_f32"
    ] = "ceil"
    capacity_count_top_k: bool = True
    min_capacity: int = 0
    capacity_multiple: int = 1
    drop_policy: DropPolicy = "position"
    slot_order: SlotOrder = "priority"
    renormalize_drop: Literal["before", "after"] = "before"

    def __post_init__(self) -> None:
        """Check every field and every contradiction between two fields."""
        for name in FACTORS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, exact_factor(name, value))
        check_config(self)

    @property
    def has_capacity(self) -> bool:
        """Whether an expert may refuse routes."""
        return self.capacity_factor is not None or self.expert_capacity is not None

    @property
    def chooses_top_k(self) -> bool:
        """Whether every token has top_k experts."""
        return self.routing in ("token_choice", "hash")

    @property
    def normalizes(self) -> bool:
        """Whether the weights are divided by their norm."""
        single = self.chooses_top_k and self.top_k == 1
        return self.renormalize and (self.renorm_single or not single)

    @property
    def constant_weights(self) -> bool:
        """Whether every weight is the same at the drop: one weight, divided by itself."""
        softmax_of_one = self.router_order == "topk_score" and self.score_fn == "softmax"
        itself = self.normalizes and self.renormalize_drop == "before" and self.renorm_eps == 0
        return self.chooses_top_k and self.top_k == 1 and (softmax_of_one or itself)

    @property
    def router_size(self) -> int:
        """Rows of router_weight: E with the identity experts, or all slots of all experts."""
        if self.routing == "soft":
            return self.num_experts * (self.expert_capacity or 0)
        return self.num_experts + self.num_identity_experts

    @property
    def activations(self) -> tuple[str, ...]:
        """The activations in use: the experts', and the shared expert's if it has its own."""
        shared = self.shared_activation
        return (self.activation,) if shared is None else (self.activation, shared)

    def activation_call(self, *, shared: bool = False) -> tuple[str, float | None, float | None]:
        """Return name, alpha and limit of the (shared) experts' activation.

        A parameter that this activation does not have is None, even if the other one has it.
        """
        name = self.activations[-1] if shared else self.activation
        family = ACTIVATIONS[name]
        alpha = None if family.default_alpha is None else self.activation_alpha
        return name, alpha, None if family.default_limit is None else self.activation_limit

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate half."""
        return ACTIVATIONS[self.activation].gated

    @property
    def gate_up_size(self) -> int:
        """Rows of gate_up_proj per expert: 2*I for gated experts, else I."""
        return self.intermediate_size * (2 if self.gated else 1)

    @property
    def shared_gate_up_size(self) -> int:
        """Rows of shared_gate_up_proj: 2*S for a gated activation, else S."""
        return self.shared_intermediate_size * (2 if ACTIVATIONS[self.activations[-1]].gated else 1)

    def for_evaluation(self) -> MoEConfig:
        """Return the config to evaluate with: nothing random, the evaluation's capacity.

        No noise, jitter or dropout, the second expert always, and "position" in place of a
        random drop.
        """
        factor = self.eval_capacity_factor
        random_drop = self.drop_policy == "random"
        return dataclasses.replace(
            self,
            router_noise_std=0.0,
            router_jitter=0.0,
            expert_dropout=0.0,
            second_expert_policy="all",
            drop_policy="position" if random_drop else self.drop_policy,
            slot_order="priority" if random_drop else self.slot_order,
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
        return {k: str(v) if k in FACTORS and v is not None else v for k, v in values.items()}

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
