"""Backends: the contract, the registry and the NumPy reference."""

from npmoe.backends.numpy_backend import NumpyBackend
from npmoe.backends.protocol import Availability, Backend, ExpertGrads
from npmoe.backends.registry import available_backends, get_backend, use_backend

__all__ = [
    "Availability",
    "Backend",
    "ExpertGrads",
    "NumpyBackend",
    "available_backends",
    "get_backend",
    "use_backend",
]
