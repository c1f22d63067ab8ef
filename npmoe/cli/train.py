"""``npmoe train``: train a character model and leave everything about it in a run folder."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from npmoe import plots
from npmoe.backends import Backend
from npmoe.cli._common import check_json, print_table, write_json
from npmoe.errors import BackendUnavailableError, CheckpointError, RangeError
from npmoe.models import generate, host_backend
from npmoe.training import (
    CharVocabulary,
    Progress,
    RunFolder,
    TrainConfig,
    TrainResult,
    python_topics_text,
    read_config,
    read_log,
    read_text,
    split_text,
    train,
)
from npmoe.training.recipe import DEFAULT_STEPS, language_recipe, steps_for_seconds, with_steps
from npmoe.training.workers import default_workers

HELP = "train a character model"
DESCRIPTION = (
    "Train a character-level language model with Mixture-of-Experts blocks. Without arguments: "
    "on the language documentation that comes with Python, within three minutes on two cores."
)
TOPICS = "pydoc_data.topics"
_PROMPT = "The "
_TEMPERATURE = 0.6
_MODEL_OPTIONS = {
    "experts": "num_experts",
    "top_k": "top_k",
    "capacity_factor": "capacity_factor",
    "hidden_size": "hidden_size",
    "layers": "num_layers",
    "context_length": "context_length",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate",
}
_LEAST = {
    "steps": 1,
    "seed": 0,
    "workers": 1,
    "experts": 1,
    "top_k": 1,
    "hidden_size": 2,
    "layers": 1,
    "context_length": 1,
    "batch_size": 1,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (Python's documentation)")
    parser.add_argument("--out", metavar="DIR", help="run folder (the next free runs/N)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help=f"steps ({DEFAULT_STEPS})")
    length.add_argument("--seconds", type=float, metavar="S", help="budget of time, instead")
    parser.add_argument("--seed", type=int, metavar="N", help="of everything random (0)")
    parser.add_argument("--backend", help="backend of the MoE layers (numpy)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="does not change the result (2, if available)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the summary to FILE")
    model = parser.add_argument_group("model")
    model.add_argument("--dense", action="store_true", help="same active parameters, no experts")
    model.add_argument("--experts", type=int, metavar="E", help="experts per layer (8)")
    model.add_argument("--top-k", type=int, metavar="K", help="experts per token (2)")
    model.add_argument("--capacity-factor", metavar="F", help="for example 1.25 (dropless)")
    model.add_argument("--hidden-size", type=int, metavar="H", help="(64)")
    model.add_argument("--layers", type=int, metavar="N", help="(4)")
    model.add_argument("--context-length", type=int, metavar="L", help="(128)")
    model.add_argument("--batch-size", type=int, metavar="B", help="sequences per step (8)")
    model.add_argument("--learning-rate", type=float, metavar="R", help="(0.004)")


def run(options: argparse.Namespace) -> int:
    """Train, print a summary and a sample, draw the pictures."""
    begin = time.perf_counter()
    # Known before the first step, not after the last.
    _check_options(options)
    check_json(options.json)
    _require_packages()
    backend = host_backend("train", options.backend)
    workers = default_workers() if options.workers is None else options.workers
    folder, config, text = _resume(options) if options.resume else _start(options, workers, backend)
    _print_plan(config, folder, workers)
    with (
        _ctrl_c() as interrupted,
        closing(_Bar(config.steps)) as bar,
        warnings.catch_warnings(),
    ):
        # What overflows is reported by the step that it spoils.
        warnings.simplefilter("ignore", RuntimeWarning)
        result = train(
            config,
            text,
            folder,
            workers=workers,
            backend=backend,
            on_step=bar.update,
            should_stop=lambda: bool(interrupted),
        )
    if result.evaluation is None:
        print(
            f"Interrupted after step {result.step} of {config.steps}; everything is saved. "
            f"Continue with: npmoe train --resume --out {shlex.quote(str(folder.path))}",
            file=sys.stderr,
        )
        return 130
    _draw(config, folder, result)
    summary = _summary(config, result, time.perf_counter() - begin)
    _print_summary(summary, folder)
    _print_sample(config, result, backend)
    write_json(options.json, summary)
    return 0


def _start(
    options: argparse.Namespace, workers: int, backend: Backend
) -> tuple[RunFolder, TrainConfig, str]:
    if options.text is None:
        text, source = python_topics_text(), TOPICS
    else:
        text, source = read_text(options.text), str(Path(options.text).resolve())
    given = {
        field: getattr(options, name)
        for name, field in _MODEL_OPTIONS.items()
        if getattr(options, name) is not None
    }
    if options.dense and "capacity_factor" in given:
        raise RangeError(
            "train: --capacity-factor must not be given with --dense, got both. "
            "A dense model drops nothing."
        )
    config = language_recipe(
        text,
        source,
        steps=DEFAULT_STEPS if options.steps is None else options.steps,
        seed=options.seed or 0,
        dense=options.dense,
        **given,
    )
    ids = CharVocabulary(config.characters).encode(text)
    split_text(ids, config.model.context_length)  # too short a text leaves no folder behind
    folder = RunFolder.create(_next_folder() if options.out is None else options.out)
    if options.seconds is not None:
        steps = steps_for_seconds(config, text, options.seconds, workers=workers, backend=backend)
        config = with_steps(config, steps)
    return folder, config, text


def _resume(options: argparse.Namespace) -> tuple[RunFolder, TrainConfig, str]:
    if options.out is None:
        raise CheckpointError("train: --out must name the run with --resume, got none.")
    fixed = [*_MODEL_OPTIONS, "steps", "seconds", "seed"]
    changed = [name for name in fixed if getattr(options, name) is not None]
    if options.dense:
        changed.append("dense")
    if changed:
        raise CheckpointError(
            f"train: {_flag(changed[0])} must not be given with --resume, got "
            f"{getattr(options, changed[0])}. The run keeps the settings it began with."
        )
    folder = RunFolder.open(options.out)
    config = read_config(folder)
    source = options.text or config.text_source
    return folder, config, python_topics_text() if source == TOPICS else read_text(source)


def _next_folder() -> Path:
    """Return runs/1, or the first number that is free."""
    number = 1
    while (Path("runs") / str(number)).exists():
        number += 1
    return Path("runs") / str(number)


def _check_options(options: argparse.Namespace) -> None:
    """Raise for numbers out of range, under the names that the user knows."""
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise RangeError(f"train: {_flag(name)} must be at least {least}, got {value}.")
    for name in ("seconds", "learning_rate"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise RangeError(f"train: {_flag(name)} must be positive and finite, got {value}.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _require_packages() -> None:
    """Raise before the work starts if a package is missing that its end would need."""
    for package in ("matplotlib", "safetensors", "threadpoolctl", "tqdm"):
        try:
            __import__(package)
        except ImportError as error:
            raise BackendUnavailableError(
                f"train: package {package} must be installed, got none. "
                "Run: pip install 'npmoe[cli]'"
            ) from error


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Collect the first Ctrl-C (or SIGTERM) in a list; a second one interrupts at once."""
    received: list[int] = []

    def handler(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nSaving after this step; once more to stop at once.\n")

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class _Bar:
    """The progress bar: loss, speed, load imbalance and drop rate of the last steps.

    It appears with the first step, so that an error before it stands alone.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.bar: Any = None
        self.val_loss = ""

    def update(self, progress: Progress) -> None:
        """Show one step."""
        from tqdm import tqdm  # noqa: PLC0415

        report = progress.report
        if self.bar is None:
            seconds = 0.5 if sys.stderr.isatty() else 30.0  # short logs of unattended runs
            self.bar = tqdm(
                total=self.steps,
                initial=report.step,
                unit="step",
                mininterval=seconds,
                maxinterval=max(10.0, seconds),
                dynamic_ncols=True,
            )
        if progress.val_loss is not None:
            self.val_loss = f" val {progress.val_loss:.3f}"
        self.bar.set_postfix_str(
            f"loss {report.cross_entropy:.3f}{self.val_loss}, "
            f"{progress.tokens_per_second:,.0f} tok/s, imbalance {report.load_imbalance:.2f}, "
            f"dropped {report.drop_rate:.1%}",
            refresh=False,
        )
        self.bar.update(report.step + 1 - self.bar.n)

    def close(self) -> None:
        """Leave the last state on a line of its own."""
        if self.bar is not None:
            self.bar.close()


def _print_plan(config: TrainConfig, folder: RunFolder, workers: int) -> None:
    model = config.model
    moe = model.moe
    kind = "dense blocks" if moe is None else f"{moe.num_experts} experts, top-{moe.top_k}"
    print(
        f"Training on {config.text_source}: {model.num_layers} layers of {model.hidden_size}, "
        f"{kind}, {config.steps} steps of {config.tokens_per_step:,} characters, "
        f"{workers} process{'es' if workers > 1 else ''}; run folder {folder.path}"
    )


def _draw(config: TrainConfig, folder: RunFolder, result: TrainResult) -> None:
    records = read_log(folder.log)
    plots.plot_curves(records, folder.curves)
    if config.model.moe is not None and result.evaluation is not None:
        plots.plot_experts(records, result.evaluation.served, config.characters, folder.experts)


def _summary(config: TrainConfig, result: TrainResult, seconds: float) -> dict[str, Any]:
    evaluation = result.evaluation
    if evaluation is None:
        raise CheckpointError("train: the run must be finished for a summary.")
    return {
        "val_loss": evaluation.loss,
        "train_loss": result.train_loss,
        "tokens_per_second": result.tokens_per_second,
        "seconds": seconds,
        "steps": result.step,
        "drop_rate": evaluation.drop_rate,
        "load_imbalance": evaluation.load_imbalance,
        "seed": config.seed,
        "parameters": result.num_parameters,
    }


def _print_summary(summary: dict[str, Any], folder: RunFolder) -> None:
    print()
    print_table(
        [
            ("validation loss", f"{summary['val_loss']:.4f} nats per character"),
            ("training loss", f"{summary['train_loss']:.4f} nats per character"),
            ("parameters", f"{summary['parameters']:,}"),
            ("throughput", f"{summary['tokens_per_second']:,.0f} characters per second"),
            ("time", f"{summary['seconds']:.1f} s for {summary['steps']} steps"),
            ("load imbalance", f"{summary['load_imbalance']:.3f} (0 is perfect balance)"),
            ("dropped routes", f"{summary['drop_rate']:.2%}"),
            ("run folder", str(folder.path)),
        ]
    )


def _print_sample(config: TrainConfig, result: TrainResult, backend: Backend) -> None:
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
