"""Checkpoints: named arrays and text in one safetensors file; no pickles.

A file is complete or absent (written beside and renamed), and a SHA-256 over everything that was
saved is verified on load.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from npmoe._half import is_float, named_dtype
from npmoe._typing import HostArray
from npmoe.errors import BackendUnavailableError, CheckpointError, DTypeError, RangeError
from npmoe.training.files import write_bytes_atomic

FORMAT = "npmoe-checkpoint-1"
_RESERVED = ("format", "sha256")
# By their names in the file. safetensors itself makes no bfloat16 arrays of NumPy.
_DTYPES = {
    "BOOL": "bool",
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
    **{f"F{n}": f"float{n}" for n in (16, 32, 64)},
    "BF16": "bfloat16",
}


def save_checkpoint(
    path: str | Path, arrays: Mapping[str, HostArray], metadata: Mapping[str, str]
) -> None:
    """Write arrays and metadata to a safetensors file, atomically.

    Parameters
    ----------
    path : path
        Replaced when everything is on the disk.
    arrays : mapping of str to array
        Real dtypes of up to 64 bits in native byte order, bfloat16 among them.
    metadata : mapping of str to str
        Anything but the keys "format" and "sha256".

    Raises
    ------
    BackendUnavailableError
        If safetensors is not installed.
    CheckpointError
        If the file cannot be written; the previous one is intact.
    DTypeError, RangeError
        If an array or a key cannot be stored.

    Notes
    -----
    Cost: three copies of the arrays in memory. Order: equal arguments give equal bytes.
    """
    numpy_format = _import_safetensors("save_checkpoint")
    for key in _RESERVED:
        if key in metadata:
            raise RangeError(
                f"save_checkpoint: metadata must not use the key {key!r}, got {metadata[key]!r}. "
                "It is written by save_checkpoint itself."
            )
    for name, array in arrays.items():
        if not _is_storable(array.dtype):
            raise DTypeError(
                f"save_checkpoint: {name} must be bool, integer or float of up to 64 bits in "
                f"native byte order, got dtype {array.dtype}. Convert it with astype."
            )
    stored = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    header = {**metadata, "format": FORMAT, "sha256": _digest(stored, metadata)}
    content = _in_fixed_order(numpy_format.save(stored, metadata=header))
    write_bytes_atomic(path, content, function="save_checkpoint", noun="checkpoint")


def load_checkpoint(path: str | Path) -> tuple[dict[str, HostArray], dict[str, str]]:
    """Return the arrays and metadata that `save_checkpoint` wrote.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    tuple of dict and dict
        Writable arrays in new memory, and the metadata.

    Raises
    ------
    BackendUnavailableError
        If safetensors is not installed, or ml_dtypes for bfloat16.
    CheckpointError
        If the file is missing, truncated, of another format, or not what was saved.
    """
    _import_safetensors("load_checkpoint")
    safetensors = importlib.import_module("safetensors")
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"load_checkpoint: path must name a checkpoint, got {path}, which does not exist. "
            "Check the path, or start a new run without --resume."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"load_checkpoint: {path} could not be read: {error.strerror}. "
            "Give a checkpoint file that you may read."
        ) from error
    metadata = _read_metadata(path, content)
    expected = metadata.pop("sha256", None)
    del metadata["format"]
    try:
        arrays = {name: _array(tensor) for name, tensor in safetensors.deserialize(content)}
    except (safetensors.SafetensorError, KeyError) as error:
        raise _damaged(path, f"a part that cannot be read ({error})") from error
    if _digest(arrays, metadata) != expected:
        raise _damaged(path, "bytes with another SHA-256")
    return arrays, metadata


def _array(tensor: Mapping[str, Any]) -> HostArray:
    """Return a tensor of the file as a new array."""
    dtype = named_dtype("load_checkpoint", _DTYPES[tensor["dtype"]], "checkpoint")
    return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"]).copy()


def _read_metadata(path: Path, content: bytes) -> dict[str, str]:
    """Return the metadata of one of our files; say whether another is truncated or foreign."""
    size = int.from_bytes(content[:8], "little")
    # safetensors allows headers up to 100 MB; more means that these are not its 8 length bytes
    if content[8:9] in (b"{", b"") and len(content) < 8 + size <= 10**8:
        raise _truncated(path, len(content), f"at least {max(8 + size, 16):,}")
    try:
        header = json.loads(content[8 : 8 + size])
        metadata = header["__metadata__"]
        kind = metadata["format"]
        needed = (
            8
            + size
            + max(
                (t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0
            )
        )
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        kind = None
    if kind is None and FORMAT.encode() in content[: 8 + size]:
        raise _damaged(path, "a header that cannot be read")
    if kind != FORMAT:
        raise CheckpointError(
            f"load_checkpoint: {path} must be a checkpoint of format {FORMAT}, got "
            + (f"format {kind!r}. " if kind is not None else "some other file. ")
            + "Give a checkpoint.safetensors that npmoe wrote, or start a new run."
        )
    if len(content) < needed:
        raise _truncated(path, len(content), f"{needed:,}")
    return dict(metadata)


def _in_fixed_order(content: bytes) -> bytes:
    """Return the same file with a sorted header: safetensors shuffles the metadata."""
    end = 8 + int.from_bytes(content[:8], "little")
    parsed = json.loads(content[8:end])
    header = json.dumps(parsed, sort_keys=True, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)  # the data begin at a multiple of 8
    return b"".join((len(header).to_bytes(8, "little"), header, memoryview(content)[end:]))


def _truncated(path: Path, size: int, needed: str) -> CheckpointError:
    return CheckpointError(
        f"load_checkpoint: {path} must be complete, got {size:,} of {needed} bytes. "
        "It is truncated: restore it from a copy, or start a new run."
    )


def _damaged(path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        f"load_checkpoint: {path} must hold what was saved, got {got}. "
        "It is damaged: restore it from a copy, or start a new run."
    )


def _digest(arrays: Mapping[str, HostArray], metadata: Mapping[str, str]) -> str:
    """Return a SHA-256 over the metadata and every array's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _is_storable(dtype: np.dtype[Any]) -> bool:
    known = dtype.kind in "biu" or is_float(dtype)
    return known and dtype.itemsize <= 8 and dtype.isnative


def _import_safetensors(function: str) -> Any:
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise BackendUnavailableError(
            f"{function}: checkpoints need the package safetensors, which is not installed. "
            "Install it with: pip install 'npmoe[checkpoint]'."
        ) from error
