"""The default run: a character model sized for two CPU cores and three minutes."""

from __future__ import annotations

import time
from dataclasses import replace

from npmoe.backends import Backend
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.models.config import LanguageConfig
from npmoe.training.config import TrainConfig, text_sha256
from npmoe.training.data import CharVocabulary, split_text
from npmoe.training.loop import single_threaded_blas
from npmoe.training.optimizer import AdamWConfig
from npmoe.training.schedules import ScheduleConfig
from npmoe.training.trainer import Trainer

DEFAULT_STEPS = 1200
_WARMUP_FRACTION = 0.05
_CALIBRATION_STEPS = 4
# Evaluation costs about a third of training per character; the rest is start, pictures, noise.
_EVALUATION_COST = 0.35
_RESERVE = 0.92


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
    # Heads of at least 32 elements, of even size for the rotary positions.
    num_heads = max(
        (n for n in range(1, hidden_size // 32 + 1) if hidden_size % (2 * n) == 0), default=1
    )
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
        schedule=ScheduleConfig(
            steps=steps,
            learning_rate=learning_rate,
            warmup_steps=min(steps, max(1, round(steps * _WARMUP_FRACTION))),
        ),
        characters=vocabulary.characters,
        text_source=source,
        text_sha256=text_sha256(text),
        batch_size=batch_size,
        micro_batches=1 if batch_size % 2 else 2,
        seed=seed,
    )


def with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """Return the config with another length; warm-up keeps its share."""
    warmup = min(steps, max(1, round(steps * _WARMUP_FRACTION)))
    schedule = replace(config.schedule, steps=steps, warmup_steps=warmup)
    return replace(config, schedule=schedule)


def steps_for_seconds(
    config: TrainConfig,
    text: str,
    seconds: float,
    *,
    workers: int = 1,
    backend: str | Backend | None = None,
) -> int:
    """Return how many steps fit into a budget, by timing a few on a throw-away copy.

    Parameters
    ----------
    config : TrainConfig
        Its own number of steps is ignored.
    text : str
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
    ids = CharVocabulary(config.characters).encode(text)
    train_ids, val_ids = split_text(ids, config.model.context_length)
    begin = time.perf_counter()
    with single_threaded_blas():
        trainer = Trainer(
            with_steps(config, _CALIBRATION_STEPS + 1), train_ids, workers=workers, backend=backend
        )
        trainer.step()
        start = time.perf_counter()
        for _ in range(_CALIBRATION_STEPS):
            trainer.step()
        step = (time.perf_counter() - start) / _CALIBRATION_STEPS
        trainer.close()
    spent = time.perf_counter() - begin
    evaluation = step * _EVALUATION_COST * len(val_ids) / config.tokens_per_step
    # Two evaluations at the end, and one every eval_every steps.
    per_step = step + evaluation / config.eval_every
    return max(1, int(((seconds - spent) * _RESERVE - 2 * evaluation) / per_step))
