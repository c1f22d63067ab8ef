"""The backend "numba_cuda" without a GPU: the same host code and kernels, run from their PTX."""

from __future__ import annotations

from npmoe.backends import Availability
from npmoe.errors import NpmoeError
from npmoe.testing.ptx import find_compiler

from ..device.emulated import EmulatedDevice
from .backend import NumbaCudaBackend
from .compiling import emulated_ptx, require_numba_cuda, spell


class EmulatedNumbaCudaBackend(NumbaCudaBackend):
    """Kernels executed on the CPU by `npmoe.testing.ptx`, under all its checkers.

    Parameters
    ----------
    schedule : "in-order", "reversed" or int
        The order of blocks and threads.
    """

    def __init__(self, schedule: str | int = "in-order") -> None:
        self.emulator = EmulatedDevice(emulated_ptx, spell, schedule)
        super().__init__(self.emulator)

    @classmethod
    def availability(cls) -> Availability:
        """Say whether numba-cuda, NVVM and a C++ compiler are there."""
        try:
            require_numba_cuda()
            find_compiler()
        except NpmoeError as error:
            return Availability(False, str(error))
        return Availability(True)
