"""Training: optimizer, schedules, data, checkpoints, the log and the loop."""

from npmoe.training.checkpoint import load_checkpoint, save_checkpoint
from npmoe.training.config import RunConfig, TrainConfig, VisionTrainConfig
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
from npmoe.training.evaluate_images import VisionEvaluation, evaluate_image_batch
from npmoe.training.files import RunFolder, write_text_atomic
from npmoe.training.image_files import read_cifar10, read_idx, read_images
from npmoe.training.images import ImageData, LabelledImages, image_batch, uci_digits
from npmoe.training.log import JsonlLog, read_log
from npmoe.training.loop import (
    Progress,
    TrainResult,
    load_trained,
    load_trained_vision,
    read_config,
    train,
)
from npmoe.training.optimizer import AdamW, AdamWConfig, AdamWState, ParameterGroup, make_groups
from npmoe.training.recipe import language_recipe, steps_for_seconds, with_options, with_steps
from npmoe.training.schedules import ScheduleConfig, learning_rate, router_noise
from npmoe.training.tasks import prepare_data
from npmoe.training.trainer import StepReport, Trainer
from npmoe.training.vision_recipe import vision_recipe
from npmoe.training.workers import Workers, default_workers, shared_array

__all__ = [
    "CHARACTER_CLASSES",
    "AdamW",
    "AdamWConfig",
    "AdamWState",
    "CharVocabulary",
    "Evaluation",
    "ImageData",
    "JsonlLog",
    "LabelledImages",
    "ParameterGroup",
    "Progress",
    "RunConfig",
    "RunFolder",
    "ScheduleConfig",
    "StepReport",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "VisionEvaluation",
    "VisionTrainConfig",
    "Workers",
    "batch",
    "character_class",
    "default_workers",
    "evaluate",
    "evaluate_image_batch",
    "image_batch",
    "language_recipe",
    "learning_rate",
    "load_checkpoint",
    "load_trained",
    "load_trained_vision",
    "make_groups",
    "prepare_data",
    "python_topics_text",
    "read_cifar10",
    "read_config",
    "read_idx",
    "read_images",
    "read_log",
    "read_text",
    "router_noise",
    "save_checkpoint",
    "shared_array",
    "split_text",
    "steps_for_seconds",
    "train",
    "uci_digits",
    "validation_batches",
    "vision_recipe",
    "windows_per_epoch",
    "with_options",
    "with_steps",
    "write_text_atomic",
]
