"""Files of a run: atomic writes, and the folder that holds one run."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from npmoe.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file so that a reader finds the old version or the new one, whole.

    Raises
    ------
    CheckpointError
        If it cannot be written; the old version is intact.
    """
    write_bytes_atomic(path, text.encode(), function="write_text_atomic", noun="version")


def write_bytes_atomic(path: str | Path, content: bytes, *, function: str, noun: str) -> None:
    """Write to a temporary file beside `path`, sync it to the disk and rename it to `path`.

    `function` and `noun` ("checkpoint") stand in the error's text.

    Raises
    ------
    CheckpointError
        If it cannot be written; the old version is intact and no temporary file is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(function, path, error, noun) from error


def write_error(function: str, path: Path, error: OSError, noun: str) -> CheckpointError:
    """Return the error that says what could not be written, what is still there, what to do."""
    kept = exists(path)
    state = f"The previous {noun} is intact." if kept else f"There was no previous {noun}."
    remedy = "Free space" if error.errno in _FULL else "Make sure that the folder is writable"
    again = "run again with --resume" if kept else "run again"
    return CheckpointError(
        f"{function}: {path} could not be written: {error.strerror}. {state} {remedy} and {again}."
    )


def exists(path: Path) -> bool:
    """Return whether there is something that can be reached at `path`."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows has no such call and needs none."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class RunFolder:
    """The folder of one run; make it with `create` or `open`.

    Parameters
    ----------
    path : path
        The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.log = self.path / "log.jsonl"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.curves = self.path / "curves.png"
        self.experts = self.path / "experts.png"
        self.confusion = self.path / "confusion.png"
        self.patches = self.path / "patches.png"

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """Return the folder for a new run, made with its parents where missing.

        Raises
        ------
        CheckpointError
            If it already holds a run, or cannot be made.
        """
        folder = cls(path)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            found = [p.name for p in (folder.config, folder.log, folder.checkpoint) if exists(p)]
        except OSError as error:
            raise CheckpointError(
                f"RunFolder.create: {folder.path} could not be made: {error.strerror}. "
                "Choose another --out."
            ) from error
        if found:
            raise CheckpointError(
                f"RunFolder.create: {folder.path} already holds a run ({', '.join(found)}). "
                "Continue it with --resume or choose another --out."
            )
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Return the folder of a run to be continued, without leftovers of a killed process.

        A run killed before its first checkpoint has a config and no checkpoint.

        Raises
        ------
        CheckpointError
            If there is no config.json.
        """
        folder = cls(path)
        if not exists(folder.config):
            raise CheckpointError(
                f"RunFolder.open: {folder.path} must hold a run, got no config.json there. "
                "Check --out, or start a new run without --resume."
            )
        for leftover in folder.path.glob(".*.tmp"):
            with contextlib.suppress(OSError):  # a run that cannot be written can be read
                leftover.unlink()
        return folder
