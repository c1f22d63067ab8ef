"""Every mistake gets one clear message, and nothing that was saved is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import SIZES, TINY, assert_one_message, contents, finish, npmoe, start

from npmoe.training import load_checkpoint, read_log

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and resource limits")


# --- texts


def written(tmp_path, content):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    return path


def refuse_text(tmp_path, path, *parts):
    folder = tmp_path / "run"
    result = npmoe("train", "--text", path, "--out", folder, "--steps", 1, *TINY)
    assert_one_message(result, "npmoe train: error: ", *parts)
    assert result.out == ""
    assert not folder.exists()


def test_a_text_shorter_than_the_context(tmp_path):
    path = written(tmp_path, b"abc " * 30)
    refuse_text(tmp_path, path, "validation part", "17 characters, got 12", "Give a longer text")


def test_an_empty_text(tmp_path):
    refuse_text(tmp_path, written(tmp_path, b""), "text.txt must hold text, got an empty file")


def test_a_text_that_is_not_there(tmp_path):
    refuse_text(tmp_path, tmp_path / "no.txt", "no.txt could not be read: No such file")


def test_a_directory(tmp_path):
    refuse_text(tmp_path, tmp_path, "could not be read: Is a directory. Give a UTF-8 text file")


@posix
def test_a_text_that_may_not_be_read(tmp_path, monkeypatch):
    path = written(tmp_path, b"text")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything: a loop of links is unreadable too
        path.unlink()
        path.symlink_to(path)
        refuse_text(tmp_path, path, "text.txt could not be read: Too many levels")
    else:
        refuse_text(tmp_path, path, "text.txt could not be read: Permission denied")


def test_a_text_that_is_not_utf8(tmp_path):
    path = written(tmp_path, b"caf\xe9 au lait " * 100)
    refuse_text(tmp_path, path, "must be UTF-8 text, got byte 0xe9 at offset 3", "iconv")


# --- options


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--steps", "0"], ["--steps must be at least 1, got 0"]),
        (["--steps", "-3"], ["--steps must be at least 1, got -3"]),
        (["--seconds", "0"], ["--seconds must be positive and finite, got 0.0"]),
        (["--seconds", "-1"], ["--seconds must be positive and finite, got -1.0"]),
        (["--seconds", "nan"], ["--seconds must be positive and finite, got nan"]),
        (["--seconds", "inf"], ["--seconds must be positive and finite, got inf"]),
        (["--seed", "-1"], ["--seed must be at least 0, got -1"]),
        (["--workers", "0"], ["--workers must be at least 1, got 0"]),
        (["--learning-rate", "nan"], ["--learning-rate must be positive and finite, got nan"]),
        (["--learning-rate", "0"], ["--learning-rate must be positive and finite, got 0.0"]),
        (["--learning-rate", "-1"], ["--learning-rate must be positive and finite, got -1.0"]),
        (["--learning-rate", "inf"], ["--learning-rate must be positive and finite, got inf"]),
        (["--experts", "0"], ["--experts must be at least 1, got 0"]),
        (["--top-k", "9"], ["top_k must be at most num_experts = 8, got 9"]),
        (["--top-k", "0"], ["--top-k must be at least 1, got 0"]),
        (["--hidden-size", "33"], ["hidden_size must be a multiple of 2", "got 33"]),
        (["--hidden-size", "1"], ["--hidden-size must be at least 2, got 1"]),
        (["--layers", "0"], ["--layers must be at least 1, got 0"]),
        (["--context-length", "0"], ["--context-length must be at least 1, got 0"]),
        (["--batch-size", "-2"], ["--batch-size must be at least 1, got -2"]),
        (["--capacity-factor", "junk"], ["capacity_factor must be a positive number", "'junk'"]),
        (["--capacity-factor", "0"], ["capacity_factor must be a positive number", "'0'"]),
        (["--capacity-factor", "nan"], ["capacity_factor must be a positive number", "'nan'"]),
        (["--capacity-factor", "1/0"], ["capacity_factor must be a positive number", "'1/0'"]),
        (["--capacity-factor", "1", "--dense"], ["--capacity-factor must not be given with --de"]),
        (["--backend", "numbda"], ["must name a known backend, got 'numbda'", "Known: "]),
        (["--backend", "loopback"], ["backend must work on host arrays, got 'loopback'"]),
        (["--backend", "loopback", "--seconds", "3"], ["must work on host arrays"]),
        (["--resume"], ["--out must name the run with --resume"]),
    ],
)
def test_bad_options(tmp_path, monkeypatch, text_file, options, parts):
    monkeypatch.chdir(tmp_path)
    result = npmoe("train", "--text", text_file, *options)
    assert_one_message(result, "npmoe train: error: ", *parts)
    assert "train: error: train:" not in result.err
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_learning_rate_that_explodes(tmp_path, text_file):
    result = finish(
        start(
            *("train", "--text", text_file, "--out", tmp_path / "run", "--steps", 5),
            *("--learning-rate", "1e30", *TINY),
        )
    )
    assert result.code == 1
    lines = [line for line in result.err.splitlines() if line.strip() and "/5 [" not in line]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("npmoe train: error: ")
    assert "must be finite, got nan" in lines[0]
    assert "Lower the learning rate" in lines[0]


# --- run folders


def test_a_folder_that_holds_another_run(run_folder, text_file):
    before = contents(run_folder)
    result = npmoe("train", "--text", text_file, "--out", run_folder, "--steps", 1, *TINY)
    assert_one_message(result, "already holds a run", "Continue it with --resume or choose another")
    assert contents(run_folder) == before


def test_a_folder_that_is_a_file(tmp_path, text_file):
    result = npmoe("train", "--text", text_file, "--out", text_file, "--steps", 1, *TINY)
    assert_one_message(result, "words.txt could not be made: File exists", "another --out")
    assert text_file.stat().st_size > 1000


def test_resuming_nothing(tmp_path):
    result = npmoe("train", "--resume", "--out", tmp_path)
    assert_one_message(result, "got no config.json there", "start a new run without --resume")


def test_resuming_with_another_text(started, text_file, tmp_path):
    before = contents(started)
    other = written(tmp_path, text_file.read_bytes() + b".")
    result = npmoe("train", "--resume", "--out", started, "--text", other)
    assert_one_message(result, "text must be the one the run began with", str(text_file))
    assert contents(started) == before


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--steps", "20"], "--steps"),
        (["--seconds", "5"], "--seconds"),
        (["--seed", "0"], "--seed"),
        (["--hidden-size", "64"], "--hidden-size"),
        (["--learning-rate", "0.1"], "--learning-rate"),
        (["--capacity-factor", "1"], "--capacity-factor"),
        (["--dense"], "--dense"),
    ],
)
def test_resuming_with_other_options(started, options, name):
    before = contents(started)
    result = npmoe("train", "--resume", "--out", started, *options)
    assert_one_message(result, f"{name} must not be given with --resume", "keeps the settings")
    assert contents(started) == before


def test_a_truncated_checkpoint(started):
    path = started / "checkpoint.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        before = contents(started)
        for command in (["train", "--resume", "--out"], ["generate"]):
            result = npmoe(*command, started)
            assert_one_message(result, "checkpoint.safetensors must be complete", "truncated")
        assert contents(started) == before


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"PK\x03\x04" + bytes(200), "got some other file"),
        (b"\x80\x04\x95pickle" + bytes(100), "got some other file"),
        (b"\x02\0\0\0\0\0\0\0{}", "got some other file"),
    ],
)
def test_a_foreign_checkpoint(started, content, part):
    (started / "checkpoint.safetensors").write_bytes(content)
    before = contents(started)
    for command in (["train", "--resume", "--out"], ["generate"]):
        result = npmoe(*command, started)
        assert_one_message(result, "checkpoint.safetensors must be a checkpoint", part)
    assert contents(started) == before


def test_the_checkpoint_of_another_run(started, tmp_path, text_file, quick):
    other = tmp_path / "other"
    options = [*TINY, "--experts", "5", "--steps", "1"]
    assert npmoe("train", "--text", text_file, "--out", other, *options).code == 0
    (started / "checkpoint.safetensors").write_bytes(
        (other / "checkpoint.safetensors").read_bytes()
    )
    before = contents(started)
    for command in (["train", "--resume", "--out"], ["generate"]):
        assert_one_message(npmoe(*command, started), "It belongs to another config.json")
    assert contents(started) == before


@pytest.mark.parametrize("damage", [lambda s: s[:200], lambda s: "", lambda s: "null"])
def test_a_damaged_config(started, damage):
    path = started / "config.json"
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    before = contents(started)
    for command in (["train", "--resume", "--out"], ["generate"]):
        assert_one_message(npmoe(*command, started), str(path))
    assert contents(started) == before


def test_a_config_that_is_not_text(started):
    (started / "config.json").write_bytes(b"\xff\xfe\x00")
    assert_one_message(npmoe("train", "--resume", "--out", started), "config.json could not be")


def test_a_damaged_log(started):
    path = started / "log.jsonl"
    path.write_bytes(b"garbage\n")
    before = contents(started)
    assert_one_message(npmoe("train", "--resume", "--out", started), "log.jsonl", "line 1")
    assert contents(started) == before


def test_a_text_that_is_gone_since(started, text_file, quick):
    config = json.loads((started / "config.json").read_text(encoding="utf-8"))
    config["text_source"] = "/nowhere/text.txt"
    (started / "config.json").write_text(json.dumps(config), encoding="utf-8")
    result = npmoe("train", "--resume", "--out", started)
    assert_one_message(result, "/nowhere/text.txt could not be read: No such file")
    assert npmoe("train", "--resume", "--out", started, "--text", text_file).code == 0


# --- disk full


LIMITS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from npmoe.cli import main
sys.exit(main())
"""


def limited(size, *arguments):
    return finish(
        subprocess.Popen(
            [sys.executable, "-c", LIMITS, str(size), *(str(a) for a in arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
    )


def last_line(result):
    line = result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    assert result.err.count("npmoe train: error: ") == 1
    assert line.startswith("npmoe train: error: ")
    return line


@posix
def test_a_full_disk_while_saving(started, quick):
    """A file may not grow beyond 100 kB: the checkpoint of 360 kB does not fit any more."""
    before = contents(started)
    size = len(before["checkpoint.safetensors"])
    assert size > 150_000
    result = limited(100_000, "train", "--resume", "--out", started, "--workers", 1)
    assert result.code == 1
    line = last_line(result)
    assert "checkpoint.safetensors could not be written: File too large" in line
    assert "The previous checkpoint is intact. Free space and run again with --resume." in line
    assert contents(started) == before
    assert load_checkpoint(started / "checkpoint.safetensors")[1]["step"] == "4"
    result = npmoe("train", "--resume", "--out", started)
    assert result.code == 0, result
    assert load_checkpoint(started / "checkpoint.safetensors")[1]["step"] == "9"


@posix
def test_a_full_disk_at_the_first_checkpoint_and_at_the_log(tmp_path, text_file, quick):
    folder = tmp_path / "run"
    options = ["--text", text_file, *SIZES.split(), "--steps", "10"]
    result = limited(100_000, "train", "--out", folder, *options)
    assert result.code == 1
    assert "There was no previous checkpoint. Free space and run again" in last_line(result)
    assert sorted(contents(folder)) == ["config.json", "log.jsonl"]
    (folder / "log.jsonl").write_bytes(b"")
    result = limited(1, "train", "--resume", "--out", folder)
    assert "log.jsonl could not be written: File too large" in last_line(result)
    result = npmoe("train", "--resume", "--out", folder)
    assert result.code == 0, result
    assert [r["step"] for r in read_log(folder / "log.jsonl")] == [10]


@posix
def test_a_full_disk_at_the_pictures_and_the_summary(run_folder, tmp_path):
    before = contents(run_folder)
    assert len(before["curves.png"]) > 40_000
    result = limited(30_000, "train", "--resume", "--out", run_folder)
    assert result.code == 1
    assert "curves.png could not be written: File too large" in last_line(result)
    assert contents(run_folder) == before
    (tmp_path / "s.json").write_text("old", encoding="utf-8")
    result = limited(10, "info", "--json", tmp_path / "s.json")
    assert_one_message(result, "s.json could not be written: File too large", "another file")


# --- interrupted


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_run_continues_bitwise(tmp_path, text_file, quick, number):
    options = ["--text", text_file, *SIZES.split(), "--steps", "200"]
    folder = tmp_path / "run folder"
    # A terminal sends Ctrl-C to the worker processes too.
    child = start("train", "--out", folder, *options, "--workers", 2, start_new_session=True)
    log = folder / "log.jsonl"
    while not (log.exists() and log.stat().st_size) and child.poll() is None:
        time.sleep(0.001)
    os.killpg(child.pid, number)
    result = finish(child)
    assert result.code == 130, result
    assert "Traceback" not in result.err
    assert "Saving after this step" in result.err
    assert f"Continue with: npmoe train --resume --out '{folder}'" in result.err
    step = int(load_checkpoint(folder / "checkpoint.safetensors")[1]["step"])
    assert 10 <= step < 200
    assert f"Interrupted after step {step} of 200; everything is saved." in result.err
    if number != signal.SIGINT:
        return
    result = npmoe("train", "--resume", "--out", folder, "--workers", 1)
    assert result.code == 0, result
    assert npmoe("train", "--out", tmp_path / "whole", *options).code == 0
    for name in ("checkpoint.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    records = [read_log(f / "log.jsonl") for f in (folder, tmp_path / "whole")]
    for record in (*records[0], *records[1]):
        del record["tokens_per_second"]
    assert records[0] == records[1]


def test_ctrl_c_elsewhere(monkeypatch):
    from npmoe.cli import info

    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "_version", interrupted)
    result = npmoe("info")
    assert (result.code, result.err) == (130, "npmoe info: interrupted.\n")


# --- missing packages


@pytest.mark.parametrize("package", ["matplotlib", "safetensors", "threadpoolctl", "tqdm"])
def test_a_missing_extra_is_named_before_any_training(tmp_path, text_file, package):
    stub = tmp_path / "stubs" / f"{package}.py"
    stub.parent.mkdir()
    stub.write_text(f"raise ImportError('no {package} here')\n", encoding="utf-8")
    result = finish(
        start(
            *("train", "--text", text_file, "--out", tmp_path / "run", "--steps", 1, *TINY),
            env={"PYTHONPATH": str(stub.parent)},
        )
    )
    assert_one_message(result, f"package {package} must be installed", "pip install 'npmoe[cli]'")
    assert result.out == ""
    assert not (tmp_path / "run").exists()


def test_generate_without_safetensors(finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    result = npmoe("generate", finished[0])
    assert_one_message(result, "safetensors", "pip install 'npmoe[")
