"""The text half of ``npmoe train``: its options, data, pictures and sample."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from npmoe import plots
from npmoe.backends import Backend
from npmoe.models import generate
from npmoe.training import (
    CharVocabulary,
    RunFolder,
    TrainConfig,
    TrainResult,
    language_recipe,
    python_topics_text,
    read_log,
    read_text,
)
from npmoe.training.recipe import DEFAULT_STEPS

TOPICS = "pydoc_data.topics"
OPTIONS = {"context_length": "context_length"}
SOURCES = ("text",)
UNIT, TOKENS = "character", "characters"
STEPS = DEFAULT_STEPS
_PROMPT = "The "
_TEMPERATURE = 0.6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this task."""
    text = parser.add_argument_group("text")
    text.add_argument("--text", metavar="FILE", help="UTF-8 text (Python's documentation)")
    text.add_argument("--context-length", type=int, metavar="L", help="(128)")


def load(options: argparse.Namespace, config: TrainConfig | None) -> tuple[str, str]:
    """Return the text and where it comes from: an option, the run, or Python's documentation."""
    source = TOPICS if config is None else config.text_source
    path = options.text or source
    if path == TOPICS:
        return python_topics_text(), TOPICS
    text = read_text(path)
    return text, str(Path(path).resolve())


def source_of(config: TrainConfig) -> str:
    """Return where a run's text came from."""
    return config.text_source


recipe = language_recipe


def draw(config: TrainConfig, folder: RunFolder, result: TrainResult, _: str) -> None:
    """Draw the curves and the experts."""
    records = read_log(folder.log)
    plots.plot_curves(records, folder.curves)
    if config.model.moe is not None and result.evaluation is not None:
        plots.plot_experts(records, result.evaluation.served, config.characters, folder.experts)


def summary(_: TrainResult) -> dict[str, Any]:
    """Return what this task adds to the summary."""
    return {}


def summary_rows(_: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what this task prints first."""
    return []


def print_sample(config: TrainConfig, result: TrainResult, backend: Backend) -> None:
    """Print what the model writes after a common word, or else after its last character."""
    vocabulary = CharVocabulary(config.characters)
    known = set(_PROMPT) <= set(config.characters)
    prompt = _PROMPT if known else config.characters[-1]
    ids = generate(
        vocabulary.encode(prompt),
        400,
        result.params,
        config.model,
        seed=config.seed,
        temperature=_TEMPERATURE,
        backend=backend,
    )
    print(f"\nA sample, after {prompt!r} at temperature {_TEMPERATURE}:")
    print(prompt + vocabulary.decode(list(ids)))
