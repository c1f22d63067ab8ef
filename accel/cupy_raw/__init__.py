"""The backend "cupy": CUDA C++ kernels for NVIDIA GPUs."""

from .backend import CupyBackend
from .emulated import EmulatedCupyBackend

__all__ = ["CupyBackend", "EmulatedCupyBackend"]
