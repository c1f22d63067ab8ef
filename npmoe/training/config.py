"""Everything that decides what a run computes, as one JSON document."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from npmoe.errors import CheckpointError, NpmoeError, RangeError, UnsupportedError
from npmoe.models.config import LanguageConfig, ModelConfig, VisionConfig
from npmoe.training.optimizer import AdamWConfig
from npmoe.training.schedules import ScheduleConfig

FORMAT = "npmoe-run-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Say what a training run computes; workers and folders do not change its result.

    Parameters
    ----------
    model : LanguageConfig or VisionConfig
    optimizer : AdamWConfig
    schedule : ScheduleConfig
    batch_size : int
        Sequences or images per step.
    micro_batches : int
        Equal parts that a step is cut into; their gradients are averaged in fixed order, so the
        result does not depend on how many of them run at once. Capacity and balance losses are
        those of a part.
    selection_bias_rate : float
        Step of `npmoe.update_selection_bias` after every optimizer step, by the choices of that
        step; positive with model.moe.selection_bias, else 0.
    seed : int
        Initial values, data order, dropout and noise.
    log_every, eval_every, checkpoint_every : int
        Steps between records, evaluations and checkpoints; the last step always has all three.

    Raises
    ------
    RangeError
        If a number is out of range.
    UnsupportedError
        For a selection bias of identity experts.
    """

    model: ModelConfig
    optimizer: AdamWConfig
    schedule: ScheduleConfig
    batch_size: int = 16
    micro_batches: int = 2
    selection_bias_rate: float = 0.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 250
    checkpoint_every: int = 100

    task: ClassVar[str]
    model_type: ClassVar[type[LanguageConfig] | type[VisionConfig]]

    def __post_init__(self) -> None:
        """Check every number."""
        name = type(self).__name__
        for field in ("batch_size", "micro_batches", "log_every", "eval_every", "checkpoint_every"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise RangeError(
                    f"{name}: {field} must be an integer of at least 1, "
                    f"got {getattr(self, field)!r}."
                )
        if not isinstance(self.seed, int) or self.seed < 0:
            raise RangeError(
                f"{name}: seed must be an integer and not negative, got {self.seed!r}."
            )
        moe = self.model.moe
        if self.schedule.router_noise_std and (moe is None or moe.routing == "soft"):
            what = "without model.moe" if moe is None else "with model.moe.routing='soft'"
            model = "dense model" if moe is None else "soft layer"
            raise RangeError(
                f"{name}: schedule.router_noise_std must stay 0 {what}, got "
                f"{self.schedule.router_noise_std}. A {model} has no router to disturb."
            )
        biased = moe is not None and moe.selection_bias
        if not 0 <= self.selection_bias_rate < float("inf") or biased != (
            self.selection_bias_rate > 0
        ):
            raise RangeError(
                f"{name}: selection_bias_rate must be positive with model.moe.selection_bias=True "
                f"and 0 without, got {self.selection_bias_rate!r} with {biased}. The bias moves by "
                "it after every step."
            )
        if moe is not None and biased and moe.num_identity_experts:
            raise UnsupportedError(
                f"{name}: model.moe.num_identity_experts must be 0 with selection_bias=True, got "
                f"{moe.num_identity_experts}. Balancing counts the experts that compute."
            )
        if self.batch_size % self.micro_batches:
            raise RangeError(
                f"{name}: batch_size must be a multiple of micro_batches = "
                f"{self.micro_batches}, got {self.batch_size}."
            )

    @property
    def steps(self) -> int:
        """Length of the run."""
        return self.schedule.steps

    @property
    def tokens_per_step(self) -> int:
        """Characters or patches that one step trains on."""
        return self.batch_size * self.model.sequence_length

    def to_json(self) -> str:
        """Return the config as JSON text."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["model"] = self.model.to_dict()
        values["optimizer"] = dataclasses.asdict(self.optimizer)
        values["schedule"] = dataclasses.asdict(self.schedule)
        document = {"format": FORMAT, "task": self.task, **values}
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "text") -> Self:
        """Return the config that `to_json` wrote.

        Raises
        ------
        CheckpointError
            If it is not such a document, or belongs to another task.
        """
        function = f"{cls.__name__}.from_json"
        try:
            values: Any = json.loads(text)
            if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
                raise CheckpointError(
                    f"{function}: {where} must be the config.json of a run (format "
                    f"{FORMAT!r}), got something else. Check the folder."
                )
            task = values.pop("task", TrainConfig.task)
            if task != cls.task:
                raise CheckpointError(
                    f"{function}: {where} must be the config.json of a run of task {cls.task!r}, "
                    f"got {task!r}. It holds another kind of model."
                )
            return cls(
                **{
                    **values,
                    "model": cls.model_type.from_dict(values["model"]),
                    "optimizer": AdamWConfig(**values["optimizer"]),
                    "schedule": ScheduleConfig(**values["schedule"]),
                }
            )
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, NpmoeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise CheckpointError(
                f"{function}: {where} must be a readable config.json, got {reason}. "
                "It is damaged or of another version: restore it from a copy, or start a new run."
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(RunConfig):
    """Say what a run of the language model computes.

    Parameters
    ----------
    model : LanguageConfig
    characters : str
        The vocabulary.
    text_source, text_sha256 : str
        Where the text came from, and the hash of its UTF-8 bytes, so that a run is not resumed
        on another text.
    others
        As for `RunConfig`.
    """

    model: LanguageConfig
    characters: str
    text_source: str
    text_sha256: str

    task: ClassVar[str] = "text"
    model_type: ClassVar[type[LanguageConfig]] = LanguageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTrainConfig(RunConfig):
    """Say what a run of the vision model computes.

    Parameters
    ----------
    model : VisionConfig
    data_source, data_sha256 : str
        Where the images came from, and their hash (`ImageData.sha256`), so that a run is not
        resumed on others.
    channel_mean, channel_std : tuple of float
        Of the raw training images, by channel: the model sees (raw - mean) / std.
    max_shift : int
        Training images are moved by up to so many pixels along each axis, drawn anew each time;
        what moves in is 0.
    others
        As for `RunConfig`.
    """

    model: VisionConfig
    data_source: str
    data_sha256: str
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    max_shift: int = 0

    task: ClassVar[str] = "vision"
    model_type: ClassVar[type[VisionConfig]] = VisionConfig

    def __post_init__(self) -> None:
        """Check every number."""
        RunConfig.__post_init__(self)
        for name in ("channel_mean", "channel_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists in JSON
            values = getattr(self, name)
            in_range = all(
                0 <= v < float("inf") and (v > 0 or name == "channel_mean") for v in values
            )
            if len(values) != self.model.channels or not in_range:
                raise RangeError(
                    f"VisionTrainConfig: {name} must hold one finite number for each of "
                    f"{self.model.channels} channels, above 0 for channel_std, got {values}."
                )
        if not isinstance(self.max_shift, int) or not 0 <= self.max_shift < self.model.image_size:
            raise RangeError(
                "VisionTrainConfig: max_shift must be an integer in "
                f"0..{self.model.image_size - 1}, got {self.max_shift!r}."
            )


def parse_config(text: str, where: str = "text") -> TrainConfig | VisionTrainConfig:
    """Return the config of a run of either task; raise as `RunConfig.from_json` does."""
    try:
        values = json.loads(text)
        vision = isinstance(values, dict) and values.get("task") == VisionTrainConfig.task
    except ValueError:
        vision = False  # the message is from_json's
    return (VisionTrainConfig if vision else TrainConfig).from_json(text, where)


def text_sha256(text: str) -> str:
    """Return the hash by which a resumed run knows its text."""
    return hashlib.sha256(text.encode()).hexdigest()
