"""``npmoe train``: train a model and leave everything about it in a run folder."""

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

from npmoe.backends import Backend
from npmoe.cli import _train_text, _train_vision
from npmoe.cli._common import check_output, print_table, write_json
from npmoe.errors import BackendUnavailableError, CheckpointError, RangeError
from npmoe.models import host_backend
from npmoe.training import (
    ImageData,
    Progress,
    RunFolder,
    TrainConfig,
    TrainResult,
    VisionTrainConfig,
    prepare_data,
    read_config,
    train,
)
from npmoe.training.recipe import steps_for_seconds, with_options, with_steps
from npmoe.training.workers import default_workers

HELP = "train a character model or an image classifier"
DESCRIPTION = (
    "Train a transformer with Mixture-of-Experts blocks. Without arguments: a character model on "
    "the language documentation that comes with Python, within three minutes on two cores. With "
    "--task vision: a classifier of the handwritten digits that come with npmoe, within two."
)
_TASKS = {"text": _train_text, "vision": _train_vision}
_MODEL_OPTIONS = {
    "experts": "num_experts",
    "top_k": "top_k",
    "capacity_factor": "capacity_factor",
    "hidden_size": "hidden_size",
    "layers": "num_layers",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate",
}
# Arguments of `with_options`, under the same names.
_ROUTER_OPTIONS = ("balance", "router_noise", "router_lr_factor", "freeze")
_LEAST = {
    "steps": 1,
    "seed": 0,
    "workers": 1,
    "experts": 1,
    "top_k": 1,
    "hidden_size": 2,
    "layers": 1,
    "context_length": 1,
    "patch_size": 1,
    "batch_size": 1,
}
_POSITIVE = ("seconds", "learning_rate")
_NOT_NEGATIVE = ("router_noise", "router_lr_factor")

Config = TrainConfig | VisionTrainConfig
Data = str | ImageData


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--task", choices=list(_TASKS), help="what is learnt (text)")
    parser.add_argument("--out", metavar="DIR", help="run folder (the next free runs/N)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="steps (1200)")
    length.add_argument("--seconds", type=float, metavar="S", help="budget of time, instead")
    parser.add_argument("--seed", type=int, metavar="N", help="of everything random (0)")
    parser.add_argument("--backend", help="of the MoE layers (numpy); 'numba' runs attention too")
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
    model.add_argument("--batch-size", type=int, metavar="B", help="sequences per step (8)")
    model.add_argument("--learning-rate", type=float, metavar="R", help="(0.004)")
    router = parser.add_argument_group("router")
    router.add_argument(
        "--balance",
        choices=["loss", "bias", "none"],
        help="auxiliary losses, or a selection bias moved after every step, or neither (loss)",
    )
    router.add_argument(
        "--router-noise", type=float, metavar="S", help="fading out over half of the run (0)"
    )
    router.add_argument(
        "--router-lr-factor", type=float, metavar="F", help="of the learning rate (1)"
    )
    router.add_argument(
        "--freeze", choices=["experts", "router"], help="leave these parameters as they begin"
    )
    for task in _TASKS.values():
        task.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Train, print a summary and a sample, draw the pictures."""
    begin = time.perf_counter()
    # Known before the first step, not after the last.
    _check_options(options)
    check_output("--json", options.json)
    _require_packages()
    backend = host_backend("train", options.backend)
    workers = default_workers() if options.workers is None else options.workers
    folder, config, data = _resume(options) if options.resume else _start(options, workers, backend)
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
            data,
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
    _draw(config, folder, result, data)
    summary = _summary(config, result, time.perf_counter() - begin)
    _print_summary(config, summary, folder)
    _print_sample(config, result, backend)
    write_json(options.json, summary)
    return 0


def _start(
    options: argparse.Namespace, workers: int, backend: Backend
) -> tuple[RunFolder, Config, Data]:
    task = _TASKS[options.task or "text"]
    given = {
        field: getattr(options, name)
        for name, field in {**_MODEL_OPTIONS, **task.OPTIONS}.items()
        if getattr(options, name) is not None
    }
    meaning = {
        "capacity_factor": "drops nothing",
        **dict.fromkeys(_ROUTER_OPTIONS, "routes nothing"),
    }
    for name, nothing in meaning.items():
        if options.dense and getattr(options, name) is not None:
            raise RangeError(
                f"train: {_flag(name)} must not be given with --dense, got both. "
                f"A dense model {nothing}."
            )
    data, source = task.load(options, None)
    steps = task.STEPS if options.steps is None else options.steps
    config: Config = task.recipe(
        data,
        source,
        steps=steps,
        seed=options.seed or 0,
        dense=options.dense,
        **given,
    )
    router = {n: getattr(options, n) for n in _ROUTER_OPTIONS if getattr(options, n) is not None}
    config = with_options(config, **router)
    prepare_data(config, data)  # too short a text leaves no folder behind
    folder = RunFolder.create(_next_folder() if options.out is None else options.out)
    if options.seconds is not None:
        steps = steps_for_seconds(config, data, options.seconds, workers=workers, backend=backend)
        config = with_steps(config, steps)
    return folder, config, data


def _resume(options: argparse.Namespace) -> tuple[RunFolder, Config, Data]:
    if options.out is None:
        raise CheckpointError("train: --out must name the run with --resume, got none.")
    fixed = [*_MODEL_OPTIONS, *_ROUTER_OPTIONS, "steps", "seconds", "seed"]
    fixed += [name for task in _TASKS.values() for name in task.OPTIONS]
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
    if options.task not in (None, config.task):
        raise CheckpointError(
            f"train: --task must be that of the run in {folder.path}, {config.task}, got "
            f"{options.task}. Leave it out, or start a new run."
        )
    task = _TASKS[config.task]
    _check_foreign(options, config.task)
    return folder, config, task.load(options, config)[0]


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
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        value = getattr(options, name)
        if value is None or 0 < value < float("inf") or (value == 0 and name in _NOT_NEGATIVE):
            continue
        kind = "finite and not negative" if name in _NOT_NEGATIVE else "positive and finite"
        raise RangeError(f"train: {_flag(name)} must be {kind}, got {value}.")
    if not options.resume:
        _check_foreign(options, options.task or "text")


def _check_foreign(options: argparse.Namespace, task: str) -> None:
    """Raise for options of the other task."""
    for other, module in _TASKS.items():
        for name in (*module.OPTIONS, *module.SOURCES):
            value = getattr(options, name)
            if other != task and value is not None:
                raise RangeError(
                    f"train: {_flag(name)} must not be given with --task {task}, got {value}. "
                    f"It belongs to --task {other}."
                )


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


def _print_plan(config: Config, folder: RunFolder, workers: int) -> None:
    model, task = config.model, _TASKS[config.task]
    moe = model.moe
    kind = "dense blocks"
    if moe is not None:
        how = f"top-{moe.top_k}" if moe.routing == "token_choice" else moe.routing.replace("_", " ")
        kind = f"{moe.num_experts} experts, {how}"
    print(
        f"Training on {task.source_of(config)}: {model.num_layers} layers of {model.hidden_size}, "
        f"{kind}, {config.steps} steps of {config.tokens_per_step:,} {task.TOKENS}, "
        f"{workers} process{'es' if workers > 1 else ''}; run folder {folder.path}"
    )


def _draw(config: Config, folder: RunFolder, result: TrainResult, data: Data) -> None:
    _TASKS[config.task].draw(config, folder, result, data)


def _summary(config: Config, result: TrainResult, seconds: float) -> dict[str, Any]:
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
        **_TASKS[config.task].summary(result),
    }


def _print_summary(config: Config, summary: dict[str, Any], folder: RunFolder) -> None:
    task = _TASKS[config.task]
    print()
    print_table(
        [
            *task.summary_rows(summary),
            ("validation loss", f"{summary['val_loss']:.4f} nats per {task.UNIT}"),
            ("training loss", f"{summary['train_loss']:.4f} nats per {task.UNIT}"),
            ("parameters", f"{summary['parameters']:,}"),
            ("throughput", f"{summary['tokens_per_second']:,.0f} {task.TOKENS} per second"),
            ("time", f"{summary['seconds']:.1f} s for {summary['steps']} steps"),
            ("load imbalance", f"{summary['load_imbalance']:.3f} (0 is perfect balance)"),
            ("dropped routes", f"{summary['drop_rate']:.2%}"),
            ("run folder", str(folder.path)),
        ]
    )


def _print_sample(config: Config, result: TrainResult, backend: Backend) -> None:
    _TASKS[config.task].print_sample(config, result, backend)
