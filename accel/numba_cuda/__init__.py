"""The backend "numba_cuda": kernels in numba.cuda's Python, for NVIDIA GPUs."""

from .backend import NumbaCudaBackend
from .emulated import EmulatedNumbaCudaBackend

__all__ = ["EmulatedNumbaCudaBackend", "NumbaCudaBackend"]
