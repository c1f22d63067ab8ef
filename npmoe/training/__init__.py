"""Training: optimizer, schedules, data, checkpoints, the log and the loop."""

from npmoe.training.checkpoint import load_checkpoint, save_checkpoint
from npmoe.training.config import TrainConfig
from npmoe.training.data import (
    CHARACTER_CLASSES,
    CharVocabulary,
    batch,
    character_class,
    python_topics_text,
    read_text,
    split_text,
    validation_batches,
    windows_per_epoch,
)
from npmoe.training.evaluate import Evaluation, evaluate
from npmoe.training.files import RunFolder, write_text_atomic
from npmoe.training.log import JsonlLog, read_log
from npmoe.training.loop import Progress, TrainResult, load_trained, read_config, train
from npmoe.training.optimizer import AdamW, AdamWConfig, AdamWState, ParameterGroup, make_groups
from npmoe.training.recipe import language_recipe, steps_for_seconds, with_steps
from npmoe.training.schedules import ScheduleConfig, learning_rate, router_noise
from npmoe.training.trainer import StepReport, Trainer
from npmoe.training.workers import Workers, default_workers, shared_array

__all__ = [
    "CHARACTER_CLASSES",
    "AdamW",
    "AdamWConfig",
    "AdamWState",
    "CharVocabulary",
    "Evaluation",
    "JsonlLog",
    "ParameterGroup",
    "Progress",
    "RunFolder",
    "ScheduleConfig",
    "StepReport",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "Workers",
    "batch",
    "character_class",
    "default_workers",
    "evaluate",
    "language_recipe",
    "learning_rate",
    "load_checkpoint",
    "load_trained",
    "make_groups",
    "python_topics_text",
    "read_config",
    "read_log",
    "read_text",
    "router_noise",
    "save_checkpoint",
    "shared_array",
    "split_text",
    "steps_for_seconds",
    "train",
    "validation_batches",
    "windows_per_epoch",
    "with_steps",
    "write_text_atomic",
]
