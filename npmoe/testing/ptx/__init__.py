"""Run compiled GPU kernels (PTX) on the CPU, under a checker; see README.md."""

from __future__ import annotations

from npmoe.testing.ptx.arguments import ReadOnly, Uninitialized, numba_array
from npmoe.testing.ptx.errors import (
    CompilerMissingError,
    PtxSyntaxError,
    PtxUnsupportedError,
    TranslationError,
)
from npmoe.testing.ptx.findings import KINDS, Place, PtxFinding
from npmoe.testing.ptx.launching import CompiledModule, launch, load
from npmoe.testing.ptx.parser import parse
from npmoe.testing.ptx.results import Coverage, LaunchResult, Traffic
from npmoe.testing.ptx.syntax import Edit, Function, Instruction, Module
from npmoe.testing.ptx.toolchain import cache_folder, find_compiler

__all__ = [
    "KINDS",
    "CompiledModule",
    "CompilerMissingError",
    "Coverage",
    "Edit",
    "Function",
    "Instruction",
    "LaunchResult",
    "Module",
    "Place",
    "PtxFinding",
    "PtxSyntaxError",
    "PtxUnsupportedError",
    "ReadOnly",
    "Traffic",
    "TranslationError",
    "Uninitialized",
    "cache_folder",
    "find_compiler",
    "launch",
    "load",
    "numba_array",
    "parse",
]
