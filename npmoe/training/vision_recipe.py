"""The default vision run: the handwritten digits, sized for two CPU cores and two minutes."""

from __future__ import annotations

from typing import Any

from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.models.config import VisionConfig
from npmoe.training.config import VisionTrainConfig
from npmoe.training.images import ImageData, channel_statistics
from npmoe.training.optimizer import AdamWConfig
from npmoe.training.recipe import choose_heads, make_schedule

DEFAULT_STEPS = 800
ROUTINGS = ("top_k", "batch_priority", "expert_choice", "soft", "dense")


def vision_recipe(
    data: ImageData,
    *,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    dense: bool = False,
    routing: str = "top_k",
    num_experts: int = 8,
    top_k: int = 2,
    capacity_factor: str | None = None,
    hidden_size: int = 64,
    num_layers: int = 3,
    patch_size: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 4e-3,
) -> VisionTrainConfig:
    """Return the config of a run on images.

    Parameters
    ----------
    data : ImageData
        Gives sizes, classes, and what the pixels are normalised by.
    steps, seed, batch_size, learning_rate
        Of the training. Images are moved by up to an eighth of their side.
    dense : bool
        Train the dense variant: the same active parameters per patch.
    routing : {"top_k", "batch_priority", "expert_choice", "soft", "dense"}
        Patches choose experts; with a capacity kept by weight across the patches of an image
        (V-MoE); experts choose patches of each image; slots of weighted patches, as many as top_k
        choices would be; all experts for every patch.
    num_experts, top_k, capacity_factor, hidden_size, num_layers
        Of the model; an expert is as wide as the hidden size. Capacities are those of an image;
        batch_priority and expert_choice have a factor of 1 unless another is given.
    patch_size : int, optional
        By default the largest of 4, 2 and 1 that leaves at least 4 patches a side.

    Returns
    -------
    VisionTrainConfig

    Raises
    ------
    RangeError
        If options are out of range or contradict each other.
    """
    side = data.train.images.shape[1]
    if patch_size is None:
        patch_size = max((p for p in (1, 2, 4) if side % p == 0 and side >= 4 * p), default=1)
    heads = choose_heads(hidden_size)
    moe = _moe(routing, num_experts, top_k, capacity_factor, hidden_size, side, patch_size)
    chosen = routing in ("top_k", "batch_priority")
    model = VisionConfig(
        image_size=side,
        channels=data.train.images.shape[3],
        num_classes=data.train.num_classes,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        moe=moe,
        load_balancing_coefficient=0.01 if chosen else 0.0,
        z_loss_coefficient=0.0 if routing == "soft" else 0.001,
    )
    mean, std = channel_statistics(data.train.images)
    return VisionTrainConfig(
        model=model.dense_variant() if dense else model,
        optimizer=AdamWConfig(),
        schedule=make_schedule(steps, learning_rate),
        data_source=data.source,
        data_sha256=data.sha256(),
        channel_mean=mean,
        channel_std=std,
        max_shift=side // 8,
        batch_size=batch_size,
        micro_batches=1 if batch_size % 2 else 2,
        seed=seed,
        eval_every=200,
    )


def _moe(
    routing: str,
    num_experts: int,
    top_k: int,
    capacity_factor: str | None,
    hidden_size: int,
    side: int,
    patch_size: int,
) -> MoEConfig:
    """Return the layer of a routing's name."""
    if routing not in ROUTINGS:
        raise RangeError(
            f"vision_recipe: routing must be one of {', '.join(map(repr, ROUTINGS))}, got "
            f"{routing!r}."
        )
    if capacity_factor is not None and routing in ("soft", "dense"):
        raise RangeError(
            f"vision_recipe: capacity_factor must be None with routing={routing!r}, got "
            f"{capacity_factor!r}. Nothing is dropped."
        )
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size,
        "num_experts": num_experts,
        "top_k": top_k,
    }
    if routing == "soft":
        slots = -(-((side // patch_size) ** 2) * top_k // num_experts)
        return MoEConfig(**sizes, routing="soft", expert_capacity=slots)
    if routing == "dense":
        return MoEConfig(**sizes, routing="dense")
    if routing == "expert_choice":
        return MoEConfig(
            **sizes,
            routing="expert_choice",
            capacity_factor=capacity_factor or "1",
            capacity_scope="sequence",
        )
    if routing == "batch_priority":
        capacity_factor = capacity_factor or "1"
    several = top_k > 1
    return MoEConfig(
        **sizes,
        # One weight, divided by itself, would leave the router without a gradient.
        renormalize=several,
        # Weights of mean 1 make the experts learn as fast as the dense model of the same width.
        routed_scaling_factor=float(top_k) if several else 1.0,
        capacity_factor=capacity_factor,
        capacity_scope="batch" if capacity_factor is None else "sequence",
        drop_policy="batch_priority" if routing == "batch_priority" else "position",
    )
