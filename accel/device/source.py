"""CUDA C++ from `accel/kernels`, as one text without includes.

One text, since compilers cache by what they are given: a changed header must change the key.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from .kernel import Kernel

FOLDER = Path(__file__).parents[1] / "kernels"
_INCLUDE = re.compile(r'#include "([^"]+)"')


@lru_cache(maxsize=32)
def read_source(file: str) -> str:
    """Return a kernel file with its headers written out, each once, and #line marks."""
    seen: set[str] = set()

    def expand(name: str) -> list[str]:
        if name in seen:
            return []
        seen.add(name)
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate((FOLDER / name).read_text(encoding="utf-8").split("\n"), 1):
            include = _INCLUDE.match(line)
            if include:
                lines += [*expand(include[1]), f'#line {number + 1} "{name}"']
            else:
                lines.append("" if line == "#pragma once" else line)
        return lines

    return "\n".join(expand(f"{file}.cu"))


def compiler_options(kernel: Kernel) -> list[str]:
    """Return the options of a variant, of NVRTC and nvcc alike."""
    options = ["--std=c++17", *(f"-D{name}={value}" for name, value in kernel.options)]
    if ("REAL", "double") in kernel.options:
        options.append("-DDOUBLE")
    return options
