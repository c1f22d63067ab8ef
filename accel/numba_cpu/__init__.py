"""The backend "numba": kernels for the CPU."""

from .requirements import require_numba

require_numba()

from .backend import NumbaBackend  # noqa: E402  # needs what was just required

__all__ = ["NumbaBackend"]
