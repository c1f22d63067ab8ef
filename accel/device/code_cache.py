"""Compiled kernels on disk, by what they were compiled from."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from npmoe.testing.ptx import cache_folder


def keep_code(key: Sequence[str], target: str, compile_code: Callable[[], bytes]) -> bytes:
    """Return the code of a key, compiled at most once.

    Parameters
    ----------
    key : sequence of str
        All that decides the code: sources, options, the compiler's version.
    target : str
        "ptx" or "cubin".
    compile_code : callable

    Returns
    -------
    bytes
        Kept in the folder of `npmoe.testing.ptx`.
    """
    name = hashlib.sha256("\0".join([*key, target]).encode()).hexdigest()
    path = cache_folder() / f"{name}.{target}"
    if path.exists():
        return path.read_bytes()
    code = compile_code()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other processes may be looking for the file at this moment.
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(code)
    Path(file.name).replace(path)
    return code
