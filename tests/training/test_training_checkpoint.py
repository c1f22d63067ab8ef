from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from npmoe.errors import BackendUnavailableError, CheckpointError, DTypeError, RangeError
from npmoe.training import load_checkpoint, save_checkpoint

pytest.importorskip("safetensors")
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and resource limits")

ARRAYS = {
    "params": np.random.default_rng(0).standard_normal(1000).astype("float32"),
    "m": np.array([[-0.0, np.nan, np.inf], [5e-324, 1, 2]]),
    "t": np.array(12),
    "mask": np.array([True, False]),
    "empty": np.zeros((0, 3), "int32"),
    "half": np.ones(3, "float16"),
    "brain": np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(2, -1),
    "strided": np.arange(12, dtype="int8").reshape(3, 4).T,
}
METADATA = {"step": "12", "config": '{"a": "é\\n"}'}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, ARRAYS, METADATA)
    return path


def assert_is_saved(path):
    arrays, metadata = load_checkpoint(path)
    assert metadata == METADATA
    assert sorted(arrays) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        got = arrays[name]
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert got.flags.writeable
        assert got.flags.owndata


def run_child(code, path, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stderr=subprocess.PIPE, text=True, **options
    )


def test_equal_contents_give_equal_bytes(path, tmp_path):
    """Safetensors by itself writes the metadata in an order that changes from call to call."""
    metadata = {**{f"key {i}": str(i) for i in range(9)}, **METADATA}
    contents = set()
    for order in (sorted(metadata), sorted(metadata, reverse=True)):
        for _ in range(3):
            save_checkpoint(path, ARRAYS, {key: metadata[key] for key in order})
            contents.add(path.read_bytes())
    assert len(contents) == 1
    assert load_checkpoint(path)[1] == metadata


def test_everything_comes_back_bitwise(path):
    assert_is_saved(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    save_checkpoint(path, {"x": np.zeros(1)}, {})
    arrays, metadata = load_checkpoint(path)
    assert list(arrays) == ["x"]
    assert metadata == {}


def test_other_programs_can_read_it(path):
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("params"), ARRAYS["params"])
        assert file.metadata()["format"] == "npmoe-checkpoint-1"


def test_the_bytes_reach_the_disk_before_the_name(path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, type(path).replace

    def fsync(handle):
        status = os.fstat(handle)
        is_folder = stat.S_ISDIR(status.st_mode)
        events.append(("folder", 0) if is_folder else ("file", status.st_size))
        real_fsync(handle)

    def replace(self, target):
        events.append(("rename", self.stat().st_size))
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(type(path), "replace", replace)
    save_checkpoint(path, ARRAYS, METADATA)
    size = path.stat().st_size
    folder = [("folder", 0)] if os.name == "posix" else []
    assert events == [("file", size), ("rename", size), *folder]


@pytest.mark.parametrize(
    ("code", "text", "advice"),
    [
        (28, "No space left on device", "Free space"),
        (13, "Permission denied", "Make sure that the folder is writable"),
    ],
)
def test_a_failed_write_keeps_the_old_checkpoint(path, monkeypatch, code, text, advice):
    def fail(handle):
        raise OSError(code, text)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(path, {"x": np.zeros(9)}, {})
    assert str(error.value) == (
        f"save_checkpoint: {path} could not be written: {text}. "
        f"The previous checkpoint is intact. {advice} and run again with --resume."
    )
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    monkeypatch.undo()
    assert_is_saved(path)


def test_a_failed_first_write_says_that_nothing_was_there(tmp_path):
    path = tmp_path / "missing" / "checkpoint.safetensors"
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(path, ARRAYS, METADATA)
    assert str(error.value) == (
        f"save_checkpoint: {path} could not be written: No such file or directory. There was no "
        "previous checkpoint. Make sure that the folder is writable and run again."
    )
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written: Not a directory"):
        save_checkpoint(tmp_path / "file" / "checkpoint.safetensors", ARRAYS, METADATA)


FULL_DISK = """
import resource, signal, sys
import numpy as np
from npmoe.errors import CheckpointError
from npmoe.training import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(sys.argv[1], {"x": np.zeros(100_000)}, {})
except CheckpointError as error:
    sys.exit(str(error))
"""


@posix
def test_a_write_that_really_fails_leaves_the_old_checkpoint(path):
    child = run_child(FULL_DISK, path)
    _, message = child.communicate(timeout=60)
    assert child.returncode == 1
    assert message.strip() == (
        f"save_checkpoint: {path} could not be written: File too large. "
        "The previous checkpoint is intact. Free space and run again with --resume."
    )
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert_is_saved(path)


KILLED = """
import os, pathlib, signal, sys
import numpy as np
from npmoe.training import save_checkpoint
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
stage = {stage!r}
if stage == "before the sync":
    os.fsync = die
elif stage == "before the rename":
    pathlib.Path.replace = die
elif stage == "after the rename":
    rename = pathlib.Path.replace
    pathlib.Path.replace = lambda self, target: (rename(self, target), die())
elif stage == "halfway":
    import resource
    signal.signal(signal.SIGXFSZ, die)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
save_checkpoint(sys.argv[1], {{"x": np.zeros(100_000)}}, {{}})
"""


@posix
@pytest.mark.parametrize("stage", ["halfway", "before the sync", "before the rename"])
def test_a_kill_at_a_known_stage_leaves_the_old_checkpoint(path, stage):
    child = run_child(KILLED.format(stage=stage), path)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, errors
    assert len(list(path.parent.glob(".*.tmp"))) == 1
    assert_is_saved(path)


@posix
def test_a_kill_after_the_rename_leaves_the_new_checkpoint(path):
    child = run_child(KILLED.format(stage="after the rename"), path)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, errors
    arrays, _ = load_checkpoint(path)
    assert arrays["x"].size == 100_000
    assert [p.name for p in path.parent.iterdir()] == [path.name]


SAVES = """
import itertools, sys
import numpy as np
from npmoe.training import save_checkpoint
for step in itertools.count():
    save_checkpoint(sys.argv[1], {"x": np.full(200_000, step)}, {"step": str(step)})
"""


@posix
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    delays = random.Random(7)
    reached = []
    for _ in range(8):
        path.unlink(missing_ok=True)
        child = run_child(SAVES, path)
        try:
            deadline = time.monotonic() + 60
            while not path.exists():
                assert child.poll() is None, child.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(delays.uniform(0, 0.05))
        finally:
            child.kill()
            child.communicate(timeout=60)
        arrays, metadata = load_checkpoint(path)
        assert (arrays["x"] == int(metadata["step"])).all()
        assert arrays["x"].size == 200_000
        reached.append(int(metadata["step"]))
    assert max(reached) > 0  # it was killed while it replaced, not only at the first file


def test_a_missing_file_says_so(tmp_path):
    path = tmp_path / "none.safetensors"
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert str(error.value) == (
        f"load_checkpoint: path must name a checkpoint, got {path}, which does not exist. "
        "Check the path, or start a new run without --resume."
    )
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path)
    assert str(error.value) == (
        f"load_checkpoint: {tmp_path} could not be read: Is a directory. "
        "Give a checkpoint file that you may read."
    )


def test_every_truncation_is_found(path):
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in (8, 9, 100, header - 1, header, header + 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path)
        needed = f"{len(content):,}" if length >= header else f"at least {header:,}"
        assert str(error.value) == (
            f"load_checkpoint: {path} must be complete, got {length:,} of {needed} bytes. "
            "It is truncated: restore it from a copy, or start a new run."
        )
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="must be complete, got 0 of at least 16 bytes"):
        load_checkpoint(path)


def test_foreign_files_are_refused(tmp_path):
    from safetensors.numpy import save

    path = tmp_path / "foreign"

    def message():
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path)
        return str(error.value)

    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    archive = (tmp_path / "foreign.npz").read_bytes()
    noise = np.random.default_rng(0).bytes(5000)
    plain = save({"x": np.zeros(3)})
    listed = b"\x02" + bytes(7) + b"[]"
    deep = (200_000).to_bytes(8, "little") + b"[" * 200_000
    for content in (archive, noise, plain, listed, deep, b'{"json": "a text of many bytes"}'):
        path.write_bytes(content)
        assert message() == (
            f"load_checkpoint: {path} must be a checkpoint of format npmoe-checkpoint-1, "
            "got some other file. Give a checkpoint.safetensors that npmoe wrote, "
            "or start a new run."
        )
    path.write_bytes(save({"x": np.zeros(3)}, {"format": "pt"}))
    assert "of format npmoe-checkpoint-1, got format 'pt'. Give" in message()


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {"x": np.arange(3, dtype="float32"), "t": np.array(2)}, {"step": "2"})
    content = path.read_bytes()
    texts = set()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"^load_checkpoint: .* must ") as error:
            load_checkpoint(path)
        texts.add(str(error.value))
    damaged = "must hold what was saved, got {}. It is damaged: restore it from a copy, or start"
    for got in ("bytes with another SHA-256", "a header that cannot be read"):
        assert any(damaged.format(got) in text for text in texts)
    assert any("got a part that cannot be read (" in text for text in texts)


def test_a_dtype_that_is_never_saved_is_damage(path):
    content = path.read_bytes()
    assert content.count(b'"F64"') == 1
    path.write_bytes(content.replace(b'"F64"', b'"C64"'))
    with pytest.raises(CheckpointError, match=r"got a part that cannot be read \('C64'\)"):
        load_checkpoint(path)


def test_metadata_is_verified_too(path):
    content = path.read_bytes()
    assert content.count(b'"step":"12"') == 1
    path.write_bytes(content.replace(b'"step":"12"', b'"step":"13"'))
    with pytest.raises(CheckpointError, match="must hold what was saved, got bytes with another"):
        load_checkpoint(path)


def test_what_cannot_be_stored_is_refused(path):
    for array in (np.array([object()]), np.zeros(2, "complex64"), np.zeros(2, ">f4")):
        with pytest.raises(DTypeError) as error:
            save_checkpoint(path, {"weight": array}, {})
        assert str(error.value) == (
            "save_checkpoint: weight must be bool, integer or float of up to 64 bits in native "
            f"byte order, got dtype {array.dtype}. Convert it with astype."
        )
    with pytest.raises(RangeError) as error:
        save_checkpoint(path, {}, {"sha256": "x"})
    assert str(error.value) == (
        "save_checkpoint: metadata must not use the key 'sha256', got 'x'. "
        "It is written by save_checkpoint itself."
    )
    assert_is_saved(path)


def test_a_missing_package_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.numpy", raising=False)
    for name, call in (
        ("save_checkpoint", lambda: save_checkpoint(path, {}, {})),
        ("load_checkpoint", lambda: load_checkpoint(path)),
    ):
        with pytest.raises(BackendUnavailableError) as error:
            call()
        assert str(error.value) == (
            f"{name}: checkpoints need the package safetensors, which is not installed. "
            "Install it with: pip install 'npmoe[checkpoint]'."
        )


def test_bfloat16_names_the_missing_package(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(BackendUnavailableError) as error:
        load_checkpoint(path)
    assert str(error.value) == (
        "load_checkpoint: bfloat16 needs the package ml_dtypes, which is not installed. "
        "Install it with: pip install 'npmoe[checkpoint]'."
    )


def test_the_package_is_imported_only_when_needed():
    code = "import npmoe.training, sys, json; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    modules = json.loads(result.stdout)
    assert "npmoe.training.checkpoint" in modules
    assert not {"safetensors", "ml_dtypes", "pydoc_data.topics"} & set(modules)
