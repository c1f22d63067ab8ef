"""The backend "cupy" without a GPU: the same host code and kernels, run from their PTX."""

from __future__ import annotations

from npmoe.backends import Availability
from npmoe.errors import NpmoeError
from npmoe.testing.ptx import find_compiler

from ..device.emulated import EmulatedDevice
from .backend import CupyBackend, Precision
from .nvrtc import emulated_ptx, nvrtc_version


class EmulatedCupyBackend(CupyBackend):
    """Kernels executed on the CPU by `npmoe.testing.ptx`, under all its checkers.

    Parameters
    ----------
    precision
        As for `CupyBackend`.
    schedule : "in-order", "reversed" or int
        The order of blocks and threads.
    """

    def __init__(self, precision: Precision = "float32", schedule: str | int = "in-order") -> None:
        self.emulator = EmulatedDevice(emulated_ptx, schedule=schedule)
        super().__init__(precision, self.emulator)

    @classmethod
    def availability(cls) -> Availability:
        """Say whether NVRTC and a C++ compiler are there."""
        try:
            nvrtc_version()
            find_compiler()
        except NpmoeError as error:
            return Availability(False, str(error))
        return Availability(True)
