"""The command in this process and in one of its own, a small text, and a finished run."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

from npmoe.cli import main
from npmoe.cli import train as train_command

for package in ("safetensors", "threadpoolctl", "tqdm", "matplotlib"):
    pytest.importorskip(package)

WORDS = ["the", "quick", "Brown", "fox", "jumps", "over", "12", "lazy", "dogs;", "and", "then?\n"]
COMMAND = [sys.executable, "-c", "import sys; from npmoe.cli import main; sys.exit(main())"]
SIZES = "--hidden-size 32 --layers 1 --context-length 16 --batch-size 4 --experts 4 --workers 1"
TINY = SIZES.split()


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def npmoe(*arguments) -> Result:
    """Run the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


def start(*arguments, **options) -> subprocess.Popen:
    """Run the command in a process of its own."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(
        [*COMMAND, *(str(a) for a in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def finish(process) -> Result:
    out, err = process.communicate(timeout=300)
    return Result(process.returncode, out, err)


def assert_one_message(result, *parts, code=1):
    """One error on stderr, nothing like a traceback, and the code of a mistake."""
    assert result.code == code, result
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("npmoe "), lines[0]
    assert ": error: " in lines[0]
    assert lines[0].endswith((".", "'")), lines[0]
    for part in parts:
        assert part in lines[0], (part, lines[0])


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=400)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory, text_file):
    """Return (folder, result, summary file) of a finished run; not to be changed."""
    place = tmp_path_factory.mktemp("finished")
    folder, summary = place / "run", place / "summary.json"
    result = npmoe(
        "train", "--text", text_file, "--out", folder, "--json", summary, *TINY, "--steps", 12
    )
    assert result.code == 0, result
    return folder, result, summary


@pytest.fixture
def run_folder(finished, tmp_path):
    """Return a copy of the finished run."""
    return shutil.copytree(finished[0], tmp_path / "run")


@pytest.fixture
def started(tmp_path, text_file):
    """Return the folder of a run stopped after its first checkpoint, at step 4 of 9."""
    import dataclasses

    from npmoe.training import RunFolder, language_recipe, read_text, train

    text = read_text(text_file)
    config = language_recipe(
        text,
        str(text_file),
        steps=9,
        hidden_size=32,
        num_layers=1,
        context_length=16,
        batch_size=4,
        num_experts=4,
    )
    config = dataclasses.replace(config, checkpoint_every=1)
    folder = RunFolder.create(tmp_path / "started")
    asked = iter(range(1, 10))
    train(config, text, folder, should_stop=lambda: next(asked) == 4)
    return folder.path


@pytest.fixture
def quick(monkeypatch):
    """Leave out the pictures and the sample."""
    monkeypatch.setattr(train_command, "_draw", lambda *_: None)
    monkeypatch.setattr(train_command, "_print_sample", lambda *_: None)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
