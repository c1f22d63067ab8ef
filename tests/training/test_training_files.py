from __future__ import annotations

import os
import stat

import pytest

from npmoe.errors import CheckpointError
from npmoe.training import RunFolder, write_text_atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "config.json"
    write_text_atomic(path, "old")
    write_text_atomic(str(path), "new é\n")
    assert path.read_bytes() == "new é\n".encode()
    assert names(tmp_path) == ["config.json"]


def test_even_a_short_text_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    sizes = []
    real = os.fsync

    def fsync(handle):
        if stat.S_ISREG(os.fstat(handle).st_mode):
            sizes.append((os.fstat(handle).st_size, (tmp_path / "config.json").exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text_atomic(tmp_path / "config.json", "new")
    assert sizes == [(3, False)]


def test_a_failed_text_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_text_atomic(path, "old")

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError) as error:
        write_text_atomic(path, "new")
    assert str(error.value) == (
        f"write_text_atomic: {path} could not be written: No space left on device. "
        "The previous version is intact. Free space and run again with --resume."
    )
    assert path.read_text() == "old"
    assert names(tmp_path) == ["config.json"]


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomic(tmp_path / "config.json", "new")
    assert names(tmp_path) == []


def test_a_new_run_makes_its_folder(tmp_path):
    folder = RunFolder.create(tmp_path / "a" / "b")
    assert folder.path.is_dir()
    paths = [folder.config, folder.log, folder.checkpoint, folder.curves, folder.experts]
    assert [p.name for p in paths] == [
        "config.json",
        "log.jsonl",
        "checkpoint.safetensors",
        "curves.png",
        "experts.png",
    ]
    assert {p.parent for p in paths} == {folder.path}
    (folder.path / "notes.txt").write_text("other files do not matter")
    RunFolder.create(str(folder.path))


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "checkpoint.safetensors"])
def test_a_folder_with_a_run_is_not_taken(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(CheckpointError) as error:
        RunFolder.create(tmp_path)
    assert str(error.value) == (
        f"RunFolder.create: {tmp_path} already holds a run ({name}). "
        "Continue it with --resume or choose another --out."
    )
    assert (tmp_path / name).read_text() == "precious"


def test_a_folder_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    for path, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "below", "Not a directory"),
    ):
        with pytest.raises(CheckpointError) as error:
            RunFolder.create(path)
        assert str(error.value) == (
            f"RunFolder.create: {path} could not be made: {reason}. Choose another --out."
        )

    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"could not be made: Permission denied\. Choose"):
        RunFolder.create(tmp_path / "forbidden")


def test_a_run_is_opened_without_leftovers(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".checkpoint.safetensors.123.tmp").write_text("half")
    folder = RunFolder.open(tmp_path)
    assert folder.path == tmp_path
    assert names(tmp_path) == ["config.json"]


def test_a_run_that_cannot_be_written_is_opened(tmp_path, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".checkpoint.safetensors.123.tmp").write_text("half")
    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert RunFolder.open(tmp_path).path == tmp_path


def test_no_run_to_continue_says_so(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError) as error:
            RunFolder.open(path)
        assert str(error.value) == (
            f"RunFolder.open: {path} must hold a run, got no config.json there. "
            "Check --out, or start a new run without --resume."
        )


def test_a_folder_that_may_not_be_entered_is_no_traceback(tmp_path, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.stat", refuse)
    with pytest.raises(CheckpointError, match=r"got no config\.json there"):
        RunFolder.open(tmp_path)
