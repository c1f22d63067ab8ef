"""Models built from the MoE layer and the rooms around it."""

from npmoe.models.config import LanguageConfig
from npmoe.models.generate import generate, sample_token
from npmoe.models.language import (
    LanguageParams,
    LossResult,
    host_backend,
    init_language_params,
    language_backward,
    language_forward,
    language_loss,
)

__all__ = [
    "LanguageConfig",
    "LanguageParams",
    "LossResult",
    "generate",
    "host_backend",
    "init_language_params",
    "language_backward",
    "language_forward",
    "language_loss",
    "sample_token",
]
