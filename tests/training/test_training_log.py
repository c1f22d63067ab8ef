from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from npmoe.errors import CheckpointError, RangeError, UnsupportedError
from npmoe.training import (
    JsonlLog,
    character_class,
    language_recipe,
    read_log,
    uci_digits,
    vision_recipe,
)
from npmoe.training.log import input_names, specialisation


@pytest.fixture
def log(tmp_path):
    log = JsonlLog(tmp_path / "log.jsonl")
    log.append({"kind": "start"})
    for step in (0, 10, 20):
        log.append({"step": step, "loss": 1 / (step + 3)})
    return log


def test_records_come_back_exactly(tmp_path):
    log = JsonlLog(str(tmp_path / "log.jsonl"))
    log.append({"step": np.int64(3), "loss": np.float64(0.1), "load": np.array([1, 2]), "t": "é\n"})
    log.append({"step": 4, "loss": 1 / 3})
    assert read_log(log.path) == [
        {"step": 3, "loss": 0.1, "load": [1, 2], "t": "é\n"},
        {"step": 4, "loss": 1 / 3},
    ]
    assert log.path.read_bytes().count(b"\n") == 2


def test_resuming_drops_later_records(log):
    log.truncate_after(10)
    assert [r.get("step") for r in read_log(log.path)] == [None, 0, 10]
    assert read_log(log.path)[2]["loss"] == 1 / 13
    log.append({"step": 20})
    assert [r.get("step") for r in read_log(log.path)] == [None, 0, 10, 20]
    assert list(log.path.parent.iterdir()) == [log.path]
    log.truncate_after(-1)
    assert read_log(log.path) == [{"kind": "start"}]


def test_a_failed_rewrite_keeps_the_log(log, monkeypatch):
    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"The previous version is intact\. Free space"):
        log.truncate_after(0)
    assert [r.get("step") for r in read_log(log.path)] == [None, 0, 10, 20]


@pytest.mark.parametrize("torn", ['{"step": 5, "lo', '{"step": 5}', "\0\0\0"])
def test_a_torn_last_line_is_dropped(log, torn):
    with log.path.open("a") as file:
        file.write(torn)
    assert len(read_log(log.path)) == 4
    log.truncate_after(100)
    assert len(read_log(log.path)) == 4
    log.append({"step": 30})
    assert [r.get("step") for r in read_log(log.path)] == [None, 0, 10, 20, 30]


def test_no_log_yet_is_no_error(tmp_path):
    log = JsonlLog(tmp_path / "log.jsonl")
    log.truncate_after(5)
    assert not log.path.exists()


def test_log_messages(log, tmp_path):
    for value in (math.nan, math.inf, np.array([math.nan]), object()):
        with pytest.raises(RangeError, match=r"JsonlLog\.append: record must hold finite numbers"):
            log.append({"loss": value})
    assert len(read_log(log.path)) == 4
    with pytest.raises(CheckpointError) as error:
        read_log(tmp_path / "none")
    assert str(error.value) == (
        f"read_log: {tmp_path / 'none'} could not be read: No such file or directory. "
        "Give the log.jsonl of a run."
    )
    lost = JsonlLog(tmp_path / "none" / "log.jsonl")
    with pytest.raises(CheckpointError) as error:
        lost.append({"step": 1})
    assert str(error.value) == (
        f"JsonlLog.append: {lost.path} could not be written: No such file or directory. There "
        "was no previous log. Make sure that the folder is writable and run again."
    )


@pytest.mark.parametrize("line", ["{broken", "[1]", "\udcff"])
def test_a_bad_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    bad = line.encode("utf-8", "surrogateescape")
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 2}\n')
    for call in (lambda: read_log(path), lambda: JsonlLog(path).truncate_after(0)):
        with pytest.raises(CheckpointError) as error:
            call()
        assert str(error.value) == (
            f"read_log: {path} must hold a JSON object on each line, got {bad!r} on line 2. "
            "Delete that line."
        )
    assert path.read_bytes().count(b"\n") == 3


FULL_DISK = """
import resource, signal, sys
from npmoe.errors import CheckpointError
from npmoe.training import JsonlLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = JsonlLog(sys.argv[1])
size = log.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, size + 5))
try:
    log.append({"step": 30})
except CheckpointError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
def test_a_full_disk_tears_only_the_last_line(log):
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(log.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr.strip() == (
        f"JsonlLog.append: {log.path} could not be written: File too large. "
        "The previous log is intact. Free space and run again with --resume."
    )
    assert log.path.read_bytes().endswith(b'{"ste')  # the write was really cut short
    log.truncate_after(100)
    assert [r.get("step") for r in read_log(log.path)] == [None, 0, 10, 20]


def test_specialisation_adds_up_inputs_of_one_name():
    served = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    table = specialisation(served, ["a", "b", "a"])
    assert table["rows"] == ["a", "b"]
    assert (
        table["choices"].tolist()
        == np.stack([served[:, 0] + served[:, 2], served[:, 1]], axis=1).tolist()
    )
    assert served[0, 0, 1] == 1  # not changed


def test_input_names_of_another_config():
    with pytest.raises(UnsupportedError, match="config must be of text or images, got object"):
        input_names(object())


def test_input_names():
    text = language_recipe("aB1 " * 200, "text")
    assert input_names(text) == [character_class(c) for c in text.characters]
    assert set(input_names(text)) == {"lower", "upper", "digit", "space"}
    names = input_names(vision_recipe(uci_digits()))
    assert len(names) == 16
    assert names[6] == "row 1, column 2"  # as patches are numbered: row by row


def test_specialisation_survives_the_log(tmp_path):
    log = JsonlLog(tmp_path / "log.jsonl")
    log.append({"step": 1, "specialisation": specialisation(np.ones((1, 2, 3), int), "xy")})
    assert read_log(log.path)[0]["specialisation"] == {
        "rows": ["x", "y"],
        "choices": [[[1, 1, 1], [1, 1, 1]]],
    }


def test_specialisation_message():
    with pytest.raises(RangeError) as error:
        specialisation(np.ones((1, 2, 3), int), ["x"])
    assert str(error.value) == (
        "specialisation: names must hold V = 2 names, got 1. V is bound by served (1, 2, 3)."
    )
