"""Models built from the MoE layer and the rooms around it."""

from npmoe.models.config import LanguageConfig, ModelConfig, TransformerConfig, VisionConfig
from npmoe.models.generate import generate, sample_token
from npmoe.models.language import (
    LanguageParams,
    init_language_params,
    language_backward,
    language_forward,
    language_loss,
)
from npmoe.models.objective import LossResult
from npmoe.models.stack import host_backend
from npmoe.models.vision import (
    VisionParams,
    init_vision_params,
    vision_backward,
    vision_forward,
    vision_loss,
)

__all__ = [
    "LanguageConfig",
    "LanguageParams",
    "LossResult",
    "ModelConfig",
    "TransformerConfig",
    "VisionConfig",
    "VisionParams",
    "generate",
    "host_backend",
    "init_language_params",
    "init_vision_params",
    "language_backward",
    "language_forward",
    "language_loss",
    "sample_token",
    "vision_backward",
    "vision_forward",
    "vision_loss",
]
