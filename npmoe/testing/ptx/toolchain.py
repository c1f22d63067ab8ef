"""The C++ compiler of the system, and the cache of what it made."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from npmoe.testing.ptx.errors import CompilerMissingError, TranslationError

__all__ = ["build_kernels", "cache_folder", "find_compiler"]

RUNTIME = Path(__file__).with_name("runtime")
# Wrapping integers, no fused multiply-adds, any rounding mode: PTX says what is done.
FLAGS = [
    "-std=c++17", "-fPIC", "-fwrapv", "-ffp-contract=off", "-fno-strict-aliasing",
    "-frounding-math", "-w", "-shared",
]  # fmt: skip
CANDIDATES = ("c++", "g++", "clang++")


def find_compiler() -> list[str]:
    """Find the C++ compiler.

    Returns
    -------
    list of str
        The command: ``$CXX`` if it is set, else the first of c++, g++ and clang++.

    Raises
    ------
    CompilerMissingError
        If there is none.
    """
    wanted = os.environ.get("CXX")
    if wanted:
        command = shlex.split(wanted)
        if shutil.which(command[0]):
            return command
        raise CompilerMissingError(
            f"find_compiler: CXX must name a C++ compiler, got '{wanted}', which is not a program. "
            "Unset CXX, or set it to g++ or clang++."
        )
    for name in CANDIDATES:
        if shutil.which(name):
            return [name]
    raise CompilerMissingError(
        f"find_compiler: a C++ compiler must be on the path (tried {', '.join(CANDIDATES)}), "
        "got none. "
        "PTX is run by compiling it to the CPU. Install g++ (Debian: apt install g++) or clang++, "
        "or set CXX to a compiler."
    )


@lru_cache(maxsize=8)
def _compiler_version(command: tuple[str, ...]) -> str:
    """Give what the compiler says of itself."""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return done.stdout or done.stderr


@lru_cache(maxsize=2)
def _text_with_headers(name: str) -> str:
    """Give a file of the runtime and all that it includes, each once."""
    seen: dict[str, str] = {}
    waiting = [name]
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen[file] = (RUNTIME / file).read_text()
            waiting += re.findall(r'#include "([^"]+)"', seen[file])
    return "".join(file + text for file, text in sorted(seen.items()))


def cache_folder() -> Path:
    """Give the folder of compiled kernels.

    Returns
    -------
    Path
        ``$NPMOE_PTX_CACHE``, else ``npmoe/ptx`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Anything in
        it may be deleted at any time.
    """
    chosen = os.environ.get("NPMOE_PTX_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "npmoe" / "ptx"


def _key(*parts: str) -> str:
    """Give a name for content."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _compile(command: list[str], target: Path, what: str) -> None:
    """Let a compiler write to a file beside `target`, and rename that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        done = subprocess.run([*command, "-o", name], capture_output=True, text=True, check=False)
        if done.returncode:
            shown = done.stderr[-2000:]
            raise TranslationError(
                f"load: the C++ compiler rejected {what} (exit {done.returncode}): {shown}"
            )
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _runtime_library(compiler: list[str]) -> Path:
    """Give the compiled runtime, made if it is not in the cache."""
    version = _compiler_version(tuple(compiler))
    key = _key(_text_with_headers("runtime.cpp"), version, *compiler, *FLAGS)
    target = cache_folder() / f"runtime-{key}.so"
    if not target.exists():
        _compile([*compiler, *FLAGS, "-O2", str(RUNTIME / "runtime.cpp")], target, "the runtime")
    return target


def build_kernels(cpp: str) -> tuple[Path, Path]:
    """Compile a translation unit to a shared library.

    Parameters
    ----------
    cpp : str
        The translation unit; it defines ``ptx_kernels``. With the runtime's headers, the compiler's
        version and its flags it is the key of the cache.

    Returns
    -------
    Path, Path
        The runtime and the kernels, both in the cache. Two processes may build them at once: each
        writes its own file and renames it.

    Raises
    ------
    CompilerMissingError, TranslationError
    """
    compiler = find_compiler()
    runtime = _runtime_library(compiler)
    version = _compiler_version(tuple(compiler))
    name = _key(cpp, _text_with_headers("device.hpp"), version, *compiler, *FLAGS)
    target = cache_folder() / f"kernel-{name}.so"
    if not target.exists():
        # The functions of the runtime are found when the library is loaded.
        late = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            source = Path(folder) / "kernel.cpp"
            source.write_text(cpp)
            command = [*compiler, *FLAGS, *late, "-O1", f"-I{RUNTIME}", str(source)]
            _compile(command, target, "a kernel")
    return runtime, target
