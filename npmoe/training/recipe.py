"""The default text run, options of both tasks, and how many steps fit into a time."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal, TypeVar

from npmoe.backends import Backend
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.models.config import LanguageConfig
from npmoe.training.config import RunConfig, TrainConfig, text_sha256
from npmoe.training.data import CharVocabulary
from npmoe.training.images import ImageData
from npmoe.training.loop import single_threaded_blas
from npmoe.training.optimizer import AdamWConfig
from npmoe.training.schedules import ScheduleConfig
from npmoe.training.tasks import prepare_data
from npmoe.training.trainer import Trainer

DEFAULT_STEPS = 1200
SELECTION_BIAS_RATE = 0.001
# Patterns of `AdamWConfig.frozen`.
FROZEN_PARTS = {
    "experts": ("*.feed_forward.gate_up_*", "*.feed_forward.down_*"),
    "router": ("*.router_weight",),
}
_WARMUP_FRACTION = 0.05
_NOISE_FRACTION = 0.5
_CALIBRATION_STEPS = 4
# Evaluation costs about a third of training per character; the rest is start, pictures, noise.
_EVALUATION_COST = 0.35
_RESERVE = 0.92

C = TypeVar("C", bound=RunConfig)


def language_recipe(
    text: str,
    source: str,
    *,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    dense: bool = False,
    num_experts: int = 8,
    top_k: int = 2,
    capacity_factor: str | None = None,
    hidden_size: int = 64,
    num_layers: int = 4,
    context_length: int = 128,
    batch_size: int = 8,
    learning_rate: float = 4e-3,
) -> TrainConfig:
    """Return the config of a run on a text.

    Parameters
    ----------
    text : str
        Gives the vocabulary.
    source : str
        Where the text came from; stored with the run.
    steps, seed, batch_size, learning_rate
        Of the training.
    dense : bool
        Train the dense variant: the same active parameters per token.
    num_experts, top_k, capacity_factor, hidden_size, num_layers, context_length
        Of the model; an expert is as wide as the hidden size.

    Returns
    -------
    TrainConfig

    Raises
    ------
    RangeError
        If options are out of range.
    """
    vocabulary = CharVocabulary.from_text(text)
    num_heads = choose_heads(hidden_size)
    moe = MoEConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size,
        num_experts=num_experts,
        top_k=top_k,
        renormalize=True,
        # Weights of mean 1 make the experts learn as fast as the dense model of the same width.
        routed_scaling_factor=float(top_k),
        capacity_factor=capacity_factor,
    )
    model = LanguageConfig(
        vocab_size=vocabulary.size,
        context_length=context_length,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        moe=moe,
    )
    return TrainConfig(
        model=model.dense_variant() if dense else model,
        optimizer=AdamWConfig(),
        schedule=make_schedule(steps, learning_rate),
        characters=vocabulary.characters,
        text_source=source,
        text_sha256=text_sha256(text),
        batch_size=batch_size,
        micro_batches=1 if batch_size % 2 else 2,
        seed=seed,
    )


def choose_heads(hidden_size: int) -> int:
    """Return as many heads of at least 32 elements, of even size, as the hidden size allows."""
    return max(
        (n for n in range(1, hidden_size // 32 + 1) if hidden_size % (2 * n) == 0), default=1
    )


def make_schedule(steps: int, learning_rate: float) -> ScheduleConfig:
    """Return the schedule of both recipes: warm-up over a twentieth of the steps, then a cosine."""
    warmup = min(steps, max(1, round(steps * _WARMUP_FRACTION)))
    return ScheduleConfig(steps=steps, learning_rate=learning_rate, warmup_steps=warmup)


def with_steps(config: C, steps: int) -> C:
    """Return the config with another length; warm-up and router noise keep their shares."""
    before = config.schedule
    schedule = replace(
        make_schedule(steps, before.learning_rate),
        final_factor=before.final_factor,
        router_noise_std=before.router_noise_std,
        router_noise_steps=_noise_steps(steps) if before.router_noise_std else 0,
    )
    return replace(config, schedule=schedule)


def with_options(
    config: C,
    *,
    balance: Literal["loss", "bias", "none"] = "loss",
    router_noise: float = 0.0,
    router_lr_factor: float = 1.0,
    freeze: Literal["experts", "router"] | None = None,
) -> C:
    """Return the config of an MoE run with other training of its routers.

    Parameters
    ----------
    config : TrainConfig or VisionTrainConfig
    balance : {"loss", "bias", "none"}
        Auxiliary losses as in the config; a selection bias moved after every step and no
        auxiliary loss; or neither.
    router_noise : float
        Standard deviation of the router noise at the start; it fades out over half of the steps.
    router_lr_factor : float
        Of the router's learning rate.
    freeze : {"experts", "router"} or None
        What stays as it begins.

    Raises
    ------
    RangeError
        If an option has no meaning for the model.
    """
    moe = config.model.moe
    given = (balance, router_noise, router_lr_factor, freeze) != ("loss", 0.0, 1.0, None)
    if moe is None:
        if given:
            raise RangeError(
                "train: balance, router_noise, router_lr_factor and freeze must not be given with "
                "a dense model, got one of them. It has no router."
            )
        return config
    schedule = replace(
        config.schedule,
        router_noise_std=router_noise,
        router_noise_steps=_noise_steps(config.steps) if router_noise else 0,
    )
    optimizer = replace(
        config.optimizer,
        router_lr_factor=router_lr_factor,
        frozen=() if freeze is None else FROZEN_PARTS[freeze],
    )
    config = replace(config, schedule=schedule, optimizer=optimizer)
    if balance == "loss":
        return config
    biased = balance == "bias"
    model = replace(
        config.model,
        moe=replace(moe, selection_bias=biased),
        load_balancing_coefficient=0.0,
        z_loss_coefficient=0.0,
    )
    return replace(config, model=model, selection_bias_rate=SELECTION_BIAS_RATE * biased)


def _noise_steps(steps: int) -> int:
    """Return the first step without router noise."""
    return max(1, round(steps * _NOISE_FRACTION))


def steps_for_seconds(
    config: RunConfig,
    data: str | ImageData,
    seconds: float,
    *,
    workers: int = 1,
    backend: str | Backend | None = None,
) -> int:
    """Return how many steps fit into a budget, by timing a few on a throw-away copy.

    Parameters
    ----------
    config : TrainConfig or VisionTrainConfig
        Its own number of steps is ignored.
    data : str or ImageData
    seconds : float
        For the whole run, evaluation included.
    workers, backend
        As for `train`.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    RangeError
        If `seconds` is not positive.
    """
    if not 0 < seconds < float("inf"):
        raise RangeError(f"train: seconds must be positive and finite, got {seconds}.")
    prepared = prepare_data(config, data)
    begin = time.perf_counter()
    with single_threaded_blas():
        trainer = Trainer(
            with_steps(config, _CALIBRATION_STEPS + 1),
            prepared.training,
            workers=workers,
            backend=backend,
        )
        trainer.step()
        start = time.perf_counter()
        for _ in range(_CALIBRATION_STEPS):
            trainer.step()
        step = (time.perf_counter() - start) / _CALIBRATION_STEPS
        trainer.close()
    spent = time.perf_counter() - begin
    evaluation = step * _EVALUATION_COST * prepared.validation_tokens / config.tokens_per_step
    # Two evaluations at the end, and one every eval_every steps.
    per_step = step + evaluation / config.eval_every
    return max(1, int(((seconds - spent) * _RESERVE - 2 * evaluation) / per_step))
