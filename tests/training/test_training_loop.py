"""A run that is stopped, killed or moved ends bitwise equal to an undisturbed one."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from npmoe.errors import BackendUnavailableError, CheckpointError, DataError, UnsupportedError
from npmoe.models import init_language_params
from npmoe.training import (
    RunFolder,
    ScheduleConfig,
    TrainConfig,
    language_recipe,
    load_checkpoint,
    load_trained,
    load_trained_vision,
    read_config,
    read_log,
    save_checkpoint,
    train,
    write_text_atomic,
)
from npmoe.training.config import text_sha256
from npmoe.tree import named_arrays

pytest.importorskip("safetensors")
pytest.importorskip("threadpoolctl")
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals")

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog;", "and", "then?\n"]
TEXT = " ".join(random.Random(0).choices(WORDS, k=300))
STEPS = 14


def make_config(**options) -> TrainConfig:
    """Return a tiny run with everything random switched on."""
    config = language_recipe(
        TEXT,
        "test",
        hidden_size=32,
        num_layers=1,
        context_length=16,
        batch_size=4,
        num_experts=4,
        capacity_factor="1.1",
    )
    schedule = ScheduleConfig(
        steps=STEPS,
        learning_rate=1e-2,
        warmup_steps=2,
        router_noise_std=0.3,
        router_noise_steps=10,
    )
    model = dataclasses.replace(config.model, dropout=0.1)
    values = {"model": model, "schedule": schedule, "checkpoint_every": 3, "log_every": 2}
    return dataclasses.replace(config, **{**values, "eval_every": 5, **options})


def contents(folder):
    """Return what must be equal: the checkpoint's bytes, and the log without its speeds."""
    records = read_log(folder.log)
    for record in records:
        assert record.pop("tokens_per_second") > 0
    return folder.checkpoint.read_bytes(), records, folder.config.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = RunFolder.create(tmp_path_factory.mktemp("undisturbed"))
    result = train(make_config(), TEXT, folder)
    assert result.step == STEPS
    return contents(folder), result


def assert_equal_to(undisturbed, folder):
    for found, wanted in zip(contents(folder), undisturbed[0], strict=True):
        assert found == wanted
    names = sorted(p.name for p in folder.path.iterdir())
    assert names == ["checkpoint.safetensors", "config.json", "log.jsonl"]


def test_the_run_leaves_config_log_and_checkpoint(undisturbed, tmp_path):
    _, records, config = undisturbed[0]
    assert [r["step"] for r in records] == [2, 4, 5, 6, 8, 10, 12, 14]
    assert [r["step"] for r in records if "val_loss" in r] == [5, 10, 14]
    assert json.loads(config)["text_sha256"] == text_sha256(TEXT)
    assert TrainConfig.from_json(config.decode()) == make_config()
    result = undisturbed[1]
    assert result.evaluation.loss == records[-1]["val_loss"]
    assert result.train_loss > 0
    assert result.num_parameters == sum(a.size for _, a in named_arrays(result.params))


@pytest.mark.parametrize("stops", [(1,), (2, 3), (3, 6, 9), (5, 13), (7,), tuple(range(1, 14))])
def test_a_stopped_run_continues_bitwise(undisturbed, tmp_path, stops):
    folder = RunFolder.create(tmp_path / "run")
    for number, stop in enumerate(stops):
        seen = []
        result = train(
            make_config(),
            TEXT,
            folder if number == 0 else RunFolder.open(tmp_path / "run"),
            workers=1 + number % 2,
            should_stop=StopAt(stop - (stops[number - 1] if number else 0)),
            on_step=lambda progress, seen=seen: seen.append(progress.report.step + 1),
        )
        assert result.step == seen[-1] == stop
        assert result.evaluation is result.train_loss is None
    result = train(read_config(folder), TEXT, folder, workers=2)
    assert result.evaluation.loss == undisturbed[1].evaluation.loss
    assert_equal_to(undisturbed, folder)


class StopAt:
    """Say True when asked for the n-th time."""

    def __init__(self, count):
        self.left = count

    def __call__(self):
        self.left -= 1
        return self.left == 0


def test_a_stop_at_the_last_step_is_a_finish(undisturbed, tmp_path):
    folder = RunFolder.create(tmp_path)
    result = train(make_config(), TEXT, folder, should_stop=StopAt(STEPS))
    assert result.evaluation.loss == undisturbed[1].evaluation.loss
    assert_equal_to(undisturbed, folder)


def test_a_finished_run_can_be_resumed_and_does_nothing(undisturbed, tmp_path):
    folder = RunFolder.create(tmp_path)
    train(make_config(), TEXT, folder)
    result = train(make_config(), TEXT, folder, on_step=lambda _: pytest.fail("a step"))
    assert result.tokens_per_second == 0.0
    assert result.evaluation.loss == undisturbed[1].evaluation.loss
    assert result.train_loss == undisturbed[1].train_loss
    assert_equal_to(undisturbed, folder)


def test_progress_tells_speed_and_validation(tmp_path):
    heard = []
    train(make_config(), TEXT, RunFolder.create(tmp_path), on_step=heard.append)
    assert [p.report.step for p in heard] == list(range(STEPS))
    assert [p.report.step + 1 for p in heard if p.val_loss is not None] == [5, 10, 14]
    assert all(p.tokens_per_second > 0 for p in heard)
    assert {p.steps for p in heard} == {STEPS}


def test_the_trained_model_is_that_of_the_checkpoint(undisturbed, tmp_path):
    folder = RunFolder.create(tmp_path)
    folder.config.write_bytes(undisturbed[0][2])
    folder.checkpoint.write_bytes(undisturbed[0][0])
    config, params, step = load_trained(folder)
    assert (config, step) == (make_config(), STEPS)
    wanted = dict(named_arrays(undisturbed[1].params))
    for name, array in named_arrays(params):
        assert array.tobytes() == wanted[name].tobytes()


# --- killed

DRIVER = f"""
import json, os, pathlib, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training_loop import TEXT, make_config
from npmoe.training import RunFolder, train

kill_at = int(sys.argv[2])
events = 0

def event(*_):
    global events
    events += 1
    if events == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

def surrounded(function):
    def wrapper(*args, **kwargs):
        event()
        result = function(*args, **kwargs)
        event()
        return result
    return wrapper

def step(progress):
    event()
    print(progress.report.step + 1, flush=True)

if kill_at:  # before and after everything that touches the disk
    os.fsync = surrounded(os.fsync)
    pathlib.Path.replace = surrounded(pathlib.Path.replace)
    pathlib.Path.open = surrounded(pathlib.Path.open)
path = sys.argv[1]
exists = os.path.exists(os.path.join(path, "config.json"))
folder = RunFolder.open(path) if exists else RunFolder.create(path)
train(make_config(), TEXT, folder, on_step=step)
print("finished", flush=True)
"""


def driver(folder, kill_at=0):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", DRIVER, str(folder), str(kill_at)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )


@posix
def test_killed_at_random_moments_until_it_finishes(undisturbed, tmp_path):
    rng = random.Random(1)
    kills = 0
    for _ in range(30):
        child = driver(tmp_path / "run")
        # Kill within or right after one of the next steps, wherever the process is then.
        for _ in range(rng.randint(2, 6)):
            line = child.stdout.readline()
        if line.strip() in ("", "finished"):
            break
        time.sleep(rng.uniform(0.0, 0.01))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        kills += child.returncode == -signal.SIGKILL
    _, errors = child.communicate()
    assert child.returncode == 0, errors
    assert kills >= 3
    assert_equal_to(undisturbed, RunFolder.open(tmp_path / "run"))


@posix
def test_killed_around_every_kind_of_disk_access(undisturbed, tmp_path):
    """The number of the event is drawn for each session: config, log, checkpoint, between steps."""
    rng = random.Random(2)
    kills = 0
    for number in [2, 6, *(rng.randint(9, 60) for _ in range(4)), 0]:
        child = driver(tmp_path / "run", number)
        _, errors = child.communicate()
        assert child.returncode == (-signal.SIGKILL if number else 0), errors
        kills += number > 0
        if (tmp_path / "run" / "checkpoint.safetensors").exists():
            load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert kills == 6
    assert_equal_to(undisturbed, RunFolder.open(tmp_path / "run"))


# --- refused, with everything kept


def kept(folder):
    return {p.name: p.read_bytes() for p in folder.path.iterdir()}


@pytest.fixture
def stopped(tmp_path):
    folder = RunFolder.create(tmp_path / "stopped")
    train(make_config(), TEXT, folder, should_stop=lambda: True)
    return folder


def test_another_text_is_refused(stopped):
    before = kept(stopped)
    with pytest.raises(CheckpointError, match=r"^train: text must be the one the run began with"):
        train(make_config(), TEXT + ".", stopped)
    assert kept(stopped) == before


def test_another_config_is_refused(stopped):
    before = kept(stopped)
    with pytest.raises(CheckpointError, match=r"^train: .*stopped must hold no other run, got"):
        train(make_config(seed=1), TEXT, stopped)
    stopped.checkpoint.unlink()
    with pytest.raises(CheckpointError, match="must hold no other run"):
        train(make_config(seed=1), TEXT, stopped)
    del before["checkpoint.safetensors"]
    assert kept(stopped) == before


@pytest.mark.parametrize("load", [lambda f: train(make_config(), TEXT, f), load_trained])
def test_the_checkpoint_of_another_model_is_refused(stopped, tmp_path, load):
    other = RunFolder.create(tmp_path / "other")
    wide = dataclasses.replace(make_config().model, num_layers=2)
    train(make_config(model=wide), TEXT, other, should_stop=lambda: True)
    stopped.checkpoint.write_bytes(other.checkpoint.read_bytes())
    before = kept(stopped)
    with pytest.raises(
        CheckpointError, match=r"must hold .* of shape .*It belongs to another config\.json\."
    ):
        load(stopped)
    assert kept(stopped) == before


def test_a_checkpoint_with_an_impossible_step_is_refused(stopped):
    arrays, _ = load_checkpoint(stopped.checkpoint)
    for step in (STEPS + 1, "many"):
        save_checkpoint(stopped.checkpoint, arrays, {"step": str(step)})
        with pytest.raises(CheckpointError, match=rf"must hold a step in 0\.\.14, got '?{step}"):
            train(make_config(), TEXT, stopped)


def test_a_device_backend_is_refused(tmp_path):
    folder = RunFolder.create(tmp_path)
    with pytest.raises(UnsupportedError, match=r"^train: backend must work on host arrays, got 'l"):
        train(make_config(), TEXT, folder, backend="loopback")
    assert kept(folder) == {}


def test_a_short_text_is_refused(tmp_path):
    text = TEXT[:100]
    config = dataclasses.replace(make_config(), text_sha256=text_sha256(text))
    with pytest.raises(
        DataError, match=r"the validation part of the text must hold at least .* 17"
    ):
        train(config, text, RunFolder.create(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_threadpoolctl_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    with pytest.raises(BackendUnavailableError, match=r"threadpoolctl .*'npmoe\[cli\]'"):
        train(make_config(), TEXT, RunFolder.create(tmp_path))


def test_a_folder_without_a_readable_config_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"^read_config: .*config\.json could not be read: No"
    ):
        load_trained(folder)
    folder.config.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"could not be read: 'utf-8' codec"):
        load_trained(folder)
    write_text_atomic(folder.config, make_config().to_json())
    with pytest.raises(CheckpointError, match=r"path must name a checkpoint, got .*not exist"):
        load_trained(folder)


def test_the_seed_decides(undisturbed, tmp_path):
    folder = RunFolder.create(tmp_path)
    train(make_config(seed=1), TEXT, folder)
    arrays, _ = load_checkpoint(folder.checkpoint)
    (tmp_path / "first").write_bytes(undisturbed[0][0])
    other, _ = load_checkpoint(tmp_path / "first")
    assert not np.array_equal(arrays["params.embedding"], other["params.embedding"])


def test_a_run_from_given_values_can_be_resumed_without_them(tmp_path):
    """They are saved before anything that a resumed run looks for."""
    start = init_language_params(make_config().model, 9)
    whole, torn = (RunFolder.create(tmp_path / name) for name in ("whole", "torn"))
    train(make_config(), TEXT, whole, initial=start)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(), TEXT, torn, initial=start, on_step=interrupt)
    assert load_checkpoint(torn.checkpoint)[1] == {"step": "0"}
    found = load_trained(torn)
    assert found[2] == 0
    for (_, one), (_, two) in zip(named_arrays(found[1]), named_arrays(start), strict=True):
        assert np.array_equal(one, two)
    train(make_config(), TEXT, torn)
    assert contents(torn) == contents(whole)


def interrupt(_):
    raise KeyboardInterrupt


def test_a_run_with_a_selection_bias_continues_bitwise(tmp_path):
    config = make_config()
    model = dataclasses.replace(
        config.model, moe=dataclasses.replace(config.model.moe, selection_bias=True)
    )
    config = dataclasses.replace(config, model=model, selection_bias_rate=0.01)
    one, two = (RunFolder.create(tmp_path / name) for name in ("one", "two"))
    train(config, TEXT, one)
    train(config, TEXT, two, should_stop=StopAt(4))
    train(read_config(two), TEXT, two, workers=2)
    assert contents(one) == contents(two)
    records = read_log(one.log)
    assert all(len(r["selection_bias_range"]) == 1 for r in records)
    assert records[-1]["selection_bias_range"][0][1] > 0
    assert all(len(r["router_entropy"]) == 1 for r in records)
    arrays, _ = load_checkpoint(one.checkpoint)
    assert np.abs(arrays["params.blocks.0.feed_forward.selection_bias"]).max() >= 0.01


def test_a_run_of_the_other_task_is_refused(stopped):
    document = json.loads(stopped.config.read_text(encoding="utf-8"))
    with pytest.raises(
        CheckpointError,
        match=r"^load_trained_vision: .* must hold a run of task 'vision', got 'text'\. It holds "
        r"another kind of model\.$",
    ):
        load_trained_vision(stopped)
    for task in ("vision", "speech"):
        write_text_atomic(stopped.config, json.dumps({**document, "task": task}))
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_trained(stopped)
