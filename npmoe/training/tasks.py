"""The two tasks: what the trainer needs to know of a model, its data and its measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from npmoe._typing import HostArray
from npmoe.backends import Backend
from npmoe.config import MoEConfig
from npmoe.errors import CheckpointError, RangeError
from npmoe.models.language import LanguageParams, init_language_params, language_loss
from npmoe.models.objective import LossResult
from npmoe.models.vision import VisionParams, init_vision_params, vision_loss
from npmoe.training.config import RunConfig, TrainConfig, VisionTrainConfig, text_sha256
from npmoe.training.data import CharVocabulary, batch, split_text, validation_batches
from npmoe.training.evaluate import BatchEvaluation, Evaluation, evaluate_batch, sum_batches
from npmoe.training.evaluate_images import (
    ImageBatchEvaluation,
    VisionEvaluation,
    evaluate_image_batch,
    sum_image_batches,
)
from npmoe.training.images import ImageData, LabelledImages, image_batch, normalize_images

_TEXT_WINDOWS = 8  # evaluated at a time
_IMAGES = 64


class Task(Protocol):
    """A model with the data it trains on. Worker processes hold copies of it."""

    def init_params(self) -> Any:
        """Draw the parameters."""

    def compute_loss(
        self,
        params: Any,
        step: int,
        part: int,
        *,
        rng: np.random.Generator,
        moe: MoEConfig | None,
        backend: str | Backend | None,
        out: Any,
    ) -> LossResult[Any, Any]:
        """Return the loss of one micro-batch and its gradients, divided by the number of parts."""

    def split(self, data: Any) -> list[Any]:
        """Return the batches of an evaluation of other data."""

    def evaluate(self, params: Any, piece: Any, backend: str | Backend | None) -> Any:
        """Evaluate one of these batches."""

    def sum(self, pieces: Sequence[Any]) -> Evaluation:
        """Return the whole evaluation from those of its batches."""


class TextTask:
    """The language model on ids (N,)."""

    def __init__(self, config: TrainConfig, ids: HostArray) -> None:
        self.config = config
        self.ids = ids

    def init_params(self) -> LanguageParams:
        """Draw the parameters."""
        return init_language_params(self.config.model, self.config.seed)

    def compute_loss(
        self,
        params: LanguageParams,
        step: int,
        part: int,
        *,
        rng: np.random.Generator,
        moe: MoEConfig | None,
        backend: str | Backend | None,
        out: LanguageParams,
    ) -> LossResult[Any, Any]:
        """Return the loss of one micro-batch."""
        config = self.config
        length = config.model.context_length
        inputs, targets = (
            array[part :: config.micro_batches]
            for array in batch(self.ids, length, config.batch_size, config.seed, step)
        )
        return language_loss(
            inputs,
            targets,
            params,
            config.model,
            rng=rng,
            moe=moe,
            backend=backend,
            out=out,
            scale=1.0 / config.micro_batches,
        )

    def split(self, data: HostArray) -> list[Any]:
        """Return inputs and targets."""
        return list(validation_batches(data, self.config.model.context_length, _TEXT_WINDOWS))

    def evaluate(
        self, params: LanguageParams, piece: Any, backend: str | Backend | None
    ) -> BatchEvaluation:
        """Evaluate one batch."""
        return evaluate_batch(params, self.config.model, *piece, backend=backend)

    def sum(self, pieces: Sequence[BatchEvaluation]) -> Evaluation:
        """Return the whole evaluation."""
        return sum_batches(list(pieces))


class VisionTask:
    """The vision model on labelled images."""

    def __init__(self, config: VisionTrainConfig, images: LabelledImages) -> None:
        self.config = config
        self.images = images

    def init_params(self) -> VisionParams:
        """Draw the parameters."""
        return init_vision_params(self.config.model, self.config.seed)

    def compute_loss(
        self,
        params: VisionParams,
        step: int,
        part: int,
        *,
        rng: np.random.Generator,
        moe: MoEConfig | None,
        backend: str | Backend | None,
        out: VisionParams,
    ) -> LossResult[Any, Any]:
        """Return the loss of one micro-batch."""
        config = self.config
        images, labels = image_batch(
            self.images, config.batch_size, config.seed, step, max_shift=config.max_shift
        )
        mine = slice(part, None, config.micro_batches)
        return vision_loss(
            normalize_images(images[mine], config.channel_mean, config.channel_std),
            labels[mine],
            params,
            config.model,
            rng=rng,
            moe=moe,
            backend=backend,
            out=out,
            scale=1.0 / config.micro_batches,
        )

    def split(self, data: LabelledImages) -> list[Any]:
        """Return the number of the first image, images and labels."""
        return [
            (first, data.images[first : first + _IMAGES], data.labels[first : first + _IMAGES])
            for first in range(0, len(data), _IMAGES)
        ]

    def evaluate(
        self, params: VisionParams, piece: Any, backend: str | Backend | None
    ) -> ImageBatchEvaluation:
        """Evaluate one batch."""
        first, raw, labels = piece
        images = normalize_images(raw, self.config.channel_mean, self.config.channel_std)
        return evaluate_image_batch(
            params, self.config.model, images, labels, first=first, backend=backend
        )

    def sum(self, pieces: Sequence[ImageBatchEvaluation]) -> VisionEvaluation:
        """Return the whole evaluation."""
        return sum_image_batches(list(pieces))


def make_task(config: RunConfig, data: Any) -> Task:
    """Return the task of a config on training data: ids (N,), or LabelledImages."""
    if isinstance(config, VisionTrainConfig):
        return VisionTask(config, data)
    if isinstance(config, TrainConfig):
        return TextTask(config, data)
    raise RangeError(
        f"train: config must be a TrainConfig or VisionTrainConfig, got {type(config).__name__}."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What to train on, what to validate on, and as much of the former; sizes in tokens."""

    training: Any
    validation: Any
    sample: Any
    validation_tokens: int


def prepare_data(config: RunConfig, data: str | ImageData) -> Prepared:
    """Split the data of a run.

    Raises
    ------
    CheckpointError
        If they are not those the config was made for.
    DataError
        If a text is too short.
    """
    if isinstance(config, TrainConfig) and isinstance(data, str):
        _check_hash("text", config.text_source, text_sha256(data) == config.text_sha256)
        ids = CharVocabulary(config.characters).encode(data)
        training, validation = split_text(ids, config.model.context_length)
        return Prepared(
            training=training,
            validation=validation,
            sample=training[-len(validation) :],
            validation_tokens=len(validation),
        )
    if isinstance(config, VisionTrainConfig) and isinstance(data, ImageData):
        _check_hash("images", config.data_source, data.sha256() == config.data_sha256)
        return Prepared(
            training=data.train,
            validation=data.test,
            sample=data.train.select(slice(len(data.test))),
            validation_tokens=len(data.test) * config.model.num_patches,
        )
    wanted = "a str" if isinstance(config, TrainConfig) else "ImageData"
    raise RangeError(
        f"train: data must be {wanted} with a {type(config).__name__}, got {type(data).__name__}."
    )


def _check_hash(what: str, source: str, same: bool) -> None:
    if not same:
        raise CheckpointError(
            f"train: {what} must be the one{'s' * (what == 'images')} the run began with "
            f"({source}), got {'others' if what == 'images' else 'another'}. "
            f"Give the same {what}, or start a new run."
        )
