"""A device that is not there: compiled PTX, run on NumPy buffers under `npmoe.testing.ptx`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing import ptx

from ..loopback import LoopbackArray
from .kernel import InOut, Kernel, Out, Size

# What memory holds before it is written: no number, or an index that is nobody's.
_POISON = 0x55


class EmulatedDevice:
    """Kernels run thread by thread on the CPU, every access checked.

    Parameters
    ----------
    compile_kernel : callable
        ``compile_kernel(kernel) -> (ptx, entry)``.
    spell : callable, optional
        ``spell(kernel, args) -> words``: what a compiler passes for NumPy arrays (with their
        promises), None and scalars; default: each as it is, an array as a pointer.
    schedule : "in-order", "reversed" or int
        The order of blocks and threads; a number seeds a random one.

    Attributes
    ----------
    coverage : dict of Kernel to Coverage
        Which PTX ran, by variant, over all launches.
    launches : Counter of Kernel
    findings : list of (Kernel, PtxFinding)
        Of launches that a checker ended.
    """

    label = "emulated"

    def __init__(
        self,
        compile_kernel: Callable[[Kernel], tuple[str, str]],
        spell: Callable[[Kernel, list[Any]], list[Any]] = lambda _, args: args,
        schedule: str | int = "in-order",
    ) -> None:
        self._compile, self._spell, self.schedule = compile_kernel, spell, schedule
        self._modules: dict[Kernel, tuple[ptx.CompiledModule, str]] = {}
        self.coverage: dict[Kernel, ptx.Coverage] = {}
        self.launches: Counter[Kernel] = Counter()
        self.findings: list[tuple[Kernel, ptx.PtxFinding]] = []

    def is_own(self, x: Any) -> bool:
        """Say whether x is an array of this device."""
        return isinstance(x, LoopbackArray)

    def asarray(self, x: Any) -> LoopbackArray:
        """Copy x to the device."""
        return x if isinstance(x, LoopbackArray) else LoopbackArray(np.array(x))

    def asnumpy(self, x: LoopbackArray) -> HostArray:
        """Copy x to the host."""
        return np.array(x._host)

    def synchronize(self) -> None:
        """Return at once."""

    def empty(self, shape: Size, dtype: Any) -> LoopbackArray:
        """Return a new array full of poison."""
        host = np.empty(shape, dtype)
        if host.dtype.kind == "f":
            host.fill(np.nan)
        else:
            host.reshape(-1).view(np.uint8).fill(_POISON)
        return LoopbackArray(host)

    def zeros(self, shape: Size, dtype: Any) -> LoopbackArray:
        """Return a new array of zeros."""
        return LoopbackArray(np.zeros(shape, dtype))

    def contiguous(self, x: LoopbackArray) -> LoopbackArray:
        """Return x, or a copy of it in C order."""
        return x if self.is_contiguous(x) else LoopbackArray(np.ascontiguousarray(x._host))

    def is_contiguous(self, x: LoopbackArray) -> bool:
        """Say whether a kernel may write to x as it lies in memory."""
        return bool(x._host.flags.c_contiguous and x._host.flags.aligned)

    def is_aligned(self, x: LoopbackArray, step: int) -> bool:
        """Return True: the checker gives every array an allocation of its own."""
        del x, step
        return True

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        threads: int,
        args: Sequence[Any],
        shared_mem: int = 0,
    ) -> None:
        """Run a kernel to its end, or raise a `PtxFinding`."""
        if kernel not in self._modules:
            text, entry = self._compile(kernel)
            self._modules[kernel] = ptx.load(text), entry  # all entries at once: one translation
        module, entry = self._modules[kernel]
        words = self._spell(kernel, [_with_promise(arg) for arg in args])
        try:
            result = module.launch(
                entry, grid, threads, words, shared_mem=shared_mem, schedule=self.schedule
            )
        except ptx.PtxFinding as finding:
            self.findings.append((kernel, finding))
            raise
        self.launches[kernel] += 1
        before = self.coverage.get(kernel)
        self.coverage[kernel] = result.coverage if before is None else before + result.coverage

    def summary(self) -> dict[str, Any]:
        """Return findings and coverage as plain JSON values, for `npmoe check --emulate`."""
        covered = {
            str(kernel): {
                "launches": self.launches[kernel],
                "fraction": round(coverage.fraction, 4),
                "missed": [f"line {i.line}: {i.text}" for i in coverage.missed],
            }
            for kernel, coverage in sorted(self.coverage.items(), key=lambda item: str(item[0]))
        }
        found = [{"kernel": str(k), "kind": f.kind, "message": str(f)} for k, f in self.findings]
        return {"schedule": str(self.schedule), "findings": found, "coverage": covered}


def _with_promise(arg: Any) -> Any:
    """Return an argument as the checker takes it: what the kernel may do with each array."""
    if isinstance(arg, Out):
        return ptx.Uninitialized(arg.array._host)
    if isinstance(arg, InOut):
        return arg.array._host
    return ptx.ReadOnly(arg._host) if isinstance(arg, LoopbackArray) else arg
