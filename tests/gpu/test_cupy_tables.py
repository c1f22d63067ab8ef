"""What the tables of equivalent mutants and of lines that do not run speak of is still there."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cache

import pytest
from compile_gates import asked_kernels
from emulation import need_emulation, need_tables

need_emulation()

from equivalents import EQUIVALENTS, Equivalent
from mutants import find_mutants
from sweep_catalog import mutated_targets
from test_cupy_sweep import code_of
from uncovered import UNCOVERED, key_of

from accel.cupy_raw.nvrtc import emulated_ptx
from accel.device.emulated import EmulatedDevice
from accel.device.source import read_source

FIELDS = ("entry", "kind", "code", "ptx")


def alternatives(pattern: str) -> list[str]:
    """Split a pattern at each | that stands in no parentheses."""
    parts, depth = [""], 0
    for piece in re.findall(r"\\.|.", pattern):
        depth += (piece == "(") - (piece == ")")
        if piece == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


@cache
def lines_of(entry: str) -> set[str]:
    """Return the lines of source that the variants of an entry are compiled from."""
    files = {kernel.file for kernel in asked_kernels() if kernel.entry == entry}
    return {line.strip() for file in files for line in read_source(file).split("\n")}


def stale_code(row: Equivalent) -> Iterator[str]:
    """Yield the alternatives of a row that name no entry, or no line of its entries."""
    entries = {kernel.entry for kernel in asked_kernels()}
    for part in alternatives(row.entry):
        if not any(re.search(part, entry) for entry in entries):
            yield part
    own = [line for e in entries if re.search(row.entry, e) for line in lines_of(e)]
    for part in alternatives(row.code):
        if not any(re.search(part, line) for line in own):
            yield part


def stale_parts(row: Equivalent, mutants: Collection[tuple[str, str, str, str]]) -> Iterator[str]:
    """Yield the alternatives of a row without which it would fit the same mutants."""
    for field in FIELDS:
        for part in alternatives(getattr(row, field)):
            if not any(replace(row, **{field: part}).fits(*mutant) for mutant in mutants):
                yield part


def test_lines_of_equivalent_mutants_are_in_the_source() -> None:
    assert {row: found for row in EQUIVALENTS if (found := list(stale_code(row)))} == {}


def test_lines_that_do_not_run_are_in_the_source() -> None:
    assert UNCOVERED.keys() <= {key_of(kernel) for kernel in asked_kernels()}
    for (entry, *_), lines in UNCOVERED.items():
        assert lines.keys() <= lines_of(entry)


@pytest.mark.exhaustive
def test_equivalent_mutants_are_mutants() -> None:
    need_tables()
    mutants = set()
    device = EmulatedDevice(emulated_ptx)
    for target in mutated_targets():
        kernel = target.kernel(device)
        for m in find_mutants(emulated_ptx(kernel)[0], kernel.entry):
            mutants.add((kernel.entry, m.kind, code_of(m.instruction), m.instruction.text))
    assert {row: found for row in EQUIVALENTS if (found := list(stale_parts(row, mutants)))} == {}


def test_a_stale_row_is_noticed() -> None:
    row = Equivalent("route_rows|nothing", "flip", r"int (a|b)\|c|for \(int64 p = token", "", "")
    lines = alternatives(row.code)
    assert lines == [r"int (a|b)\|c", r"for \(int64 p = token"]
    assert list(stale_code(row)) == ["nothing", *lines]
    # A line of rows.cu.
    assert list(stale_code(replace(row, entry="combine_rows"))) == lines[:1]
    mutants = [("route_rows", "flip", "int b|c", "setp")]
    assert list(stale_parts(row, mutants)) == ["nothing", lines[1]]
    none = ["route_rows", "nothing", "flip", *lines, "bra"]
    assert list(stale_parts(replace(row, ptx="bra"), mutants)) == none
