"""Types shared by every room, and the one way to find an array's namespace."""

import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

# An array of whichever backend is in use; host code uses HostArray.
Array: TypeAlias = Any
HostArray: TypeAlias = "npt.NDArray[Any]"


def array_namespace(x: Array) -> Any:
    """Return the module whose functions take `x`: numpy for ndarrays, else the array's own."""
    if type(x) is np.ndarray:
        return np
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    return sys.modules[type(x).__module__.partition(".")[0]]  # CuPy's arrays do not tell
