"""Check every gradient of small full models against finite differences, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.backends import Backend
from npmoe.config import MoEConfig
from npmoe.finite_differences import check_directions
from npmoe.layer_gradcheck import check_counts, layer_decisions
from npmoe.models.config import LanguageConfig
from npmoe.models.language import init_language_params, language_loss, language_loss_value
from npmoe.tree import map_arrays

_SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "context_length": 6,
    "hidden_size": 8,
    "num_heads": 4,
    "num_kv_heads": 2,
    "load_balancing_coefficient": 0.5,
    "z_loss_coefficient": 0.1,
}


def gradcheck_models() -> dict[str, LanguageConfig]:
    """Return small models that together run every backward the language model can reach."""
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 6, "num_experts": 5}
    return {
        "pre-norm SwiGLU, renormalised after a drop": LanguageConfig(
            **_SIZES,
            num_layers=2,
            dropout=0.1,
            moe=MoEConfig(
                **sizes,
                top_k=2,
                renormalize=True,
                routed_scaling_factor=1.7,
                capacity_factor="0.8",
                drop_policy="probability",
                renormalize_drop="after",
                router_noise_std=0.3,
            ),
        ),
        "post-norm GELU with biases, dense and MoE blocks": LanguageConfig(
            **_SIZES,
            num_layers=2,
            norm="layer",
            norm_position="post",
            activation="gelu",
            dense_intermediate_size=7,
            tie_embeddings=False,
            moe_every=2,
            moe=MoEConfig(
                **sizes,
                top_k=3,
                activation="gelu",
                expert_bias=True,
                router_bias=True,
                router_order="topk_score",
                routed_scaling_factor=0.6,
            ),
        ),
        "pre-norm ReLU, renormalised before a drop": LanguageConfig(
            **_SIZES,
            num_layers=1,
            norm="layer",
            moe=MoEConfig(
                **sizes,
                top_k=2,
                activation="relu",
                renormalize=True,
                routed_scaling_factor=2.5,
                capacity_factor="0.7",
            ),
        ),
    }


def gradcheck_model(
    cfg: LanguageConfig,
    *,
    seed: int = 0,
    directions: int = 2,
    backend: str | Backend | None = None,
) -> dict[str, float]:
    """Return the worst relative error of the directional derivatives, by parameter.

    Dropout and noise are drawn again from the same seed at every evaluation. Points where a
    routing decision or a ReLU changes are left by shrinking the step.

    Parameters
    ----------
    cfg : LanguageConfig
        A small model: every evaluation runs it whole.
    seed : int
        Of parameters, data, masks and directions.
    directions : int
        Directions per parameter.
    backend : str, Backend or None

    Returns
    -------
    dict of str to float

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
        # Biases start at zero and norm weights at one; move them off these special points.
        lambda _, leaf: leaf + 0.1 * rng.standard_normal(leaf.shape),
        init_language_params(cfg, seed, "float64"),
    )
    shape = (2, cfg.context_length)
    inputs, targets = rng.integers(0, cfg.vocab_size, (2, *shape))

    def noise() -> np.random.Generator:
        return np.random.default_rng((seed, 1))

    result = language_loss(inputs, targets, params, cfg, rng=noise(), backend=backend)
    saved = result.saved

    def loss() -> float:
        nonlocal saved
        value, saved = language_loss_value(
            inputs, targets, params, cfg, rng=noise(), backend=backend
        )
        return value

    def decisions() -> HostArray:
        layers = (block.moe for block in saved.blocks if block.moe is not None)
        return np.concatenate([layer_decisions(layer) for layer in layers])

    # A stream of its own: that of the data would move an input along itself, and the gradient
    # of anything normalised vanishes there.
    turns = np.random.default_rng((seed, 2))
    return check_directions(
        loss, result.grads, params, directions=directions, decisions=decisions, rng=turns
    )
