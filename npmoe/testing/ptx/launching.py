"""Compile a module, launch its entries."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from npmoe.errors import NpmoeError, RangeError
from npmoe.testing.ptx.arguments import Buffer, pack_arguments
from npmoe.testing.ptx.binding import (
    SPACE_NUMBERS,
    CFinding,
    CLaunch,
    CRegion,
    CTraffic,
    Library,
)
from npmoe.testing.ptx.findings import SPACES, Report, make_finding
from npmoe.testing.ptx.launch_checks import (
    check_directives,
    check_shared,
    check_sizes,
    schedule_number,
    three_sizes,
)
from npmoe.testing.ptx.memory_layout import Placed
from npmoe.testing.ptx.parser import parse
from npmoe.testing.ptx.results import Coverage, LaunchResult, Traffic
from npmoe.testing.ptx.syntax import Edit, Module
from npmoe.testing.ptx.toolchain import build_kernels
from npmoe.testing.ptx.translate import KernelCode, translate_kernel

__all__ = ["CompiledModule", "launch", "load"]

LIMIT = 1 << 31
_LOADING = threading.Lock()


class CompiledModule:
    """PTX that is ready to run; made by `load`.

    Parameters
    ----------
    module : Module
        The parsed text.
    kernels : dict of KernelCode
        Translations by entry.
    library : Library
    """

    def __init__(self, module: Module, kernels: dict[str, KernelCode], library: Library) -> None:
        self.module, self._kernels, self._library = module, kernels, library
        self._order = {name: k for k, name in enumerate(kernels)}

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the kernels that can be launched."""
        return tuple(self._kernels)

    def launch(
        self,
        entry: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        schedule: str | int = "in-order",
        traffic: bool = False,
        limit: int = LIMIT,
        edit: str | None = None,
    ) -> LaunchResult:
        """Run one kernel; see `npmoe.testing.ptx.launch`.

        Parameters
        ----------
        edit : str, optional
            Name of the edit, of those given to `load`, that is in force.
        """
        if entry not in self._kernels:
            raise RangeError(
                f"launch: entry must name a kernel of the module, got '{entry}'. "
                f"It has: {', '.join(self._kernels)}."
            )
        code = self._kernels[entry]
        if edit is not None and edit not in code.variants:
            raise RangeError(
                f"launch: edit must name an edit of {entry} that was given to load, got '{edit}'. "
                f"It has: {', '.join(code.variants) or 'none'}."
            )
        c = CLaunch()
        c.grid[:], c.block[:] = three_sizes(grid, "grid"), three_sizes(block, "block")
        check_sizes(tuple(c.grid), tuple(c.block))
        check_directives(code.entry, tuple(c.block))
        c.dynamic_shared = check_shared(shared_mem)
        c.schedule, c.seed = schedule_number(schedule)
        c.limit, c.traffic = limit, traffic
        c.variant = code.variants[edit] if edit is not None else 0
        return self._run(code, c, args)

    def _run(self, code: KernelCode, c: CLaunch, args: Sequence[Any]) -> LaunchResult:
        """Lay out the memory, call the library, and read what it says."""
        layout, entry = code.layout, code.entry.name
        params, buffers = pack_arguments(
            code.entry, args, layout.first_free_slot, layout.offsets, layout.parameter_bytes
        )
        counts = (ctypes.c_uint64 * max(code.counters, 1))()
        c.counts = ctypes.addressof(counts)
        variables = [*layout.global_, *layout.windowed]
        regions, memory = _regions(variables, buffers, c.dynamic_shared)
        finding, totals = CFinding(), (ctypes.c_uint64 * 5)()
        seen = (CTraffic * (2 * len(code.sites) if c.traffic else 1))()
        param_block = ctypes.create_string_buffer(params, len(params) + 64)
        kernel = self._library.kernel(self._order[entry])
        status = self._library.launch(
            ctypes.byref(kernel), ctypes.byref(c), regions, len(regions), param_block, len(params),
            ctypes.byref(finding), totals, seen, len(seen),
        )  # fmt: skip
        del memory
        if status == 1:
            raise make_finding(
                Report(finding, entry, code.sites, buffers, variables, code.register_names)
            )
        if status:
            raise NpmoeError(
                f"launch: {entry} needs more memory than there is for {tuple(c.block)} threads in "
                "a block. Use a smaller launch."
            )
        executed = tuple(counts[k] for k in code.counter_of)
        traffic = [
            Traffic(
                instruction=code.sites[t.site - 1],
                space=SPACES[t.space],
                requests=t.requests,
                transactions=t.transactions,
                ideal=t.ideal,
                worst=t.worst,
                bytes=t.bytes,
            )
            for t in seen[: totals[4] if c.traffic else 0]
        ]
        return LaunchResult(
            Coverage(entry, code.instructions, executed),
            barriers=totals[0],
            collectives=totals[1],
            async_copies=totals[2],
            traffic=tuple(traffic),
        )


def _regions(
    variables: Sequence[Placed], buffers: Sequence[Buffer], dynamic_shared: int
) -> tuple[ctypes.Array[CRegion], list[Any]]:
    """Every allocation of a launch, and what keeps its memory alive."""
    out: list[CRegion] = []
    kept: list[Any] = []
    for number, placed in enumerate(variables):
        v = placed.variable
        size = dynamic_shared if placed.dynamic else v.size
        data = 0
        if v.space in {"global", "const"}:
            memory = ctypes.create_string_buffer(v.initial or b"", v.size + 32)
            kept.append(memory)
            data = ctypes.addressof(memory)
        space = SPACE_NUMBERS[v.space]
        out.append(CRegion(placed.base, size, data, space, number, v.space == "const", 0))
    for k, b in enumerate(buffers):
        out.append(
            CRegion(
                base=b.base,
                size=b.array.nbytes,
                data=b.array.ctypes.data,
                space=SPACE_NUMBERS["global"],
                number=len(variables) + k,
                read_only=b.read_only,
                uninitialized=b.uninitialized,
            )
        )
    return (CRegion * len(out))(*out), kept


@lru_cache(maxsize=64)
def _load(
    ptx: str, entries: tuple[str, ...], edits: tuple[tuple[str, Edit], ...]
) -> CompiledModule:
    """Translate, compile and open; remembered in this process."""
    module = parse(ptx, edits)
    kernels = {name: translate_kernel(module, name, k) for k, name in enumerate(entries)}
    table = ", ".join(
        f'{{"{name}", ptx::run{k}, sizeof(ptx::Registers{k})}}' for k, name in enumerate(kernels)
    )
    cpp = "\n".join(
        [
            '#include "device.hpp"',
            "namespace ptx {",
            *(k.cpp for k in kernels.values()),
            "}",
            'extern "C" { extern const ptx::Kernel ptx_kernels[];',
            f"const ptx::Kernel ptx_kernels[] = {{{table}}}; }}",
        ]
    )
    library = Library(*build_kernels(cpp))
    return CompiledModule(module, kernels, library)


def load(
    ptx: str, entries: Sequence[str] | None = None, *, edits: Mapping[str, Edit] | None = None
) -> CompiledModule:
    """Compile PTX for the CPU.

    Parameters
    ----------
    ptx : str
        A PTX text.
    entries : sequence of str, optional
        The kernels to compile; default: all of the module, in one translation unit.
    edits : mapping of str to Edit, optional
        Alternatives for single lines, compiled along, so that many mutants cost one compilation.
        ``launch(..., edit=name)`` chooses one.

    Returns
    -------
    CompiledModule
        Remembered in the process, and on disk by content (see `npmoe.testing.ptx.cache_folder`).

    Raises
    ------
    PtxSyntaxError, PtxUnsupportedError, CompilerMissingError, RangeError

    Notes
    -----
    **Cost** about half a second for a thousand instructions, once; then milliseconds.
    """
    module = parse(ptx)
    chosen = tuple(module.entries if entries is None else entries)
    for name in chosen:
        if name not in module.entries:
            raise RangeError(
                f"load: entries must name kernels of the module, got '{name}'. It has: "
                f"{', '.join(module.entries) or 'none'}."
            )
    with _LOADING:
        return _load(ptx, chosen, tuple((edits or {}).items()))


def launch(
    ptx: str,
    entry: str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    args: Sequence[Any],
    *,
    shared_mem: int = 0,
    schedule: str | int = "in-order",
    traffic: bool = False,
    limit: int = LIMIT,
) -> LaunchResult:
    """Run a kernel of a PTX text on the CPU, under every checker.

    Parameters
    ----------
    ptx : str
        A PTX text, from nvcc, NVRTC or numba-cuda.
    entry : str
        Name of the kernel.
    grid, block : int or sequence of int
        Blocks, and threads in a block: (x, y, z).
    args : sequence
        One value for each parameter. Arrays are updated in place and must be C-contiguous; wrap
        them in `ReadOnly` or `Uninitialized`. ``bytes`` for structs, None for a null pointer.
    shared_mem : int
        Bytes of dynamic shared memory.
    schedule : "in-order", "reversed" or int
        The order of blocks and threads. "in-order" runs each thread until it must wait; a number
        seeds a random order that interrupts threads before memory accesses.
    traffic : bool
        Also count bank conflicts and sectors (about twice as slow).
    limit : int
        Memory accesses and backward branches after which the kernel is said not to end.

    Returns
    -------
    LaunchResult
        Coverage and counters.

    Raises
    ------
    PtxFinding
        What a checker found. The arrays are as they were at that moment.
    PtxSyntaxError, PtxUnsupportedError, CompilerMissingError, ShapeError, DTypeError, RangeError

    Notes
    -----
    **Order** the same schedule gives the same interleaving, on every machine.
    """
    module = load(ptx, (entry,) if entry in parse(ptx).entries else None)
    return module.launch(
        entry,
        grid,
        block,
        args,
        shared_mem=shared_mem,
        schedule=schedule,
        traffic=traffic,
        limit=limit,
    )
