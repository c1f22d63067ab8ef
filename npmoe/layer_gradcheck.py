"""Check every gradient of one MoE layer against finite differences, for any config, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npmoe import losses
from npmoe._typing import HostArray
from npmoe.activations import kink_sides
from npmoe.backends import Backend
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.finite_differences import check_directions
from npmoe.layer import moe_backward, moe_forward
from npmoe.params import MoEParams, init_params
from npmoe.routing.weights import chosen_norms
from npmoe.saved import SavedTensors
from npmoe.tree import map_arrays

_SHAPE = (2, 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """What is moved: the parameters that have gradients, and the input."""

    params: MoEParams
    hidden_states: HostArray


def gradcheck_layers() -> dict[str, MoEConfig]:
    """Return small configs that together run every backward the layer can reach."""
    sizes: dict[str, Any] = {"hidden_size": 5, "intermediate_size": 4, "num_experts": 6}
    shared: dict[str, Any] = {"shared_intermediate_size": 3}
    table: dict[str, dict[str, Any]] = {
        "sigmoid, biased groups, shared expert (DeepSeek-V3)": {
            **{"score_fn": "sigmoid", "selection_bias": True, "num_groups": 3, "topk_group": 2},
            **{"renormalize": True, "renorm_eps": 0.1, "routed_scaling_factor": 2.5},
            **shared,
        },
        "sqrt(softplus), clamped SwiGLU, jitter and noise (DeepSeek-V4)": {
            **{"score_fn": "sqrtsoftplus", "activation": "swiglu_clamp_pre"},
            **{"renormalize": True, "router_jitter": 0.2, "router_noise_std": 0.3, **shared},
            "activation_limit": 0.5,
        },
        "top-k before softmax, biases, clamped SwiGLU (gpt-oss)": {
            **{"router_order": "topk_score", "router_bias": True, "expert_bias": True},
            **{"activation": "swiglu_oai", "activation_limit": 0.8},
        },
        "sigmoid on the input (Llama 4)": {
            **{"router_order": "topk_score", "score_fn": "sigmoid", "weight_position": "input"},
            "expert_bias": True,
        },
        "gated shared expert averaged, soft-cap, output bias, dropout": {
            **{"shared_gated": True, "shared_combine": "average", "logit_softcap": 1.5, **shared},
            **{"output_bias": True, "expert_dropout": 0.3, "shared_activation": "gelu"},
            **{"weight_position": "mid", "expert_bias": True},
        },
        "Euclidean norm, identity experts (DBRX, LongCat)": {
            **{"renormalize": True, "renorm_p": 2, "num_identity_experts": 2, "top_k": 3},
            "routed_scaling_factor": 0.7,
        },
        "refused second experts, maximum of norm and eps (GShard)": {
            **{"second_expert_policy": "random", "renormalize": True, "renorm_eps": 0.4},
            **{"renorm_eps_mode": "max", "expert_capacity": 2, "drop_policy": "k_major"},
        },
        "normalised after the drop by batch priority": {
            **{"renormalize": True, "renormalize_drop": "after", "expert_capacity": 2},
            "drop_policy": "batch_priority",
        },
        "expert choice": {"routing": "expert_choice", "capacity_factor": "0.8"},
        "dense, sigmoid": {"routing": "dense", "score_fn": "sigmoid", "renormalize": True},
        "soft slots": {"routing": "soft", "expert_capacity": 2, "activation": "gelu_tanh"},
        "ReGLU": {"activation": "reglu", **shared},
        "squared ReLU, not gated": {"activation": "relu2", "capacity_factor": "0.9"},
    }
    return {title: MoEConfig(**(sizes | {"top_k": 2} | fields)) for title, fields in table.items()}


def gradcheck_layer(
    cfg: MoEConfig,
    *,
    seed: int = 0,
    directions: int = 2,
    backend: str | Backend | None = None,
    masked: bool = False,
) -> dict[str, float]:
    """Return the worst relative error of the directional derivatives, by argument.

    The function differentiated is ``<g, output> + <h, router_logits>`` plus a z-loss (but for
    soft routing), for seeded g and h. Random parts are drawn again from the same seed at every
    evaluation. Points where a choice, a drop or a kink's side changes are left by shrinking the
    step.

    Parameters
    ----------
    cfg : MoEConfig
        Any; its router must not compute in float32.
    seed : int
        Of parameters, data, randomness and directions.
    directions : int
        Directions per argument.
    backend : str, Backend or None
        One with host arrays.
    masked : bool
        Whether some tokens are masked.

    Returns
    -------
    dict of str to float
        By parameter, and "hidden_states".

    Raises
    ------
    GradientError
        If a decision changes even at the smallest step.
    RangeError
        If nothing would be checked, or the seed is negative.
    """
    check_counts(seed, directions)
    rng = np.random.default_rng(seed)
    params = map_arrays(
        lambda _, leaf: leaf + 0.3 * rng.standard_normal(leaf.shape),
        init_params(cfg, seed, "float64"),
    )
    x = rng.standard_normal((*_SHAPE, cfg.hidden_size))
    grad_output = rng.standard_normal(x.shape)
    mask = rng.random(_SHAPE) < 0.7 if masked else None
    replay = None
    if cfg.routing == "hash":
        rows = [rng.permutation(cfg.router_size)[: cfg.top_k] for _ in range(x[..., 0].size)]
        replay = np.array(rows).reshape(*_SHAPE, cfg.top_k)
    saved: SavedTensors | None = None

    def forward() -> tuple[HostArray, SavedTensors]:
        nonlocal saved
        noise = np.random.default_rng((seed, 1))
        output, saved = moe_forward(x, params, cfg, backend, noise, mask, replay)
        if saved is None:  # save=True is the default
            raise AssertionError
        return output, saved

    _, first = forward()
    tilt = rng.standard_normal(first.routing.router_logits.shape)
    if first.routing.token_mask is not None:
        tilt[~first.routing.token_mask] = 0.0
    z_coefficient = 0.0 if cfg.routing == "soft" else 0.1
    grad_logits = tilt
    if z_coefficient:
        grad_logits = tilt + losses.z_loss(first.routing, coefficient=z_coefficient)[1]
    grads = moe_backward(grad_output, first, params, grad_logits)

    def loss() -> float:
        output, now = forward()
        value = 0.0
        if z_coefficient:
            value, _ = losses.z_loss(now.routing, coefficient=z_coefficient)
        logits = now.routing.router_logits
        if now.routing.token_mask is not None:
            logits = np.where(now.routing.token_mask[:, None], logits, 0.0)
        return value + float((output * grad_output).sum() + (logits * tilt).sum())

    def decisions() -> HostArray:
        return layer_decisions(saved or first)

    moved = _Checked(params=replace(params, selection_bias=None), hidden_states=x)
    found = _Checked(params=grads.params(), hidden_states=grads.hidden_states)
    # A stream of its own: that of the data would move an input along itself, and the gradient
    # of anything normalised vanishes there.
    turns = np.random.default_rng((seed, 2))
    errors = check_directions(
        loss, found, moved, directions=directions, decisions=decisions, rng=turns
    )
    return {name.removeprefix("params."): error for name, error in errors.items()}


def check_counts(seed: int, directions: int) -> None:
    """Raise RangeError if nothing would be checked, or the seed is negative."""
    for name, value, least in (("directions", directions, 1), ("seed", seed, 0)):
        if value < least:
            raise RangeError(f"gradcheck: {name} must be at least {least}, got {value}.")


def layer_decisions(saved: SavedTensors) -> HostArray:
    """Return everything discrete about one forward pass: choices, drops, sides of kinks."""
    cfg, routing, plan = saved.cfg, saved.routing, saved.plan
    parts = [routing.topk_ids, plan.row_ids, kink_sides(saved.gate_up, *cfg.activation_call())]
    if saved.shared_gate_up is not None:
        parts.append(kink_sides(saved.shared_gate_up, *cfg.activation_call(shared=True)))
    if cfg.renorm_eps_mode == "max":
        parts.append(chosen_norms(routing, plan, cfg) >= cfg.renorm_eps)
    return np.concatenate([np.asarray(p).ravel().astype(np.int64) for p in parts])
