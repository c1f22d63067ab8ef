"""Check every gradient of small full models against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.backends import Backend
from npmoe.config import MoEConfig
from npmoe.finite_differences import check_directions
from npmoe.layer_gradcheck import check_counts, layer_decisions
from npmoe.models.config import LanguageConfig, ModelConfig, VisionConfig
from npmoe.models.language import init_language_params, language_loss, language_loss_value
from npmoe.models.objective import LossResult
from npmoe.models.vision import init_vision_params, vision_loss, vision_loss_value
from npmoe.tree import map_arrays

_BOTH: dict[str, Any] = {
    "hidden_size": 8,
    "num_heads": 4,
    "num_kv_heads": 2,
    "load_balancing_coefficient": 0.5,
    "z_loss_coefficient": 0.1,
}
_SIZES: dict[str, Any] = {**_BOTH, "vocab_size": 11, "context_length": 6}
_IMAGES: dict[str, Any] = {
    **_BOTH,
    "image_size": 6,
    "channels": 2,
    "num_classes": 4,
    "patch_size": 3,
}


def gradcheck_models() -> dict[str, ModelConfig]:
    """Return small models that together run every backward the two models can reach."""
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
        "vision, pre-norm, learned positions, batch priority per image": VisionConfig(
            **_IMAGES,
            num_layers=2,
            moe_last=1,
            dense_intermediate_size=5,
            activation="gelu",
            dropout=0.1,
            moe=MoEConfig(
                **sizes,
                top_k=2,
                activation="gelu",
                expert_bias=True,
                capacity_factor="0.6",
                capacity_scope="sequence",
                drop_policy="batch_priority",
                router_noise_std=0.2,
            ),
        ),
        "vision, post-norm, sinusoidal positions, expert choice": VisionConfig(
            **{**_IMAGES, "load_balancing_coefficient": 0.0},
            num_layers=1,
            norm="layer",
            norm_position="post",
            positions="sinusoidal",
            moe=MoEConfig(
                **sizes,
                top_k=2,
                routing="expert_choice",
                capacity_factor="1",
                capacity_scope="sequence",
            ),
        ),
        "vision, soft slots": VisionConfig(
            **{**_IMAGES, "load_balancing_coefficient": 0.0, "z_loss_coefficient": 0.0},
            num_layers=1,
            moe=MoEConfig(**sizes, routing="soft", expert_capacity=2),
        ),
    }


def gradcheck_model(
    cfg: ModelConfig,
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
    cfg : LanguageConfig or VisionConfig
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
        _init_params(cfg, seed),
    )
    result, value = _losses(cfg, params, rng, seed, backend)
    saved = result.saved

    def loss() -> float:
        nonlocal saved
        total, saved = value()
        return total

    def decisions() -> HostArray:
        layers = (block.moe for block in saved.blocks if block.moe is not None)
        return np.concatenate([layer_decisions(layer) for layer in layers])

    # A stream of its own: that of the data would move an input along itself, and the gradient
    # of anything normalised vanishes there.
    turns = np.random.default_rng((seed, 2))
    return check_directions(
        loss, result.grads, params, directions=directions, decisions=decisions, rng=turns
    )


def _init_params(cfg: ModelConfig, seed: int) -> Any:
    """Draw the parameters of either model in float64."""
    if isinstance(cfg, VisionConfig):
        return init_vision_params(cfg, seed, "float64")
    return init_language_params(cfg, seed, "float64")


def _losses(
    cfg: ModelConfig,
    params: Any,
    rng: np.random.Generator,
    seed: int,
    backend: str | Backend | None,
) -> tuple[LossResult[Any, Any], Callable[[], tuple[float, Any]]]:
    """Draw a batch; return its loss with gradients, and a function that gives its value again."""

    def noise() -> np.random.Generator:
        return np.random.default_rng((seed, 1))

    if isinstance(cfg, VisionConfig):
        images = rng.standard_normal((2, cfg.image_size, cfg.image_size, cfg.channels))
        labels = rng.integers(0, cfg.num_classes, 2)
        return (
            vision_loss(images, labels, params, cfg, rng=noise(), backend=backend),
            lambda: vision_loss_value(images, labels, params, cfg, rng=noise(), backend=backend),
        )
    inputs, targets = rng.integers(0, cfg.vocab_size, (2, 2, cfg.context_length))
    return (
        language_loss(inputs, targets, params, cfg, rng=noise(), backend=backend),
        lambda: language_loss_value(inputs, targets, params, cfg, rng=noise(), backend=backend),
    )
