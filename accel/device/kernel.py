"""What a backend asks of a device: one variant of a kernel, and what it does with each array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from npmoe._typing import Array, HostArray

Size = int | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One variant of a kernel: the file, its entry, and the options it is compiled with."""

    file: str
    entry: str
    options: tuple[tuple[str, str | int], ...] = ()

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.entry} of {self.file}" + (f" ({options})" if options else "")


@dataclass(frozen=True, slots=True)
class Out:
    """An argument that the kernel writes, and never reads before it has written it."""

    array: Array


@dataclass(frozen=True, slots=True)
class InOut:
    """An argument that the kernel reads and writes; a plain array is only read."""

    array: Array


class Device(Protocol):
    """Arrays and launches: CuPy's, Numba's, or NumPy buffers under the PTX checker.

    The host code above it is the same in all three, so that what the checker has seen is what a
    device gets: grids, buffer lengths, argument order and types.
    """

    label: str

    def is_own(self, x: Any) -> bool:
        """Say whether x is an array of this device."""

    def asarray(self, x: Any) -> Array:
        """Copy x to the device; an array that is there already is returned."""

    def asnumpy(self, x: Array) -> HostArray:
        """Copy x to the host; waits for all work."""

    def synchronize(self) -> None:
        """Wait for all work."""

    def empty(self, shape: Size, dtype: Any) -> Array:
        """Return a new array that holds anything."""

    def zeros(self, shape: Size, dtype: Any) -> Array:
        """Return a new array of zeros."""

    def contiguous(self, x: Array) -> Array:
        """Return x, or a copy of it in C order."""

    def is_contiguous(self, x: Array) -> bool:
        """Say whether a kernel may write to x as it lies in memory."""

    def is_aligned(self, x: Array, step: int) -> bool:
        """Say whether x begins at a multiple of so many bytes."""

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        threads: int,
        args: Sequence[Any],
        shared_mem: int = 0,
    ) -> None:
        """Start a kernel on the current stream and return at once.

        `args` are arrays, `Out`, `InOut`, None for a null pointer, and NumPy scalars of the exact
        types of the parameters.
        """
