"""The training loop: steps, evaluation, log and checkpoints in one run folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from npmoe.backends import Backend
from npmoe.errors import BackendUnavailableError, CheckpointError
from npmoe.models.language import LanguageParams, init_language_params
from npmoe.models.stack import host_backend
from npmoe.models.vision import VisionParams, init_vision_params
from npmoe.training.checkpoint import load_checkpoint, save_checkpoint
from npmoe.training.config import RunConfig, TrainConfig, VisionTrainConfig, parse_config
from npmoe.training.evaluate import Evaluation
from npmoe.training.evaluate_images import VisionEvaluation
from npmoe.training.files import RunFolder, exists, write_text_atomic
from npmoe.training.images import ImageData
from npmoe.training.log import JsonlLog, input_names, specialisation
from npmoe.training.tasks import prepare_data
from npmoe.training.trainer import StepReport, Trainer, load_params
from npmoe.tree import named_arrays, num_elements


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What the caller hears after every step."""

    report: StepReport
    steps: int
    tokens_per_second: float
    val_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a run ends with; the last two are None if it was interrupted.

    Attributes
    ----------
    step : int
        Steps made, over all sessions.
    tokens_per_second : float
        Training throughput of this session, evaluation and checkpoints not counted.
    params : LanguageParams or VisionParams
    evaluation : Evaluation or VisionEvaluation or None
        On the validation text, or the test images.
    train_loss : float or None
        The same loss on as much of what was trained on: the end of the training text, or the
        first of the training images, unmoved.
    """

    step: int
    tokens_per_second: float
    params: Any
    evaluation: Evaluation | None
    train_loss: float | None

    @property
    def num_parameters(self) -> int:
        """How many numbers were trained."""
        return num_elements(self.params)


@contextlib.contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Hold every BLAS call to one thread: its threads then cannot change a bit of the result.

    Raises
    ------
    BackendUnavailableError
        If threadpoolctl is not installed.
    """
    try:
        from threadpoolctl import threadpool_limits  # noqa: PLC0415
    except ImportError as error:
        raise BackendUnavailableError(
            "train: package threadpoolctl must be installed, got none. "
            "Run: pip install 'npmoe[cli]'"
        ) from error
    with threadpool_limits(limits=1):
        yield


def train(
    config: RunConfig,
    data: str | ImageData,
    folder: RunFolder,
    *,
    workers: int = 1,
    backend: str | Backend | None = None,
    initial: LanguageParams | VisionParams | None = None,
    on_step: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train from the folder's checkpoint, or from the start, to the last step.

    Parameters
    ----------
    config : TrainConfig or VisionTrainConfig
        Of a new run, or read from the folder.
    data : str or ImageData
        The whole text, of which the last tenth is for validation; or images to train and test on.
    folder : RunFolder
        Receives config.json, log.jsonl and checkpoint.safetensors.
    workers : int
        Processes that compute micro-batches at the same time; does not change the result.
    backend : str, Backend or None
        Runs the MoE sublayers; must work on host arrays.
    initial : LanguageParams or VisionParams, optional
        Where a new run starts, in place of drawn parameters; saved at once as step 0. A run that
        has a checkpoint continues from that.
    on_step : callable
        Called after every step.
    should_stop : callable
        Asked after every step; when it says True, the run is saved and returned as it is.

    Returns
    -------
    TrainResult

    Raises
    ------
    CheckpointError
        If the folder's files cannot be used or written, or belong to other data or another config.
    DataError
        If the text is too short.
    ShapeError
        If `initial` is not of the config's model.
    UnsupportedError
        If the backend does not work on host arrays.

    Notes
    -----
    **Order**: bitwise equal for any number of workers and wherever it was interrupted, given the
    same library versions and processor.
    """
    run = host_backend("train", backend)
    prepared = prepare_data(config, data)
    log = JsonlLog(folder.log)
    with (
        single_threaded_blas(),
        contextlib.closing(
            Trainer(config, prepared.training, workers=workers, backend=run, initial=initial)
        ) as trainer,
    ):
        if not exists(folder.config):
            if initial is not None:  # first, so that no run can be resumed without it
                save_checkpoint(folder.checkpoint, trainer.state(), {"step": "0"})
            write_text_atomic(folder.config, config.to_json())
        elif read_config(folder) != config:
            raise CheckpointError(
                f"train: {folder.path} must hold no other run, got the config of another one. "
                "Choose another folder, or continue that run with its own config."
            )
        if exists(folder.checkpoint):
            _restore(trainer, folder, config)
        log.truncate_after(trainer.step_number)
        seconds, made, stopped = 0.0, 0, False
        evaluation = None
        while trainer.step_number < config.steps and not stopped:
            start = time.perf_counter()
            report = trainer.step()
            seconds += time.perf_counter() - start
            made += 1
            done = trainer.step_number
            speed = made * config.tokens_per_step / seconds
            last = done == config.steps
            evaluation = (
                trainer.evaluate(prepared.validation)
                if last or done % config.eval_every == 0
                else None
            )
            if evaluation is not None or done % config.log_every == 0:
                log.append(_record(config, report, done, speed, evaluation))
            stopped = should_stop()
            if last or stopped or done % config.checkpoint_every == 0:
                save_checkpoint(folder.checkpoint, trainer.state(), {"step": str(done)})
            val_loss = None if evaluation is None else evaluation.loss
            on_step(
                Progress(
                    report=report, steps=config.steps, tokens_per_second=speed, val_loss=val_loss
                )
            )
        finished = trainer.step_number == config.steps
        if finished and evaluation is None:
            evaluation = trainer.evaluate(prepared.validation)
        return TrainResult(
            step=trainer.step_number,
            tokens_per_second=made * config.tokens_per_step / seconds if made else 0.0,
            params=trainer.params,
            evaluation=evaluation if finished else None,
            train_loss=trainer.evaluate(prepared.sample).loss if finished else None,
        )


def _restore(trainer: Trainer, folder: RunFolder, config: RunConfig) -> None:
    arrays, metadata = load_checkpoint(folder.checkpoint)
    _check_arrays(arrays, trainer.state(), folder)
    step = metadata.get("step", "none")
    if not (step.isdecimal() and int(step) <= config.steps):
        raise CheckpointError(
            f"train: {folder.checkpoint} must hold a step in 0..{config.steps}, got {step}. "
            "It belongs to another config.json."
        )
    trainer.load_state(arrays, int(step))


def _check_arrays(arrays: dict[str, Any], expected: dict[str, Any], folder: RunFolder) -> None:
    """Raise unless the checkpoint has the arrays of the config's model."""
    for name in sorted(set(expected) | set(arrays)):
        got = arrays[name].shape if name in arrays else None
        want = expected[name].shape if name in expected else None
        if got != want or (got is not None and arrays[name].dtype != expected[name].dtype):
            raise CheckpointError(
                f"train: {folder.checkpoint} must hold {name} of shape {want}, got {got}. "
                "It belongs to another config.json."
            )


def read_config(folder: RunFolder) -> TrainConfig | VisionTrainConfig:
    """Return the config of a run.

    Raises
    ------
    CheckpointError
        If the folder holds no readable config.json.
    """
    try:
        text = folder.config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"read_config: {folder.config} could not be read: {reason}. Give the folder of a run."
        ) from error
    return parse_config(text, str(folder.config))


def load_trained(folder: RunFolder) -> tuple[TrainConfig, LanguageParams, int]:
    """Return config, parameters and step of a language run, for generation.

    Raises
    ------
    CheckpointError
        If the folder holds no usable run, or one of another task.
    """
    config = read_config(folder)
    if not isinstance(config, TrainConfig):
        raise _other_task("load_trained", folder, config, TrainConfig.task)
    params = init_language_params(config.model, config.seed)
    return config, params, _load_step(folder, params)


def load_trained_vision(folder: RunFolder) -> tuple[VisionTrainConfig, VisionParams, int]:
    """Return config, parameters and step of a vision run.

    Raises
    ------
    CheckpointError
        If the folder holds no usable run, or one of another task.
    """
    config = read_config(folder)
    if not isinstance(config, VisionTrainConfig):
        raise _other_task("load_trained_vision", folder, config, VisionTrainConfig.task)
    params = init_vision_params(config.model, config.seed)
    return config, params, _load_step(folder, params)


def _load_step(folder: RunFolder, params: LanguageParams | VisionParams) -> int:
    """Copy the parameters of a checkpoint into a tree; return its step."""
    arrays, metadata = load_checkpoint(folder.checkpoint)
    expected = {f"params.{name}": leaf for name, leaf in named_arrays(params)}
    found = {name: a for name, a in arrays.items() if name.startswith("params.")}
    _check_arrays(found, expected, folder)
    load_params(params, arrays)
    return int(metadata.get("step", "0"))


def _other_task(function: str, folder: RunFolder, config: RunConfig, task: str) -> CheckpointError:
    return CheckpointError(
        f"{function}: {folder.path} must hold a run of task {task!r}, got {config.task!r}. "
        "It holds another kind of model."
    )


def _record(
    config: RunConfig,
    report: StepReport,
    step: int,
    tokens_per_second: float,
    evaluation: Evaluation | None,
) -> dict[str, Any]:
    """Return one line of the log; `step` counts steps made."""
    record: dict[str, Any] = {
        "step": step,
        "cross_entropy": report.cross_entropy,
        "auxiliary": report.auxiliary,
        "learning_rate": report.learning_rate,
        "grad_norm": report.grad_norm,
        "drop_rate": report.drop_rate,
        "load_imbalance": report.load_imbalance,
        "tokens_per_expert": report.tokens_per_expert,
        "kept_per_expert": report.kept_per_expert,
        "router_entropy": report.router_entropy,
        "tokens_per_second": round(tokens_per_second, 1),
    }
    if report.selection_bias_range is not None:
        record["selection_bias_range"] = report.selection_bias_range
    if evaluation is not None:
        record["val_loss"] = evaluation.loss
        if config.model.moe is not None:
            record["specialisation"] = specialisation(evaluation.served, input_names(config))
    if isinstance(evaluation, VisionEvaluation):
        record["val_accuracy"] = evaluation.accuracy
    return record
