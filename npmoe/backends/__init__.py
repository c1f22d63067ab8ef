"""Backends: the contract, the registry and the NumPy reference."""

from npmoe.backends.numpy_backend import NumpyBackend
from npmoe.backends.protocol import Availability, Backend, ExpertGrads, FusedExperts
from npmoe.backends.reference import ReferenceBackend
from npmoe.backends.registry import (
    available_backends,
    get_backend,
    get_emulated_backend,
    use_backend,
)

__all__ = [
    "Availability",
    "Backend",
    "ExpertGrads",
    "FusedExperts",
    "NumpyBackend",
    "ReferenceBackend",
    "available_backends",
    "get_backend",
    "get_emulated_backend",
    "use_backend",
]
