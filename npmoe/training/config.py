"""TrainConfig: everything that decides what a run computes, as one JSON document."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from npmoe.errors import CheckpointError, NpmoeError, RangeError, UnsupportedError
from npmoe.models.config import LanguageConfig
from npmoe.training.optimizer import AdamWConfig
from npmoe.training.schedules import ScheduleConfig

FORMAT = "npmoe-run-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Say what a training run computes; workers and folders do not change its result.

    Parameters
    ----------
    model : LanguageConfig
    optimizer : AdamWConfig
    schedule : ScheduleConfig
    characters : str
        The vocabulary.
    text_source, text_sha256 : str
        Where the text came from, and the hash of its UTF-8 bytes, so that a run is not resumed
        on another text.
    batch_size : int
        Sequences per step.
    micro_batches : int
        Equal parts that a step is cut into; their gradients are averaged in fixed order, so the
        result does not depend on how many of them run at once. Capacity and balance losses are
        those of a part.
    seed : int
        Initial values, data order, dropout and noise.
    log_every, eval_every, checkpoint_every : int
        Steps between records, evaluations and checkpoints; the last step always has all three.

    Raises
    ------
    RangeError
        If a number is out of range.
    """

    model: LanguageConfig
    optimizer: AdamWConfig
    schedule: ScheduleConfig
    characters: str
    text_source: str
    text_sha256: str
    batch_size: int = 16
    micro_batches: int = 2
    seed: int = 0
    log_every: int = 10
    eval_every: int = 250
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Check every number."""
        for name in ("batch_size", "micro_batches", "log_every", "eval_every", "checkpoint_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise RangeError(
                    f"TrainConfig: {name} must be an integer of at least 1, "
                    f"got {getattr(self, name)!r}."
                )
        if not isinstance(self.seed, int) or self.seed < 0:
            raise RangeError(
                f"TrainConfig: seed must be an integer and not negative, got {self.seed!r}."
            )
        if self.model.moe is None and self.schedule.router_noise_std:
            raise RangeError(
                "TrainConfig: schedule.router_noise_std must stay 0 without model.moe, got "
                f"{self.schedule.router_noise_std}. A dense model has no router."
            )
        if self.model.moe is not None and self.model.moe.selection_bias:
            raise UnsupportedError(
                "TrainConfig: model.moe.selection_bias must be False, got True. Nothing would "
                "update it: the trainer balances by its auxiliary loss."
            )
        if self.batch_size % self.micro_batches:
            raise RangeError(
                f"TrainConfig: batch_size must be a multiple of micro_batches = "
                f"{self.micro_batches}, got {self.batch_size}."
            )

    @property
    def steps(self) -> int:
        """Length of the run."""
        return self.schedule.steps

    @property
    def tokens_per_step(self) -> int:
        """Characters that one step trains on."""
        return self.batch_size * self.model.context_length

    def to_json(self) -> str:
        """Return the config as JSON text."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["model"] = self.model.to_dict()
        values["optimizer"] = dataclasses.asdict(self.optimizer)
        values["schedule"] = dataclasses.asdict(self.schedule)
        return json.dumps({"format": FORMAT, **values}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "text") -> TrainConfig:
        """Return the config that `to_json` wrote.

        Raises
        ------
        CheckpointError
            If it is not such a document.
        """
        try:
            values: Any = json.loads(text)
            if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
                raise CheckpointError(
                    f"TrainConfig.from_json: {where} must be the config.json of a run (format "
                    f"{FORMAT!r}), got something else. Check the folder."
                )
            return cls(
                **{
                    **values,
                    "model": LanguageConfig.from_dict(values["model"]),
                    "optimizer": AdamWConfig(**values["optimizer"]),
                    "schedule": ScheduleConfig(**values["schedule"]),
                }
            )
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, NpmoeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise CheckpointError(
                f"TrainConfig.from_json: {where} must be a readable config.json, got {reason}. "
                "It is damaged or of another version: restore it from a copy, or start a new run."
            ) from error


def text_sha256(text: str) -> str:
    """Return the hash by which a resumed run knows its text."""
    return hashlib.sha256(text.encode()).hexdigest()
