from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from npmoe.errors import CheckpointError, RangeError
from npmoe.training import JsonlLog, read_log


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
