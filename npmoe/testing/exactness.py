"""Which configs have results that no rounding can touch, so that they are compared with ==."""

from __future__ import annotations

from npmoe.config import MoEConfig

# Activations that keep integers, and slopes too.
INTEGER_ACTIVATIONS = ("relu", "relu2", "reglu")
# Fields that must have this value: everything else is not dyadic.
EXACT_FIELDS = {
    "score_fn": "softmax",
    "renorm_eps": 0.0,
    "renorm_p": 1,
    "logit_softcap": None,
    "second_expert_policy": "all",
    "router_noise_std": 0.0,
    "router_jitter": 0.0,
    "shared_gated": False,
}


def is_exact(cfg: MoEConfig, num_tokens: int) -> bool:
    """Return whether values="exact" leaves no rounding anywhere, already in float32.

    The activations keep integers. A softmax over K = 1 chosen logit is 1; otherwise all logits
    are made equal, and powers of two for K and the number of logits make probabilities, weights
    and gradients dyadic. Dropout of 1/2 multiplies by 2. With inputs in -1..1 and the sizes
    below, |x|.|w| sums stay below 2**22 of their last bits. The longest is grad_router_weight:
    the gradient of a weight is below 8 * 8 * 162, of which a softmax over 8 takes an eighth
    twice, so that 16 tokens have 14 bits before the point and 8 after it. A weight on the input
    would be squared by an activation that multiplies.
    """
    if any(getattr(cfg, name) != value for name, value in EXACT_FIELDS.items()):
        return False
    sizes = (cfg.hidden_size, cfg.intermediate_size, cfg.shared_intermediate_size)
    small = max(*sizes, cfg.router_size) <= 8 and num_tokens <= 16 and cfg.routing != "soft"
    integers = all(name in INTEGER_ACTIVATIONS for name in cfg.activations)
    halves = cfg.routed_scaling_factor in (0.5, 1.0) and cfg.expert_dropout in (0.0, 0.5)
    # When experts choose, a token has all of them or none, but a replayed one any number.
    counted = cfg.top_k in (1, 2) and not (cfg.routing == "expert_choice" and cfg.normalizes)
    dyadic = cfg.router_size in (1, 2, 4, 8) and counted
    squared = cfg.weight_position == "input" and cfg.activation != "relu"
    return small and integers and halves and not squared and (dyadic or weight_is_one(cfg))


def weight_is_one(cfg: MoEConfig) -> bool:
    """Return whether every weight is exactly 1, and its gradient 0, whatever the logits are."""
    softmax_of_one = cfg.router_order == "topk_score" and cfg.score_fn == "softmax"
    return cfg.chooses_top_k and cfg.top_k == 1 and softmax_of_one


def has_exact_choice(cfg: MoEConfig, *, integers: bool, tied: bool) -> bool:
    """Return whether rounding cannot change the choice, given integers or logits all equal.

    A softmax or no score at all keeps the order of logits; groups count by their largest.
    """
    on_logits = cfg.router_order == "topk_score" or cfg.selection_bias_on == "logits"
    ordered = on_logits or cfg.score_fn == "softmax"
    unbiased = not cfg.selection_bias or (on_logits and integers)
    plain = cfg.num_groups == 1 or (cfg.group_score == "max" and cfg.group_fill == "-inf")
    noisy = cfg.router_noise_std or cfg.router_jitter or cfg.second_expert_policy != "all"
    by_tokens = cfg.routing in ("token_choice", "dense", "hash")
    rounded = noisy or cfg.logit_softcap
    return (integers or tied) and by_tokens and ordered and unbiased and plain and not rounded
