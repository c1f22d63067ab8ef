"""Tables of instructions with expected results, compiled together;
and small kernels for checkers."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pytest

from npmoe.testing import ptx

SCHEDULES = ["in-order", "reversed", 7]
HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"


def missing_compiler() -> str:
    """Why nothing can be compiled; empty where it can."""
    try:
        ptx.find_compiler()
    except ptx.CompilerMissingError as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(bool(missing_compiler()), reason=missing_compiler() or "-")


def to_bits(value: float, kind: str) -> int:
    """A number as the bits of a PTX type; integers are bits already."""
    width = int(kind[1:])
    if kind[0] == "f" and isinstance(value, float):
        return int.from_bytes(struct.pack("<f" if width == 32 else "<d", value), "little")
    return int(value) % (1 << width)


@dataclass
class Case:
    """A body of PTX over registers d, e (results) and a, b, c, ... (sources), and its rows."""

    name: str
    body: str
    results: tuple[str, ...]
    sources: tuple[str, ...]
    rows: list[tuple[tuple[float, ...], tuple[float, ...]]]


@dataclass
class Table:
    """Cases that share a translation unit."""

    cases: dict[str, Case] = field(default_factory=dict)

    def add(
        self, body: str, results: str, sources: str, rows: Sequence[tuple[Any, Any]], name: str = ""
    ) -> None:
        """Note a case: types are space-separated, rows are (sources, results)."""
        opcode = name or body.split(maxsplit=1)[0]
        while opcode in self.cases:
            opcode += "+"
        tidy = [
            (s if isinstance(s, tuple) else (s,), r if isinstance(r, tuple) else (r,))
            for s, r in rows
        ]
        self.cases[opcode] = Case(
            opcode, body, tuple(results.split()), tuple(sources.split()), tidy
        )

    def kernel(self, number: int, case: Case) -> str:
        """The kernel of one case: thread t takes row t."""
        regs = [*zip("de", case.results, strict=False), *zip("abcxyz", case.sources, strict=False)]
        declared = "\n".join(f".reg .{k.replace('pred', 'pred')} {n};" for n, k in regs)
        n_in, n_out = len(case.sources), len(case.results)
        loads = "\n".join(
            f"ld.global.b{k[1:]} {n}, [%rd1+{8 * j}];"
            for j, (n, k) in enumerate(zip("abcxyz", case.sources, strict=False))
        )
        stores = "\n".join(
            f"st.global.b{k[1:]} [%rd2+{8 * j}], {n};"
            for j, (n, k) in enumerate(zip("de", case.results, strict=False))
        )
        return f"""
.visible .entry k{number}(.param .u64 in, .param .u64 out)
{{
.reg .b32 %r<4>; .reg .b64 %rd<6>; .reg .pred p, q;
{declared}
ld.param.u64 %rd1, [in]; ld.param.u64 %rd2, [out];
mov.u32 %r1, %tid.x;
mad.wide.u32 %rd1, %r1, {8 * max(n_in, 1)}, %rd1;
mad.wide.u32 %rd2, %r1, {8 * n_out}, %rd2;
{loads}
{case.body}
{stores}
ret;
}}"""

    @cached_property
    def module(self) -> ptx.CompiledModule:
        """All cases, compiled."""
        return ptx.load(
            HEADER + "".join(self.kernel(k, c) for k, c in enumerate(self.cases.values()))
        )

    def check(self, name: str) -> None:
        """Run a case and compare every bit."""
        case = self.cases[name]
        n = len(case.rows)
        given = np.zeros((n, max(len(case.sources), 1)), np.uint64)
        for t, (sources, _) in enumerate(case.rows):
            given[t, : len(sources)] = [
                to_bits(v, k) for v, k in zip(sources, case.sources, strict=True)
            ]
        out = np.zeros((n, len(case.results)), np.uint64)
        self.module.launch(f"k{list(self.cases).index(name)}", 1, n, [ptx.ReadOnly(given), out])
        for t, (sources, expected) in enumerate(case.rows):
            bits = [to_bits(v, k) for v, k in zip(expected, case.results, strict=True)]
            got = [int(v) for v in out[t]]
            assert got == bits, (
                f"{case.body} of {sources}: got {[hex(v) for v in got]}, "
                f"expected {[hex(v) for v in bits]}"
            )


def kernel(body: str, params: str = ".u64 p0", declarations: str = "", name: str = "k") -> str:
    """A module with one kernel; %rd1.. hold its parameters, %r1 the thread, %r2 the block."""
    names = [p.split()[-1] for p in params.split(",")]
    listed = ", ".join(f".param {p.strip()}" for p in params.split(","))
    loads = "\n".join(
        f"ld.param.u64 %rd{k + 1}, [{n}];" for k, n in enumerate(names) if f".u64 {n}" in params
    )
    return f"""{HEADER}
.visible .entry {name}({listed})
{{
.reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %rd<32>; .reg .f32 %f<16>; .reg .pred %p<8>;
{declarations}
{loads}
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
{body}
ret;
}}
"""


def run(text: str, grid: Any, block: Any, args: Sequence[Any], **options: Any) -> ptx.LaunchResult:
    """Launch kernel `k`."""
    return ptx.launch(text, "k", grid, block, args, **options)


def find(
    text: str, grid: Any, block: Any, args: Sequence[Any], kind: str, **options: Any
) -> ptx.PtxFinding:
    """Launch kernel `k`, which must give a finding of this kind."""
    with pytest.raises(ptx.PtxFinding) as caught:
        run(text, grid, block, args, **options)
    assert caught.value.kind == kind, str(caught.value)
    return caught.value


class Batch:
    """Kernels named `k`, each a text of its own, compiled together."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = list(dict.fromkeys(texts))

    @cached_property
    def module(self) -> ptx.CompiledModule:
        """One translation unit for all; kernel n is `k<n>`."""
        bodies = (
            t.removeprefix(HEADER).replace(" k(", f" k{n}(") for n, t in enumerate(self.texts)
        )
        return ptx.load(HEADER + "".join(bodies))

    def run(self, text: str, *launch: Any, **options: Any) -> ptx.LaunchResult:
        """Launch the kernel of one text."""
        return self.module.launch(f"k{self.texts.index(text)}", *launch, **options)

    def find(self, text: str, *launch: Any, kind: str, **options: Any) -> ptx.PtxFinding:
        """Launch it, which must give a finding of this kind."""
        with pytest.raises(ptx.PtxFinding) as caught:
            self.run(text, *launch, **options)
        assert caught.value.kind == kind, str(caught.value)
        return caught.value
